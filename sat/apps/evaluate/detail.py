"""How fine detail compares: features of full-resolution crops; the other scores look at shrunk pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from sat.apps.evaluate.distances import frechet, frechet_of_many, kernel_distance, statistics
from sat.apps.evaluate.pictures import Opened, collect, pictures_below
from sat.data.records import HELD_OUT, TABLE, DataError
from sat.models.vision.classifier import Classifier, embed
from sat.util.images import from_pil


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


def crop_features(pictures: Iterable[PIL.Image.Image], classifier: Classifier) -> Tensor:
    """(crops, width) features of all crops of ``pictures``."""
    parts = [embed(classifier, crops(picture, classifier.card.size)).features for picture in pictures]
    if not parts:
        raise DataError("no pictures to compare")
    return torch.cat(parts)


def detail_distance(
    made: Iterable[PIL.Image.Image], real: Iterable[PIL.Image.Image], classifier: Classifier
) -> float:
    """Fréchet distance between the features of the crops of ``made`` and of ``real`` pictures."""
    ours, theirs = (statistics(crop_features(pictures, classifier)) for pictures in (made, real))
    return frechet(*ours, *theirs)


def fine_energy(made: Sequence[PIL.Image.Image], real: Sequence[PIL.Image.Image]) -> float:
    """Energy of ``made`` in frequencies that a picture of half the size cannot hold, over that of ``real``.

    1 is as much fine detail as real pictures have, 0 none: the power spectra of the grey pictures, averaged
    over each set and over directions, and the ratio geometrically averaged over the frequencies from a
    quarter to half a cycle a pixel. All pictures are squares of one size.
    """
    ours, theirs = _power(made), _power(real)
    half = len(ours) // 2
    return float((ours[half:] / theirs[half:]).log().mean().exp())


def _power(pictures: Sequence[PIL.Image.Image]) -> Tensor:
    """(side / 2 - 1) mean power at 1, 2, … cycles a picture."""
    if len({picture.size for picture in pictures}) != 1 or pictures[0].width != pictures[0].height:
        raise DataError("fine detail compares squares of one size")
    side = pictures[0].width
    grey = torch.stack([from_pil(picture).mean(0) for picture in pictures]).double()
    power = torch.fft.fft2(grey - grey.mean((1, 2), keepdim=True)).abs().square().mean(0)
    cycles = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    ring = (cycles[:, None] ** 2 + cycles**2).sqrt().round().long().flatten()
    count = torch.bincount(ring).double()
    return (torch.bincount(ring, power.flatten()) / count)[1 : side // 2]


@dataclass(frozen=True)
class Detail:
    """Scores of a folder of ``images`` pictures."""

    distance: float  # Fréchet
    limit: float | None  # the same, extrapolated to many pictures; None for few
    kernel: float
    energy: float
    images: int


def detail_of_folders(images: Path, real: Path, classifier: Classifier) -> Detail:
    """Distances and :func:`fine_energy` of generated pictures against those below ``real``."""
    found = collect(images)
    return detail(Opened([path for path, _ in found]), [text for _, text in found], real, classifier)


def detail(
    made: Sequence[PIL.Image.Image], captions: Sequence[str], real: Path, classifier: Classifier
) -> Detail:
    """As :func:`detail_of_folders`, of opened pictures and what each was drawn for."""
    there = real_pictures(real, {picture.size for picture in made})
    ours, theirs = (crop_features(pictures, classifier) for pictures in (made, there))
    known = _captions(real)
    ours_of = _repeated(captions, ours)
    theirs_of = _repeated([known.get(path, str(path)) for path in there.paths], theirs)
    return Detail(
        frechet(*statistics(ours), *statistics(theirs)),
        frechet_of_many(ours, theirs, ours_of, theirs_of),
        kernel_distance(ours, theirs),
        fine_energy(made, there),
        len(made),
    )


def _captions(folder: Path) -> dict[Path, str]:
    """The first caption of each picture in the tables of ``folder``."""
    tables = [folder / name for name in (TABLE, HELD_OUT) if (folder / name).is_file()]
    return {path: text for table in tables if table.stat().st_size for path, text in collect(folder, table)}


def _repeated(names: Sequence[str], features: Tensor) -> list[str]:
    """The name of each row of ``features``: all pictures have as many crops."""
    return [name for name in names for _ in range(len(features) // len(names))]


def real_pictures(folder: Path, sizes: Collection[tuple[int, int]]) -> Opened:
    """Pictures below ``folder``, which must have one of ``sizes`` (width, height)."""
    pictures = Opened(pictures_below(folder))
    for path, picture in zip(pictures.paths, pictures, strict=True):
        if picture.size not in sizes:
            wanted = ", ".join(f"{height} x {width}" for width, height in sorted(sizes))
            raise DataError(
                f"{path}: is {picture.height} x {picture.width} (height x width), the pictures are {wanted}: "
                f"detail compares at one size"
            )
    return pictures
