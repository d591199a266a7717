"""Prompts: read, checked, and shared out over ranks and jobs. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sat.errors import UserError
from sat.util.host import read_bounded

MOST_BYTES = 64 << 20
"""Of a prompt file."""


class PromptError(UserError, ValueError):
    """A prompt, or a file of prompts, that cannot be used."""


@dataclass(frozen=True)
class Prompt:
    """One prompt and its number in the run, which names its folder."""

    index: int
    text: str


_TITLE = 32  # characters of a prompt that a progress line shows


def title(text: str) -> str:
    """The beginning of a prompt, safe to print on one line."""
    line = "".join(c if c.isprintable() else " " for c in text[: _TITLE + 1])
    return line if len(text) <= _TITLE else line[: _TITLE - 1] + "…"


def read_prompt_file(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines and spaces around a prompt are dropped."""
    try:
        raw = read_bounded(path, MOST_BYTES)
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
    """Refuse ``text`` that has no UTF-8 form, as from an argument in another encoding, or holds a NUL."""
    if (at := text.find("\0")) >= 0:
        raise PromptError(f"{what} holds a NUL at character {at}: text has none; is it binary data?")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} is not valid UTF-8 at character {error.start} ({ascii(text[error.start])})"
        ) from error


def share(prompts: Sequence[Prompt], part: int, parts: int) -> list[Prompt]:
    """Every ``parts``-th prompt; of a whole file number i goes to rank i modulo the world, as officially.

    It goes by place, not number, so that ranks can share what is a share of a file already.
    """
    return list(prompts[part::parts])
