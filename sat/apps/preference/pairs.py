"""Pairs of pictures drawn for the same prompt, in the order and on the sides that a rater sees them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from sat.apps.evaluate.pictures import PICTURES, Picture, PromptList, found
from sat.data.records import DataError
from sat.sampling.output import numbered
from sat.sampling.prompts import Prompt
from sat.util.images import read_png_text

Side = Literal["a", "b"]

QUESTIONS: Mapping[str, str] = {
    "alignment": "Which picture fits the text better?",
    "quality": "Which picture looks better?",
}
"""What is asked of every pair, as the paper's raters were asked: how well the prompt is met, and beauty."""


@dataclass(frozen=True)
class Pair:
    """Pictures ``a`` and ``b`` of one prompt."""

    name: str  # <number of the prompt>_<number of the image>
    prompt: Prompt
    a: Path
    b: Path


class Item(NamedTuple):
    """One question to a rater about one pair, with the picture that stands on the left."""

    pair: Pair
    question: str
    left: Side

    @property
    def name(self) -> str:
        """The pair and the question."""
        return f"{self.pair.name}/{self.question}"

    def chosen(self, side: Literal["left", "right", "tie"]) -> Literal["a", "b", "tie"]:
        """What a choice on the page means."""
        if side == "tie":
            return "tie"
        return self.left if side == "left" else ("b" if self.left == "a" else "a")


def pairs_of(a: Path, b: Path, prompts: PromptList | None) -> tuple[list[Pair], list[str]]:
    """Pairs of the prompts that both folders have, and what was left out in a line each.

    Without ``prompts``, the prompts are those that the PNG files name; with them, the texts shown are the
    list's, whatever the pictures were drawn for: a model may have been given expanded prompts.
    """
    indices = {folder: set(numbered(_inner(folder))) for folder in (a, b)}
    common = sorted(indices[a] & indices[b])
    known = list(prompts.prompts) if prompts is not None else _named(a, b, common)
    both = [prompt for prompt in known if prompt.index in indices[a] and prompt.index in indices[b]]
    if not both:
        raise DataError(f"{a} and {b} have no prompt in common: folders <number>_… as sample.py writes them")
    notes = [
        f"{folder}: {len(missing)} prompts have pictures here alone, such as number {missing[0]}; left out"
        for folder, other in ((a, b), (b, a))
        if (missing := sorted(indices[folder] - indices[other]))
    ]
    ours, theirs = found(a, both), found(b, both)
    if len(ours) != len(theirs):
        fewest = min(len(ours), len(theirs)) // len(both)
        notes.append(f"{fewest} pictures of each prompt are compared, the smaller number of the two folders")
    right = {(picture.prompt, picture.image): picture for picture in theirs}
    return [_pair(one, right[key], both) for one in ours if (key := (one.prompt, one.image)) in right], notes


def _pair(one: Picture, other: Picture, prompts: Sequence[Prompt]) -> Pair:
    prompt = next(prompt for prompt in prompts if prompt.index == one.prompt)
    return Pair(f"{one.prompt}_{one.image}", prompt, one.path, other.path)


def _inner(folder: Path) -> Path:
    """Where the pictures of ``folder`` are."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    return folder / PICTURES if (folder / PICTURES).is_dir() else folder


def _named(a: Path, b: Path, indices: Sequence[int]) -> list[Prompt]:
    """The prompts that the pictures of ``a`` name; those of ``b`` must not name others."""
    prompts = []
    for index in indices:
        texts = []
        for folder in (a, b):
            path = found(folder, [Prompt(index, "")])[0].path
            text = (read_png_text(path) or {}).get("prompt") if path.suffix == ".png" else None
            texts += [] if text is None else [text]
        if not texts:
            raise DataError(
                f"{a}: the pictures of prompt {index} do not say what it was: give --prompts FILE"
            )
        if len(set(texts)) > 1:
            raise DataError(
                f"prompt {index} is {texts[0]!r} in {a} and {texts[1]!r} in {b}: give the texts to show "
                f"with --prompts FILE"
            )
        prompts.append(Prompt(index, texts[0]))
    return prompts


def order(pairs: Sequence[Pair], questions: Sequence[str], rater: str, seed: int) -> list[Item]:
    """Every question about every pair, in an order of this rater's; a pair's questions follow one another.

    Sides are drawn anew for each rater and pair, so that neither place nor order tells which is which.
    """
    shuffled = list(pairs)
    random.Random(f"{seed}/{rater}").shuffle(shuffled)
    sides: Sequence[Side] = ("a", "b")
    return [
        Item(pair, question, random.Random(f"{seed}/{rater}/{pair.name}").choice(sides))
        for pair in shuffled
        for question in questions
    ]


def fingerprint(pairs: Sequence[Pair]) -> str:
    """16 hexadecimal digits that tell these pairs from others: by prompts, file names and sizes."""
    told = [
        [pair.name, pair.prompt.text, *((path.name, path.stat().st_size) for path in (pair.a, pair.b))]
        for pair in pairs
    ]
    return hashlib.sha256(json.dumps(told).encode("utf-8", "surrogatepass")).hexdigest()[:16]
