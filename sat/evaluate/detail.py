"""How fine detail compares: features of full-resolution crops; the other scores look at shrunk pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from sat.data.records import DataError
from sat.evaluate.classifier import Classifier, embed, frechet, statistics
from sat.evaluate.retrieval import collect, open_all
from sat.util.images import from_pil

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def crops(image: PIL.Image.Image, side: int) -> Tensor:
    """(n, 3, side, side) in [-1, 1]: squares that overlap by half and cover a picture at least that large."""
    pixels = from_pil(image)
    height, width = pixels.shape[1:]
    if min(height, width) < side:
        raise DataError(f"a picture of {height} x {width} is smaller than the classifier's {side} x {side}")
    tops, lefts = (_starts(length, side) for length in (height, width))
    return torch.stack([pixels[:, t : t + side, x : x + side] for t in tops for x in lefts])


def _starts(length: int, side: int) -> list[int]:
    count = 1 + -(-(length - side) // max(side // 2, 1))
    return [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]


def detail_distance(
    made: Iterable[PIL.Image.Image], real: Iterable[PIL.Image.Image], classifier: Classifier
) -> float:
    """Fréchet distance between the features of the crops of ``made`` and of ``real`` pictures."""
    stats = []
    for pictures in (made, real):
        parts = [embed(classifier, crops(picture, classifier.card.size)).features for picture in pictures]
        if not parts:
            raise DataError("no pictures to compare")
        stats.append(statistics(torch.cat(parts)))
    return frechet(*stats[0], *stats[1])


def detail_of_folders(images: Path, real: Path, classifier: Classifier) -> tuple[float, int]:
    """:func:`detail_distance` of generated pictures to those below ``real``, and how many there are."""
    made = open_all(collect(images))
    there = real_pictures(real, {picture.size for picture in made})
    return detail_distance(made, there, classifier), len(made)


def real_pictures(folder: Path, sizes: Collection[tuple[int, int]]) -> list[PIL.Image.Image]:
    """Pictures below ``folder``, which must have one of ``sizes`` (width, height)."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise DataError(f"{folder}: holds no pictures")
    pictures = open_all([(path, "") for path in paths])
    for path, picture in zip(paths, pictures, strict=True):
        if picture.size not in sizes:
            wanted = ", ".join(f"{height} x {width}" for width, height in sorted(sizes))
            raise DataError(
                f"{path}: is {picture.height} x {picture.width} (height x width), the pictures are {wanted}: "
                f"detail compares at one size"
            )
    return pictures
