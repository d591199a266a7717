"""Prompts: read, checked, and shared out over ranks and jobs. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
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
