"""From prompts and noise to latents and pictures, the text encoder moved as memory asks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from sat.conditioning.condition import Condition, Sizes
from sat.diffusion.guidance import Guider
from sat.diffusion.samplers import Sampler, StepCallback
from sat.diffusion.step_cache import Count, StepCache
from sat.engine import DiffusionEngine, NonFiniteError
from sat.offload.block_swap import OffloadSchedule
from sat.parallel.collectives import by_first, taking_turns
from sat.parallel.mesh import ALONE, Axis
from sat.sampling.inputs import Inputs
from sat.sampling.output import OutputFolder
from sat.sampling.prompts import Prompt, title
from sat.util.images import to_pil
from sat.util.log import Progress, progress
from sat.util.rng import ImageRng

log = logging.getLogger(__name__)

TextMemory = Literal["keep", "free", "cpu", "blocks"]
"""Whether the text encoder stays between prompts, is dropped for good, or waits in host memory."""


@runtime_checkable
class _Strong(Protocol):
    """A guider with a strength."""

    scale: float


def strength(guider: Guider) -> float | None:
    """The guidance scale, or None for a guider without one."""
    return float(guider.scale) if isinstance(guider, _Strong) else None


def with_strength(guider: Guider, scale: float | None) -> Guider:
    """``guider`` at another guidance ``scale``; None leaves it as it is."""
    if scale is None:
        return guider
    if not isinstance(guider, _Strong):
        raise ValueError(
            f"guidance {scale:g} is asked for, but {type(guider).__name__} has no strength to set"
        )
    other = copy.copy(guider)
    other.scale = float(scale)
    return other


@dataclass(frozen=True)
class EncodedPrompt:
    """The encoder's output for one prompt, on the CPU; ``negative`` None stands for zeros."""

    text: Tensor  # (1, T, C_text)
    mask: Tensor | None = None  # (1, T)
    negative: Tensor | None = None  # (1, T, C_text)
    negative_mask: Tensor | None = None


@dataclass(frozen=True)
class SamplingParams:
    """What is the same for every picture of a call. Pixels for ``height`` and ``width``.

    ``tile``: the side, in latent cells, of the squares that a larger picture is denoised by; None is whole.
    """

    height: int
    width: int
    steps: int
    guider: Guider
    tile: int | None = None


class Generator:
    """An engine with its sampler: encodes prompts, turns noise into latents, latents into pictures.

    ``at_once`` images go through the network together. With 1 a picture is bitwise the same however many are
    asked for, because no matrix product changes its shape with the batch; more is faster where the network
    is small or the device large. ``team``: the ranks that draw the same pictures; they share the first
    stage's tiles, and each of them makes the same calls.
    """

    def __init__(
        self,
        engine: DiffusionEngine,
        sampler: Sampler,
        *,
        device: torch.device,
        text_memory: TextMemory = "keep",
        at_once: int = 1,
        decode_batch: int = 1,
        decode_tile: int | None = None,
        team: Axis = ALONE,
    ) -> None:
        self.engine = engine.eval()
        self.sampler = sampler
        self.device = device
        self.text_memory: TextMemory = text_memory
        self.at_once = at_once
        self.decode_batch = decode_batch
        self.decode_tile = decode_tile
        self.team = team
        self.speed = ""  # what makes the network fast, in words
        self.offload = OffloadSchedule()  # of the parts that wait in host memory
        self.cache: StepCache | None = None
        self.count = Count()  # of the network's looks, where a step cache is in use
        self._negative: tuple[str, Tensor, Tensor | None] | None = None  # the last one and its encoding

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], negative: str = "") -> list[EncodedPrompt]:
        """Encoder outputs of ``texts``, each encoded alone; afterwards the encoder goes if memory asks.

        An empty ``negative`` prompt is zeros, as officially, not the encoding of "".
        """
        self.offload.enter("text")
        against, against_mask = self._against(negative)
        encoded = [EncodedPrompt(*self._encode(text), against, against_mask) for text in texts]
        if self.text_memory == "free":
            self.engine.conditioner.free_text_encoder()
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

    def latents(
        self,
        encoded: EncodedPrompt,
        rng: ImageRng,
        params: SamplingParams,
        callback: StepCallback | None = None,
        low: Tensor | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) float32 on the CPU for the B images of ``rng``, for one prompt.

        ``low`` (B, 3, H / factor, W / factor) in [-1, 1]: the low-resolution images that relay starts from.
        """
        parts = []
        for start in range(0, len(rng), self.at_once):
            rows = slice(start, start + self.at_once)
            part = rng.part(rows)
            cond, uncond = self.condition(encoded, *self._seen(params), len(part))
            low_latent = self._low(None if low is None else low[rows], part, params)
            self.offload.enter("model")
            out = self.engine.sample(
                cond,
                uncond,
                part.start().to(self.device),
                steps=params.steps,
                guider=params.guider,
                sampler=self.sampler,
                low_res=low_latent,
                noise_sampler=lambda part=part: part.unit().to(self.device),  # type: ignore[misc]
                tile=params.tile,
                callback=callback,
                reuse=None if self.cache is None else self.cache.over(self.engine.network, self.count),
            )
            parts.append(out.float().cpu())
        return torch.cat(parts)

    def _seen(self, params: SamplingParams) -> tuple[int, int]:
        """Height and width, in pixels, of what the network sees at once: the picture, or a tile of it."""
        if params.tile is None:
            return params.height, params.width
        factor = self.engine.first_stage.factor
        return min(params.height, params.tile * factor), min(params.width, params.tile * factor)

    def _low(self, images: Tensor | None, rng: ImageRng, params: SamplingParams) -> Tensor | None:
        """The latent (B, C, h, w) of the enlarged low-resolution images; None for plain diffusion."""
        wanted = self.engine.process.input
        if wanted is None or images is None:
            if images is not None or (wanted is not None and wanted.required):
                raise ValueError(
                    "relay starts from low-resolution images, and only relay does: "
                    + ("none are given" if images is None else "this model has no relay")
                )
            return None
        expected = wanted.size(params.height, params.width)
        if tuple(images.shape[2:]) != expected:
            raise ValueError(
                f"low-resolution images are {images.shape[2]} x {images.shape[3]} pixels, expected "
                f"{expected[0]} x {expected[1]} for {params.height} x {params.width} (height x width)"
            )
        self.offload.enter("first_stage")
        large = wanted.enlarge(images.to(self.device))
        return self.engine.encode(large, rng.unit().to(self.device), tile=self.decode_tile, work=self._work)

    def images(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of ``latents`` (B, C, h, w); none on ranks other than the team's first."""
        if self.team.rank and self.decode_tile is None:
            return []
        self.offload.enter("first_stage")
        pixels = self.engine.decode(
            latents.to(self.device), batch=self.decode_batch, tile=self.decode_tile, work=self._work
        )
        if self.team.rank:
            return []
        if not bool(torch.isfinite(pixels).all()):
            name = str(self.engine.first_stage.dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"the decoded image is not finite ({name} first stage): try sampling.dtype=bf16 or fp32"
            )
        return [to_pil(image) for image in pixels]

    def _work(self, jobs: Sequence[Callable[[], Tensor]]) -> Iterator[Tensor]:
        """The first stage's tiles, shared over the team."""
        return taking_turns(self.team, jobs)

    def _encode(self, text: str) -> tuple[Tensor, Tensor | None]:
        out, mask = self.engine.conditioner.encode([text], self.device)
        return out.cpu(), None if mask is None else mask.cpu()

    def _against(self, negative: str) -> tuple[Tensor | None, Tensor | None]:
        """The encoding of the negative prompt, made once for all prompts; nothing for an empty one."""
        if not negative.strip():
            return None, None
        if self._negative is None or self._negative[0] != negative:
            self._negative = negative, *self._encode(negative)
        return self._negative[1:]


# -- one run: the prompts of this rank, drawn in order into the output folder, with progress and resuming


@dataclass(frozen=True)
class InitialNoise:
    """Where every image starts: ``given`` latents (n, C, h, w), else the generator of ``seed`` + i.

    ``given`` holds ``batch_size`` images for every prompt, or one for each image of the run.
    """

    seed: int
    shape: tuple[int, int, int]  # (C, h, w)
    batch_size: int
    given: Tensor | None = None

    def of(self, prompt: Prompt, images: Sequence[int]) -> ImageRng:
        """The random numbers of some images of one prompt."""
        given = None
        if self.given is not None:
            given = self.given[[(prompt.index * self.batch_size + i) % len(self.given) for i in images]]
        return ImageRng.of(self.seed, images, self.shape, given)


@dataclass(frozen=True)
class Report:
    """What a run did on this rank."""

    written: list[Path]
    skipped: int  # prompts that were finished before


@dataclass(frozen=True)
class Run:
    """Everything that is the same for all prompts of a run. ``beat`` is called at every step.

    ``preview`` is told of every step; an error of its own ends the run.
    ``inputs`` are the low-resolution pictures that relay starts from. Of the generator's team, the first rank
    decides what is to be drawn, reads inputs and writes files, for all.
    """

    generator: Generator
    params: SamplingParams
    noise: InitialNoise
    folder: OutputFolder
    negative_prompt: str = ""
    rank: int = 0
    beat: Callable[[], None] = lambda: None
    inputs: Inputs | None = None
    preview: StepCallback | None = None

    def __call__(self, prompts: Sequence[Prompt], *, resume: bool = False) -> Report:
        """Draw ``prompts`` one after the other; with ``resume``, only what is not there yet."""
        team = self.generator.team
        leads = team.rank == 0
        todo = by_first(team, lambda: [(prompt, self._missing(prompt, resume)) for prompt in prompts])
        skipped = sum(images is None for _, images in todo)
        if skipped and leads:
            log.info("%d of %d prompts are finished already", skipped, len(prompts))
        open_ = [(prompt, images) for prompt, images in todo if images is not None]
        early = self._encode([prompt for prompt, images in open_ if images])
        written: list[Path] = []
        with progress(sum(self._steps(images) for _, images in open_), rank=self.rank) as bar:
            for number, (prompt, images) in enumerate(open_, 1):
                bar.note(f"[{number}/{len(open_)}] {title(prompt.text)}")
                if images:
                    encoded = early.get(prompt.index) or self._encode_one(prompt)
                    self._draw(prompt, images, encoded, bar)
                if leads:
                    written += self.folder.finish(prompt)
        return Report(written, skipped)

    def _missing(self, prompt: Prompt, resume: bool) -> list[int] | None:
        """Images to draw; None when the prompt needs nothing at all."""
        if not resume:
            return list(range(self.noise.batch_size))
        return None if self.folder.finished(prompt) else self.folder.missing(prompt)

    def _encode(self, prompts: Sequence[Prompt]) -> dict[int, EncodedPrompt]:
        """All prompts at once where the encoder leaves afterwards; nothing where it stays."""
        if self.generator.text_memory == "keep" or not prompts:
            return {}
        encoded = self.generator.encode([prompt.text for prompt in prompts], self.negative_prompt)
        return {prompt.index: one for prompt, one in zip(prompts, encoded, strict=True)}

    def _encode_one(self, prompt: Prompt) -> EncodedPrompt:
        return self.generator.encode([prompt.text], self.negative_prompt)[0]

    def _steps(self, images: Sequence[int]) -> int:
        return -(-len(images) // self.generator.at_once) * self.params.steps

    def _draw(self, prompt: Prompt, images: list[int], encoded: EncodedPrompt, bar: Progress) -> None:
        """Draw and write ``images`` of ``prompt``, each file as soon as its picture is there."""

        def step(done: int, total: int, latents: Tensor) -> None:
            bar.advance()
            self.beat()
            if self.preview is not None:
                self.preview(done, total, latents)

        for start in range(0, len(images), self.generator.at_once):
            part = images[start : start + self.generator.at_once]
            low = self._low(prompt, part)
            latents = self.generator.latents(encoded, self.noise.of(prompt, part), self.params, step, low)
            pictures = self.generator.images(latents)  # one rank of a team has them
            for index, image in zip(part, pictures, strict=bool(pictures)):
                self.folder.write_image(prompt, index, image)
            self.beat()

    def _low(self, prompt: Prompt, images: Sequence[int]) -> Tensor | None:
        """The low-resolution pictures of ``images``; not every rank of a team need see the folder."""
        inputs = self.inputs
        return None if inputs is None else by_first(self.generator.team, lambda: inputs.read(prompt, images))
