"""Every section of an experiment as a frozen dataclass: unknown keys are errors, defaults are written once.

Nothing heavy is imported, so any layer may use these types. Sizes are (height, width) in pixels unless a
field says otherwise. Rules about several fields of a section are its ``_rules``; rules between sections are
in ``between.py``.
"""

from sat.config.schema.base import (
    WEIGHTS,
    Broken,
    CheckpointConfig,
    Component,
    ConditioningConfig,
    DiffusionConfig,
    Makes,
    MustExist,
    OutputConfig,
    ParallelConfig,
    Precision,
    RuleError,
    Section,
    plain,
)
from sat.config.schema.experiment import (
    AdaptersConfig,
    Experiment,
    LoadConfig,
    LoraConfig,
    MemoryConfig,
    QuantizeConfig,
)
from sat.config.schema.sampling import SamplingConfig
from sat.config.schema.train import (
    AugmentConfig,
    BucketsConfig,
    DataConfig,
    OffloadConfig,
    SourceConfig,
    TrainConfig,
)

__all__ = [
    "Precision",
    "Broken",
    "Makes",
    "MustExist",
    "RuleError",
    "Section",
    "Component",
    "plain",
    "WEIGHTS",
    "DiffusionConfig",
    "ConditioningConfig",
    "CheckpointConfig",
    "SamplingConfig",
    "QuantizeConfig",
    "MemoryConfig",
    "OutputConfig",
    "ParallelConfig",
    "OffloadConfig",
    "TrainConfig",
    "LoraConfig",
    "LoadConfig",
    "AdaptersConfig",
    "SourceConfig",
    "AugmentConfig",
    "BucketsConfig",
    "DataConfig",
    "Experiment",
]
