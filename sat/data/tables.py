"""Tables of pictures and captions: what a row must have, and the two text formats of tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from sat.data.records import CAPTION_KEYS, Bad, FieldError, Record


class Captions(NamedTuple):
    """The captions of a row, and how often each of them is drawn (empty: alike)."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]


def row_captions(row: Mapping[str, object]) -> Captions:
    """The captions of a row: one text or a list of them under text, prompt or caption, with ``weights``."""
    key = next((key for key in CAPTION_KEYS if row.get(key) is not None), None)
    if key is None:
        raise FieldError(CAPTION_KEYS[0], f"no caption, expected one of {', '.join(CAPTION_KEYS)}", "caption")
    value = row[key]
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise FieldError(key, f"{value!r}, expected a caption or a list of captions", "caption")
    weights = row.get("weights")
    if weights is None:
        return Captions(texts, ())
    if not isinstance(weights, (list, tuple)) or not all(
        isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in weights
    ):
        raise FieldError("weights", f"{weights!r}, expected a list of numbers")
    try:
        Record(Path(), texts, found := tuple(map(float, weights)))
    except ValueError as error:
        raise FieldError("weights", str(error)) from error
    return Captions(texts, found)


def row_record(row: object, folder: Path) -> Record:
    """The record of a row whose ``file_name`` is relative to ``folder``."""
    if not isinstance(row, dict):
        raise FieldError("row", f"expected an object with file_name and text, got {type(row).__name__}")
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise FieldError("file_name", f"{name!r}, expected the path of an image", "picture")
    found = row_captions(row)
    path = folder / name
    if not path.is_file():
        raise FieldError("file_name", f"{name}: no such file", "picture")
    labels = {
        str(other): value
        for other, value in row.items()
        if isinstance(value, str) and other not in ("file_name", *CAPTION_KEYS)
    }
    return Record(path, found.texts, found.weights, labels)


def read_jsonl(table: Path) -> Iterator[Record | Bad]:
    """One record or complaint for each line of a table of JSON objects."""
    with table.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield row_record(json.loads(line), table.parent)
            except FieldError as error:
                yield Bad(f"{table}:{number}", str(error), error.kind)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                yield Bad(f"{table}:{number}", f"row: not JSON: {error}")


def read_csv(table: Path) -> Iterator[Record | Bad]:
    """One record or complaint for each row of a comma-separated table with a header."""
    with table.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        try:
            columns = rows.fieldnames or []
            for needed in (("file_name",), CAPTION_KEYS):
                if not set(needed) & set(columns):
                    has = ", ".join(map(str, columns)) or "none"
                    yield Bad(
                        f"{table}:1", f"{needed[0]}: no column {' or '.join(needed)} (there are: {has})"
                    )
                    return
            for row in rows:
                texts = {key: value for key, value in row.items() if isinstance(value, str) and value.strip()}
                try:
                    yield row_record(texts, table.parent)
                except FieldError as error:
                    yield Bad(f"{table}:{rows.line_num}", str(error), error.kind)
        except (csv.Error, ValueError) as error:
            yield Bad(f"{table}:{rows.line_num + 1}", f"row: not a comma-separated table in UTF-8: {error}")
