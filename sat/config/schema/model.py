"""The model: how it is noised, what it is conditioned on, where its weights are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sat.config.schema.base import Broken, Component, Makes, MustExist, Section

WEIGHTS = "see docs/checkpoints.md for where weights come from, or name another folder"


@dataclass(frozen=True)
class DiffusionConfig(Section):
    """How images are noised, what the network predicts, and how training is scored."""

    section = "diffusion"
    schedule: Annotated[Component, Makes("sat.diffusion.schedule.Schedule")]
    parameterisation: Annotated[Component, Makes("sat.diffusion.prediction.Parameterisation")]
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
