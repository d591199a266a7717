"""Pictures to change: read, brought to size, cut out and put back; masks and strengths of each prompt."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sat.config.schema import OutpaintConfig
from sat.mixins.edit import Edit, latent_mask
from sat.mixins.regions import Areas, attached, regions
from sat.sampling.inputs import InputError, PictureFiles
from sat.sampling.output import from_pil
from sat.sampling.prompts import Prompt
from sat.util.pictures import Fit, Pixels, fit_boxes, fit_message, fitted, with_alpha

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

    from sat.config.schema import RegionsConfig, SamplingConfig
    from sat.control_input import ControlInput
    from sat.diffusion.process import Process
    from sat.diffusion.schedule import Schedule
    from sat.sampling.generator import EncodedPrompt

log = logging.getLogger(__name__)

STRENGTH = 0.6
"""Of a picture without a mask, unless one is given."""

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class PictureList:
    """Pictures of a caller: one for all images, or one for each, prompt by prompt; ``key`` is its name."""

    pictures: Sequence[Image.Image]
    key: str
    batch_size: int = 1

    def open(self, prompt: Prompt, image: int) -> Pixels:
        """The picture for image number ``image`` of ``prompt``."""
        one = len(self.pictures) == 1
        return with_alpha(self.pictures[0 if one else prompt.index * self.batch_size + image])

    def find(self, prompt: Prompt, image: int) -> str:
        """Words for it in messages."""
        return f"{self.key} of prompt {prompt.index}"


Source = PictureFiles | PictureList


class Framed(NamedTuple):
    """A picture and its mask as the model sees them, H x W pixels, and the way back to the whole picture."""

    picture: Image.Image
    mask: NDArray[np.uint8] | None  # (H, W) 255 = draw anew; of a map, each place's strength
    inner: Box  # the picture's place in the frame
    whole: Image.Image | None = None  # the picture that a cut-out was taken from
    box: Box = (0, 0, 0, 0)  # its place there
    whole_mask: NDArray[np.uint8] | None = None  # of ``whole``


@dataclass(frozen=True)
class Given:
    """Pictures to change of some images of one prompt, read and framed."""

    framed: list[Framed]
    strength: float
    is_map: bool
    sampling: SamplingConfig
    puts_back: bool = True

    def around(self, process: Process, schedule: Schedule, steps: int) -> Process:
        """``process`` as it runs with this edit, for its levels."""
        edit = Edit(torch.empty(0), self.strength, self.sampling.strength_by)
        return edit.around(process, schedule, steps)

    def edit(self, factor: int, encode: Callable[[Tensor], Tensor]) -> Edit:
        """The edit for the engine; ``encode`` makes latents of pictures (n, 3, H, W) in [-1, 1]."""
        init, mask, inpaint = (
            torch.stack([from_pil(f.picture) for f in self.framed]),
            None,
            self.sampling.inpaint,
        )
        masks = [f.mask for f in self.framed if f.mask is not None]
        if masks:
            pixels = torch.from_numpy(np.stack(masks))[:, None].float() / 255  # (n, 1, H, W)
            if self.is_map:
                mask = F.avg_pool2d(pixels, factor)
            else:
                mask = latent_mask(pixels, factor, inpaint.grow, inpaint.feather)
        latent = encode(init)
        mask = None if mask is None else mask.to(latent.device)
        return Edit(latent, self.strength, self.sampling.strength_by, mask, self.is_map)

    def finished(self, drawn: Sequence[Image.Image]) -> list[Image.Image]:
        """``drawn`` pictures with what was to stay pasted back, and cut-outs put back into the whole."""
        return [self._finished(image, framed) for image, framed in zip(drawn, self.framed, strict=True)]

    def _finished(self, image: Image.Image, framed: Framed) -> Image.Image:
        inpaint = self.sampling.inpaint
        if framed.mask is not None and inpaint.paste:
            image = pasted(framed.picture, image, framed.mask, inpaint.blur)
        if framed.whole is None or framed.whole_mask is None or not self.puts_back:
            return image
        left, top, right, bottom = framed.box
        part = image.crop(framed.inner).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        out = framed.whole.copy()
        out.paste(part, (left, top))
        return pasted(framed.whole, out, framed.whole_mask, inpaint.blur) if inpaint.paste else out


def pasted(kept: Image.Image, drawn: Image.Image, mask: NDArray[np.uint8], blur: int) -> Image.Image:
    """``drawn`` where ``mask`` is above 0, and the very pixels of ``kept`` elsewhere.

    Inside the mask's border the two are mixed over ``blur`` pixels, fewer in a narrower mask.
    """
    weight = inner_ramp(mask > 0, blur)[..., None]  # (H, W, 1)
    a, b = np.asarray(kept.convert("RGB"), np.float32), np.asarray(drawn, np.float32)
    return Image.fromarray(np.rint(a + weight * (b - a)).astype(np.uint8))


def inner_ramp(mask: NDArray[np.bool_], blur: int) -> NDArray[np.float32]:
    """(H, W): 0 outside ``mask``, rising to 1 over ``blur`` pixels from its border inwards.

    The frame's own edge is no border.
    """
    inside = torch.from_numpy(mask)[None, None].float()
    ramp, eroded = inside.clone(), inside
    for _ in range(blur):  # pixels further and further from the border
        eroded = -F.max_pool2d(-F.pad(eroded, (1, 1, 1, 1), value=1.0), 3, stride=1)
        ramp += eroded
    ramp = ramp / ramp.max().clamp(min=1)
    return ramp[0, 0].numpy()


@dataclass(frozen=True)
class EditInput:
    """The pictures that a run changes, by the config's keys or by those of a prompt's own row.

    ``follows``: for a later stage of a cascade, where only masks and maps count: what is drawn anew is drawn
    as relay draws it, the rest is the given picture at the larger size. ``puts_back``: cut-outs
    (``inpaint.padding``) end in the whole picture; false for stages before the last.
    """

    sampling: SamplingConfig
    pictures: Mapping[str, Source]  # by key; a row's own come first
    follows: bool = False
    puts_back: bool = True
    _digests: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        sampling: SamplingConfig,
        prompts: Sequence[Prompt] = (),
        given: Mapping[str, Source] | None = None,
    ) -> EditInput | None:
        """The pictures that the config, the rows of ``prompts`` or the caller name; None for none.

        :class:`InputError` for a mask or a strength without a picture.
        """
        named = {key: getattr(sampling, key) for key in KEYS}
        pictures: dict[str, Source] = {k: PictureFiles(p, f"sampling.{k}") for k, p in named.items() if p}
        if given and {"mask", "strength_map"} & given.keys():
            pictures = {key: s for key, s in pictures.items() if key == "init_image"}
        pictures.update(given or {})
        if not pictures and not any(prompt.row.own(*KEYS) for prompt in prompts):
            lone = sampling.strength is not None or any(prompt.row.strength is not None for prompt in prompts)
            if lone or sampling.outpaint is not None:
                key = "strength" if lone else "outpaint"
                raise InputError(
                    f"sampling.{key} is for a picture to change: name one in sampling.init_image "
                    "(--init-image)"
                )
            return None
        return cls(sampling, pictures)

    def following(self, sampling: SamplingConfig, factor: int) -> tuple[EditInput, SamplingConfig]:
        """This for a later stage of a cascade, ``factor`` times larger than the first, and its config."""
        first, out = self.sampling, self.sampling.outpaint
        margins = None if out is None else OutpaintConfig(**{k: factor * v for k, v in vars(out).items()})
        changed = {key: getattr(first, key) for key in (*KEYS, "strength", "strength_by", "fit")}
        inpaint = replace(first.inpaint, blur=factor * first.inpaint.blur)
        sampling = replace(sampling, **changed, outpaint=margins, inpaint=inpaint)
        return replace(self, sampling=sampling, follows=True), sampling

    def sources(self, prompt: Prompt) -> dict[str, Source]:
        """The pictures of ``prompt`` by their keys; none where it is drawn from noise alone."""
        found = {key: PictureFiles(path, key) for key, path in prompt.row.own(*KEYS).items()}
        if "mask" in found and "strength_map" in found:
            raise InputError(f"prompt {prompt.index} has a mask and a strength_map: keep one of them")
        masked = "mask" in found or "strength_map" in found
        shared = {key: s for key, s in self.pictures.items() if key == "init_image" or not masked}
        sources = {**shared, **found}
        if sources and "init_image" not in sources:
            raise InputError(f"prompt {prompt.index} has a {next(iter(sources))}, but no init_image")
        return sources

    def read(self, prompt: Prompt, images: Sequence[int]) -> Given | None:
        """The pictures to change of some images of ``prompt``; None where they are drawn from noise alone."""
        sources = self.sources(prompt)
        if not sources:
            return None
        framed = [self.frame(prompt, image, sources) for image in images]
        masked = [one.mask is not None for one in framed]
        if len(set(masked)) > 1:
            raise InputError(
                f"prompt {prompt.index}: some of its init_images are transparent, others are not"
            )
        strength = self.sampling.strength if prompt.row.strength is None else prompt.row.strength
        strength = (1.0 if masked[0] else STRENGTH) if strength is None else strength
        is_map = "strength_map" in sources
        if self.follows and not is_map:
            strength = 1.0
        if strength == 1 and not masked[0]:
            return None  # text-to-image
        return Given(framed, strength, is_map, self.sampling, self.puts_back)

    def check(self, prompts: Sequence[Prompt], batch_size: int) -> None:
        """Read every picture once; :class:`InputError` for the first fault, log lines for what is done."""
        seen, lines = set[object](), dict[str, None]()
        for prompt in prompts:
            sizes = set[tuple[int, int]]()
            for image in range(batch_size):
                sources = self.sources(prompt)
                size = (prompt.row.height, prompt.row.width, prompt.row.strength)
                where = (*size, *((key, source.find(prompt, image)) for key, source in sources.items()))
                if where in seen or not sources:
                    continue
                seen.add(where)
                lines.update(dict.fromkeys(self._notes(prompt, image, sources)))
                given = self.read(prompt, [image])
                if given is None:
                    lines["strength 1 without a mask draws from noise alone: init_image has no effect"] = None
                elif given.strength == 0:
                    lines["strength 0 takes no step: pictures are the autoencoder's round trip"] = None
                whole = None if given is None else given.framed[0].whole
                sizes.update([] if whole is None else [whole.size])
            if len(sizes) > 1:
                raise InputError(
                    f"prompt {prompt.index}: its init_images have {len(sizes)} sizes: give one size"
                )
        for line in list(lines)[:SHOWN]:
            log.info("%s", line)
        if len(lines) > SHOWN:
            log.info("… and %d more of such lines about init images and masks", len(lines) - SHOWN)

    def frame(self, prompt: Prompt, image: int, sources: Mapping[str, Source]) -> Framed:
        """The picture and mask for image number ``image`` of ``prompt``, as the model sees them."""
        init, where = sources["init_image"].open(prompt, image), sources["init_image"].find(prompt, image)
        mask, is_map, picture = _mask(prompt, image, sources, init), "strength_map" in sources, init.rgb
        if mask is not None and not mask.any():
            key = next((key for key in KEYS[1:] if key in sources), "init_image")
            raise InputError(f"{sources[key].find(prompt, image)}: no part is to be drawn anew (white)")
        height = prompt.row.height or self.sampling.height
        width = prompt.row.width or self.sampling.width
        if self.sampling.inpaint.padding is not None and mask is not None and not is_map:
            return _cut_out(picture, mask, height, width, self.sampling.inpaint.padding)
        out, fit = self.sampling.outpaint, self.sampling.fit
        left, top, right, bottom = (0, 0, 0, 0) if out is None else (out.left, out.top, out.right, out.bottom)
        high, wide = height - top - bottom, width - left - right
        if min(high, wide) < 1:
            raise InputError(
                f"{where}: sampling.outpaint leaves no room in {height} x {width} (height x width)"
            )
        shown = np.asarray(fitted(picture, high, wide, fit))
        around = [(top, bottom), (left, right)]
        framed = Image.fromarray(np.pad(shown, [*around, (0, 0)], mode="edge"))
        if mask is None and out is None:
            return Framed(framed, None, (0, 0, width, height))
        drawn = Image.fromarray(np.zeros((picture.height, picture.width), np.uint8) if mask is None else mask)
        pixels = np.asarray(fitted(drawn, high, wide, fit, fill=255))
        pixels = np.pad(pixels if is_map else _binary(pixels), around, constant_values=255)
        if not pixels.any():
            raise InputError(f"{where}: nothing of its mask is left by fit {fit}: try pad or stretch")
        return Framed(framed, pixels, (0, 0, width, height))

    def fields(self, prompt: Prompt, image: int) -> dict[str, str]:
        """PNG fields of a picture: the files it was made from, with digests, and the settings of the edit."""
        sources, s = self.sources(prompt), self.sampling
        if not sources:
            return {}
        strength = s.strength if prompt.row.strength is None else prompt.row.strength
        if strength == 1 and self.read(prompt, [image]) is None:  # text-to-image
            return {}
        told = {key: self._told(source.find(prompt, image)) for key, source in sources.items()}
        told["strength"] = f"{'default' if strength is None else format(strength, 'g')} by {s.strength_by}"
        told["edit"] = f"fit {s.fit}" + (f", {s.outpaint}" if s.outpaint else "")
        masked = len(sources) > 1 or s.outpaint is not None
        return {**told, "edit": told["edit"] + (f", {s.inpaint}" if masked or s.inpaint.padding else "")}

    def _told(self, found: Path | str) -> str:
        if isinstance(found, str):
            return found
        if found not in self._digests:
            self._digests[found] = hashlib.blake2b(found.read_bytes(), digest_size=8).hexdigest()
        return f"{found.name} {self._digests[found]}"

    def _notes(self, prompt: Prompt, image: int, sources: Mapping[str, Source]) -> list[str]:
        """Sentences about what is done to the pictures of one image."""
        init, where = sources["init_image"].open(prompt, image), sources["init_image"].find(prompt, image)
        out, s, notes = self.sampling.outpaint, self.sampling, list[str]()
        height, width = prompt.row.height or s.height, prompt.row.width or s.width
        if out is not None:
            height, width = height - out.top - out.bottom, width - out.left - out.right
        if s.inpaint.padding is None and (told := fit_message(init.rgb.size, height, width, s.fit)):
            notes.append(f"{where}: {told}")
        other = next((key for key in KEYS[1:] if key in sources), None)
        if init.alpha is not None:
            used = "are the mask" if other is None else f"are white: the {other} says what is drawn anew"
            notes.append(f"{where}: its transparent parts {used}")
        if other == "mask":
            grey = np.asarray(sources["mask"].open(prompt, image).rgb.convert("L"))
            share = float(((grey > 32) & (grey < 224)).mean())
            if share > 0.05:
                name = sources["mask"].find(prompt, image)
                notes.append(
                    f"{name}: {share:.0%} of it is grey, cut at half; strength_map takes grey as strength"
                )
        return notes


KEYS = ("init_image", "mask", "strength_map")
SHOWN = 8
"""Lines about pictures before the rest is counted."""


def _binary(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where(mask >= 128, 255, 0).astype(np.uint8)


def _mask(
    prompt: Prompt, image: int, sources: Mapping[str, Source], init: Pixels
) -> NDArray[np.uint8] | None:
    """(H, W) of a picture's size, 255 = draw anew; of a map as grey as it is. None without any mask."""
    key = next((key for key in KEYS[1:] if key in sources), None)
    if key is None:
        return None if init.alpha is None else _binary(255 - np.asarray(init.alpha))
    grey = sources[key].open(prompt, image).rgb.convert("L")
    if grey.size != init.rgb.size:
        raise InputError(
            f"{sources[key].find(prompt, image)}: is {grey.height} x {grey.width} (height x width), but "
            f"{sources['init_image'].find(prompt, image)} is {init.rgb.height} x {init.rgb.width}"
        )
    return np.array(grey) if key == "strength_map" else _binary(np.asarray(grey))


def _cut_out(picture: Image.Image, mask: NDArray[np.uint8], height: int, width: int, padding: int) -> Framed:
    """The part of ``picture`` around ``mask``, with ``padding`` pixels to spare, at ``height`` x ``width``.

    The part has the frame's shape as far as the picture reaches; beyond, the frame is padded.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    spans = [
        (max(0, int(where[0]) - padding), min(side, int(where[-1]) + 1 + padding), side)
        for where, side in ((rows, picture.height), (columns, picture.width))
    ]
    tall, wide = (end - start for start, end, _ in spans)
    tall, wide = max(tall, round(wide * height / width)), max(wide, round(tall * width / height))
    places = []
    for (start, end, side), length in zip(spans, (tall, wide), strict=True):
        length = min(length, side)
        first = min(max(0, (start + end - length) // 2), side - length)
        places.append((first, first + length))
    (top, bottom), (left, right) = places
    box = (left, top, right, bottom)
    part, part_mask = picture.crop(box), Image.fromarray(mask).crop(box)
    inner = fit_boxes(part.size, height, width, "pad")[1]
    pixels = _binary(np.asarray(fitted(part_mask, height, width, "pad", fill=0)))
    return Framed(fitted(part, height, width, "pad"), pixels, inner, picture, box, mask)


# -- regions: prompts of their own for parts of the picture


@dataclass(frozen=True)
class Regions:
    """Prompts for parts of a picture; ``encoded`` has a text for each once the encoder has run."""

    config: RegionsConfig
    fit: Fit = "crop"
    encoded: Sequence[EncodedPrompt] = ()

    @property
    def prompts(self) -> list[str]:
        """The regions' texts."""
        return [area.prompt for area in self.config.areas]

    def masks(self, height: int, width: int) -> Tensor:
        """(R, height, width) float32, 1 in the region; :class:`InputError` for an empty one."""
        found = torch.zeros(len(self.config.areas), height, width)
        for out, area in zip(found, self.config.areas, strict=True):
            if area.box is not None:
                x, y = (
                    np.rint(np.array(area.box[i::2]) * side).astype(int)
                    for i, side in ((0, width), (1, height))
                )
                out[y[0] : max(y[1], y[0] + 1), x[0] : max(x[1], x[0] + 1)] = 1
            elif area.mask is not None:
                grey = PictureFiles(area.mask, "sampling.regions").open(Prompt(0, ""), 0).rgb.convert("L")
                out += (
                    torch.from_numpy(_binary(np.asarray(fitted(grey, height, width, self.fit, fill=0)))) / 255
                )
            if not out.any():
                raise InputError(
                    f"sampling.regions: {area.mask or area.box}: no pixel is in the region (white)"
                )
        return found

    def control(
        self, batch: int, height: int, width: int, device: torch.device, shares: Callable[[], Sequence[float]]
    ) -> ControlInput:
        """The network's input for ``batch`` images of ``height`` x ``width`` pixels.

        ``shares`` gives the noise share of every step's level.
        """
        lengths = tuple(one.text.shape[1] for one in self.encoded)
        text = torch.cat([one.text for one in self.encoded], 1).to(device).expand(batch, -1, -1)
        known = [one.mask for one in self.encoded]
        mask = None
        if any(one is not None for one in known):
            parts = [
                torch.ones(1, n, dtype=torch.bool) if m is None else m
                for m, n in zip(known, lengths, strict=True)
            ]
            mask = torch.cat(parts, 1)
        areas = Areas(self.masks(height, width), lengths, mask)
        share, start, end = self.config.share, self.config.start, self.config.end
        if self.config.by == "steps":  # step i of n takes part if (i + 1/2) / n lies in the range
            levels = shares()
            acting = [1 - s for i, s in enumerate(levels) if start <= (i + 0.5) / len(levels) <= end]
            share, start, end = (share, acting[0], acting[-1]) if acting else (0.0, 0.0, 0.0)
        return regions(text, areas, share, start, end)

    def on(self, network: nn.Module) -> AbstractContextManager[None]:
        """A context in which ``network`` reads regions."""
        return attached(network)

    def fields(self) -> dict[str, str]:
        """PNG fields: the prompts, and a digest of places and settings."""
        told = hashlib.blake2b(repr(self.config).encode(), digest_size=8)
        for area in self.config.areas:
            told.update(b"" if area.mask is None else area.mask.read_bytes())
        return {"regions": f"{'; '.join(self.prompts)} ({told.hexdigest()})"}
