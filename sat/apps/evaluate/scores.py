"""Scores of several folders of pictures side by side: taken, averaged by category, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sat.apps.evaluate.metrics import KINDS, Score, Setting
from sat.apps.evaluate.pictures import Picture, PromptList, drawn


@dataclass(frozen=True)
class Folder:
    """A folder of pictures under the name that tables and reports call it."""

    name: str
    path: Path
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Results:
    """Scores of every folder, and the judges that failed with their reasons."""

    prompts: PromptList
    folders: tuple[Folder, ...]
    scores: dict[str, tuple[Score, ...]]  # by the folder's name
    failed: tuple[str, ...] = field(default=())

    @property
    def names(self) -> list[str]:
        """All scores that some folder has, in order."""
        return list(dict.fromkeys(score.name for scores in self.scores.values() for score in scores))

    def score(self, folder: str, name: str) -> Score | None:
        """One score of one folder, if it has it."""
        return next((score for score in self.scores[folder] if score.name == name), None)

    def categories(self) -> list[str]:
        """The categories of the prompts in order of appearance; none if the list has none."""
        return [name for name in dict.fromkeys(self.prompts.categories) if name]


def open_folders(paths: Sequence[Path], prompts: PromptList) -> tuple[Folder, ...]:
    """The folders with the pictures of ``prompts``, each under the last part of its path, if it is unique."""
    short = [path.resolve().name for path in paths]
    return tuple(
        Folder(name if short.count(name) == 1 else str(path), path, tuple(drawn(path, prompts.prompts)))
        for name, path in zip(short, paths, strict=True)
    )


def take(
    folders: Sequence[Folder],
    prompts: PromptList,
    judges: Sequence[str],
    setting: Setting,
    report: Callable[[str], None] = lambda line: None,
) -> Results:
    """Ask each of ``judges`` about each folder; they are loaded one after the other.

    What one judge refuses (pictures of the wrong size, a damaged weight file) does not lose the others'
    scores: it is listed in ``failed``.
    """
    scores: dict[str, list[Score]] = {folder.name: [] for folder in folders}
    failed: list[str] = []
    for name in judges:
        report(f"{name}: {sum(len(folder.pictures) for folder in folders)} pictures")
        try:
            judge = KINDS[name].make(setting)
            taken = {folder.name: judge(folder.pictures) for folder in folders}
        except (ValueError, RuntimeError, OSError) as error:
            failed.append(f"{name}: {error}")
            continue
        for folder, found in taken.items():
            scores[folder] += found
    return Results(
        prompts, tuple(folders), {name: tuple(found) for name, found in scores.items()}, tuple(failed)
    )


def standard_error(score: Score, pictures: Sequence[Picture]) -> float | None:
    """Of a mean over pictures, with prompts as the independent draws; None for other scores."""
    by_prompt: dict[int, list[float]] = {}
    for value, picture in zip(score.each, pictures, strict=bool(score.each)):
        if value is not None:
            by_prompt.setdefault(picture.prompt, []).append(value)
    means = [sum(values) / len(values) for values in by_prompt.values()]
    if len(means) < 2:
        return None
    mean = sum(means) / len(means)
    return math.sqrt(sum((one - mean) ** 2 for one in means) / (len(means) - 1) / len(means))


def by_category(score: Score, pictures: Sequence[Picture], prompts: PromptList) -> dict[str, float]:
    """The mean over the pictures of each category; empty for scores that are no means."""
    found: dict[str, list[float]] = {}
    for value, picture in zip(score.each, pictures, strict=bool(score.each)):
        category = prompts.category(picture.prompt)
        if value is not None and category:
            found.setdefault(category, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def as_dict(results: Results) -> dict[str, Any]:
    """Everything, for ``scores.json``: the scores of each folder and those of each of its pictures."""
    return {
        "prompts": len(results.prompts.prompts),
        "folders": {folder.name: _folder(results, folder) for folder in results.folders},
        "failed": list(results.failed),
    }


def _folder(results: Results, folder: Folder) -> dict[str, Any]:
    scores = results.scores[folder.name]
    told = {
        score.name: {
            "value": score.value,
            "better": score.better,
            "pictures": score.pictures,
            "standard_error": standard_error(score, folder.pictures),
            "by_category": by_category(score, folder.pictures, results.prompts),
            "note": score.note,
        }
        for score in scores
    }
    pictures = [
        {
            "file": picture.path.relative_to(folder.path).as_posix(),
            "prompt": picture.caption,
            "category": results.prompts.category(picture.prompt),
            "scores": {score.name: score.each[index] for score in scores if score.each},
        }
        for index, picture in enumerate(folder.pictures)
    ]
    return {"path": str(folder.path), "scores": told, "pictures": pictures}


def table(results: Results) -> list[str]:
    """Lines for the terminal: one score a row, one folder a column, notes below."""
    names = results.names
    head = ["", *(folder.name for folder in results.folders)]
    rows = [[_title(results, name), *_cells(results, name)] for name in names]
    for category in results.categories():
        rows.append([f"in {category}", *("" for _ in results.folders)])
        for name in names:
            values = [_in_category(results, folder, name, category) for folder in results.folders]
            if any(value is not None for value in values):
                rows.append([f"  {name}", *("" if value is None else number(value) for value in values)])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [_line(row, widths) for row in [head, *rows]] if names else []
    notes: dict[str, dict[str, None]] = {}
    for score in (score for scores in results.scores.values() for score in scores if score.note):
        notes.setdefault(score.note, {})[score.name] = None
    return [*lines, *(f"{', '.join(names)}: {note}" for note, names in notes.items())]


def _in_category(results: Results, folder: Folder, name: str, category: str) -> float | None:
    score = results.score(folder.name, name)
    return None if score is None else by_category(score, folder.pictures, results.prompts).get(category)


def _title(results: Results, name: str) -> str:
    better = next(s.better for folder in results.folders if (s := results.score(folder.name, name)))
    return f"{name} ({better} is better)"


def _cells(results: Results, name: str) -> list[str]:
    cells = []
    for folder in results.folders:
        score = results.score(folder.name, name)
        error = None if score is None else standard_error(score, folder.pictures)
        more = "" if error is None else f" ± {number(error)}"
        cells.append("" if score is None else f"{number(score.value)}{more}")
    return cells


def number(value: float) -> str:
    """Four significant digits, without an exponent where it can be."""
    return f"{value:.4g}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join([first, *rest]).rstrip()
