"""Scores of several folders of pictures side by side: taken, then shown as JSON, a table and an HTML file."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sat.apps.evaluate.metrics import METRICS, MetricConfig, Score, best_of
from sat.apps.evaluate.pictures import Opened, Picture, PromptList, drawn
from sat.apps.preference.votes import Interval, bootstrap

SIDE = 384
"""Pixels of a picture's longer side in the report; the full ones stay where they are."""

STYLE = """
:root { color-scheme: light dark; --line: #8886; --dim: #777; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 120rem; padding: 1.5rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .75rem 0; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; } td.best { font-weight: 700; }
.dim { color: var(--dim); } .wide { overflow-x: auto; }
article { border-top: 1px solid var(--line); padding: .75rem 0; }
article p { margin: 0 0 .5rem; }
.row { display: grid; gap: .75rem; grid-auto-columns: minmax(8rem, 24rem); grid-auto-flow: column; }
.row { justify-content: start; margin-bottom: .75rem; }
figure { margin: 0; } figcaption { font-size: .8rem; }
img { display: block; max-width: 100%; height: auto; image-rendering: auto; }
img.small { width: 12rem; image-rendering: pixelated; }
"""


@dataclass(frozen=True)
class Folder:
    """A folder of pictures, with its name in tables and reports."""

    name: str
    path: Path
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Results:
    """Scores of every folder, and the metrics that failed with their reasons."""

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


def compute_scores(
    folders: Sequence[Folder],
    prompts: PromptList,
    metrics: Sequence[str],
    config: MetricConfig,
    report: Callable[[str], None] = lambda line: None,
) -> Results:
    """Take each of ``metrics`` of each folder; they are loaded one after the other.

    A metric that refuses (pictures of the wrong size, a damaged weight file) does not lose the others'
    scores: it is listed in ``failed``.
    """
    scores: dict[str, list[Score]] = {folder.name: [] for folder in folders}
    failed: list[str] = []
    for name in metrics:
        report(f"{name}: {sum(len(folder.pictures) for folder in folders)} pictures")
        try:
            metric = METRICS[name](config)
            taken = {folder.name: metric(folder.pictures) for folder in folders}
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


def interval(score: Score, pictures: Sequence[Picture]) -> Interval | None:
    """95 % limits of a mean over pictures, by resampling prompts; None for other scores, or of one prompt."""
    sums: dict[int, tuple[float, int]] = {}
    for value, picture in zip(score.each, pictures, strict=bool(score.each)):
        if value is not None:
            total, count = sums.get(picture.prompt, (0.0, 0))
            sums[picture.prompt] = total + value, count + 1
    if len(sums) < 2:
        return None
    return bootstrap(np.array(list(sums.values())), lambda drawn: drawn[:, 0] / drawn[:, 1], seed=0)


def by_category(score: Score, pictures: Sequence[Picture], prompts: PromptList) -> dict[str, float]:
    """The mean over the pictures of each category; empty for scores that are no means."""
    found: dict[str, list[float]] = {}
    for value, picture in zip(score.each, pictures, strict=bool(score.each)):
        category = prompts.category(picture.prompt)
        if value is not None and category:
            found.setdefault(category, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def number(value: float) -> str:
    """Four significant digits, without an exponent where it can be."""
    return f"{value:.4g}"


def as_dict(results: Results) -> dict[str, Any]:
    """All numbers, for ``scores.json``: the scores of each folder and those of each of its pictures."""
    folders = {}
    for folder in results.folders:
        scores = results.scores[folder.name]
        folders[folder.name] = {
            "path": str(folder.path),
            "scores": {
                score.name: {
                    "value": score.value,
                    "better": score.better,
                    "pictures": score.pictures,
                    "standard_error": standard_error(score, folder.pictures),
                    "interval": interval(score, folder.pictures),
                    "by_category": by_category(score, folder.pictures, results.prompts),
                    "note": score.note,
                }
                for score in scores
            },
            "pictures": [
                {
                    "file": picture.path.relative_to(folder.path).as_posix(),
                    "prompt": picture.caption,
                    "category": results.prompts.category(picture.prompt),
                    "scores": {score.name: score.each[index] for score in scores if score.each},
                }
                for index, picture in enumerate(folder.pictures)
            ],
        }
    count = len(results.prompts.prompts)
    return {"prompts": count, "folders": folders, "failed": list(results.failed)}


def table(results: Results) -> list[str]:
    """Lines for the terminal: one score a row, one folder a column, notes below."""
    rows = [["", *(folder.name for folder in results.folders)]]
    for name in results.names:
        scores = [results.score(folder.name, name) for folder in results.folders]
        better = next(score.better for score in scores if score)
        row = [f"{name} ({better} is better)"]
        for folder, score in zip(results.folders, scores, strict=True):
            error = None if score is None else standard_error(score, folder.pictures)
            more = "" if error is None else f" ± {number(error)}"
            row.append("" if score is None else f"{number(score.value)}{more}")
        rows.append(row)
    for category in results.categories():
        rows.append([f"in {category}", *("" for _ in results.folders)])
        for name in results.names:
            row = [f"  {name}"]
            for folder in results.folders:
                score = results.score(folder.name, name)
                means = {} if score is None else by_category(score, folder.pictures, results.prompts)
                row.append(number(means[category]) if category in means else "")
            if any(row[1:]):
                rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] if results.names else []
    notes: dict[str, dict[str, None]] = {}
    for score in (score for scores in results.scores.values() for score in scores if score.note):
        notes.setdefault(score.note, {})[score.name] = None
    return [*lines, *(f"{', '.join(names)}: {note}" for note, names in notes.items())]


# -- the report: one HTML file


def html(results: Results, title: str, limit: int) -> Iterator[str]:
    """The page, in pieces. Pictures of at most ``limit`` prompts are shown, spread evenly over the list."""
    yield "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
    yield "<meta name=viewport content='width=device-width, initial-scale=1'>\n"
    yield f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n"
    count = len(results.prompts.prompts)
    sizes = (f"{len(folder.pictures)} pictures in {escape(folder.name)}" for folder in results.folders)
    yield f"<p>{count} prompts, {', '.join(sizes)}.</p>\n"
    yield from _score_table(results)
    if results.categories():
        yield "<h2>By category</h2>\n"
        yield from _category_tables(results)
    chosen = spread(count, limit)
    shown = "" if len(chosen) == count else f" <span class=dim>{len(chosen)} of {count} prompts</span>"
    yield f"<h2>Pictures{shown}</h2>\n"
    for index in chosen:
        yield from _prompt_pictures(results, index)
    yield "</html>\n"


def spread(count: int, limit: int) -> list[int]:
    """``limit`` numbers from 0 to ``count`` - 1, evenly spread; all of them where there are no more."""
    if count <= limit:
        return list(range(count))
    return [index * count // limit for index in range(limit)]


def _score_table(results: Results) -> Iterator[str]:
    heads = "".join(f"<th>{escape(folder.name)}" for folder in results.folders)
    yield f"<div class=wide><table><tr><th>score<th>better{heads}<th>\n"
    for name in results.names:
        scores = [results.score(folder.name, name) for folder in results.folders]
        there = [score for score in scores if score is not None]
        best = best_of(there)
        yield f"<tr><td>{escape(name)}<td class=dim>{there[0].better}"
        for folder, score in zip(results.folders, scores, strict=True):
            if score is None:
                yield "<td>"
                continue
            mark = " class=best" if len(there) > 1 and score.value == best.value else ""
            limits = interval(score, folder.pictures)
            more = (
                ""
                if limits is None
                else f" <span class=dim>{number(limits.low)} to {number(limits.high)}</span>"
            )
            yield f"<td{mark}>{number(score.value)}{more}"
        yield f"<td class=dim>{escape('; '.join(dict.fromkeys(s.note for s in there if s.note)))}\n"
    yield "</table></div>\n"
    yield "<p class=dim>Beside a mean: its 95 % limits, from prompts drawn again with replacement.</p>\n"
    if results.failed:
        yield "<p>Not taken: " + "; ".join(map(escape, results.failed)) + "</p>\n"


def _category_tables(results: Results) -> Iterator[str]:
    for folder in results.folders:
        means = {
            s.name: by_category(s, folder.pictures, results.prompts) for s in results.scores[folder.name]
        }
        named = [name for name, values in means.items() if values]
        if not named:
            continue
        yield f"<div class=wide><table><tr><th>{escape(folder.name)}"
        yield "".join(f"<th>{escape(name)}" for name in named) + "\n"
        for category in results.categories():
            cells = (means[name].get(category) for name in named)
            yield f"<tr><td>{escape(category)}"
            yield "".join("<td>" + ("" if value is None else number(value)) for value in cells) + "\n"
        yield "</table></div>\n"


def _prompt_pictures(results: Results, place: int) -> Iterator[str]:
    """The pictures of one prompt: folders side by side, several images of a prompt below one another."""
    prompt, category = results.prompts.prompts[place], results.prompts.categories[place]
    label = f" <span class=dim>{escape(category)}</span>" if category else ""
    yield f"<article><p>{prompt.index}. {escape(prompt.text)}{label}</p>\n"
    own = [[(i, p) for i, p in enumerate(f.pictures) if p.prompt == prompt.index] for f in results.folders]
    for row in range(max(map(len, own), default=0)):
        yield "<div class=row>"
        for folder, pictures in zip(results.folders, own, strict=True):
            if row < len(pictures):
                index, picture = pictures[row]
                values = [(s.name, s.each[index]) for s in results.scores[folder.name] if s.each]
                shown = ", ".join(f"{name} {number(value)}" for name, value in values if value is not None)
                small, data = thumbnail(picture.path)
                yield (
                    f"<figure><img{' class=small' if small else ''} loading=lazy "
                    f"alt='{escape(picture.caption)}' src='data:image/webp;base64,{data}'><figcaption>"
                    f"{escape(folder.name)} <span class=dim>{escape(shown)}</span></figcaption></figure>"
                )
        yield "</div>\n"
    yield "</article>\n"


def thumbnail(path: Path) -> tuple[bool, str]:
    """(is small, WebP bytes in base64); a small picture is kept whole and lossless."""
    (image,) = Opened([path])
    small = max(image.size) < SIDE
    if not small:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=88, lossless=small)
    return small, base64.b64encode(buffer.getvalue()).decode()
