"""The retrieval score: how often a classifier finds in a generated picture what its caption asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from sat.data.records import CAPTION_KEYS, DataError
from sat.data.transforms import on_white, to_tensor
from sat.evaluate.classifier import Card, Classifier, embed, frechet, statistics, top_shares
from sat.sampling.prompts import read_prompt_file

ENOUGH = 500  # pictures for a feature distance that says something

_NUMBERED = re.compile(r"(\d+)_")
_DRAWN = re.compile(r"\d{9}\.png")


@dataclass(frozen=True)
class Wanted:
    """What a caption asks for; ``style`` None where it names none."""

    caption: str
    concept: str
    style: str | None


@dataclass(frozen=True)
class Judged:
    """One picture and what the classifier made of it."""

    where: str
    wanted: Wanted
    best: tuple[str, ...]  # five concepts, the likeliest first
    style: str

    @property
    def found(self) -> bool:
        """Whether the likeliest concept is the one asked for."""
        return self.best[0] == self.wanted.concept


@dataclass(frozen=True)
class Scores:
    """Shares over the judged pictures. ``style`` is over the ``styled`` ones, whose captions name a style.

    ``distance``: Fréchet distance of the features to those of real pictures, None for fewer than two.
    ``unknown``: captions that name no concept of the classifier; their pictures are not judged.
    """

    images: int
    top1: float
    top5: float
    style: float | None
    styled: int
    distance: float | None
    unknown: tuple[str, ...] = ()
    judged: tuple[Judged, ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, object]:
        """The numbers, and the pictures that were not recognised."""
        numbers = {
            name: getattr(self, name) for name in ("images", "top1", "top5", "style", "styled", "distance")
        }
        missed = [
            {"where": one.where, "caption": one.wanted.caption, "seen": list(one.best)}
            for one in self.judged
            if not one.found
        ]
        return {**numbers, "unknown": list(self.unknown), "missed": missed}


def wanted(caption: str, card: Card) -> Wanted | None:
    """The concept (the longest label in ``caption`` as whole words) and style it names, or None."""
    text = caption.lower()
    found = [label for label in card.concepts if _has(label.lower(), text)]
    if not found:
        return None
    style = next((s for s in card.styles if _has(f"{s} style", text) or _has(f"{s} emoji", text)), None)
    return Wanted(caption, max(found, key=len), style)


def _has(words: str, text: str) -> bool:
    """Whether ``words`` stand in ``text`` with no letter or digit beside them."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def score(
    images: Sequence[PIL.Image.Image],
    captions: Sequence[str],
    classifier: Classifier,
    names: Sequence[str] | None = None,
) -> Scores:
    """Judges ``images`` by the ``captions`` they were drawn for; ``names`` say where each is from."""
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images for {len(captions)} captions")
    if names is None:
        names = [str(number) for number in range(len(images))]
    card = classifier.card
    aims = [wanted(caption, card) for caption in captions]
    unknown = tuple(dict.fromkeys(c for c, aim in zip(captions, aims, strict=True) if aim is None))
    rows = zip(names, images, aims, strict=True)
    kept = [(name, image, aim) for name, image, aim in rows if aim is not None]
    if not kept:
        raise DataError(
            f"none of {len(captions)} captions names one of the {len(card.concepts)} concepts the classifier "
            "knows" + (f", e.g. {captions[0]!r}" if captions else "")
        )
    pixels = torch.stack([_prepared(image, card.size) for _, image, _ in kept])
    out = embed(classifier, pixels)
    target = torch.tensor([card.concepts.index(aim.concept) for _, _, aim in kept])
    top1, top5 = top_shares(out.concept, target)
    styles = [card.styles[index] for index in out.style.argmax(1).tolist()]
    styled = [style == aim.style for style, (_, _, aim) in zip(styles, kept, strict=True) if aim.style]
    best = out.concept.argsort(dim=1, descending=True)[:, :5].tolist()
    judged = tuple(
        Judged(name, aim, tuple(card.concepts[index] for index in row), style)
        for (name, _, aim), row, style in zip(kept, best, styles, strict=True)
    )
    distance = None
    if len(kept) > 1:
        distance = frechet(*statistics(out.features), classifier.real_mean.cpu(), classifier.real_cov.cpu())
    share = sum(styled) / len(styled) if styled else None
    return Scores(len(kept), top1, top5, share, len(styled), distance, unknown, judged)


def _prepared(image: PIL.Image.Image, size: int) -> torch.Tensor:
    """``image`` as (3, size, size) in [-1, 1]."""
    picture = on_white(image)
    if picture.size != (size, size):
        picture = picture.resize((size, size), PIL.Image.Resampling.LANCZOS)
    return to_tensor(np.asarray(picture))


def collect(images: Path, captions: Path | None = None) -> list[tuple[Path, str]]:
    """Pictures below ``images`` with their captions.

    ``captions`` may be a table (``.jsonl`` with file_name, relative to ``images``, and text) or a text file
    with one prompt a line for the folders ``<line number from 0>_…`` that sampling writes. Without it, the
    prompts are read from the PNG files themselves, where sampling keeps them.
    """
    if not images.is_dir():
        raise DataError(f"{images}: no such folder of images")
    if captions is None:
        found = _from_files(images)
    elif captions.suffix == ".jsonl":
        found = _from_table(images, captions)
    else:
        found = _from_lines(images, captions)
    if not found:
        raise DataError(f"{images}: no images with a caption" + (f" in {captions}" if captions else ""))
    return found


def _from_files(images: Path) -> list[tuple[Path, str]]:
    found = []
    for path in sorted(images.rglob("*.png")):
        if path.name == "grid.png":
            continue
        with PIL.Image.open(path) as file:
            prompt = file.info.get("prompt")
        if isinstance(prompt, str):
            found.append((path, prompt))
    return found


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
        if _DRAWN.fullmatch(path.name)
    ]


def open_all(found: Sequence[tuple[Path, str]]) -> list[PIL.Image.Image]:
    """The pictures of :func:`collect`, on white."""
    pictures = []
    for path, _ in found:
        try:
            with PIL.Image.open(path) as file:
                pictures.append(on_white(file))
        except OSError as error:
            raise DataError(f"{path}: {error}") from error
    return pictures


def score_folder(images: Path, captions: Path | None, classifier: Classifier) -> Scores:
    """:func:`score` of what :func:`collect` finds."""
    found = collect(images, captions)
    names = [str(path.relative_to(images)) for path, _ in found]
    return score(open_all(found), [caption for _, caption in found], classifier, names)
