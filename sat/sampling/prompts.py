"""Prompts: read, checked, and shared out over ranks and jobs. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sat.errors import UserError
from sat.util.host import read_bounded

MOST_BYTES = 64 << 20
"""Of a prompt file."""


class PromptError(UserError, ValueError):
    """A prompt, or a file of prompts, that cannot be used."""


@dataclass(frozen=True)
class Row:
    """Settings that a prompt has for itself, in place of the run's; None is the run's."""

    negative_prompt: str | None = None
    seed: int | None = None
    height: int | None = None  # pixels, with ``width``
    width: int | None = None
    init_image: Path | None = None
    mask: Path | None = None
    strength_map: Path | None = None
    strength: float | None = None
    controls: tuple[Mapping[str, Any], ...] | None = None  # as items of ``sampling.controls``

    def own(self, *names: str) -> dict[str, Any]:
        """The values of those fields that are given."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def enlarged(self, factor: int) -> Row:
        """The same with a size, if it has one, ``factor`` times larger each way."""
        if self.height is None or self.width is None:
            return self
        return replace(self, height=factor * self.height, width=factor * self.width)


NO_ROW = Row()


@dataclass(frozen=True)
class Prompt:
    """One prompt and its number in the run, which names its folder; ``row``: settings of its own."""

    index: int
    text: str
    row: Row = NO_ROW


def read_prompt_file(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines and spaces around a prompt are dropped."""
    # str.splitlines would also cut at form feeds and Unicode separators inside a prompt.
    lines = _read_text(path).replace("\r\n", "\n").split("\n")
    prompts = [stripped for line in lines if (stripped := line.strip())]
    if not prompts:
        raise PromptError(f"prompt file {path} holds no prompt: expected one per line")
    return prompts


def _read_text(path: Path) -> str:
    try:
        raw = read_bounded(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise PromptError(f"prompt file {path} does not exist") from error
    except OSError as error:
        raise PromptError(f"prompt file {path} cannot be read: {error.strerror or error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"prompt file {path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save it as UTF-8"
        ) from error


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


# -- prompt files with settings: a JSON object a line


TEXTS = ("prompts", "prompt", "text", "caption")
"""Keys that hold the prompt, whatever their case: DrawBench says Prompts, PartiPrompts Prompt."""
_PATHS = ("init_image", "mask", "strength_map")
_KEYS = {*(f.name for f in fields(Row)), *TEXTS, "negative", "size"}


def read_prompt_rows(path: Path) -> tuple[list[Prompt], list[str]]:
    """Numbered prompts of a ``.jsonl`` file with their own settings, and the keys that mean nothing here.

    Paths are relative to the file's folder. :class:`PromptError` names the file, the line and the key.
    """
    prompts, strange = list[Prompt](), dict[str, None]()
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"prompt file {path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{where}: not JSON ({error})") from error
        values = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(values, dict):
            raise PromptError(f"{where}: expected an object with `prompt`, got {type(value).__name__}")
        values = {str(key).lower(): inner for key, inner in values.items() if inner is not None}
        strange.update(dict.fromkeys(sorted(values.keys() - _KEYS)))
        text = next((values[key] for key in TEXTS if values.get(key)), None)
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"{where}: no prompt; expected text in {' or '.join(TEXTS)}")
        check_text(text, f"{where}: the prompt")
        prompts.append(Prompt(len(prompts), " ".join(text.split()), _row(values, path.parent, where)))
    if not prompts:
        raise PromptError(f"prompt file {path} holds no prompt: expected a JSON object a line")
    return prompts, list(strange)


def _row(values: Mapping[str, Any], folder: Path, where: str) -> Row:
    """The settings in ``values``, each of its type."""

    def take(key: str, kind: type | tuple[type, ...], expected: str) -> Any:  # noqa: ANN401
        value = values.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise PromptError(f"{where}: {key}: expected {expected}, got {json.dumps(value)[:60]}")
        return value

    negative = take("negative_prompt", str, "text")
    negative = take("negative", str, "text") if negative is None else negative
    check_text(negative or "", f"{where}: the negative prompt")
    height, width = take("height", int, "pixels"), take("width", int, "pixels")
    size = take("size", (str, list), 'height and width, as "512x768" or [512, 768]')
    if size is not None:
        parts = re.fullmatch(r"(\d+)x(\d+)", size) if isinstance(size, str) else None
        numbers = [int(part) for part in parts.groups()] if parts else size
        if len(numbers) != 2 or not all(type(number) is int for number in numbers):
            raise PromptError(f'{where}: size: expected height and width, as "512x768", got {size!r}')
        height, width = numbers
    if (height is None) != (width is None):
        raise PromptError(f"{where}: height and width come together")
    strength = take("strength", (int, float), "a number of 0 to 1")
    if strength is not None and not 0 <= strength <= 1:
        raise PromptError(f"{where}: strength: expected 0 to 1, got {strength:g}")
    paths = {key: take(key, str, "the path of a picture") for key in _PATHS}
    controls = take("controls", list, "a list of controls")
    if controls is not None and not all(isinstance(control, dict) for control in controls):
        raise PromptError(f"{where}: controls: expected a list of objects with path and image")
    controls = (
        [
            {
                k: str(folder / v) if k in ("path", "image") and isinstance(v, str) else v
                for k, v in one.items()
            }
            for one in controls or ()
        ]
        if controls is not None
        else None
    )
    return Row(
        negative, take("seed", int, "a whole number"), height, width,
        **{key: None if text is None else folder / text for key, text in paths.items()},
        strength=strength, controls=None if controls is None else tuple(controls),
    )  # fmt: skip
