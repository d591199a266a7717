"""What a golden file's metadata says about its run."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.golden.file import Golden, GoldenError


def option(golden: Golden, key: str) -> Any:
    """The entry ``key`` of the metadata, or of a JSON object in it; None where there is none."""
    entries = {name: _value(text) for name, text in golden.metadata.items()}
    inner = (entry[key] for entry in entries.values() if isinstance(entry, dict) and key in entry)
    return entries[key] if key in entries else next(inner, None)


def number(golden: Golden, key: str, default: float | None = None) -> float:
    """A number, by :func:`option`; ``default`` where there is none, an error without a default."""
    found = option(golden, key)
    found = default if found is None else found
    try:
        return float(found)  # type: ignore[arg-type]
    except (TypeError, ValueError) as problem:
        raise GoldenError(f"{golden.path}: its metadata has no number {key!r}, but {found!r}") from problem


def class_name(golden: Golden, key: str) -> str:
    """The last part of a class name, whatever is said beside it."""
    text = str(option(golden, key))
    found = re.match(r"(?:\w+\.)*(\w+)", text)
    return found[1] if found else text


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
