"""Lists of prompts to evaluate on, some with categories: plain text, DrawBench, PartiPrompts, COCO."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sat.sampling.prompts import Prompt, PromptError, checked_prompts, read_prompt_file

TEXTS = ("prompts", "prompt", "text", "caption")
"""Columns that hold the prompt, whatever their case: DrawBench says Prompts, PartiPrompts Prompt."""

CATEGORIES = ("category",)


@dataclass(frozen=True)
class PromptList:
    """Numbered prompts and their categories, one for each; "" for none."""

    prompts: tuple[Prompt, ...]
    categories: tuple[str, ...]

    def category(self, prompt: int) -> str:
        """The category of the prompt with that number."""
        return self.categories[prompt]


def plain(texts: Sequence[str]) -> PromptList:
    """``texts`` without categories."""
    return PromptList(tuple(checked_prompts(texts)), ("",) * len(texts))


def read_list(path: Path) -> PromptList:
    """The prompts of a file: ``.csv`` or ``.tsv`` with a head, ``.jsonl``, ``.json``, else one a line.

    Tables have a column of :data:`TEXTS` and may have one called category. ``.json`` is a list of strings or
    objects, or COCO's captions (an object with ``annotations``).
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".json"):
        return plain(read_prompt_file(path))
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise PromptError(f"prompt list {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"prompt list {path} cannot be read: {error}") from error
    rows = list(_table(path, text, suffix) if suffix in (".csv", ".tsv") else _json(path, text, suffix))
    if not rows:
        raise PromptError(f"prompt list {path} holds no prompt")
    pairs = [_pair(row, where) for where, row in rows]
    return PromptList(tuple(checked_prompts([text for text, _ in pairs])), tuple(c for _, c in pairs))


def _table(path: Path, text: str, suffix: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if suffix == ".tsv" else ",")
    names = [name.strip().lower() for name in reader.fieldnames or []]
    if not set(names) & set(TEXTS):
        raise PromptError(
            f"prompt list {path}: no column of prompts; expected one called {' or '.join(TEXTS)}, "
            f"it has {', '.join(names) or 'none'}"
        )
    for row in reader:
        yield f"{path}, line {reader.line_num}", {str(k).strip().lower(): v for k, v in row.items() if k}


def _json(path: Path, text: str, suffix: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    lines = list(enumerate(text.split("\n"), 1)) if suffix == ".jsonl" else [(1, text)]
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise PromptError(f"prompt list {path}, line {number}: not JSON ({error})") from error
        if suffix == ".json" and isinstance(value, dict) and "annotations" in value:
            value = value["annotations"]
        for item in value if suffix == ".json" and isinstance(value, list) else [value]:
            where = f"{path}, line {number}"
            if isinstance(item, Mapping):
                yield where, {str(key).lower(): inner for key, inner in item.items()}
            else:
                yield where, {"text": item}


def _pair(row: Mapping[str, object], where: str) -> tuple[str, str]:
    """Prompt and category of one row."""
    text = next((row[name] for name in TEXTS if row.get(name)), None)
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"prompt list {where}: no prompt; expected text in {' or '.join(TEXTS)}")
    category = next((row[name] for name in CATEGORIES if row.get(name)), "")
    return " ".join(text.split()), str(category).strip()
