"""Every section of an experiment as a frozen dataclass: unknown keys are errors, defaults are written once.

Nothing heavy is imported, so any layer may use these types. Sizes are (height, width) in pixels unless a
field says otherwise. Rules about several fields of a section are its ``_rules``; rules between sections are
in ``between.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from sat.adapters import groups
from sat.memory.size import parse_size
from sat.sampling.prompts import PromptError, parse_share
from sat.sampling.sizes import SizeError, SizeRule

if TYPE_CHECKING:
    from sat.parallel.launch import DeviceKind
    from sat.transformer.kernels import Backend

Precision = Literal["fp32", "bf16", "fp16"]
Broken = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Makes:
    """Marks a component field with the dotted name of what its target must build, imported when checked."""

    name: str


@dataclass(frozen=True)
class MustExist:
    """Marks a path that is read, with what to do when it is missing.

    Such paths are looked up from the current folder first, then from the top of the YAML file's project.
    """

    advice: str
    ranges: bool = False  # ``a-{00..12}.tar`` stands for many files


class RuleError(ValueError):
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

    def __post_init__(self) -> None:
        if broken := list(self._rules()):
            raise RuleError(self.section, broken)

    def _rules(self) -> Broken:
        """(field, what is wrong) for every broken rule."""
        yield from ()

    def _at_least_1(self, *names: str) -> Broken:
        """The rule that counts which are given are at least 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                yield name, f"expected at least 1, got {value}"


@dataclass(frozen=True)
class Component:
    """A class or function named by ``target``, and arguments written for it; ``build`` makes the object."""

    target: str
    params: Mapping[str, Any] = field(default_factory=dict)


WEIGHTS = "see docs/checkpoints.md for where weights come from, or name another folder"


@dataclass(frozen=True)
class DiffusionConfig(Section):
    """How images are noised, what the network predicts, and how training is scored."""

    section = "diffusion"
    schedule: Annotated[Component, Makes("sat.diffusion.schedule.Schedule")]
    parameterisation: Annotated[Component, Makes("sat.diffusion.parameterisation.Parameterisation")]
    process: Annotated[Component, Makes("sat.diffusion.process.Process")] = Component(
        "sat.diffusion.process.Process"
    )
    loss: Annotated[Component, Makes("sat.diffusion.loss.DenoisingLoss")] | None = None


@dataclass(frozen=True)
class ConditioningConfig(Section):
    """Text encoder, size embedding and tokenizer. ``max_length`` is in tokens, the end mark included."""

    section = "conditioning"
    text: Annotated[Component, Makes("sat.models.t5.T5Encoder")]
    size: Annotated[Component, Makes("sat.conditioning.size.SizeConditioner")]
    max_length: int = 224
    tokenizer: Annotated[
        Path | None, MustExist("name a sentencepiece model, or null for the one beside the weights")
    ] = None

    def _rules(self) -> Broken:
        if self.max_length < 1:
            yield "max_length", f"expected at least 1 token, got {self.max_length}"


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
    sampler: Annotated[Component, Makes("sat.diffusion.sampler.Sampler")] = Component(
        "sat.diffusion.sampler.DDIM"
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


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Where weights are read: ``path`` has every part, the other three name one part each and win over it.

    ``random`` is a seed: parts that no path covers are drawn at random from it. Without it they are an error.
    ``allow_missing`` are shell patterns over our tensor names, ``allow_unexpected`` over those in the file.
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

    def source(self, part: Literal["model", "first_stage", "text"]) -> Path | None:
        """The file or folder that ``part`` is read from, or None when no path names one."""
        own: Path | None = getattr(self, part)
        return own if own is not None else self.path

    def _rules(self) -> Broken:
        if self.random is not None and self.random < 0:
            yield "random", f"expected a seed of at least 0, got {self.random}"


@dataclass(frozen=True)
class QuantizeConfig(Section):
    """Linears kept as int8 or int4, made whole for each product: ``network`` and ``text_encoder`` by kind.

    ``layers`` are groups of layers (``sat/adapters/groups.py``) or shell patterns over ``model.…`` and
    ``text.…``; other layers, embeddings and norms stay as they are. ``group`` inputs share a scale (null: a
    whole row in int8, 32 in int4).
    """

    section = "memory.quantize"
    network: Literal["int8", "int4"] | None = None
    text_encoder: Literal["int8", "int4"] | None = None
    group: int | None = None
    layers: list[str] = field(default_factory=lambda: ["attention", "mlp", "text_encoder"])

    def patterns(self) -> list[str]:
        """``layers`` as shell patterns over ``model.…`` and ``text.…``."""
        return [pattern for layer in self.layers for pattern in groups.patterns(layer)]

    def _rules(self) -> Broken:
        yield from self._at_least_1("group")
        if not self.layers:
            yield "layers", f"expected at least one of {', '.join(groups.GROUPS)}, or a pattern"
        for layer in groups.unknown(self.layers):
            near = groups.hint(layer, groups.GROUPS)
            yield "layers", f"no group {layer!r}{near} (there are {', '.join(groups.GROUPS)}, and patterns)"


@dataclass(frozen=True)
class MemoryConfig(Section):
    """Time for memory. ``decode_batch`` images are decoded at a time; ``decode_tile`` is in latent cells.

    Of a part on the device, ``cpu`` waits in host memory while others work, ``blocks`` has its blocks there
    throughout and fetches each before its turn. ``adaln`` ``cpu``: the modulation layers, once they have made
    what the steps need. On the CPU these change nothing. ``budget``, such as ``8GB``, adds what is needed of
    all this to stay within it.
    """

    section = "memory"
    text_encoder: Literal["keep", "free", "cpu", "blocks"] = "keep"
    network: Literal["keep", "cpu", "blocks"] = "keep"
    first_stage: Literal["keep", "cpu"] = "keep"
    adaln: Literal["keep", "cpu"] = "keep"
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    decode_batch: int = 1
    decode_tile: int | None = None
    budget: str | None = None

    def _rules(self) -> Broken:
        if self.decode_batch < 1:
            yield "decode_batch", f"expected at least 1 image, got {self.decode_batch}"
        if self.decode_tile is not None and self.decode_tile < 8:
            yield "decode_tile", f"expected at least 8 latent cells, got {self.decode_tile}"
        try:
            parse_size("1GB" if self.budget is None else self.budget)
        except ValueError as error:
            yield "budget", str(error)


@dataclass(frozen=True)
class OutputConfig(Section):
    """Where results go; ``resume`` skips prompts whose files are all there."""

    section = "output"
    dir: Path | None = None
    resume: bool = False

    def _rules(self) -> Broken:
        if self.resume and self.dir is None:
            yield "resume", "`resume` needs `output.dir`, the folder to continue"


@dataclass(frozen=True)
class ParallelConfig(Section):
    """Device and rank layout; ``timeout`` in seconds ends a run whose other ranks are silent.

    ``tensor`` x ``sequence`` x ``guidance`` ranks work on the same pictures, sharing weights, tokens and the
    two halves of guidance; what is left of the world shares out the pictures (docs/parallel.md).
    """

    section = "parallel"
    device: DeviceKind = "auto"
    tensor: int = 1
    sequence: int = 1
    guidance: int = 1
    timeout: float = 600.0

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks of each kind that work on the same pictures."""
        return {"tensor": self.tensor, "sequence": self.sequence, "guidance": self.guidance}

    def _rules(self) -> Broken:
        yield from self._at_least_1("tensor", "sequence")
        if self.guidance not in (1, 2):
            yield "guidance", f"expected 1 or 2 (guidance has two halves), got {self.guidance}"
        if not self.timeout > 0:
            yield "timeout", f"expected more than 0 seconds, got {self.timeout}"


@dataclass(frozen=True)
class OffloadConfig(Section):
    """What waits in the CPU's memory until it is needed: the optimizer, which then steps there; weights."""

    section = "train.offload"
    optimizer: bool = False
    parameters: bool = False


@dataclass(frozen=True)
class TrainConfig(Section):
    """One training run; ``batch_size`` is per rank and accumulation step, ``warmup`` in optimizer steps.

    ``dtype`` is that of the weights (half precision keeps float32 masters, so it needs ``zero`` above 0);
    ``autocast`` computes in bf16 with ``fp32`` weights. ``max_minutes`` saves and stops early;
    ``max_bad_steps`` steps in a row with a loss that is not finite end the run.
    ``compile``: one compiled block for all layers of what is trained.
    """

    section = "train"
    objective: Annotated[Component, Makes("sat.train.objectives.Objective")]
    steps: int
    batch_size: int = 1
    accumulate: int = 1
    dtype: Precision = "fp32"
    autocast: Literal["bf16"] | None = None
    zero: Literal[0, 1, 2, 3] = 0
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    optimizer: Annotated[Component, Makes("torch.optim.Optimizer")] = Component("torch.optim.AdamW")
    lr: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema: float | None = None
    activation_checkpointing: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep_last: int = 2
    background_save: bool = False
    sample_every: int | None = None
    sample_prompts: list[str] = field(default_factory=list)
    validate_every: int | None = None
    max_minutes: float | None = None
    max_bad_steps: int = 20
    wandb: Literal["offline", "online", "disabled"] = "offline"
    tensorboard: bool = False
    peak_tflops: float | None = None
    project: str = "cogview3"
    allocator: bool = True
    compile: bool = False
    init_from: CheckpointConfig | None = None

    def _rules(self) -> Broken:
        counts = ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep_last")
        yield from self._at_least_1(*counts, "sample_every", "validate_every", "max_bad_steps")
        yield from self._ranges()
        if self.autocast is not None and self.dtype != "fp32":
            yield "autocast", f"computes in bf16 with `dtype` fp32 weights, but `dtype` is {self.dtype}"
        if self.dtype != "fp32" and self.zero == 0:
            yield (
                "zero",
                f"`dtype` {self.dtype} needs 1, 2 or 3, which keep float32 masters of the weights; got 0",
            )
        if self.offload.optimizer and self.zero == 0:
            yield "offload", "`optimizer` needs `zero` 1, 2 or 3, which keep the optimizer apart; got 0"
        if self.offload.parameters and self.zero != 3:
            yield "offload", f"`parameters` needs `zero` 3, which shares out the weights; got {self.zero}"
        if self.sample_every is not None and not self.sample_prompts:
            yield "sample_prompts", "`sample_every` is set but there is no prompt to sample"

    def _ranges(self) -> Broken:
        ranges = {
            "warmup": (0 <= self.warmup <= self.steps, f"0 to `steps` ({self.steps})"),
            "lr": (self.lr > 0, "more than 0"),
            "min_lr_ratio": (0 <= self.min_lr_ratio <= 1, "0 to 1"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "clip": (self.clip is None or self.clip > 0, "more than 0 or null"),
            "ema": (self.ema is None or 0 <= self.ema < 1, "a decay of at least 0 and below 1, or null"),
            "peak_tflops": (self.peak_tflops is None or self.peak_tflops > 0, "more than 0 or null"),
            "max_minutes": (self.max_minutes is None or self.max_minutes > 0, "more than 0 minutes or null"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                yield name, f"expected {expected}, got {getattr(self, name)}"


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank factors to train instead of the weights (docs/lora.md).

    ``alpha`` is for layers of ``rank`` (null: equal to it, so that the factors count as they are); layers
    that ``ranks`` gives another rank keep the ratio. ``targets`` are groups of layers
    (``sat/adapters/groups.py``) or shell patterns over ``model.…`` and ``text.…``. ``start`` is an adapter to
    go on from.
    """

    section = "adapters.lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["attention"])
    ranks: dict[str, int] = field(default_factory=dict)
    dora: bool = False
    start: Annotated[Path | None, MustExist("name an adapter to go on from, or null for a new one")] = None

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def _rules(self) -> Broken:
        yield from self._at_least_1("rank")
        if self.alpha is not None and not self.alpha > 0:
            yield "alpha", f"expected more than 0, or null for the rank, got {self.alpha}"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"expected a share of 0 to below 1, got {self.dropout}"
        if not self.targets:
            yield "targets", f"expected at least one of {', '.join(groups.GROUPS)}, or a pattern"
        for name in ("targets", "ranks"):
            for target in groups.unknown(getattr(self, name)):
                near = groups.hint(target, groups.GROUPS)
                yield name, f"no group {target!r}{near} (there are {', '.join(groups.GROUPS)}, and patterns)"
        for target, rank in self.ranks.items():
            if rank < 1:
                yield "ranks", f"expected at least 1, got {rank} for {target!r}"


@dataclass(frozen=True)
class LoadConfig(Section):
    """A trained adapter to use; ``strength`` 0 is without it, 1 as trained."""

    section = "adapters.load"
    path: Annotated[Path, MustExist("name an adapter: a file, a folder, or a run's folder")]
    strength: float = 1.0

    def _rules(self) -> Broken:
        if not math.isfinite(self.strength):
            yield "strength", f"expected a number, got {self.strength}"


@dataclass(frozen=True)
class AdaptersConfig(Section):
    """Small additions to linear layers: ``lora`` is trained by ``train.py``, ``load`` used as they are.

    ``merge`` folds the loaded ones into the weights: as fast as without any, but strengths are then fixed.
    """

    section = "adapters"
    lora: LoraConfig | None = None
    load: list[LoadConfig] = field(default_factory=list)
    merge: bool = False


@dataclass(frozen=True)
class SourceConfig(Section):
    """One data set: a folder, table or shards of images with captions (``name-{000..012}.tar`` is a range).

    ``repeats``: copies of it in an epoch. ``weight``: its share of the stream instead, relative to the
    weights of the other sources.
    """

    section = "data.sources"
    path: Annotated[
        Path,
        MustExist("name a folder, table or shards of images with captions (see docs/data.md)", ranges=True),
    ]
    repeats: int = 1
    weight: float | None = None

    def _rules(self) -> Broken:
        yield from self._at_least_1("repeats")
        if self.weight is not None and not 0 < self.weight < math.inf:
            yield "weight", f"expected more than 0 or null, got {self.weight}"
        if self.weight is not None and self.repeats != 1:
            yield "weight", f"`repeats` {self.repeats} is given too: one of them says how often it comes"


@dataclass(frozen=True)
class AugmentConfig(Section):
    """Mild random placement on white: ``shift`` is a share of the side, ``scale`` the range of the factor."""

    section = "data.augment"
    shift: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)

    def _rules(self) -> Broken:
        if not 0 <= self.shift <= 0.5:
            yield "shift", f"expected 0 to 0.5 of the side, got {self.shift}"
        if not 0 < self.scale[0] <= self.scale[1]:
            yield "scale", f"expected 0 < smallest <= largest, got {list(self.scale)}"


@dataclass(frozen=True)
class BucketsConfig(Section):
    """Sizes for pictures of different shapes: multiples of ``step`` pixels with at most ``area`` pixels.

    ``area``: one or several; a picture goes to the largest that it fills. ``max_ratio``: of the longer to
    the shorter side. ``min_images``: buckets with fewer are closed, their pictures go to the next best.
    """

    section = "data.buckets"
    area: int | list[int]
    step: int
    max_ratio: float = 2.0
    min_images: int = 1

    @property
    def areas(self) -> tuple[int, ...]:
        """All areas in pixels."""
        return (self.area,) if isinstance(self.area, int) else tuple(self.area)

    def _rules(self) -> Broken:
        yield from self._at_least_1("step", "min_images")
        if not self.areas or min(self.areas) < self.step**2:
            least = f"at least `step` x `step` ({self.step**2}) pixels"
            yield "area", f"expected one or several areas of {least}, got {self.area}"
        if not 1 <= self.max_ratio < math.inf:
            yield "max_ratio", f"expected at least 1, got {self.max_ratio}"


@dataclass(frozen=True)
class DataConfig(Section):
    """Image-caption pairs for training, brought to ``height`` x ``width`` pixels or to ``buckets``.

    ``cache``: a folder that keeps latents and text embeddings over runs; ``cache_views``: differently placed
    pictures of each item whose latents are kept there, or in memory without it.
    """

    section = "data"
    sources: list[SourceConfig]
    height: int | None = None
    width: int | None = None
    buckets: BucketsConfig | None = None
    crop: Literal["center", "random"] = "center"
    augment: AugmentConfig | None = None
    max_bad_share: float = 0.05
    cache: Path | None = None
    cache_views: int = 0
    workers: int = 0
    validation: list[SourceConfig] = field(default_factory=list)

    def _rules(self) -> Broken:
        if not self.sources:
            yield "sources", "expected at least one source"
        for name in ("sources", "validation"):
            weighted = [source.weight is not None for source in getattr(self, name)]
            if any(weighted) and not all(weighted):
                yield name, "either every source has a `weight` or none has"
        yield from self._size_rules()
        if not 0 <= self.max_bad_share <= 1:
            yield "max_bad_share", f"expected a share of 0 to 1, got {self.max_bad_share}"
        for name in ("cache_views", "workers"):
            if getattr(self, name) < 0:
                yield name, f"expected at least 0, got {getattr(self, name)}"

    def _size_rules(self) -> Broken:
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is None and self.buckets is None:
                yield "", f"needs `{name}`, or `buckets` instead of height and width"
            elif value is not None and self.buckets is not None:
                yield name, "`buckets` is given too: set one of them to null"
            elif value is not None and value < 1:
                yield name, f"expected at least 1 pixel, got {value}"


@dataclass(frozen=True)
class Experiment(Section):
    """A whole checked config. ``imports`` names modules outside ``sat`` whose classes may be targets."""

    section = "experiment"
    model: Annotated[Component, Makes("torch.nn.Module")]
    diffusion: DiffusionConfig
    conditioning: ConditioningConfig
    first_stage: Annotated[Component, Makes("sat.first_stage.autoencoder.AutoencoderKL")]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    train: TrainConfig | None = None
    data: DataConfig | None = None
    imports: list[str] = field(default_factory=list)


def plain(value: Any) -> Any:
    """``value`` (a section, component or leaf) as the mappings, lists and scalars that YAML writes."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
