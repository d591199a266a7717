"""Where a run writes, and how its ranks are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sat.config.schema.base import Broken, Section

if TYPE_CHECKING:
    from sat.parallel.launch import DeviceKind


@dataclass(frozen=True)
class OutputConfig(Section):
    """Where results go, null is the command's folder; ``resume`` skips prompts whose files are all there."""

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
