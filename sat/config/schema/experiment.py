"""The whole of a config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from sat.config.schema.adapters import AdaptersConfig
from sat.config.schema.base import Component, Makes, Section
from sat.config.schema.data import DataConfig
from sat.config.schema.memory import MemoryConfig
from sat.config.schema.model import CheckpointConfig, ConditioningConfig, DiffusionConfig
from sat.config.schema.run import OutputConfig, ParallelConfig
from sat.config.schema.sampling import SamplingConfig
from sat.config.schema.train import TrainConfig


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
