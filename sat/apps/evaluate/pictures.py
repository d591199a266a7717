"""Pictures to evaluate and the prompts they were drawn for."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import PIL.Image

from sat.data.records import CAPTION_KEYS, DataError
from sat.data.transforms import on_white
from sat.sampling.output import IMAGE, folder_name, numbered
from sat.sampling.prompts import Prompt, PromptError, checked_prompts, read_prompt_file
from sat.util.images import read_png_text

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


# -- pictures to be scored and the captions they were drawn for, found in folders and opened one at a time


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
GRID = "grid.png"
PICTURES = "pictures"
"""Where an evaluation's own folder keeps its pictures."""

_NUMBERED = re.compile(r"(\d+)_")


@dataclass(frozen=True)
class Picture:
    """Image ``image`` of prompt ``prompt`` of a run."""

    path: Path
    caption: str
    prompt: int = 0
    image: int = 0


class Opened(Sequence[PIL.Image.Image]):
    """Pictures on white, each read when it is asked for: thousands of large ones do not fit in memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    @overload
    def __getitem__(self, index: int) -> PIL.Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> Opened: ...

    def __getitem__(self, index: int | slice) -> PIL.Image.Image | Opened:
        if isinstance(index, slice):
            return Opened(self.paths[index])
        path = self.paths[index]
        try:
            with PIL.Image.open(path) as file:
                return on_white(file)
        except (OSError, SyntaxError) as error:
            raise DataError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return len(self.paths)


def drawn(folder: Path, prompts: Sequence[Prompt]) -> list[Picture]:
    """As :func:`found`, and none of the PNG files may say that it was drawn for another prompt."""
    pictures = found(folder, prompts)
    for picture in pictures:
        _same_prompt(picture)
    return pictures


def found(folder: Path, prompts: Sequence[Prompt]) -> list[Picture]:
    """The pictures of ``prompts`` in ``folder``, prompt by prompt, as many of each as of the first.

    Folders are ``<number>_…`` as sampling writes them; pictures of other programs are found by the same
    names, of any kind in :data:`SUFFIXES`. A prompt without pictures, or with fewer than others, is an error.
    The folder may be that of an evaluation, which has them in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    folder = folder / PICTURES if (folder / PICTURES).is_dir() else folder
    there = numbered(folder)
    missing = [prompt for prompt in prompts if prompt.index not in there]
    if missing:
        raise DataError(
            f"{folder}: no folder {missing[0].index}_… for prompt {missing[0].index}, {missing[0].text!r} "
            f"({len(missing)} of {len(prompts)} are missing)"
        )
    pictures: list[Picture] = []
    counts: dict[int, Path] = {}
    for prompt in prompts:
        own = folder / _own(folder, prompt, there[prompt.index])
        paths = _images(own)
        counts.setdefault(len(paths), own)
        pictures += [Picture(path, prompt.text, prompt.index, i) for i, path in enumerate(paths)]
    if len(counts) > 1 or 0 in counts:
        shown = ", ".join(f"{count} in {where.name}" for count, where in counts.items())
        raise DataError(f"{folder}: as many pictures of every prompt are expected, found {shown}")
    return pictures


def _own(root: Path, prompt: Prompt, names: Sequence[str]) -> str:
    """The folder of ``prompt`` among those with its number."""
    own = folder_name(prompt)
    if own in names or len(names) == 1:
        return own if own in names else names[0]
    raise DataError(f"{root}: several folders for prompt {prompt.index}: {', '.join(names[:3])}; keep one")


def _images(folder: Path) -> list[Path]:
    """Our numbered pictures, else those of another program."""
    every = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    ours = [path for path in every if IMAGE.fullmatch(path.name)]
    return ours or [path for path in every if path.name != GRID and not path.name.startswith(".")]


def _same_prompt(picture: Picture) -> None:
    """Refuse a picture that says it was drawn for another prompt."""
    text = (read_png_text(picture.path) or {}).get("prompt") if picture.path.suffix == ".png" else None
    if text is not None and text != picture.caption:
        raise DataError(
            f"{picture.path}: was drawn for {text!r}, but prompt {picture.prompt} is now {picture.caption!r}"
        )


def pictures_below(folder: Path) -> list[Path]:
    """All pictures below ``folder``; an error if there is none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.name != GRID)
    if not paths:
        raise DataError(f"{folder}: holds no pictures")
    return paths


def collect(images: Path, captions: Path | None = None) -> list[tuple[Path, str]]:
    """Pictures below ``images`` with their captions.

    ``captions`` may be a table (``.jsonl`` with file_name, relative to ``images``, and text) or a text file
    with one prompt a line for the folders ``<line number from 0>_…`` that sampling writes. Without it, the
    prompts are read from the PNG files themselves, where sampling keeps them.
    """
    if not images.is_dir():
        raise DataError(f"{images}: no such folder of images")
    if captions is None:
        found = list(_from_files(images))
    elif captions.suffix == ".jsonl":
        found = _from_table(images, captions)
    else:
        found = _from_lines(images, captions)
    if not found:
        raise DataError(f"{images}: no images with a caption" + (f" in {captions}" if captions else ""))
    return found


def _from_files(images: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(images.rglob("*.png")):
        if path.name == GRID:
            continue
        with PIL.Image.open(path) as file:
            prompt = file.info.get("prompt")
        if isinstance(prompt, str):
            yield path, prompt


def _from_table(images: Path, table: Path) -> list[tuple[Path, str]]:
    found = []
    for number, line in enumerate(table.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = next(row[key] for key in CAPTION_KEYS if row.get(key))
            found.append((images / row["file_name"], text if isinstance(text, str) else text[0]))
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            raise DataError(f"{table}:{number}: expected an object with file_name and text") from error
    return found


def _from_lines(images: Path, prompts: Path) -> list[tuple[Path, str]]:
    lines = read_prompt_file(prompts)
    folders = {int(m[1]): folder for folder in images.iterdir() if (m := _NUMBERED.match(folder.name))}
    missing = [index for index in range(len(lines)) if index not in folders]
    if missing:
        raise DataError(
            f"{images}: no folder {missing[0]}_… for prompt {missing[0]} of {prompts}, {lines[missing[0]]!r} "
            f"({len(missing)} of {len(lines)} are missing)"
        )
    return [
        (path, line)
        for index, line in enumerate(lines)
        for path in sorted(folders[index].iterdir())
        if IMAGE.fullmatch(path.name)
    ]
