"""Every section of an experiment as a frozen dataclass: unknown keys are errors, defaults are written once.

Nothing heavy is imported, so any layer may use these types. Sizes are (height, width) in pixels unless a
field says otherwise. Rules about several fields of a section are its ``_rules``; rules between sections are
in ``constraints.py``.
"""

from sat.config.schema.base import (
    WEIGHTS,
    Broken,
    CheckpointConfig,
    Component,
    ConditioningConfig,
    DiffusionConfig,
    InpaintConfig,
    Makes,
    MustExist,
    OutpaintConfig,
    OutputConfig,
    ParallelConfig,
    Precision,
    RegionConfig,
    RegionsConfig,
    RuleError,
    SamplingConfig,
    Section,
    plain,
)
from sat.config.schema.experiment import (
    AdaptersConfig,
    AugmentConfig,
    BucketsConfig,
    ControlTraining,
    DataConfig,
    Experiment,
    GroupConfig,
    LoadConfig,
    LoraConfig,
    MemoryConfig,
    OffloadConfig,
    PageConfig,
    QuantizeConfig,
    SourceConfig,
    TokenConfig,
    TrainConfig,
)

__all__ = [
    "AdaptersConfig", "AugmentConfig", "Broken", "BucketsConfig", "CheckpointConfig", "Component",
    "ConditioningConfig", "ControlTraining", "DataConfig", "DiffusionConfig", "Experiment", "GroupConfig",
    "InpaintConfig", "LoadConfig", "LoraConfig", "Makes", "MemoryConfig", "MustExist", "OffloadConfig",
    "OutpaintConfig", "OutputConfig", "PageConfig", "ParallelConfig", "Precision", "QuantizeConfig",
    "RegionConfig", "RegionsConfig", "RuleError", "SamplingConfig", "Section", "SourceConfig",
    "TokenConfig", "TrainConfig", "WEIGHTS", "plain",
]  # fmt: skip
