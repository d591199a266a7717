"""Scores of the small classifier that ships: its files, retrieval by caption, and fine detail of crops."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat.apps.evaluate.distances import frechet, frechet_of_many, kernel_distance, statistics
from sat.apps.evaluate.pictures import Opened, collect, pictures_below
from sat.checkpoint.eight_bits import Whole, packed
from sat.checkpoint.format import as_lazy
from sat.data.records import HELD_OUT, TABLE, DataError, DataPathError
from sat.data.transforms import to_tensor
from sat.models.vision import classifier as network
from sat.models.vision.classifier import Card, embed, top_shares
from sat.sampling.output import from_pil
from sat.util.pictures import on_white

WEIGHTS, CARD = "classifier.safetensors", "classifier.json"
ENOUGH = 500  # pictures for a feature distance that says something


class Classifier(network.Classifier):
    """The network with its two files, ``classifier.safetensors`` and ``classifier.json``."""

    def stored(self, eight_bits: bool = False) -> dict[str, Tensor]:
        """The weights as the file has them: in fp16 or matrices in 8 bits, statistics in fp32 where small."""
        state, exact = self.state_dict(), {"real_mean"} if eight_bits else {"real_mean", "real_cov"}
        matrices = {n: t for n, t in state.items() if eight_bits and t.ndim > 1 and n != "real_cov"}
        rest = {n: t for n, t in state.items() if n not in matrices}
        halved = {n: t.half() for n, t in rest.items() if t.is_floating_point() and n not in exact}
        return {n: t.contiguous() for n, t in (rest | halved | packed(matrices)).items()}

    def take(self, stored: Mapping[str, Tensor], source: str = "memory") -> None:
        """Load what :meth:`stored` gave, from the file ``source``; float32 after."""
        self.load_state_dict(dict(Whole(as_lazy(stored, source))))
        self.float()

    def save(self, folder: Path, card: Card, eight_bits: bool = False) -> None:
        """Write the weights and ``card`` beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.stored(eight_bits), folder / WEIGHTS)
        (folder / CARD).write_text(json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """The classifier saved in ``folder``, float32, in evaluation mode."""
        missing = [name for name in (WEIGHTS, CARD) if not (folder / name).is_file()]
        if missing:
            raise DataPathError(
                f"{folder}: no {' and no '.join(missing)}; train one with "
                "'python -m sat.cli.evaluate train-classifier'"
            )
        model = cls(Card.of(json.loads((folder / CARD).read_text("utf-8"))))
        model.take(load_file(folder / WEIGHTS), str(folder / WEIGHTS))
        return model.eval()


# -- retrieval: how often the classifier finds in a picture the thing that its caption names


@dataclass(frozen=True)
class Wanted:
    """Concept and style that a caption names; ``style`` None without one."""

    caption: str
    concept: str
    style: str | None


@dataclass(frozen=True)
class Judged:
    """One picture and the classifier's answers."""

    where: str
    wanted: Wanted
    best: tuple[str, ...]  # five concepts, the likeliest first
    style: str

    @property
    def found(self) -> bool:
        """True if the likeliest concept is the one of the caption."""
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
        names = ("images", "top1", "top5", "style", "styled", "distance")
        missed = [
            {"where": one.where, "caption": one.wanted.caption, "seen": list(one.best)}
            for one in self.judged
            if not one.found
        ]
        numbers = {name: getattr(self, name) for name in names}
        return {**numbers, "unknown": list(self.unknown), "missed": missed}


def wanted(caption: str, card: Card) -> Wanted | None:
    """The concept (the longest label in ``caption`` as whole words) and style it names, or None."""
    text = caption.lower()

    def named(words: str) -> bool:  # with no letter or digit beside them
        return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None

    found = [label for label in card.concepts if named(label.lower())]
    if not found:
        return None
    style = next((s for s in card.styles if named(f"{s} style") or named(f"{s} emoji")), None)
    return Wanted(caption, max(found, key=len), style)


def score(
    images: Sequence[PIL.Image.Image],
    captions: Sequence[str],
    classifier: network.Classifier,
    names: Sequence[str] | None = None,
) -> Scores:
    """Judge ``images`` by the ``captions`` they were drawn for; ``names`` say the origin of each."""
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
    out = embed(classifier, torch.stack([prepared(image, card.size) for _, image, _ in kept]))
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


def prepared(image: PIL.Image.Image, size: int) -> Tensor:
    """``image`` as (3, size, size) in [-1, 1]."""
    picture = on_white(image)
    if picture.size != (size, size):
        picture = picture.resize((size, size), PIL.Image.Resampling.LANCZOS)
    return to_tensor(np.asarray(picture))


def score_folder(images: Path, captions: Path | None, classifier: network.Classifier) -> Scores:
    """:func:`score` of the pictures and captions that :func:`collect` finds."""
    found = collect(images, captions)
    names = [str(path.relative_to(images)) for path, _ in found]
    return score(Opened([path for path, _ in found]), [caption for _, caption in found], classifier, names)


# -- fine detail: features of full-resolution crops; the other scores look at shrunk pictures


@dataclass(frozen=True)
class Detail:
    """Fine detail of ``images`` pictures against real ones."""

    distance: float  # Fréchet
    limit: float | None  # the same, extrapolated to many pictures; None for few
    kernel: float
    energy: float
    images: int


def crops(image: PIL.Image.Image, side: int) -> Tensor:
    """(n, 3, side, side) in [-1, 1]: squares that overlap by half and cover a picture at least that large."""
    pixels = from_pil(image)  # (3, H, W)
    height, width = pixels.shape[1:]
    if min(height, width) < side:
        raise DataError(f"a picture of {height} x {width} is smaller than the classifier's {side} x {side}")
    starts = []
    for length in (height, width):
        count = 1 + -(-(length - side) // max(side // 2, 1))
        starts.append([round(i * (length - side) / max(count - 1, 1)) for i in range(count)])
    return torch.stack([pixels[:, t : t + side, x : x + side] for t in starts[0] for x in starts[1]])


def crop_features(pictures: Iterable[PIL.Image.Image], classifier: network.Classifier) -> Tensor:
    """(crops, width) features of all crops of ``pictures``."""
    parts = [embed(classifier, crops(picture, classifier.card.size)).features for picture in pictures]
    if not parts:
        raise DataError("no pictures to compare")
    return torch.cat(parts)


def detail_distance(
    made: Iterable[PIL.Image.Image], real: Iterable[PIL.Image.Image], classifier: network.Classifier
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
    spectra = []
    for pictures in (made, real):
        if len({picture.size for picture in pictures}) != 1 or pictures[0].width != pictures[0].height:
            raise DataError("fine detail compares squares of one size")
        side = pictures[0].width
        grey = torch.stack([from_pil(picture).mean(0) for picture in pictures]).double()  # (n, side, side)
        power = torch.fft.fft2(grey - grey.mean((1, 2), keepdim=True)).abs().square().mean(0)
        cycles = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
        ring = (cycles[:, None] ** 2 + cycles**2).sqrt().round().long().flatten()
        mean = torch.bincount(ring, power.flatten()) / torch.bincount(ring).double()
        spectra.append(mean[1 : side // 2])  # at 1, 2, … cycles a picture
    ours, theirs = spectra
    half = len(ours) // 2
    return float((ours[half:] / theirs[half:]).log().mean().exp())


def detail(
    made: Sequence[PIL.Image.Image], captions: Sequence[str], real: Path, classifier: network.Classifier
) -> Detail:
    """Distances and :func:`fine_energy` of opened pictures, each with its caption, against those in ``real``.

    A real picture's caption is its first one in the tables of its folder.
    """
    there = real_pictures(real, {picture.size for picture in made})
    ours, theirs = (crop_features(pictures, classifier) for pictures in (made, there))
    tables = [real / name for name in (TABLE, HELD_OUT) if (real / name).is_file()]
    known = {path: text for table in tables if table.stat().st_size for path, text in collect(real, table)}

    def of_crops(names: Sequence[str], features: Tensor) -> list[str]:  # all pictures have as many crops
        return [name for name in names for _ in range(len(features) // len(names))]

    return Detail(
        frechet(*statistics(ours), *statistics(theirs)),
        frechet_of_many(
            ours,
            theirs,
            of_crops(captions, ours),
            of_crops([known.get(path, str(path)) for path in there.paths], theirs),
        ),
        kernel_distance(ours, theirs),
        fine_energy(made, there),
        len(made),
    )


def real_pictures(folder: Path, sizes: Collection[tuple[int, int]]) -> Opened:
    """Pictures below ``folder``, which must have one of ``sizes`` (width, height)."""
    pictures = Opened(pictures_below(folder))
    for path, picture in zip(pictures.paths, pictures, strict=True):
        if picture.size not in sizes:
            expected = ", ".join(f"{height} x {width}" for width, height in sorted(sizes))
            raise DataError(
                f"{path}: is {picture.height} x {picture.width} (height x width), the pictures are "
                f"{expected}: detail compares at one size"
            )
    return pictures
