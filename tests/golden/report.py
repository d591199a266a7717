"""Compare tensors with stored ones, one printed line a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Comparison = tuple[Callable[[str, Tensor, Tensor], None], Tensor]
"""How to compare, a method of :class:`Report`, and our value."""

NETWORK = 1e-4
"""Float32 network outputs, latents and losses: largest difference over the largest stored value."""
TABLE = 1e-6
"""Schedules and embedding tables: largest difference over the largest stored value."""
IMAGE = 1e-3
"""Images in [0, 1]: largest absolute difference. Decoder outputs in [-1, 1] are twice as wide."""


@dataclass(frozen=True)
class Line:
    """One comparison. ``relative`` is ``absolute`` over the largest finite stored magnitude."""

    file: str
    name: str
    absolute: float
    relative: float
    bound: str
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        note = f"  {self.note}" if self.note else ""
        return (
            f"{verdict} {self.file:<28} {self.name:<52} abs {self.absolute:9.3e}  rel {self.relative:9.3e}"
            f"  bound {self.bound}{note}"
        )


@dataclass
class Report:
    """The comparisons made for one file; ``echo`` prints each as it is made."""

    file: str
    echo: bool = True
    lines: list[Line] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether something was compared and all of it held."""
        return bool(self.lines) and all(line.passed for line in self.lines)

    def names(self) -> set[str]:
        """The stored tensors that were compared."""
        return {line.name for line in self.lines}

    def relative(self, name: str, ours: Tensor, stored: Tensor, tolerance: float) -> None:
        """Bound the largest difference by ``tolerance`` times the largest stored magnitude."""
        self._add(name, ours, stored, relative=tolerance)

    def network(self, name: str, ours: Tensor, stored: Tensor) -> None:
        """A float32 network output, a latent or a loss."""
        self.relative(name, ours, stored, NETWORK)

    def table(self, name: str, ours: Tensor, stored: Tensor) -> None:
        """A schedule or an embedding table; integers must be equal."""
        if stored.is_floating_point():
            self.relative(name, ours, stored, TABLE)
        else:
            self.exact(name, ours, stored)

    def sinusoid(self, name: str, ours: Tensor, stored: Tensor, largest: float) -> None:
        """Sines and cosines of angles up to ``largest``: :data:`TABLE`, and one rounding of a frequency.

        Math libraries differ in the last bit of exp, so in that of a frequency: at 1000 radians that is 1e-4.
        """
        self._add(name, ours, stored, absolute=TABLE + largest * 2**-23)

    def image(self, name: str, ours: Tensor, stored: Tensor) -> None:
        """Pixels in [0, 1]."""
        self._add(name, ours, stored, absolute=IMAGE)

    def exact(self, name: str, ours: Tensor, stored: Tensor) -> None:
        """The same numbers, bit for bit."""
        self._add(name, ours, stored, absolute=0.0)

    def within(self, name: str, ours: Tensor, stored: Tensor, absolute: float) -> None:
        """Bound the largest difference by ``absolute``."""
        self._add(name, ours, stored, absolute=absolute)

    def unknown(self, name: str) -> None:
        """A stored tensor that no check knows: a failure, so that nothing is passed over in silence."""
        self._record(
            Line(self.file, name, float("nan"), float("nan"), "-", False, "no check for this tensor")
        )

    def all(self, golden: Mapping[str, Tensor], ours: Mapping[str, Comparison]) -> None:
        """Make every comparison that ``golden`` has a ``mid.`` or ``out.`` tensor for."""
        for name in sorted(n for n in golden if n.startswith(("mid.", "out."))):
            if name not in ours:
                self.unknown(name)
                continue
            compare, value = ours[name]
            compare(name, value, golden[name])

    def _add(
        self,
        name: str,
        ours: Tensor,
        stored: Tensor,
        *,
        relative: float | None = None,
        absolute: float | None = None,
    ) -> None:
        bound = f"{relative:.0e} rel" if relative is not None else f"{absolute:.0e} abs"
        difference, scale, note = _measure(ours.detach(), stored)
        share = difference / scale if scale else (0.0 if difference == 0.0 else float("inf"))
        limit = relative * scale if relative is not None else (absolute or 0.0)
        self._record(Line(self.file, name, difference, share, bound, difference <= limit, note))

    def _record(self, line: Line) -> None:
        self.lines.append(line)
        if self.echo:
            print(line, flush=True)


def _measure(ours: Tensor, stored: Tensor) -> tuple[float, float, str]:
    """Largest absolute difference, largest stored magnitude, and what is worth a remark.

    NaN agrees with NaN and an infinity with the same infinity; anything else non-finite is infinitely far
    off.
    """
    if ours.shape != stored.shape:
        return float("inf"), 1.0, f"shape {tuple(ours.shape)}, stored {tuple(stored.shape)}"
    a, b = ours.double(), stored.double()
    same = (a == b) | (a.isnan() & b.isnan())
    finite = b.isfinite()
    scale = b[finite].abs().max().item() if bool(finite.any()) else 0.0
    note = f"{int((~finite).sum())} non-finite stored" if not bool(finite.all()) else ""
    if bool(same.all()):
        return 0.0, scale, note
    difference = (a - b).abs().masked_fill(same, 0.0)
    return difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item(), scale, note
