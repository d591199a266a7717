"""The retrieval score: how often a classifier finds in a generated picture what its caption asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from sat.apps.evaluate.distances import frechet, statistics
from sat.apps.evaluate.pictures import Opened, collect
from sat.data.records import DataError
from sat.data.transforms import on_white, to_tensor
from sat.models.vision.classifier import Card, Classifier, embed, top_shares

ENOUGH = 500  # pictures for a feature distance that says something


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
    pixels = torch.stack([prepared(image, card.size) for _, image, _ in kept])
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


def prepared(image: PIL.Image.Image, size: int) -> torch.Tensor:
    """``image`` as (3, size, size) in [-1, 1]."""
    picture = on_white(image)
    if picture.size != (size, size):
        picture = picture.resize((size, size), PIL.Image.Resampling.LANCZOS)
    return to_tensor(np.asarray(picture))


def score_folder(images: Path, captions: Path | None, classifier: Classifier) -> Scores:
    """:func:`score` of what :func:`collect` finds."""
    found = collect(images, captions)
    names = [str(path.relative_to(images)) for path, _ in found]
    return score(Opened([path for path, _ in found]), [caption for _, caption in found], classifier, names)
