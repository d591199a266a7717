"""A report that is one HTML file: scores of several folders, their pictures side by side."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from sat.apps.evaluate.metrics import best_of
from sat.apps.evaluate.pictures import Opened, Picture
from sat.apps.evaluate.scores import Folder, Results, by_category, number, standard_error

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


def html(results: Results, title: str, limit: int) -> Iterator[str]:
    """The page in pieces. Pictures of at most ``limit`` prompts are shown, spread evenly over the list."""
    yield "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
    yield "<meta name=viewport content='width=device-width, initial-scale=1'>\n"
    yield f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n"
    count = len(results.prompts.prompts)
    yield f"<p>{count} prompts, {', '.join(_size(folder) for folder in results.folders)}.</p>\n"
    yield from _table(results)
    yield from _category_tables(results)
    chosen = spread(count, limit)
    shown = "" if len(chosen) == count else f" <span class=dim>{len(chosen)} of {count} prompts</span>"
    yield f"<h2>Pictures{shown}</h2>\n"
    for index in chosen:
        yield from _prompt(results, index)
    yield "</html>\n"


def spread(count: int, limit: int) -> list[int]:
    """``limit`` numbers from 0 to ``count`` - 1, evenly spread; all of them where there are no more."""
    if count <= limit:
        return list(range(count))
    return [index * count // limit for index in range(limit)]


def _size(folder: Folder) -> str:
    return f"{len(folder.pictures)} pictures in {escape(folder.name)}"


def _table(results: Results) -> Iterator[str]:
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
            error = standard_error(score, folder.pictures)
            more = "" if error is None else f" <span class=dim>± {number(error)}</span>"
            yield f"<td{mark}>{number(score.value)}{more}"
        yield f"<td class=dim>{escape('; '.join(dict.fromkeys(s.note for s in there if s.note)))}\n"
    yield "</table></div>\n"
    if results.failed:
        yield "<p>Not taken: " + "; ".join(map(escape, results.failed)) + "</p>\n"


def _category_tables(results: Results) -> Iterator[str]:
    categories = results.categories()
    if not categories:
        return
    yield "<h2>By category</h2>\n"
    for folder in results.folders:
        means = {
            s.name: by_category(s, folder.pictures, results.prompts) for s in results.scores[folder.name]
        }
        named = [name for name, values in means.items() if values]
        if not named:
            continue
        yield f"<div class=wide><table><tr><th>{escape(folder.name)}"
        yield "".join(f"<th>{escape(name)}" for name in named) + "\n"
        for category in categories:
            cells = (means[name].get(category) for name in named)
            yield f"<tr><td>{escape(category)}"
            yield "".join("<td>" + ("" if value is None else number(value)) for value in cells) + "\n"
        yield "</table></div>\n"


def _prompt(results: Results, index: int) -> Iterator[str]:
    """The pictures of one prompt: folders side by side, several images of a prompt below one another."""
    prompt = results.prompts.prompts[index]
    category = results.prompts.categories[index]
    label = f" <span class=dim>{escape(category)}</span>" if category else ""
    yield f"<article><p>{prompt.index}. {escape(prompt.text)}{label}</p>\n"
    own = [[(i, p) for i, p in enumerate(f.pictures) if p.prompt == prompt.index] for f in results.folders]
    for number_ in range(max(map(len, own), default=0)):
        yield "<div class=row>"
        for folder, pictures in zip(results.folders, own, strict=True):
            if number_ < len(pictures):
                yield _figure(results, folder, *pictures[number_])
        yield "</div>\n"
    yield "</article>\n"


def _figure(results: Results, folder: Folder, index: int, picture: Picture) -> str:
    values = [(s.name, s.each[index]) for s in results.scores[folder.name] if s.each]
    told = ", ".join(f"{name} {number(value)}" for name, value in values if value is not None)
    small, data = thumbnail(picture.path)
    mark = " class=small" if small else ""
    alt = escape(picture.caption)
    return (
        f"<figure><img{mark} loading=lazy alt='{alt}' src='data:image/webp;base64,{data}'><figcaption>"
        f"{escape(folder.name)} <span class=dim>{escape(told)}</span></figcaption></figure>"
    )


def thumbnail(path: Path) -> tuple[bool, str]:
    """Whether the picture is too small to need shrinking, and its WebP bytes in base64."""
    (image,) = Opened([path])
    small = max(image.size) < SIDE
    if not small:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=88, lossless=small)
    return small, base64.b64encode(buffer.getvalue()).decode()
