"""Prompt lists with categories, and the pictures of folders with their captions."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import PIL.Image

from sat.data.formats import decoded
from sat.data.records import CAPTION_KEYS, IMAGE_SUFFIXES, DataError, DataPathError
from sat.data.sources import files_below
from sat.sampling.output import IMAGE, folder_name, numbered, read_png_text
from sat.sampling.prompts import MOST_BYTES, TEXTS, Prompt, PromptError, checked_prompts, read_prompt_file
from sat.util.host import read_bounded
from sat.util.pictures import PictureError, open_picture, shown

ITEM = "item_id"
"""Column of DPG-Bench's name of a prompt."""

GRID = "grid.png"
PICTURES = "pictures"
"""Folder for pictures in an evaluation's own folder."""

_NUMBERED = re.compile(r"(\d+)_")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptList:
    """Numbered prompts, their categories ("" for none), and the names of a benchmark for them, if any."""

    prompts: tuple[Prompt, ...]
    categories: tuple[str, ...]
    names: tuple[str, ...] = ()

    def category(self, prompt: int) -> str:
        """The category of the prompt with that number."""
        return self.categories[prompt]


def plain(texts: Sequence[str]) -> PromptList:
    """``texts`` without categories."""
    return PromptList(tuple(checked_prompts(texts)), ("",) * len(texts))


def read_list(path: Path) -> PromptList:
    """The prompts of a file: ``.csv`` or ``.tsv`` with a head, ``.jsonl``, ``.json``, else one a line.

    Tables have a column of :data:`TEXTS` and may have one called category (GenEval's: tag). ``.json`` is a
    list of strings or objects, or COCO's captions (an object with ``annotations``). DPG-Bench's prompts are a
    folder of ``<item_id>.txt``, or a ``.csv`` with several rows of one ``item_id``, which count once. Rows of
    ``.jsonl`` may have settings of their own (docs/edit.md).
    """
    if path.is_dir():
        return _folder_of_texts(path)
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".json"):
        return plain(read_prompt_file(path))
    try:
        text = read_bounded(path, MOST_BYTES).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise PromptError(f"prompt list {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"prompt list {path} cannot be read: {error}") from error
    rows = _table_rows(path, text) if suffix in (".csv", ".tsv") else _json_rows(path, text)
    if not rows:
        raise PromptError(f"prompt list {path} holds no prompt")
    texts, categories, items = [], [], dict[object, None]()
    for number, row in rows:
        if (item := row.get(ITEM)) in items:
            continue
        prompt = next((row[name] for name in TEXTS if row.get(name)), None)
        if not isinstance(prompt, str) or not prompt.strip():
            raise PromptError(
                f"prompt list {path}, line {number}: no prompt; expected text in {' or '.join(TEXTS)}"
            )
        texts.append(" ".join(prompt.split()))
        categories.append(str(row.get("category") or row.get("tag") or "").strip())
        if item:
            items[item] = None
    names = tuple(str(item) for item in items) if len(items) == len(texts) else ()
    return PromptList(tuple(checked_prompts(texts)), tuple(categories), names)


def _folder_of_texts(path: Path) -> PromptList:
    """A prompt a file."""
    files = sorted(path.glob("*.txt"))
    if not files:
        raise PromptError(f"prompt list {path}: a folder without .txt files, one for each prompt")
    texts = [" ".join(" ".join(read_prompt_file(file)).split()) for file in files]
    return replace(plain(texts), names=tuple(file.stem for file in files))


def _table_rows(path: Path, text: str) -> list[tuple[int, Mapping[str, object]]]:
    """Line number and values by column, of ``.csv`` and ``.tsv``."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)
    names = [name.strip().lower() for name in reader.fieldnames or []]
    if not set(names) & set(TEXTS):
        raise PromptError(
            f"prompt list {path}: no column of prompts; expected one called {' or '.join(TEXTS)}, "
            f"it has {', '.join(names) or 'none'}"
        )
    rows: list[tuple[int, Mapping[str, object]]] = []
    for row in reader:
        if any(map(str.strip, row.get(None) or ())):
            raise PromptError(
                f"prompt list {path}, line {reader.line_num}: more fields than the header has; quote texts "
                "with separators"
            )
        rows.append((reader.line_num, {str(k).strip().lower(): v for k, v in row.items() if k}))
    return rows


def _json_rows(path: Path, text: str) -> list[tuple[int, Mapping[str, object]]]:
    """Line number and values by key, of ``.json`` and ``.jsonl``; a string is a text without category."""
    whole = path.suffix.lower() == ".json"
    rows: list[tuple[int, Mapping[str, object]]] = []
    for number, line in [(1, text)] if whole else enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise PromptError(f"prompt list {path}, line {number}: not JSON ({error})") from error
        if whole and isinstance(value, dict) and "annotations" in value:
            value = value["annotations"]
        for item in value if whole and isinstance(value, list) else [value]:
            row = item if isinstance(item, Mapping) else {"text": item}
            rows.append((number, {str(key).lower(): inner for key, inner in row.items()}))
    return rows


@dataclass(frozen=True)
class Picture:
    """Image ``image`` of prompt ``prompt`` of a run."""

    path: Path
    caption: str
    prompt: int = 0
    image: int = 0


class Opened(Sequence[PIL.Image.Image]):
    """Pictures on white, each read when it is indexed: thousands of large ones do not fit in memory."""

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
            with open_picture(path) as file:
                return shown(file)
        except PictureError as error:
            raise DataError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return len(self.paths)


def drawn(folder: Path, prompts: Sequence[Prompt]) -> list[Picture]:
    """As :func:`found`, and none of the PNG files may say that it was drawn for another prompt."""
    pictures = found(folder, prompts)
    for picture in pictures:
        text = named_prompt(picture.path)
        if text is not None and text != picture.caption:
            raise DataError(
                f"{picture.path}: was drawn for {text!r}, but prompt {picture.prompt} is now "
                f"{picture.caption!r}"
            )
    return pictures


def named_prompt(path: Path) -> str | None:
    """The prompt that a PNG file of ours names; None for other files."""
    return (read_png_text(path) or {}).get("prompt") if path.suffix == ".png" else None


def inner_folder(folder: Path) -> Path:
    """The folder of the pictures: ``folder``, or the one in it where it is that of an evaluation."""
    if not folder.is_dir():
        raise DataPathError(f"{folder}: no such folder of images")
    return folder / PICTURES if (folder / PICTURES).is_dir() else folder


def found(folder: Path, prompts: Sequence[Prompt]) -> list[Picture]:
    """The pictures of ``prompts`` in ``folder``, prompt by prompt, as many of each as of the first.

    Folders are ``<number>_…`` as sampling writes them; pictures of other programs are found by the same
    names, of any kind that is read. A prompt without pictures, or with fewer than others, is an error.
    The folder may be that of an evaluation, which has them in it.
    """
    folder = inner_folder(folder)
    there = numbered(folder)
    if missing := [prompt for prompt in prompts if prompt.index not in there]:
        raise DataError(
            f"{folder}: no folder {missing[0].index}_… for prompt {missing[0].index}, {missing[0].text!r} "
            f"({len(missing)} of {len(prompts)} are missing)"
        )
    pictures: list[Picture] = []
    counts: dict[int, Path] = {}
    for prompt in prompts:
        names, name = there[prompt.index], folder_name(prompt)
        if name not in names and len(names) > 1:
            raise DataError(
                f"{folder}: several folders for prompt {prompt.index}: {', '.join(names[:3])}; keep one"
            )
        own = folder / (name if name in names else names[0])
        every = sorted(path for path in own.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        paths = [path for path in every if IMAGE.fullmatch(path.name)]  # ours, else another program's
        paths = paths or [path for path in every if path.name != GRID and not path.name.startswith(".")]
        counts.setdefault(len(paths), own)
        pictures += [Picture(path, prompt.text, prompt.index, i) for i, path in enumerate(paths)]
    if len(counts) > 1 or 0 in counts:
        shown = ", ".join(f"{count} in {where.name}" for count, where in counts.items())
        raise DataError(f"{folder}: as many pictures of every prompt are expected, found {shown}")
    return pictures


def pictures_below(folder: Path) -> list[Path]:
    """All pictures below ``folder``; an error if there is none."""
    if not folder.is_dir():
        raise DataPathError(f"{folder}: no such folder of images")
    paths = [p for p in files_below(folder) if p.suffix.lower() in IMAGE_SUFFIXES and p.name != GRID]
    if not paths:
        raise DataPathError(f"{folder}: holds no pictures")
    return paths


def collect(  # noqa: C901 - three places that captions come from
    images: Path, captions: Path | None = None
) -> list[tuple[Path, str]]:
    """Pictures below ``images`` with their captions.

    ``captions`` may be a table (``.jsonl`` with file_name, relative to ``images``, and text) or a text file
    with one prompt a line for the folders ``<line number from 0>_…`` that sampling writes. Without it, the
    prompts are read from the PNG files themselves, where sampling keeps them.
    """
    if not images.is_dir():
        raise DataPathError(f"{images}: no such folder of images")
    found, unnamed = list[tuple[Path, str]](), list[Path]()
    if captions is None:
        for path in (path for path in files_below(images) if path.suffix == ".png" and path.name != GRID):
            try:
                with open_picture(path) as file:
                    prompt = file.info.get("prompt")
            except PictureError as error:
                raise DataError(f"{path}: {error}") from error
            if isinstance(prompt, str):
                found.append((path, prompt))
            else:
                unnamed.append(path)
        if unnamed:
            what = "%d PNG files name no prompt in their text, such as %s: left out; --captions gives some"
            log.warning(what, len(unnamed), unnamed[0])
    elif captions.suffix == ".jsonl":
        try:
            lines = decoded(read_bounded(captions, MOST_BYTES)).splitlines()
        except (OSError, ValueError) as error:
            raise DataPathError(f"{captions}: {getattr(error, 'strerror', None) or error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = next(row[key] for key in CAPTION_KEYS if row.get(key))
                found.append((images / row["file_name"], text if isinstance(text, str) else text[0]))
            except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
                message = f"{captions}:{number}: expected an object with file_name and text"
                raise DataPathError(message) from error
    else:
        found = _of_lines(images, captions)
    if not found:
        raise DataPathError(f"{images}: no images with a caption" + (f" in {captions}" if captions else ""))
    return found


def _of_lines(images: Path, prompts: Path) -> list[tuple[Path, str]]:
    """Pictures of the folders ``<line number>_…`` with that line of a text file."""
    lines = read_prompt_file(prompts)
    folders = {int(m[1]): folder for folder in images.iterdir() if (m := _NUMBERED.match(folder.name))}
    if missing := [index for index in range(len(lines)) if index not in folders]:
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
