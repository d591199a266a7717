"""What a golden file's metadata says about its run."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from tests.golden.file import Golden, GoldenError

#: Entries about the file, not about its run.
NOTES = ("torch", "rng_calls", "seed", "rng", "note", "weights_dtype_note", "network_t_dtype", "toy_network")


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


def understood(golden: Golden, keys: Collection[str]) -> None:
    """Refuse, by name, entries of the metadata that are neither ``keys`` nor notes (of several words)."""
    entries = [(name, name, _value(text)) for name, text in golden.metadata.items()]
    inner = [
        (f"{o}.{k}", k, v) for o, _, entry in entries if isinstance(entry, dict) for k, v in entry.items()
    ]
    unknown = [
        shown
        for shown, key, value in [*entries, *inner]
        if key not in (*keys, *NOTES) and not isinstance(value, dict)
        if not (isinstance(value, str) and " " in value)
    ]
    unknown += [shown for shown, _, value in inner if isinstance(value, dict)]
    if unknown:
        raise GoldenError(f"{golden.path}: metadata that is not understood: {', '.join(sorted(unknown))}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
