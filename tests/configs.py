"""A toy experiment, and components with awkward signatures, for tests of configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from sat.config.load import load
from sat.config.schema import Experiment
from sat.config.yaml_source import ConfigError

ROOT = Path(__file__).parents[1]
DEBUG = ROOT / "configs" / "debug.yaml"


def debug(*overrides: str | tuple[str, Any]) -> Experiment:
    """configs/debug.yaml, without a tokenizer."""
    return load([DEBUG], ["conditioning.tokenizer=null", *overrides])


def refused(bases: Sequence[str | Path], overrides: Sequence[str | tuple[str, Any]] = ()) -> list[str]:
    """The lines of the error that a config gives."""
    with pytest.raises(ConfigError) as caught:
        load(bases, overrides)
    return [str(problem) for problem in caught.value.problems]


class Brush:
    """Something a component can be made of."""


@dataclass(frozen=True)
class Range:
    """A mapping in YAML, an object in Python."""

    low: float
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")


class Wide(Brush):
    """One parameter of every kind that YAML can say, and a runtime one."""

    def __init__(
        self,
        ratio: float = 1.0,
        pair: tuple[int, int] = (1, 2),
        names: Sequence[str] = (),
        mode: Literal["a", "b"] = "a",
        span: Range | None = None,
        brush: Brush | None = None,
        brushes: Mapping[str, Brush] | None = None,
        several: Sequence[Brush] = (),
        folder: Path | None = None,
        *,
        engine: object = None,
    ) -> None:
        self.values = (ratio, pair, names, mode, span, brush, brushes, several, folder, engine)


class Greedy(Brush):
    """Takes anything, so nothing can be checked."""

    def __init__(self, **options: int) -> None:
        self.options = options


def helper() -> str:
    """A function that makes no brush."""
    return "helper"
