"""Sections and components of a config, and the sections of the model and the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from sat.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
Broken = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Makes:
    """Marks a component field with what its target must build: a dotted name, or any annotation."""

    wanted: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Schema by which pydantic checks such a field."""
        from sat.config.component import object_schema

        return object_schema(self.wanted, source, handler)


@dataclass(frozen=True)
class MustExist:
    """Marks a path that is read, with what to do when it is missing.

    Such paths are looked up from the current folder first, then from the top of the YAML file's project.
    """

    advice: str
    ranges: bool = False  # ``a-{00..12}.tar`` stands for many files


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

    def __getstate__(self) -> dict[str, Any]:
        """Without the object that was made of it (:func:`sat.config.component.built`)."""
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
    """Device and rank layout; ``timeout`` in seconds ends a run whose other ranks are silent.

    ``tensor`` x ``sequence`` x ``guidance`` ranks work on the same pictures, sharing weights, tokens and the
    two halves of guidance; what is left of the world shares out the pictures (docs/parallel.md).
    """

    section = "parallel"
    device: Literal["auto", "cpu", "cuda"] = "auto"
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


# -- the model: noise, conditions, weights


WEIGHTS = "see docs/checkpoints.md for where weights come from, or name another folder"


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
    """Text encoder, size embedding and tokenizer. ``max_length`` is in tokens, the end mark included."""

    section = "conditioning"
    text: Annotated[Component, Makes("sat.models.t5.T5Encoder")]
    size: Annotated[Component, Makes("sat.conditioning.conditioner.SizeConditioner")]
    max_length: int = 224
    tokenizer: Annotated[
        Path | None, MustExist("name a sentencepiece model, or null for the one beside the weights")
    ] = None

    def _rules(self) -> Broken:
        if self.max_length < 1:
            yield "max_length", f"expected at least 1 token, got {self.max_length}"


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Files of weights: ``path`` has every part, the other three name one part each and win over it.

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
