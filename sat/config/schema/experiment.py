"""Sections of an experiment but for sampling, data and training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sat.adapters import groups
from sat.config.schema.base import (
    Broken,
    CheckpointConfig,
    Component,
    ConditioningConfig,
    DiffusionConfig,
    Makes,
    MustExist,
    OutputConfig,
    ParallelConfig,
    Section,
)
from sat.config.schema.sampling import SamplingConfig
from sat.config.schema.train import DataConfig, TrainConfig
from sat.util.host import parse_size


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank factors to train instead of the weights (docs/lora.md).

    ``alpha`` is for layers of ``rank`` (null: equal to it, so that the factors count as they are); layers
    that ``ranks`` gives another rank keep the ratio. ``targets`` are groups of layers
    (``sat/adapters/groups.py``) or shell patterns over ``model.…`` and ``text.…``. ``start`` is an adapter
    to go on from.
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


# -- memory


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


# -- the whole config


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
    imports: list[str] = field(default_factory=list)
