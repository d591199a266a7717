"""Prompts, their shares over ranks and jobs, and the image sizes a model draws. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sat.errors import UserError


class PromptError(UserError, ValueError):
    """A prompt, or a file of prompts, that cannot be used."""


@dataclass(frozen=True)
class Prompt:
    """One prompt and its number in the run, which names its folder."""

    index: int
    text: str


def read_prompt_file(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines and spaces around a prompt are dropped."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise PromptError(f"prompt file {path} does not exist") from error
    except OSError as error:
        raise PromptError(f"prompt file {path} cannot be read: {error.strerror or error}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"prompt file {path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save it as UTF-8"
        ) from error
    # str.splitlines would also cut at form feeds and Unicode separators inside a prompt.
    prompts = [stripped for line in text.replace("\r\n", "\n").split("\n") if (stripped := line.strip())]
    if not prompts:
        raise PromptError(f"prompt file {path} holds no prompt: expected one per line")
    return prompts


def checked_prompts(texts: Iterable[str]) -> list[Prompt]:
    """Numbered prompts, every one valid text (an argument in another encoding than UTF-8 is not)."""
    prompts = [Prompt(index, text) for index, text in enumerate(texts)]
    for prompt in prompts:
        check_text(prompt.text, f"prompt {prompt.index}")
    return prompts


def check_text(text: str, what: str) -> None:
    """Refuse ``text`` that has no UTF-8 form, as from an argument in another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} is not valid UTF-8 at character {error.start} ({ascii(text[error.start])})"
        ) from error


class Share(NamedTuple):
    """Part ``part`` (from 0) of a run that is cut into ``parts``."""

    part: int
    parts: int


def parse_share(text: str) -> Share:
    """``K/N``: of N parts the one with prompts K, K + N, K + 2 N and so on, each under its own number."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise PromptError(f"expected K/N with K from 0 to N - 1, such as 0/4, got {text!r}")
    return Share(int(match[1]), int(match[2]))


def share(prompts: Sequence[Prompt], part: int, parts: int) -> list[Prompt]:
    """Every ``parts``-th prompt; of a whole file number i goes to rank i modulo the world, as officially.

    It goes by place, not number, so that ranks can share what is a share of a file already.
    """
    return list(prompts[part::parts])


# -- which image sizes a model draws, and the nearest one to a size that it does not. Standard library only


class SizeError(UserError, ValueError):
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
