"""One run: the prompts of this rank, drawn in order into the output folder, with progress and resuming."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sat.diffusion.samplers import StepCallback
from sat.parallel.collectives import by_first
from sat.sampling.generator import Drawer, Encoded, Look
from sat.sampling.inputs import Inputs
from sat.sampling.output import OutputFolder
from sat.sampling.prompts import Prompt
from sat.util.progress import Progress, progress
from sat.util.rng import ImageRng

log = logging.getLogger(__name__)

TITLE = 32
"""Characters of a prompt that the progress line shows."""


@dataclass(frozen=True)
class Noise:
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
    ``inputs`` are the low-resolution pictures that relay starts from. Of the drawer's team, the first rank
    decides what is to be drawn, reads inputs and writes files, for all.
    """

    drawer: Drawer
    look: Look
    noise: Noise
    folder: OutputFolder
    negative_prompt: str = ""
    rank: int = 0
    beat: Callable[[], None] = lambda: None
    inputs: Inputs | None = None
    preview: StepCallback | None = None

    def __call__(self, prompts: Sequence[Prompt], *, resume: bool = False) -> Report:
        """Draw ``prompts`` one after the other; with ``resume``, only what is not there yet."""
        team = self.drawer.team
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

    def _encode(self, prompts: Sequence[Prompt]) -> dict[int, Encoded]:
        """All prompts at once where the encoder leaves afterwards; nothing where it stays."""
        if self.drawer.text_memory == "keep" or not prompts:
            return {}
        encoded = self.drawer.encode([prompt.text for prompt in prompts], self.negative_prompt)
        return {prompt.index: one for prompt, one in zip(prompts, encoded, strict=True)}

    def _encode_one(self, prompt: Prompt) -> Encoded:
        return self.drawer.encode([prompt.text], self.negative_prompt)[0]

    def _steps(self, images: Sequence[int]) -> int:
        return -(-len(images) // self.drawer.at_once) * self.look.steps

    def _draw(self, prompt: Prompt, images: list[int], encoded: Encoded, bar: Progress) -> None:
        """Draw and write ``images`` of ``prompt``, each file as soon as its picture is there."""

        def step(done: int, total: int, latents: Tensor) -> None:
            bar.advance()
            self.beat()
            if self.preview is not None:
                self.preview(done, total, latents)

        for start in range(0, len(images), self.drawer.at_once):
            part = images[start : start + self.drawer.at_once]
            low = self._low(prompt, part)
            latents = self.drawer.latents(encoded, self.noise.of(prompt, part), self.look, step, low)
            pictures = self.drawer.images(latents)  # one rank of a team has them
            for index, image in zip(part, pictures, strict=bool(pictures)):
                self.folder.write_image(prompt, index, image)
            self.beat()

    def _low(self, prompt: Prompt, images: Sequence[int]) -> Tensor | None:
        """The low-resolution pictures of ``images``; not every rank of a team need see the folder."""
        inputs = self.inputs
        return None if inputs is None else by_first(self.drawer.team, lambda: inputs.read(prompt, images))


def title(text: str) -> str:
    """The beginning of a prompt, safe to print on one line."""
    line = "".join(c if c.isprintable() else " " for c in text[: TITLE + 1])
    return line if len(text) <= TITLE else line[: TITLE - 1] + "…"
