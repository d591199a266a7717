"""One loop draws every picture: prompts and noise become latents, latents become pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from sat.conditioning.conditioner import Condition, Encoded, Sizes, joined
from sat.control_input import Controls
from sat.diffusion.guidance import Guider
from sat.diffusion.samplers import Sampler, StepCallback
from sat.diffusion.schedule import Level, sized
from sat.diffusion.step_cache import Count, StepCache
from sat.diffusion.tiles import tile_size
from sat.engine import DiffusionEngine, NonFiniteError
from sat.offload.block_swap import OffloadSchedule
from sat.parallel.collectives import by_first, taking_turns
from sat.parallel.launch import ALONE, Axis
from sat.sampling.inputs import PictureInput
from sat.sampling.output import OutputFolder, to_pil
from sat.sampling.prompts import NO_ROW, Prompt
from sat.util.host import trim_heap
from sat.util.log import progress, title

if TYPE_CHECKING:
    from sat.config.schema import SamplingConfig
    from sat.sampling.edit import EditInput, Given, Regions


SEED_LIMIT = 2**32
"""torch's CPU generator looks at 32 bits of a seed: 2**32 would silently repeat seed 0."""


class ImageRng:
    """Unit normal noise of some images, (n, C, h, w) float32 on the CPU: each row from its image's generator.

    Every call takes the next numbers of each generator, so the rows are the same whatever images are drawn
    together. ``given`` latents take the place of the noise that sampling starts from.
    """

    def __init__(
        self, generators: Sequence[torch.Generator], shape: Sequence[int], given: Tensor | None = None
    ) -> None:
        self._generators, self._shape, self._given = list(generators), tuple(shape), given

    @classmethod
    def of(
        cls, seed: int, images: Sequence[int], shape: Sequence[int], given: Tensor | None = None
    ) -> ImageRng:
        """Of images numbered ``images``: image i has a generator seeded with ``seed`` + i.

        On the CPU whatever the device, so one seed means one picture everywhere.
        """
        for own in (seed + i for i in images):
            if not 0 <= own < SEED_LIMIT:
                raise ValueError(
                    f"seed {own} is out of range: 0 to {SEED_LIMIT - 1} (image i of a batch uses seed + i)"
                )
        generators = [torch.Generator(device="cpu").manual_seed(seed + i) for i in images]
        return cls(generators, shape, given)

    def __len__(self) -> int:
        return len(self._generators)

    def start(self) -> Tensor:
        """The noise that sampling starts from."""
        return self.unit() if self._given is None else self._given

    def unit(self) -> Tensor:
        """Noise that has not been given out before."""
        return torch.stack(
            [torch.randn(self._shape, generator=g, dtype=torch.float32) for g in self._generators]
        )


def image_noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """The first unit normal noise of image ``index``: ``shape`` (C, h, w) float32 on the CPU."""
    return ImageRng.of(seed, [index], shape).unit()[0]


# -- from prompts and noise to pictures: encode, denoise, decode, and the loop that all callers share


log = logging.getLogger(__name__)

TextMemory = Literal["keep", "free", "cpu", "blocks"]
"""The text encoder between prompts: kept on the device, dropped for good, or waiting in host memory."""


@runtime_checkable
class Strong(Protocol):
    """A guider with a strength."""

    scale: float


def strength(guider: Guider) -> float | None:
    """The guidance scale, or None for a guider without one."""
    return float(guider.scale) if isinstance(guider, Strong) else None


@dataclass(frozen=True)
class EncodedPrompt:
    """The encoder's output for one prompt, on the CPU; ``negative`` None stands for zeros."""

    text: Tensor  # (1, T, C_text)
    mask: Tensor | None = None  # (1, T)
    negative: Tensor | None = None  # (1, T, C_text)
    negative_mask: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[tuple[EncodedPrompt, int]]) -> EncodedPrompt:
        """Rows of several prompts, of each as many as said; all have one negative prompt, or none."""
        if len(parts) == 1:
            return parts[0][0]
        one = [Encoded(p.text, p.mask) for p, count in parts for _ in range(count)]
        against = [Encoded(p.negative, p.negative_mask) for p, count in parts for _ in range(count)
                   if p.negative is not None]  # fmt: skip
        return cls(*joined(one), *(joined(against) if against else ()))


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters shared by all images of one call; ``height`` and ``width`` in pixels.

    ``tile``: side, in latent cells, of the squares that a larger picture is denoised by; None denoises it
    whole. Image i of a prompt starts from noise of ``seed`` + i, or from ``latents``: ``batch_size`` of them,
    used for every prompt, or one for each image of the run.
    """

    height: int
    width: int
    steps: int
    guider: Guider
    tile: int | None = None
    negative_prompt: str = ""
    seed: int = 0
    batch_size: int = 1  # images a prompt
    latents: Tensor | None = None  # (n, C, h, w) unit noise
    regions: Regions | None = None  # prompts for parts of the picture
    back_projections: int = 0  # rounds that bring an enlarged picture back to the given one

    def within(self, encoded: Sequence[EncodedPrompt]) -> SamplingParams:
        """These parameters with the prompts of regions encoded."""
        return self if self.regions is None else replace(self, regions=replace(self.regions, encoded=encoded))

    def of_prompt(self, prompt: Prompt) -> SamplingParams:
        """These parameters with those of the prompt's own row in their place."""
        if prompt.row == NO_ROW:
            return self
        return replace(self, **prompt.row.own("negative_prompt", "seed", "height", "width"))

    @classmethod
    def of(cls, sampling: SamplingConfig, guider: Guider, latents: Tensor | None = None) -> SamplingParams:
        """The parameters that a config names; ``latents`` are those of its file, read and checked."""
        s, regions = sampling, None
        if s.regions is not None:
            from sat.sampling.edit import Regions  # only where there are any

            regions = Regions(s.regions, s.fit)
        return cls(
            s.height,
            s.width,
            s.steps,
            guider,
            s.tile,
            s.negative_prompt,
            s.seed,
            s.batch_size,
            latents,
            regions,
            s.back_projections,
        )


class SteeringPictures(Protocol):
    """Pictures of trained controls: read by the first rank of a team, and encoded for the network."""

    def read(self, prompt: Prompt, images: Sequence[int]) -> list[Tensor]:
        """Pictures (n, channels, height, width) for some images of ``prompt``, of each control."""
        ...

    def encode(self, prompt: Prompt, pictures: Sequence[Tensor], device: torch.device) -> Controls:
        """Inputs of the network of what was read."""
        ...


@dataclass(frozen=True)
class Picture:
    """Image number ``index`` of ``prompt``; ``image`` is None on ranks other than the team's first."""

    prompt: Prompt
    index: int
    image: Image.Image | None
    latents: Tensor  # (C, h, w) float32 on the CPU, as the first stage decodes them


@dataclass(eq=False)
class Generator:
    """An engine with its sampler: encodes prompts, turns noise into latents, latents into pictures.

    ``at_once`` images go through the network together. With 1 a picture is bitwise the same however many are
    asked for, because no matrix product changes its shape with the batch; more is faster where the network
    is small or the device large. ``decode_tile`` is in latent cells; None decodes pictures whole. ``team``:
    the ranks that draw the same pictures; they share the first stage's tiles, and each makes the same calls.
    """

    engine: DiffusionEngine
    sampler: Sampler
    device: torch.device
    text_memory: TextMemory = "keep"
    at_once: int = 1
    decode_batch: int = 1
    decode_tile: int | None = None
    team: Axis = ALONE
    rank: int = 0  # of this process in the run; rank 0 shows progress
    offload: OffloadSchedule | None = None  # of parts that wait in host memory
    cache: StepCache | None = None
    count: Count = field(default_factory=Count)  # of the network's looks, where a step cache is in use
    speed: str = ""  # what makes the network fast, in words
    _negative: tuple[str, Tensor, Tensor | None] | None = None  # the last negative prompt and its encoding

    def __post_init__(self) -> None:
        self.engine.eval()

    def generate(  # noqa: C901 - from prompts to pictures
        self,
        requests: Sequence[tuple[Prompt, Sequence[int]]],
        params: SamplingParams,
        *,
        inputs: PictureInput | None = None,
        controls: SteeringPictures | None = None,
        edits: EditInput | None = None,
        callback: StepCallback | None = None,
        encoded: Sequence[EncodedPrompt] | None = None,
        together: bool = False,
    ) -> Iterator[Picture]:
        """Pictures of ``requests``, prompts with the numbers of their images, each as soon as it is there.

        ``together``: ``at_once`` counts images of several prompts, which then have one size and one negative
        prompt, and neither controls nor edits; else only images of one prompt go through the network at once.

        Where the text encoder does not stay on the device, all prompts are encoded first; ``encoded`` are
        prompts that have been encoded before. ``inputs`` are the pictures that the process starts from,
        ``controls`` those of trained controls, ``edits`` those that are changed; the team's first rank reads
        them. ``callback(step, total, preview)`` is called after each step, counted over all images, with the
        predicted latents (b, C, h, w); an error that it raises ends the run.
        """
        if encoded is not None and len(encoded) != len(requests):
            raise ValueError(f"{len(encoded)} encoded prompts are given for {len(requests)} prompts")
        areas, shared = [] if params.regions is None else params.regions.prompts, params
        if encoded is None and requests and self.text_memory != "keep":
            negatives = [params.of_prompt(prompt).negative_prompt for prompt, _ in requests]
            texts = [prompt.text for prompt, _ in requests]
            every = self.encode([*texts, *areas], [*negatives, *[""] * len(areas)])
            encoded, shared = every[: len(texts)], params.within(every[len(texts) :])
        elif areas:
            shared = params.within(self.encode(areas))
        rows = [[(number, i) for i in images] for number, (_, images) in enumerate(requests)]
        rows = [sum(rows, [])] if together else rows
        parts = [row[k : k + self.at_once] for row in rows for k in range(0, len(row), self.at_once)]
        total, done, held_texts = params.steps * len(parts), 0, dict[int, EncodedPrompt]()

        def step(now: int, of: int, preview: Tensor) -> None:
            nonlocal done
            done += 1
            if callback is not None:
                callback(done, total, preview)

        for part in parts:
            images: dict[int, list[int]] = {}
            for number, image in part:
                images.setdefault(number, []).append(image)
            prompts = {number: requests[number][0] for number in images}
            own = {number: shared.of_prompt(prompt) for number, prompt in prompts.items()}
            number, params = next(iter(own.items()))
            prompt = prompts[number]
            if encoded is None:
                held_texts = {n: held_texts.get(n) or self._encoded(prompts[n], own[n]) for n in own}
            text = EncodedPrompt.joined([((encoded or held_texts)[n], len(images[n])) for n in own])
            low = None
            if inputs is not None:
                read = [partial(inputs.read, prompts[n], images[n]) for n in own]
                low = torch.cat([by_first(self.team, one) for one in read])
            given = None
            if params.latents is not None:
                count = len(params.latents)
                places = [prompts[n].index * params.batch_size + i for n, i in part]
                given = params.latents[[place % count for place in places]]
            shape = self.engine.latent_shape(params.height, params.width)
            rng = ImageRng.of(0, [own[n].seed + i for n, i in part], shape, given)
            held = () if controls is None else self._controls(controls, prompt, images[number])
            edit = None if edits is None else by_first(self.team, partial(edits.read, prompt, images[number]))
            if edit is not None:
                total += len(self._levels(edit, params)) - params.steps
            latents = self.latents(text, rng, params, step, low, held, edit)
            drawn = self.images(latents, low, params.back_projections)
            if edit is not None and drawn:
                drawn = edit.finished(drawn)
            pictures: Sequence[Image.Image | None] = drawn or [None] * len(part)
            for (n, index), picture, z in zip(part, pictures, latents, strict=True):
                yield Picture(prompts[n], index, picture, z)

    def _encoded(self, prompt: Prompt, params: SamplingParams) -> EncodedPrompt:
        (text,) = self.encode([prompt.text], params.negative_prompt)
        return text

    def _controls(self, controls: SteeringPictures, prompt: Prompt, images: Sequence[int]) -> Controls:
        """Inputs of the controls for some images of ``prompt``; the team's first rank reads them."""
        if self.offload is not None:
            self.offload.enter("first_stage")
        pictures = by_first(self.team, partial(controls.read, prompt, images))
        return controls.encode(prompt, pictures, self.device)

    def save(  # noqa: PLR0913 - all that a folder of pictures depends on
        self,
        folder: OutputFolder,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        inputs: PictureInput | None = None,
        controls: SteeringPictures | None = None,
        edits: EditInput | None = None,
        callback: StepCallback | None = None,
        beat: Callable[[str], None] = lambda doing: None,
        resume: bool = False,
    ) -> list[Path]:
        """Draw ``prompts`` into ``folder``, each file as soon as its picture is there; the files written.

        With ``resume``, only what is not there yet. Of a team, the first rank decides what is drawn and
        writes the files, for all. ``beat`` is told what is done at every step and picture.
        """
        requests = by_first(self.team, lambda: folder.requests(prompts, resume=resume))
        leads, written = self.team.rank == 0, list[Path]()
        if leads and len(requests) < len(prompts):
            log.info("%d of %d prompts are finished already", len(prompts) - len(requests), len(prompts))
        steps = params.steps * sum(-(-len(images) // self.at_once) for _, images in requests)
        with progress(steps, rank=self.rank) as bar:

            def step(done: int, total: int, preview: Tensor) -> None:
                bar.total = total  # of pictures that are changed, fewer than at first
                bar.update()
                beat(f"step {done} of {total}")
                if callback is not None:
                    callback(done, total, preview)

            drawn = [(prompt, images) for prompt, images in requests if images]  # the others lack a grid
            pictures = self.generate(
                drawn, params, inputs=inputs, controls=controls, edits=edits, callback=step
            )
            for number, (prompt, images) in enumerate(requests, 1):
                if not bar.disable:
                    bar.set_description_str(f"[{number}/{len(requests)}] {title(prompt.text)}")
                for picture in islice(pictures, len(images)):
                    if picture.image is not None:
                        folder.write_image(prompt, picture.index, picture.image)
                    beat(f"picture {picture.index} of prompt {prompt.index} is done")
                if leads:
                    written += folder.finish(prompt)
        return written

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], negative: str | Sequence[str] = "") -> list[EncodedPrompt]:
        """Encoder outputs of ``texts``, each encoded alone; afterwards the encoder goes if memory asks.

        ``negative`` is the prompt against all of them, or one for each.
        An empty one is zeros or the encoding of "", as the conditioner says.
        """
        if self.offload is not None:
            self.offload.enter("text")

        def encode(text: str) -> tuple[Tensor, Tensor | None]:
            out, mask = self.engine.conditioner.encode([text], self.device)
            return out.cpu(), None if mask is None else mask.cpu()

        encoded = []
        for text, prompt in zip(
            texts, [negative] * len(texts) if isinstance(negative, str) else negative, strict=True
        ):
            against: tuple[Tensor | None, Tensor | None] = None, None
            if (
                prompt.strip() or self.engine.conditioner.encodes_empty
            ):  # encoded once for all that follow with the same one
                if self._negative is None or self._negative[0] != prompt:
                    self._negative = prompt, *encode(prompt)
                against = self._negative[1:]
            encoded.append(EncodedPrompt(*encode(text), *against))
        if self.text_memory == "free":
            self.engine.conditioner.free_text_encoder()
            trim_heap()
        return encoded

    def condition(
        self, encoded: EncodedPrompt, height: int, width: int, batch: int
    ) -> tuple[Condition, Condition]:
        """Conditional and unconditional input of ``batch`` images of a prompt; both have the size vector."""
        sizes = Sizes.uncropped(height, width, batch)
        vector = self.engine.conditioner.size(*sizes).to(self.device)

        def whole(text: Tensor, mask: Tensor | None) -> Condition:
            rows = text.to(self.device).expand(batch, -1, -1)
            return Condition(rows, vector, None if mask is None else mask.to(self.device).expand(batch, -1))

        cond = whole(encoded.text, encoded.mask)
        if encoded.negative is None:
            return cond, cond.null()
        return cond, whole(encoded.negative, encoded.negative_mask)

    def latents(  # noqa: C901 - one input after the other
        self,
        encoded: EncodedPrompt,
        rng: ImageRng,
        params: SamplingParams,
        callback: StepCallback | None = None,
        low: Tensor | None = None,
        controls: Controls = (),
        given: Given | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) float32 on the CPU of the B images of ``rng``, drawn together for one prompt.

        ``low`` (B, 3, H / factor, W / factor) in [-1, 1]: the pictures that the process starts from.
        ``given``: pictures to change.
        """
        height, width, wanted = params.height, params.width, self.engine.process.input
        if params.tile is not None:  # the network sees one square at a time
            side = params.tile * self.engine.first_stage.factor
            height, width = min(height, side), min(width, side)
        cond, uncond = self.condition(encoded, height, width, len(rng))
        if params.regions is not None:
            shares = lambda: [level.noise_share for level in self._levels(given, params)]  # noqa: E731
            controls = (*controls, params.regions.control(len(rng), height, width, self.device, shares))
        if controls:
            cond = replace(cond, controls=controls)
            uncond = replace(uncond, controls=cond.null().controls)

        low_latent = None
        if low is None and wanted is not None and wanted.required:
            raise ValueError("this model starts from low-resolution images: none are given")
        if low is not None:
            if wanted is None:
                raise ValueError("low-resolution images are given, but this model draws from noise alone")
            if self.offload is not None:
                self.offload.enter("first_stage")
            noise = rng.unit().to(self.device)
            large = wanted.enlarge(low.to(self.device))  # (B, 3, H, W)
            low_latent = self.engine.encode(large, noise, tile=self.decode_tile, work=self._share_tiles)

        start, edit = rng.start().to(self.device), None
        if given is not None:  # their mean latents: no noise is drawn, so that strength 1 is text-to-image
            if self.offload is not None:
                self.offload.enter("first_stage")
            edit = given.edit(
                self.engine.first_stage.factor,
                lambda images: self.engine.encode(
                    images.to(self.device), torch.zeros_like(start), tile=self.decode_tile,
                    work=self._share_tiles,
                ),
            )  # fmt: skip
        if controls:
            self._tell_idle(controls, given, params)
        if self.offload is not None:
            self.offload.enter("model")
        with nullcontext() if params.regions is None else params.regions.on(self.engine.network):
            out = self.engine.sample(
                cond,
                uncond,
                start,
                steps=params.steps,
                guider=params.guider,
                sampler=self.sampler,
                low_res=low_latent,
                noise_sampler=lambda: rng.unit().to(self.device),
                tile=params.tile,
                callback=callback,
                reuse=None if self.cache is None else self.cache.over(self.engine.network, self.count),
                edit=edit,
            )
        return out.float().cpu()

    def _levels(self, given: Given | None, params: SamplingParams) -> list[Level]:
        """Levels that are evaluated, for changing ``given`` or for a picture from noise."""
        process, size = self.engine.process, self.engine.latent_shape(params.height, params.width)[1:]
        size = size if params.tile is None else tile_size(size, params.tile)
        schedule = sized(self.engine.schedule, size)
        if given is not None:
            process = given.around(process, schedule, params.steps)
        return process.hooks.levels(schedule, params.steps)[:-1]

    def _tell_idle(self, controls: Controls, given: Given | None, params: SamplingParams) -> None:
        """Say of controls that no level of the run is in the range of, as happens easily in few steps."""
        shares = [level.noise_share for level in self._levels(given, params)]
        for own in controls:
            if any(own.strengths) and not any(own.acts(share) for share in shares):
                at = ", ".join(f"{1 - share:.2g}" for share in shares)
                log.warning(
                    "control %s acts from %g to %g of the noise range and changes nothing: this run looks at "
                    "%s", own.name, own.start, own.end, at,
                )  # fmt: skip

    def images(self, latents: Tensor, low: Tensor | None = None, rounds: int = 0) -> list[Image.Image]:
        """Pictures of ``latents`` (B, C, h, w); none on ranks other than the team's first.

        ``low`` (B, 3, H / factor, W / factor) in [-1, 1]: the pictures that the process started from, onto
        which ``rounds`` of back-projection bring them.
        """
        if self.team.rank and self.decode_tile is None:
            return []
        if self.offload is not None:
            self.offload.enter("first_stage")
        pixels = self.engine.decode(
            latents.to(self.device), batch=self.decode_batch, tile=self.decode_tile, work=self._share_tiles
        )
        if self.team.rank:
            return []
        if not bool(torch.isfinite(pixels).all()):
            name = str(self.engine.first_stage.dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"the decoded image is not finite ({name} first stage): try sampling.dtype=bf16 or fp32"
            )
        if rounds and low is not None and (wanted := self.engine.process.input) is not None:
            pixels = wanted.consistent(pixels, (low.to(pixels.device) + 1) / 2, rounds)
        return [to_pil(image) for image in pixels]

    def _share_tiles(self, jobs: Sequence[Callable[[], Tensor]]) -> Iterator[Tensor]:
        """The first stage's tiles, shared over the team."""
        return taking_turns(self.team, jobs)
