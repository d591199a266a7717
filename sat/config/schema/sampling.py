"""What to draw, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sat.config.schema.base import Broken, Component, Makes, MustExist, Precision, Section
from sat.sampling.prompts import PromptError, SizeError, SizeRule, parse_share

if TYPE_CHECKING:
    from sat.kernels.attention import Backend


@dataclass(frozen=True)
class SamplingConfig(Section):
    """What to draw and how. ``batch_size`` is images per prompt; image ``i`` uses seed ``seed + i``.

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
    attention: Backend = "auto"
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
        except PromptError as error:
            yield "share", str(error)
        try:
            self.sizes.check(self.height, self.width)
        except SizeError as error:
            yield "height", str(error)
