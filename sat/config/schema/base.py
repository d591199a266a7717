"""What sections of a config are made of: components, paths, and rules that are checked when one is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

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


def plain(value: Any) -> Any:
    """``value`` (a section, component or leaf) as the mappings, lists and scalars that YAML writes."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
