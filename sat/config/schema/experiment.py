"""The whole experiment, and the sections of data, training, adapters and memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sat.adapters import groups
from sat.config.schema.base import (
    Auto,
    AutoPrecision,
    Broken,
    CheckpointConfig,
    Component,
    ConditioningConfig,
    DiffusionConfig,
    Makes,
    MustExist,
    OutputConfig,
    ParallelConfig,
    SamplingConfig,
    Section,
)
from sat.util.host import parse_size


@dataclass(frozen=True)
class ExtraConfig(Section):
    """The place of a further picture of every pair, cut as the first is; one of the three.

    ``column``: of a table; for shards ``0001.NAME.png``, beside pictures ``fox.NAME.png``. ``folder``: of
    pictures of the same paths and names. ``alpha``: the pictures' own transparency.
    """

    section = "data.sources"
    column: str | None = None
    folder: Annotated[Path | None, MustExist("name a folder of pictures of the same names, or null")] = None
    alpha: bool = False

    def _rules(self) -> Broken:
        given = [self.column is not None, self.folder is not None, self.alpha]
        if sum(given) != 1:
            yield "", f"expected one of `column`, `folder` and `alpha`, got {sum(given)} of them"
        if self.column is not None and not self.column.strip():
            yield "column", "expected the name of a column, got nothing"


@dataclass(frozen=True)
class SourceConfig(Section):
    """One data set: a folder, table or shards of images with captions (``name-{000..012}.tar`` is a range).

    ``repeats``: copies of it in an epoch. ``weight``: its share of the stream instead, relative to the
    weights of the other sources. ``caption``: the name of the captions in its rows; null: the first there is
    of text, prompt, caption, captions and description; several names with weights, such as
    ``{short: 1, long: 3}``: all of them, drawn by these. ``mask``: pictures that weigh the loss by place,
    white where it counts whole. ``control``: ready pictures for a control (``adapters.control``); null makes
    them of the pictures. ``loser``: pictures of the same captions that people liked less, for
    ``sat.train.objectives.preference.Preference``. ``loss_weight``: factor of the losses of its pictures.
    """

    section = "data.sources"
    counts = ("repeats",)
    path: Annotated[
        Path,
        MustExist(
            "name a folder, table or shards of images with captions (see docs/data.md; class pictures are "
            "drawn by `python -m sat.cli.prepare prior`)",
            ranges=True,
        ),
    ]
    repeats: int = 1
    weight: float | None = None
    caption: str | dict[str, float] | None = None
    mask: ExtraConfig | None = None
    control: ExtraConfig | None = None
    loser: ExtraConfig | None = None
    loss_weight: float = 1.0

    @property
    def extras(self) -> dict[str, ExtraConfig]:
        """The further pictures by name."""
        named = {"mask": self.mask, "control": self.control, "loser": self.loser}
        return {name: place for name, place in named.items() if place is not None}

    def _rules(self) -> Broken:
        if self.weight is not None and not 0 < self.weight < math.inf:
            yield "weight", f"expected more than 0 or null, got {self.weight}"
        if isinstance(self.caption, dict) and not (
            all(0 < weight < math.inf for weight in self.caption.values()) and self.caption
        ):
            yield "caption", f"expected names with weights above 0, got {self.caption}"
        if not 0 < self.loss_weight < math.inf:
            yield "loss_weight", f"expected more than 0, got {self.loss_weight}"
        if self.weight is not None and self.repeats != 1:
            yield "weight", f"`repeats` {self.repeats} is given too: one of them says how often it comes"


@dataclass(frozen=True)
class AugmentConfig(Section):
    """Mild random placement on white: ``shift`` is a share of the side, ``scale`` the range of the factor.

    ``turn``: up to that many degrees either way. ``warp``: up to that share of a side, at the corners of a
    mesh. ``mirror``: share of pictures mirrored; letters and hands are wrong then.
    """

    section = "data.augment"
    shift: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    turn: float = 0.0
    warp: float = 0.0
    mirror: float = 0.0

    def _rules(self) -> Broken:
        if not 0 <= self.shift <= 0.5:
            yield "shift", f"expected 0 to 0.5 of the side, got {self.shift}"
        if not 0 < self.scale[0] <= self.scale[1]:
            yield "scale", f"expected 0 < smallest <= largest, got {list(self.scale)}"
        for name, most in (("turn", 180), ("warp", 0.2), ("mirror", 1)):
            if not 0 <= getattr(self, name) <= most:
                yield name, f"expected 0 to {most}, got {getattr(self, name)}"


@dataclass(frozen=True)
class BucketsConfig(Section):
    """Sizes for pictures of different shapes: multiples of ``step`` pixels with at most ``area`` pixels.

    ``area``: one or several; a picture goes to the largest that it fills. ``max_ratio``: of the longer to
    the shorter side. ``min_images``: buckets with fewer are closed, their pictures go to the next best.
    """

    section = "data.buckets"
    counts = ("step", "min_images")
    area: int | list[int]
    step: int
    max_ratio: float = 2.0
    min_images: int = 1

    @property
    def areas(self) -> tuple[int, ...]:
        """All areas in pixels."""
        return (self.area,) if isinstance(self.area, int) else tuple(self.area)

    def _rules(self) -> Broken:
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

    def _rules(self) -> Broken:  # noqa: C901
        if not self.sources:
            yield "sources", "expected at least one source"
        for name in ("sources", "validation"):
            weighted = [source.weight is not None for source in getattr(self, name)]
            if any(weighted) and not all(weighted):
                yield name, "either every source has a `weight` or none has"
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is None and self.buckets is None:
                yield "", f"needs `{name}`, or `buckets` instead of height and width"
            elif value is not None and self.buckets is not None:
                yield name, "`buckets` is given too: set one of them to null"
            elif value is not None and value < 1:
                yield name, f"expected at least 1 pixel, got {value}"
        if not 0 <= self.max_bad_share <= 1:
            yield "max_bad_share", f"expected a share of 0 to 1, got {self.max_bad_share}"
        for name in ("cache_views", "workers"):
            if getattr(self, name) < 0:
                yield name, f"expected at least 0, got {getattr(self, name)}"


# -- a training run


@dataclass(frozen=True)
class OffloadConfig(Section):
    """Parts that wait in the CPU's memory until needed: the optimizer, which then steps there; weights."""

    section = "train.offload"
    optimizer: bool = False
    parameters: bool = False


@dataclass(frozen=True)
class GroupConfig(Section):
    """Trained parameters with a learning rate and weight decay of their own; null: ``train``'s.

    ``targets`` are shell patterns over the parameters' names, such as ``text.*`` or ``model.*.attn.*``. The
    decay is that of matrices and kernels, as everywhere.
    """

    section = "train.groups"
    targets: list[str]
    lr: float | None = None
    weight_decay: float | None = None

    def _rules(self) -> Broken:
        if not self.targets:
            yield "targets", "expected at least one pattern over names of parameters"
        if self.lr is None and self.weight_decay is None:
            yield "", "needs `lr` or `weight_decay`"
        if self.lr is not None and not 0 < self.lr < math.inf:
            yield "lr", f"expected more than 0 or null, got {self.lr}"
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            yield "weight_decay", f"expected at least 0 or null, got {self.weight_decay}"


_UNFIT = {
    "ReduceLROnPlateau": "waits for a score at every step; there is none",
    "SequentialLR": "takes other schedulers, which no config can make",
    "ChainedScheduler": "takes other schedulers, which no config can make",
    "LambdaLR": "takes a function, which no config can write",
    "MultiplicativeLR": "takes a function, which no config can write",
}
"""Schedulers of torch that a run cannot step, and the reason."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """One training run; ``batch_size`` is per rank and accumulation step, ``warmup`` in optimizer steps.

    ``dtype`` is that of the weights (half precision keeps float32 masters, so it needs ``zero`` above 0);
    ``autocast`` computes in bf16 with ``fp32`` weights. ``backend``: ``plain`` is torch alone, in one process
    and in fp32. ``max_minutes`` saves and stops early;
    ``max_bad_steps`` steps in a row with a loss that is not finite end the run. ``schedule``: a name, or a
    scheduler of ``torch.optim.lr_scheduler`` by its path; ``decay_steps``: the length of ``wsd``'s fall.
    ``prolong``: what the schedule does when a resumed run has another ``steps``: it is stretched over them,
    keeps its last rate, or warms up for a second one. ``ema``: decays of averages of the weights, each
    exported; validation and samples take the first. ``groups``: rates and decays by part and pattern; the
    first that names a parameter has it (docs/training.md). Besides the ``keep_last`` newest checkpoints those
    of every ``keep_every`` steps stay, and with ``keep_best`` that of the lowest held-out loss; ``patience``:
    that many validations in a row without a lower one end the run. ``profile``: so many steps are traced;
    ``group_norms``: gradient norms of parts or ``groups`` in the metrics. wandb's name is the run folder's
    unless ``wandb_name`` says another. ``compile``: one compiled block for all layers of what is trained.
    ``pack``: beside LoRA on a CPU, keep frozen weights in the order of its matrix products, once for each
    pass: faster, and one more copy. ``auto`` is measured as in sampling; ``dtype: auto`` is bf16 where that
    is fast and ``zero`` is not 0.
    """

    section = "train"
    counts = (
        "steps", "batch_size", "accumulate", "log_every", "save_every", "keep_last", "sample_every",
        "validate_every", "max_bad_steps", "keep_every", "patience",
    )  # fmt: skip
    objective: Annotated[Component, Makes("sat.train.objectives.Objective")]
    steps: int
    batch_size: int = 1
    accumulate: int = 1
    dtype: AutoPrecision = "fp32"
    autocast: Literal["bf16"] | None = None
    backend: Literal["deepspeed", "plain"] = "deepspeed"
    zero: int = 0
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    optimizer: Annotated[Component, Makes("torch.optim.Optimizer")] = Component("torch.optim.AdamW")
    lr: float = 1e-4
    schedule: (
        Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"]
        | Annotated[Component, Makes("torch.optim.lr_scheduler.LRScheduler")]
    ) = "constant"
    warmup: int = 0
    decay_steps: int | None = None
    min_lr_ratio: float = 0.0
    prolong: Literal["stretch", "constant", "rewarm"] = "stretch"
    weight_decay: float = 0.0
    groups: list[GroupConfig] = field(default_factory=list)
    clip: float | None = 1.0
    ema: float | list[float] | None = None
    activation_checkpointing: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: bool = False
    patience: int | None = None
    background_save: bool = False
    sample_every: int | None = None
    sample_prompts: list[str] = field(default_factory=list)
    validate_every: int | None = None
    max_minutes: float | None = None
    max_bad_steps: int = 20
    wandb: Literal["offline", "online", "disabled"] = "offline"
    tensorboard: bool = False
    profile: int | None = None
    group_norms: bool = False
    peak_tflops: float | None = None
    project: str = "cogview3"
    wandb_name: str | None = None
    wandb_group: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    wandb_notes: str | None = None
    allocator: bool = True
    pack: Auto = "auto"
    attention: Literal["auto", "torch", "exp"] = "auto"
    compile: bool = False
    init_from: CheckpointConfig | None = None

    @property
    def decays(self) -> list[float]:
        """Decays of ``ema``; the first is that of ``native``, of validation and of samples."""
        if self.ema is None:
            return []
        return list(self.ema) if isinstance(self.ema, (list, tuple)) else [self.ema]

    def _rules(self) -> Broken:  # noqa: C901
        ranges = {
            "zero": (0 <= self.zero <= 3, "a stage from 0 to 3"),
            "warmup": (0 <= self.warmup <= self.steps, f"0 to `steps` ({self.steps})"),
            "lr": (self.lr > 0, "more than 0"),
            "min_lr_ratio": (0 <= self.min_lr_ratio <= 1, "0 to 1"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "clip": (self.clip is None or self.clip > 0, "more than 0 or null"),
            "ema": (
                all(0 <= decay < 1 for decay in self.decays)
                and len({*self.decays}) == len(self.decays)
                and self.ema != [],
                "a decay of at least 0 and below 1, several different ones, or null",
            ),
            "peak_tflops": (self.peak_tflops is None or self.peak_tflops > 0, "more than 0 or null"),
            "max_minutes": (self.max_minutes is None or self.max_minutes > 0, "more than 0 minutes or null"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                yield name, f"expected {expected}, got {getattr(self, name)}"
        if self.schedule == "wsd" and not 0 < (self.decay_steps or 0) <= self.steps - self.warmup:
            left = self.steps - self.warmup
            yield (
                "decay_steps",
                f"wsd falls over 1 to {left} steps (`steps` - `warmup`), got {self.decay_steps}",
            )
        elif self.schedule != "wsd" and self.decay_steps is not None:
            other = self.schedule.target if isinstance(self.schedule, Component) else self.schedule
            yield "decay_steps", f"is for `schedule` wsd, but that is {other}: set it to null"
        if isinstance(self.schedule, Component):
            module, _, name = self.schedule.target.rpartition(".")
            if name in _UNFIT and module.startswith("torch."):
                yield "schedule", f"{name} {_UNFIT[name]}"
            unused = {"warmup": 0, "min_lr_ratio": 0.0, "prolong": "stretch"}
            for key, nothing in unused.items():
                if getattr(self, key) != nothing:
                    yield key, f"has no meaning with {name}, which has its own `params`: set it to {nothing}"
        if self.autocast is not None and self.dtype not in ("fp32", "auto"):
            yield "autocast", f"computes in bf16 with `dtype` fp32 weights, but `dtype` is {self.dtype}"
        if self.dtype not in ("fp32", "auto") and self.zero == 0:
            yield (
                "zero",
                f"`dtype` {self.dtype} needs 1, 2 or 3, which keep float32 masters of the weights; got 0"
                + (", and `backend` plain trains in fp32" if self.backend == "plain" else ""),
            )
        if self.backend == "plain" and self.zero:
            yield "zero", f"`backend` plain keeps whole weights in one process: set it to 0, got {self.zero}"
        if self.offload.optimizer and self.zero == 0:
            yield "offload", "`optimizer` needs `zero` 1, 2 or 3, which keep the optimizer apart; got 0"
        if self.offload.parameters and self.zero != 3:
            yield "offload", f"`parameters` needs `zero` 3, which shares out the weights; got {self.zero}"
        for name in ("keep_best", "patience"):
            if getattr(self, name) and self.validate_every is None:
                yield name, "goes by the held-out loss: set `validate_every`, and `data.validation`"
        if self.sample_every is not None and not self.sample_prompts:
            yield "sample_prompts", "`sample_every` is set but there is no prompt to sample"


# -- sections of an experiment but for sampling, data and training


def _unknown_groups(key: str, names: Iterable[str]) -> Broken:
    """Problems of ``key`` with ``names`` that are neither groups of layers nor patterns."""
    for name in names:
        if name not in groups.GROUPS and not groups.is_pattern(name):
            near = groups.hint(name, groups.GROUPS)
            yield key, f"no group {name!r}{near} (there are {', '.join(groups.GROUPS)}, and patterns)"


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank factors to train instead of the weights (docs/lora.md).

    ``alpha`` is for layers of ``rank`` (null: equal to it, so that the factors count as they are); layers
    that ``ranks`` gives another rank keep the ratio. ``rslora``: factors count alpha / sqrt(rank) instead
    (arXiv:2312.03732). ``lokr``: Kronecker factors instead (arXiv:2309.14859), the first of this size or -1:
    near the square root; ``rank`` is that of the second. ``targets`` are groups of layers
    (``sat/adapters/groups.py``) or shell patterns over ``model.…`` and ``text.…``. ``start`` is an adapter
    to go on from.
    """

    section = "adapters.lora"
    counts = ("rank",)
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["attention"])
    ranks: dict[str, int] = field(default_factory=dict)
    dora: bool = False
    rslora: bool = False
    lokr: int | None = None
    start: Annotated[Path | None, MustExist("name an adapter to go on from, or null for a new one")] = None

    def effective_alpha(self, rank: int) -> float:
        """Alpha of a layer of ``rank``, of which alpha / rank is the factors' scale."""
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return alpha * math.sqrt(rank) if self.rslora else alpha * rank / self.rank

    def _rules(self) -> Broken:
        if self.alpha is not None and not self.alpha > 0:
            yield "alpha", f"expected more than 0, or null for the rank, got {self.alpha}"
        if self.rslora and self.alpha is None:
            yield "alpha", "rslora scales by alpha / sqrt(rank), so say alpha; got null"
        if self.rslora and self.start is not None:
            yield "rslora", "`start` has scales of its own: set it to false"
        if self.lokr is not None and self.lokr != -1 and self.lokr < 2:
            yield "lokr", f"expected a size from 2 on, -1 or null, got {self.lokr}"
        if self.lokr is not None and (self.dora or self.rslora or self.start is not None):
            other = "dora" if self.dora else "rslora" if self.rslora else "start"
            yield "lokr", f"Kronecker factors do not go with `{other}`: set one of the two to null or false"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"expected a share of 0 to below 1, got {self.dropout}"
        if not self.targets:
            yield "targets", f"expected at least one of {', '.join(groups.GROUPS)}, or a pattern"
        yield from _unknown_groups("targets", self.targets)
        yield from _unknown_groups("ranks", self.ranks)
        for target, rank in self.ranks.items():
            if rank < 1:
                yield "ranks", f"expected at least 1, got {rank} for {target!r}"


@dataclass(frozen=True)
class TokenConfig(Section):
    """A new word to learn (textual inversion): as captions write it, and how many embeddings it stands for.

    ``start``: words whose embeddings it starts from; null: random ones.
    """

    section = "adapters.tokens"
    counts = ("vectors",)
    word: str
    vectors: int = 1
    start: str | None = None

    def _rules(self) -> Broken:
        if not self.word or self.word != "".join(self.word.split()):
            yield "word", f"expected a word without spaces, such as <fox>, got {self.word!r}"
        if self.start is not None and not self.start.strip():
            yield "start", "expected words to start from, or null"


@dataclass(frozen=True)
class ControlTraining(Section):
    """A control to train beside a frozen model (docs/control.md), or to keep on it while others train.

    ``design`` builds a new one; ``start`` is one to go on from, whose own design counts. ``train`` false
    keeps it as it is, and the network or its LoRA learns with it on. ``picture`` makes the control's picture
    of each picture whose source names none (``data.sources.N.control``); null: as ``start`` says.
    ``dropout``: share of pictures that are trained on without their control's. ``samples``: a picture, or a
    folder with one for each of ``train.sample_prompts``, that the pictures in between are steered by, made
    as ``picture`` says.
    """

    section = "adapters.control"
    design: Annotated[Component, Makes("sat.control.base.Control")] | None = None
    start: Annotated[Path | None, MustExist("name a control to go on from, or null for a new one")] = None
    train: bool = True
    picture: Annotated[Component, Makes("sat.data.preprocess.Preprocess")] | None = None
    dropout: float = 0.0
    samples: Annotated[Path | None, MustExist("name a picture, or a folder of them")] = None

    def _rules(self) -> Broken:
        if self.design is None and self.start is None:
            yield "design", "expected a `design` for a new control, or one to go on from in `start`"
        if self.start is None and not self.train:
            yield "train", "a new control that does not learn does nothing: name one in `start`"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"expected a share of 0 to below 1, got {self.dropout}"


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

    ``control`` is a branch that learns from pictures beside captions, or is there while others learn.

    ``merge`` folds the loaded ones into the weights: as fast as without any, but strengths are then fixed.
    ``tokens`` are new words to train, ``embeddings`` trained ones to use: files, folders or runs' folders.
    """

    section = "adapters"
    lora: LoraConfig | None = None
    control: ControlTraining | None = None
    load: list[LoadConfig] = field(default_factory=list)
    merge: bool = False
    tokens: list[TokenConfig] = field(default_factory=list)
    embeddings: list[
        Annotated[Path, MustExist("name embeddings of a textual inversion: a file, or a run's folder")]
    ] = field(default_factory=list)

    def _rules(self) -> Broken:
        words = [token.word for token in self.tokens]
        if twice := sorted({word for word in words if words.count(word) > 1}):
            yield "tokens", f"the word {twice[0]!r} is there twice"


# -- memory


@dataclass(frozen=True)
class QuantizeConfig(Section):
    """Linears kept as int8 or int4, made whole for each product: ``network`` and ``text_encoder`` by kind.

    ``layers`` are groups of layers (``sat/adapters/groups.py``) or shell patterns over ``model.…`` and
    ``text.…``; other layers, embeddings and norms stay as they are. ``group`` inputs share a scale (null: a
    whole row in int8, 32 in int4).
    """

    section = "memory.quantize"
    counts = ("group",)
    network: Literal["int8", "int4"] | None = None
    text_encoder: Literal["int8", "int4"] | None = None
    group: int | None = None
    layers: list[str] = field(default_factory=lambda: ["attention", "mlp", "text_encoder"])

    def patterns(self) -> list[str]:
        """``layers`` as shell patterns over ``model.…`` and ``text.…``."""
        return [pattern for layer in self.layers for pattern in groups.patterns(layer)]

    def _rules(self) -> Broken:
        if not self.layers:
            yield "layers", f"expected at least one of {', '.join(groups.GROUPS)}, or a pattern"
        yield from _unknown_groups("layers", self.layers)


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
            if self.budget is not None:
                parse_size(self.budget)
        except ValueError as error:
            yield "budget", str(error)


# -- the whole config


STYLES = {
    "photograph": "{prompt}, photograph, natural light",
    "oil painting": "{prompt}, oil painting, visible brush strokes",
    "watercolour": "{prompt}, watercolour on paper",
    "ink drawing": "{prompt}, black ink drawing on white paper",
    "pixel art": "{prompt}, pixel art",
    "3D": "{prompt}, 3D render, soft shadows",
}
"""Styles of a page whose config names none."""


@dataclass(frozen=True)
class PageConfig(Section):
    """Words of the web page about this model: what it can draw, prompts to click, styles.

    ``about`` stands above the ``examples``, a text file with a prompt a line; ``about_zh`` is its Chinese.
    ``styles``: names, and the text of each, in which ``{prompt}`` is what a person wrote.
    """

    section = "page"
    about: str = ""
    about_zh: str = ""
    examples: Annotated[Path | None, MustExist("name a text file with one prompt a line")] = None
    styles: dict[str, str] = field(default_factory=lambda: dict(STYLES))

    def _rules(self) -> Broken:
        for name, text in self.styles.items():
            if "{prompt}" not in text:
                yield "styles", f"{name}: expected a text with {{prompt}} in it, got {text!r}"


@dataclass(frozen=True)
class Experiment(Section):
    """A whole checked config. ``imports`` names modules outside ``sat`` whose classes may be targets."""

    section = "experiment"
    model: Annotated[Component, Makes("torch.nn.Module")]
    diffusion: DiffusionConfig
    conditioning: ConditioningConfig
    first_stage: Annotated[Component, Makes("sat.first_stage.model.AutoencoderKL")]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    train: TrainConfig | None = None
    data: DataConfig | None = None
    page: PageConfig | None = None
    imports: list[str] = field(default_factory=list)
