"""Which image sizes a model draws, and the nearest one to a size that it does not. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


class SizeError(ValueError):
    """A height and width outside the rule of the model."""


@dataclass(frozen=True)
class SizeRule:
    """Height and width in pixels: each in [``min``, ``max``] and a multiple of ``multiple``.

    Their product is at most ``max_area``. The defaults are CogView3-Plus's (official ``sample_dit.py:140``).
    """

    min: int = 512
    max: int = 2048
    multiple: int = 32
    max_area: int = 2**21

    def __post_init__(self) -> None:
        if self.multiple < 1 or self.min < 1:
            raise ValueError(
                f"a size rule needs min and multiple of at least 1, got {self.min} and {self.multiple}"
            )
        if self._low > self._high or self._low * self._low > self.max_area:
            raise ValueError(f"no size satisfies the rule: {self}")

    def __str__(self) -> str:
        return (
            f"{self.min} to {self.max} pixels a side, multiples of {self.multiple}, "
            f"height x width at most {self.max_area}"
        )

    def allows(self, height: int, width: int) -> bool:
        """True if the model draws ``height`` x ``width``."""
        return next(self._broken(height, width), None) is None

    def check(self, height: int, width: int) -> None:
        """Raise :class:`SizeError` with every rule that this size breaks and the nearest allowed size."""
        broken = list(self._broken(height, width))
        if broken:
            near = self.nearest(height, width)
            raise SizeError(
                f"height x width {height} x {width} is not possible: {'; '.join(broken)}. "
                f"The nearest size is {near[0]} x {near[1]} (height x width)"
            )

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The allowed (height, width) with the least sum of squared differences; the larger of equals."""

        def distance(size: tuple[int, int]) -> tuple[int, int]:
            return (size[0] - height) ** 2 + (size[1] - width) ** 2, -size[0] * size[1]

        best = [
            (h, self._side(width, self.max_area // h))
            for h in self._sides()
            if h * self._low <= self.max_area
        ]
        return min(best, key=distance)

    def sides(self, other: int | None = None) -> list[int]:
        """The possible sides: beside one of ``other`` pixels, or beside some other."""
        most = self.max_area // (self._low if other is None else max(other, 1))
        return [side for side in self._sides() if side <= most]

    @property
    def _low(self) -> int:
        """The smallest multiple that is a side."""
        return -(-self.min // self.multiple) * self.multiple

    @property
    def _high(self) -> int:
        """The largest multiple that is a side."""
        return self.max // self.multiple * self.multiple

    def _sides(self) -> range:
        return range(self._low, self._high + 1, self.multiple)

    def _side(self, wanted: int, most: int) -> int:
        """The allowed side closest to ``wanted`` and no larger than ``most``; halves go up."""
        rounded = (2 * wanted + self.multiple) // (2 * self.multiple) * self.multiple
        return max(self._low, min(rounded, self._high, most // self.multiple * self.multiple))

    def _broken(self, height: int, width: int) -> Iterator[str]:
        """Each rule that is broken, in words."""
        for name, side in (("height", height), ("width", width)):
            if not self.min <= side <= self.max:
                yield f"{name} {side} is not between {self.min} and {self.max}"
            if side % self.multiple:
                yield f"{name} {side} is not a multiple of {self.multiple}"
        if height * width > self.max_area:
            yield f"height x width is {height * width}, more than {self.max_area}"
