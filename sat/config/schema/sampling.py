"""The section ``sampling``, the image sizes that a model draws, and shares of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from sat.config.schema.base import Broken, Component, Makes, MustExist, Precision, Section
from sat.errors import UserError


class SizeError(UserError, ValueError):
    """A height and width outside the rule of the model."""


@dataclass(frozen=True)
class SizeRule:
    """Height and width in pixels: each in [``min``, ``max``] and a multiple of ``multiple``.

    Their product is at most ``max_area``. The defaults are CogView3-Plus's (official ``sample_dit.py:140``).
    """

    min: int = 512
    max: int = 2048
    multiple: int = 32
    max_area: int = 2**21

    def __post_init__(self) -> None:
        if self.multiple < 1 or self.min < 1:
            raise ValueError(
                f"a size rule needs min and multiple of at least 1, got {self.min} and {self.multiple}"
            )
        if self._low > self._high or self._low * self._low > self.max_area:
            raise ValueError(f"no size satisfies the rule: {self}")

    def __str__(self) -> str:
        return (
            f"{self.min} to {self.max} pixels a side, multiples of {self.multiple}, "
            f"height x width at most {self.max_area}"
        )

    def allows(self, height: int, width: int) -> bool:
        """True if the model draws ``height`` x ``width``."""
        return next(self._broken(height, width), None) is None

    def check(self, height: int, width: int) -> None:
        """Raise :class:`SizeError` with every rule that this size breaks and the nearest allowed size."""
        broken = list(self._broken(height, width))
        if broken:
            near = self.nearest(height, width)
            raise SizeError(
                f"height x width {height} x {width} is not possible: {'; '.join(broken)}. "
                f"The nearest size is {near[0]} x {near[1]} (height x width)"
            )

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The allowed (height, width) with the least sum of squared differences; the larger of equals."""

        def distance(size: tuple[int, int]) -> tuple[int, int]:
            return (size[0] - height) ** 2 + (size[1] - width) ** 2, -size[0] * size[1]

        best, step = list[tuple[int, int]](), self.multiple
        rounded = (2 * width + step) // (2 * step) * step  # halves go up
        for side in self._sides():
            if side * self._low <= self.max_area:
                most = self.max_area // side // step * step
                best.append((side, max(self._low, min(rounded, self._high, most))))
        return min(best, key=distance)

    def sides(self, other: int | None = None) -> list[int]:
        """The possible sides: beside one of ``other`` pixels, or beside some other."""
        most = self.max_area // (self._low if other is None else max(other, 1))
        return [side for side in self._sides() if side <= most]

    @property
    def _low(self) -> int:
        """The smallest multiple that is a side."""
        return -(-self.min // self.multiple) * self.multiple

    @property
    def _high(self) -> int:
        """The largest multiple that is a side."""
        return self.max // self.multiple * self.multiple

    def _sides(self) -> range:
        return range(self._low, self._high + 1, self.multiple)

    def _broken(self, height: int, width: int) -> Iterator[str]:
        """Each rule that is broken, in words."""
        for name, side in (("height", height), ("width", width)):
            if not self.min <= side <= self.max:
                yield f"{name} {side} is not between {self.min} and {self.max}"
            if side % self.multiple:
                yield f"{name} {side} is not a multiple of {self.multiple}"
        if height * width > self.max_area:
            yield f"height x width is {height * width}, more than {self.max_area}"


class Share(NamedTuple):
    """Part ``part`` (from 0) of a run that is cut into ``parts``."""

    part: int
    parts: int


def parse_share(text: str) -> Share:
    """``K/N``: of N parts the one with prompts K, K + N, K + 2 N and so on, each under its own number."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"expected K/N with K from 0 to N - 1, such as 0/4, got {text!r}")
    return Share(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class SamplingConfig(Section):
    """Prompts and settings of pictures. ``batch_size`` is images per prompt; image ``i`` uses ``seed + i``.

    ``input_dir`` is an earlier run's output folder, whose pictures relay enlarges. ``tile`` (latent cells)
    denoises larger pictures by overlapping squares of that side.
    ``at_once`` images go through the network together: with 1, a picture does not depend on how many are
    asked for, to the last bit; with more, large devices are used better.
    ``cache`` reuses what the network did at the step before where it would do nearly the same.
    ``share`` ``K/N`` draws prompts K, K + N, … alone, under the numbers they have in the whole run.
    Speed (docs/performance.md): ``attention`` names a kernel, ``pack`` lays weights out for the CPU's matrix
    products, ``fold`` (on the CPU) works on one text token for all where there is no prompt, ``compile``
    compiles one block for all layers, ``graphs`` replays a step as one CUDA graph.
    """

    section = "sampling"
    prompt: str | list[str] | None = None
    prompt_file: Annotated[
        Path | None, MustExist("name a text file with one prompt per line, or use --prompt")
    ] = None
    share: str | None = None
    negative_prompt: str = ""
    height: int = 1024
    width: int = 1024
    steps: int = 50
    seed: int = 0
    batch_size: int = 1
    at_once: int = 1
    dtype: Precision = "fp32"
    guider: Annotated[Component, Makes("sat.diffusion.guidance.Guider")] = Component(
        "sat.diffusion.guidance.ClassifierFree", {"scale": 5.0}
    )
    sampler: Annotated[Component, Makes("sat.diffusion.samplers.Sampler")] = Component(
        "sat.diffusion.samplers.DDIM"
    )
    cache: Annotated[Component, Makes("sat.diffusion.step_cache.StepCache")] | None = None
    sizes: SizeRule = field(default_factory=SizeRule)
    latents: Annotated[Path | None, MustExist("name a file of initial latents, or null for seeded noise")] = (
        None
    )
    grid_columns: int | None = None
    input_dir: Annotated[
        Path | None, MustExist("name the output folder of a base model's run, which relay enlarges")
    ] = None
    tile: int | None = None
    attention: Literal["auto", "torch", "cudnn", "flash", "efficient", "math", "exp", "flash3", "sage"] = (
        "auto"
    )
    pack: bool = True
    fold: bool = True
    compile: bool = False
    graphs: bool = False

    def _rules(self) -> Broken:
        if self.prompt is not None and self.prompt_file is not None:
            yield "prompt", "`prompt` and `prompt_file` are both given; set one of them to null"
        if not 1 <= self.steps <= 1000:
            yield "steps", f"expected 1 to 1000 steps, got {self.steps}"
        if not 0 <= self.seed <= 2**32 - self.batch_size:
            yield "seed", f"expected 0 to 2^32 - `batch_size` (image i uses seed + i), got {self.seed}"
        yield from self._at_least_1("batch_size", "at_once", "grid_columns")
        if self.tile is not None and self.tile < 8:
            yield "tile", f"expected at least 8 latent cells, got {self.tile}"
        try:
            parse_share("0/1" if self.share is None else self.share)
        except ValueError as error:
            yield "share", str(error)
        try:
            self.sizes.check(self.height, self.width)
        except SizeError as error:
            yield "height", str(error)
