"""Captions of one picture, with weights: the recipe the small model is trained on."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from sat.apps.emoji.concepts import Concept

TAG_VARIANTS = 3  # captions with different pairs of tags


class Caption(NamedTuple):
    """A caption and how often it is drawn (the weights of one picture sum to 1)."""

    text: str
    weight: float


def with_article(label: str) -> str:
    """``label`` with "a" or "an" before it, as people type; unchanged where it is plural or has one."""
    last = label.split(" with ")[0].split(" of ")[0].split()[-1].lower()
    if label.startswith(("a ", "an ", "the ")) or (
        last.endswith("s") and not last.endswith(("ss", "us", "is"))
    ):
        return label
    return f"{'an' if re.match('[aeiouAEIO]', label) and not label.startswith('uni') else 'a'} {label}"


def captions(concept: Concept, style: str) -> list[Caption]:
    """Weighted captions of ``concept`` drawn in ``style``.

    45 % "red apple, noto style"; 20 % "a noto emoji of red apple"; 15 % the label alone, half of it with an
    article; 20 % the label, two of its tags and the style (without tags, the first form takes its place).
    """
    label = concept.label
    named = f"{label}, {style} style"
    tagged = _tagged(concept, style)
    bare, articled = label, with_article(label)
    weights: dict[str, float] = {}
    article = "an" if style[0] in "aeiou" else "a"
    for caption, weight in (
        (named, 0.45),
        (f"{article} {style} emoji of {label}", 0.20),
        (bare, 0.075),
        (articled, 0.075),
        *((caption, 0.20 / len(tagged)) for caption in tagged),
    ):
        weights[caption] = weights.get(caption, 0.0) + weight
    return [Caption(text, round(weight, 6)) for text, weight in weights.items()]


def _tagged(concept: Concept, style: str) -> list[str]:
    """Up to ``TAG_VARIANTS`` captions with two tags each, the same ones every time."""
    if not concept.tags:
        return [f"{concept.label}, {style} style"]
    chooser = random.Random(f"{concept.code}/{style}")
    pick = min(2, len(concept.tags))
    drawn = (chooser.sample(concept.tags, pick) for _ in range(TAG_VARIANTS))
    return list(dict.fromkeys(f"{concept.label}, {', '.join(tags)}, {style} style" for tags in drawn))
