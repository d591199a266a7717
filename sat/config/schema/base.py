"""Sections and components of a config, and the sections of the model, the run and sampling."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from sat.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
AutoPrecision = Literal["fp32", "bf16", "fp16", "auto"]
Auto = bool | Literal["auto"]
"""``auto``: whatever is faster on this machine, measured once (docs/performance.md)."""
Broken = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Makes:
    """Marks a component field with what its target must build: a dotted name, or any annotation."""

    wanted: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Schema by which pydantic checks such a field."""
        from sat.config.check import object_schema

        return object_schema(self.wanted, source, handler)


@dataclass(frozen=True)
class MustExist:
    """Marks a path that is read, with what to do when it is missing.

    Such paths are looked up from the current folder first, then from the top of the YAML file's project.
    """

    advice: str
    ranges: bool = False  # ``a-{00..12}.tar`` stands for many files

    def about(self, given: str) -> str:
        """Advice for when ``given`` is missing; of official weights, also where they are downloaded."""
        places = PUBLISHED.get(Path(given).name) if self.advice == WEIGHTS else None
        return f"download {places}; {self.advice}" if places else self.advice


class RuleError(UserError, ValueError):
    """Broken cross-field rules of one section, as (field, what is wrong) pairs."""

    def __init__(self, section: str, broken: list[tuple[str, str]]) -> None:
        self.section = section
        self.broken = broken
        super().__init__(
            "; ".join(f"{section}.{key}: {what}" if key else f"{section}: {what}" for key, what in broken)
        )


class Section:
    """A part of the experiment. Subclasses list their ``_rules``; all that fail are raised together."""

    section: ClassVar[str] = "section"
    counts: ClassVar[tuple[str, ...]] = ()  # fields that, if given, are at least 1

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in self.counts}
        small = {name: n for name, n in counts.items() if n is not None and n < 1}
        broken = [(name, f"expected at least 1, got {n}") for name, n in small.items()]
        if broken := [*broken, *self._rules()]:
            raise RuleError(self.section, broken)

    def _rules(self) -> Broken:
        """(field, what is wrong) for every broken rule."""
        yield from ()


@dataclass(frozen=True)
class Component:
    """A class or function named by ``target``, and arguments written for it; ``build`` makes the object."""

    target: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Without the object that was made of it (:func:`sat.config.check.built`)."""
        return {"target": self.target, "params": self.params}


def plain(value: Any) -> Any:
    """``value`` (a section, component or leaf) as the mappings, lists and scalars that YAML writes."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


# -- the output of a run and the layout of its ranks


@dataclass(frozen=True)
class OutputConfig(Section):
    """Output folder, null for the command's own; ``resume`` skips prompts whose files are all there."""

    section = "output"
    dir: Path | None = None
    resume: bool = False


@dataclass(frozen=True)
class ParallelConfig(Section):
    """Device and rank layout; ``timeout`` and ``stall``, in seconds, end a run that lost a rank.

    ``timeout``: until all ranks have joined, and (15 s at most) without a sign of life of one. ``stall``:
    without progress of a rank that lives, outside of work that may take any time.

    ``tensor`` x ``sequence`` x ``guidance`` ranks work on the same pictures, sharing weights, tokens and the
    two halves of guidance; what is left of the world shares out the pictures (docs/parallel.md).
    """

    section = "parallel"
    counts = ("tensor", "sequence")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor: int = 1
    sequence: int = 1
    guidance: int = 1
    timeout: float = 600.0
    stall: float = 600.0

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks of each kind that work on the same pictures."""
        return {"tensor": self.tensor, "sequence": self.sequence, "guidance": self.guidance}

    def _rules(self) -> Broken:
        if self.guidance not in (1, 2):
            yield "guidance", f"expected 1 or 2 (guidance has two halves), got {self.guidance}"
        for name in ("timeout", "stall"):
            if not getattr(self, name) > 0:
                yield name, f"expected more than 0 seconds, got {getattr(self, name)}"


# -- the model: noise, conditions, weights


WEIGHTS = "see docs/checkpoints.md for where weights come from, or name another folder"
_CLOUD = "https://cloud.tsinghua.edu.cn/d"
_SAT = (
    f"{{}} (network), {_CLOUD}/c8b9497fc5124d71818a (autoencoder) and text_encoder and tokenizer of "
    "https://huggingface.co/THUDM/CogVideoX-2b, and put them together with convert.py"
)
PUBLISHED = {
    "plus": "https://huggingface.co/THUDM/CogView3-Plus-3B (or ZhipuAI/CogView3-Plus-3B on modelscope.cn or "
    "wisemodel.cn) and name its folder here",
    "cogview4": "https://huggingface.co/THUDM/CogView4-6B and name its folder here",
    "base": _SAT.format(f"{_CLOUD}/242b66daf4424fa99bf0"),
    "relay": _SAT.format(f"{_CLOUD}/134951acced949c1a9e1"),
    "base_distill": _SAT.format(f"{_CLOUD}/d10032a94db647f5aa0e"),
    "relay_distill": _SAT.format(f"{_CLOUD}/4d50ec092c64418f8418"),
}
"""Addresses of the official weights, by the folder that the configs name."""


@dataclass(frozen=True)
class DiffusionConfig(Section):
    """Noising of images, the network's prediction, and the training loss."""

    section = "diffusion"
    schedule: Annotated[Component, Makes("sat.diffusion.schedule.Schedule")]
    prediction: Annotated[Component, Makes("sat.diffusion.prediction.Prediction")]
    process: Annotated[Component, Makes("sat.diffusion.process.Process")] = Component(
        "sat.diffusion.process.Process"
    )
    loss: Annotated[Component, Makes("sat.diffusion.loss.DenoisingLoss")] | None = None


@dataclass(frozen=True)
class ConditioningConfig(Section):
    """Text encoder, size embedding and tokenizer. ``max_length`` is in tokens, the end mark included.

    ``padding``: attended by the network (``as_diffusers``) or not (``masked``). ``empty_prompt``: what
    guidance steers away from and dropped captions become: ``zeros`` (CogView3) or the ``encoded`` "".
    """

    section = "conditioning"
    text: Annotated[Component, Makes("sat.conditioning.conditioner.TextEncoder")]
    size: Annotated[Component, Makes("sat.conditioning.conditioner.SizeConditioner")]
    max_length: int = 224
    tokenizer: Annotated[
        Path | None,
        MustExist("name a spiece.model or tokenizer.json, or null for the one beside the weights"),
    ] = None
    padding: Literal["as_diffusers", "masked"] = "as_diffusers"
    empty_prompt: Literal["zeros", "encoded"] = "zeros"

    def _rules(self) -> Broken:
        if self.max_length < 1:
            yield "max_length", f"expected at least 1 token, got {self.max_length}"


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Files of weights: ``path`` has every part, the other three name one part each and win over it.

    ``random`` is a seed: parts that no path covers are drawn at random from it. Without it they are an error.
    ``allow_missing`` are shell patterns over our tensor names, ``allow_unexpected`` over those in the file.
    ``verify`` compares files with the digests in their manifest (``full``), only sizes and counts
    (``manifest``), or nothing (``off``). ``allow_config`` are shell patterns over keys of this config that
    may differ from the config that comes with the weights.
    """

    section = "checkpoint"
    path: Annotated[Path | None, MustExist(WEIGHTS)] = None
    model: Annotated[Path | None, MustExist(WEIGHTS)] = None
    first_stage: Annotated[Path | None, MustExist(WEIGHTS)] = None
    text: Annotated[Path | None, MustExist(WEIGHTS)] = None
    random: int | None = None
    allow_missing: list[str] = field(default_factory=list)
    allow_unexpected: list[str] = field(default_factory=list)
    allow_pickle: bool = False
    verify: Literal["full", "manifest", "off"] = "full"
    allow_config: list[str] = field(default_factory=list)

    def source(self, part: Literal["model", "first_stage", "text"]) -> Path | None:
        """The file or folder that ``part`` is read from, or None when no path names one."""
        own: Path | None = getattr(self, part)
        return own if own is not None else self.path

    def _rules(self) -> Broken:
        if self.random is not None and self.random < 0:
            yield "random", f"expected a seed of at least 0, got {self.random}"


# -- the section ``sampling``, the image sizes that a model draws, and shares of a run


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
class ControlConfig(Section):
    """A trained control and its picture (docs/control.md); ``scale`` 0 leaves it out.

    ``image``: a picture, or a folder with one for each prompt. ``start`` and ``end`` are shares of the noise
    range, 0 pure noise and 1 a clean picture. ``layers``: weights of the base's layers. ``guess``: only the
    half of guidance with the prompt gets it. ``fit``: how a picture of another shape is brought to the
    size. ``preprocess``: the picture is a plain one, of which the control's is made as for its training.
    """

    section = "sampling.controls"
    path: Annotated[Path, MustExist("name a control: a file, a folder, or a run's folder")]
    image: Annotated[Path | None, MustExist("name a picture, or a folder of them")] = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    layers: list[float] | None = None
    guess: bool = False
    fit: Literal["crop", "pad", "stretch"] = "crop"
    preprocess: bool = False

    def _rules(self) -> Broken:
        if not math.isfinite(self.scale):
            yield "scale", f"expected a number, got {self.scale}"
        if not 0 <= self.start <= self.end <= 1:
            yield "start", f"expected 0 <= `start` <= `end` <= 1, got {self.start} and {self.end}"


@dataclass(frozen=True)
class RegionConfig(Section):
    """A prompt for a part of the picture: where ``mask`` is white, or in ``box``.

    A box is (left, top, right, bottom) as shares of the picture.
    """

    section = "sampling.regions.areas"
    prompt: str
    mask: Annotated[Path | None, MustExist("name a picture that is white in the region")] = None
    box: list[float] | None = None

    def _rules(self) -> Broken:
        if (self.mask is None) == (self.box is None):
            yield "", "needs `mask` or `box`, and not both"
        if not self.prompt.strip():
            yield "prompt", "is empty: say what is in the region"
        if self.box is not None:
            sides = self.box if len(self.box) == 4 else [1.0, 1.0, 0.0, 0.0]
            left, top, right, bottom = sides
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                yield "box", f"expected left, top, right, bottom as shares of the picture, got {self.box}"


@dataclass(frozen=True)
class RegionsConfig(Section):
    """Prompts for parts of the picture, beside the prompt for all of it (docs/edit.md).

    ``share``: how much of a place's attention is its region's, the rest is as without regions. ``start`` and
    ``end`` are shares of the noise range, 0 pure noise and 1 a clean picture, or by ``steps`` of the steps
    that are taken: those whose middle lies between.
    """

    section = "sampling.regions"
    areas: list[RegionConfig]
    share: float = 0.8
    start: float = 0.0
    end: float = 1.0
    by: Literal["noise", "steps"] = "noise"

    def _rules(self) -> Broken:
        if not self.areas:
            yield "areas", "expected at least one region"
        if not 0 <= self.share <= 1:
            yield "share", f"expected 0 (no regions) to 1, got {self.share:g}"
        if not 0 <= self.start <= self.end <= 1:
            yield "start", f"expected 0 <= `start` <= `end` <= 1, got {self.start} and {self.end}"


@dataclass(frozen=True)
class OutpaintConfig(Section):
    """Pixels to add on each side of ``init_image``; height and width of the run include them."""

    section = "sampling.outpaint"
    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def _rules(self) -> Broken:
        margins = {name: getattr(self, name) for name in ("left", "top", "right", "bottom")}
        for name, pixels in margins.items():
            if pixels < 0:
                yield name, f"expected at least 0 pixels, got {pixels}"
        if not any(margins.values()):
            yield "", "adds nothing: give left, top, right or bottom some pixels, or set it to null"


@dataclass(frozen=True)
class InpaintConfig(Section):
    """Masks in latents and pixels (docs/edit.md).

    ``grow``: latent cells that the mask is larger all around; ``feather``: it falls off over twice as many
    beyond. ``paste``: pixels outside the mask are the picture's own, and inside its border the two are mixed
    over ``blur`` pixels. ``padding``: draw a cut-out around the mask with that many pixels to spare, at full
    size, and put it back; null draws the whole picture.
    """

    section = "sampling.inpaint"
    grow: int = 1
    feather: int = 0
    paste: bool = True
    blur: int = 4
    padding: int | None = None

    def _rules(self) -> Broken:
        for name in ("grow", "feather", "blur", "padding"):
            value = getattr(self, name)
            if value is not None and value < 0:
                yield name, f"expected at least 0, got {value}"


@dataclass(frozen=True)
class SamplingConfig(Section):
    """Prompts and settings of pictures. ``batch_size`` is images per prompt; image ``i`` uses ``seed + i``.

    ``input_dir`` is an earlier run's output folder, whose pictures relay enlarges; ``back_projections``
    rounds bring the enlarged ones back to what they shrink to (docs/sampling.md). ``tile`` (latent cells)
    denoises larger pictures by overlapping squares of that side.
    ``at_once`` images go through the network together: with 1, a picture does not depend on how many are
    asked for, to the last bit; with more, large devices are used better.
    ``controls``: pictures that steer the drawing beside the prompt.
    ``cache`` reuses what the network did at the step before where it would do nearly the same.
    ``init_image`` (a file or a folder) is changed instead of drawing from noise alone (docs/edit.md): as far
    as ``strength`` says (0 to 1; null is 0.6, and 1 in a mask), by the noise share it starts from or by the
    share of the steps; where ``mask`` is white, or it is transparent itself; each place as far as
    ``strength_map`` is bright. ``fit`` brings it to height and width. ``regions`` have prompts of their own.
    ``trained_steps`` are the only numbers of steps that distilled weights are for, which say so themselves.
    ``share`` ``K/N`` draws prompts K, K + N, … alone, under the numbers they have in the whole run.
    Speed (docs/performance.md): ``attention`` names a kernel, ``pack`` lays weights out for the CPU's matrix
    products, with ``sigmoid`` GELU is taken by one, ``fold`` (on the CPU) works on one text token for all
    where there is no prompt, of few tokens as ``ragged``, ``compile`` compiles one block for all layers,
    ``graphs`` replays a step as one CUDA graph, ``convolutions`` are the float32 autoencoder's on the CPU,
    with weights in oneDNN's order as ``packed``. ``auto`` is measured on the shapes in use, once a machine,
    and resolved.yaml has what was chosen; so for ``dtype``.
    """

    section = "sampling"
    counts = ("batch_size", "at_once", "grid_columns")
    prompt: str | list[str] | None = None
    prompt_file: Annotated[
        Path | None, MustExist("name a text file with one prompt per line, or use --prompt")
    ] = None
    share: str | None = None
    negative_prompt: str = ""
    height: int = 1024
    width: int = 1024
    steps: int = 50
    trained_steps: list[int] | None = None
    seed: int = 0
    batch_size: int = 1
    at_once: int = 1
    dtype: AutoPrecision = "fp32"
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
    back_projections: int = 0
    init_image: Annotated[Path | None, MustExist("name a picture, or a folder of them, to change")] = None
    mask: Annotated[Path | None, MustExist("name a picture that is white where to draw anew")] = None
    strength_map: Annotated[Path | None, MustExist("name a grey picture of each place's strength")] = None
    strength: float | None = None
    strength_by: Literal["noise", "steps"] = "noise"
    fit: Literal["crop", "pad", "stretch"] = "crop"
    outpaint: OutpaintConfig | None = None
    inpaint: InpaintConfig = field(default_factory=InpaintConfig)
    regions: RegionsConfig | None = None
    tile: int | None = None
    controls: list[ControlConfig] = field(default_factory=list)
    attention: Literal["auto", "torch", "cudnn", "flash", "efficient", "math", "exp", "flash3", "sage"] = (
        "auto"
    )
    pack: bool | Literal["auto", "packed_sigmoid", "plain_sigmoid"] = "auto"
    fold: bool | Literal["auto", "ragged"] = "auto"
    compile: bool = False
    graphs: bool = False
    convolutions: Literal["auto", "packed", "plain"] = "auto"

    def _rules(self) -> Broken:  # noqa: C901 - one rule after the other
        if self.prompt is not None and self.prompt_file is not None:
            yield "prompt", "`prompt` and `prompt_file` are both given; set one of them to null"
        if not 1 <= self.steps <= 1000:
            yield "steps", f"expected 1 to 1000 steps, got {self.steps}"
        elif self.trained_steps and self.steps not in self.trained_steps:
            counts = ", ".join(map(str, self.trained_steps))
            yield "steps", f"the weights were distilled to {counts} steps, got {self.steps}"
        if not 0 <= self.seed <= 2**32 - self.batch_size:
            yield "seed", f"expected 0 to 2^32 - `batch_size` (image i uses seed + i), got {self.seed}"
        if not 0 <= self.back_projections <= 100:
            yield "back_projections", f"expected 0 to 100 rounds, got {self.back_projections}"
        if self.tile is not None and self.tile < 8:
            yield "tile", f"expected at least 8 latent cells, got {self.tile}"
        if self.strength is not None and not 0 <= self.strength <= 1:
            yield "strength", f"expected 0 (the picture as it is) to 1 (noise alone), got {self.strength:g}"
        if self.mask is not None and self.strength_map is not None:
            yield "mask", "`strength_map` is given too, which is a mask of many strengths: set one to null"
        if self.outpaint is not None:
            spare = self.height - self.outpaint.top - self.outpaint.bottom
            across = self.width - self.outpaint.left - self.outpaint.right
            if min(spare, across) < 1:
                yield "outpaint", f"leaves {spare} x {across} pixels (height x width) for the picture itself"
            if self.inpaint.padding is not None:
                yield "outpaint", "`inpaint.padding` draws a part of the picture alone: set one to null"
        try:
            if self.share is not None:
                parse_share(self.share)
        except ValueError as error:
            yield "share", str(error)
        try:
            self.sizes.check(self.height, self.width)
        except SizeError as error:
            yield "height", str(error)
