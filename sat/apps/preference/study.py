"""A study of preferences: pairs of pictures for the same prompt, in each rater's own order and sides."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sat.apps.evaluate.pictures import Opened, PromptList, found, inner_folder, named_prompt
from sat.apps.preference.votes import Choice, Side, Vote, VoteFile
from sat.data.records import HELD_OUT, TABLE, DataError
from sat.sampling.output import numbered
from sat.sampling.prompts import Prompt
from sat.util.pictures import PictureError, open_picture

Place = Literal["left", "right", "tie"]

QUESTIONS: Mapping[str, str] = {
    "alignment": "Which picture fits the text better?",
    "quality": "Which picture looks better?",
}
"""Questions about every pair, those of the paper to its raters: how well the prompt is met, and beauty."""


class BadRequestError(ValueError):
    """A request of the page that is not possible; the text is shown to the rater."""


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
    def right(self) -> Side:
        """The picture that stands on the right."""
        return "b" if self.left == "a" else "a"

    @property
    def name(self) -> str:
        """The pair and the question."""
        return f"{self.pair.name}/{self.question}"

    def chosen(self, side: Place) -> Choice:
        """The vote for a choice on the page."""
        return "tie" if side == "tie" else self.left if side == "left" else self.right


def pairs_of(a: Path, b: Path, prompts: PromptList | None) -> tuple[list[Pair], list[str]]:
    """Pairs of the prompts that both folders have, and a line for each thing that was left out.

    Without ``prompts``, the prompts are those that the PNG files name; with them, the texts shown are the
    list's, whatever the pictures were drawn for: a model may have been given expanded prompts.
    """
    indices = {folder: set(numbered(inner_folder(folder))) for folder in (a, b)}
    common = sorted(indices[a] & indices[b])
    known = _named_prompts(a, b, common) if prompts is None else prompts.prompts
    both = {prompt.index: prompt for prompt in known if prompt.index in common}
    if not both:
        raise DataError(f"{a} and {b} have no prompt in common: folders <number>_… as sample.py writes them")
    notes = [
        f"{folder}: {len(missing)} prompts have pictures here alone, such as number {missing[0]}; left out"
        for folder, other in ((a, b), (b, a))
        if (missing := sorted(indices[folder] - indices[other]))
    ]
    ours, theirs = found(a, list(both.values())), found(b, list(both.values()))
    if len(ours) != len(theirs):
        fewest = min(len(ours), len(theirs)) // len(both)
        notes.append(f"{fewest} pictures of each prompt are compared, the smaller number of the two folders")
    others = {(picture.prompt, picture.image): picture.path for picture in theirs}
    return [
        Pair(f"{one.prompt}_{one.image}", both[one.prompt], one.path, others[one.prompt, one.image])
        for one in ours
        if (one.prompt, one.image) in others
    ], notes


class Preferred(NamedTuple):
    """Pairs that a majority decided, and the numbers of those that were left out."""

    rows: list[tuple[Pair, Side]]  # the picture that won
    even: int  # ties, and as many votes for one as for the other
    unasked: int  # without votes


def preferred(pairs: Sequence[Pair], votes: Sequence[Vote]) -> Preferred:
    """The picture of each pair that most votes of all raters and questions are for; a tie is for none."""
    lead = Counter[str]()
    for vote in votes:
        lead[vote.pair] += {"a": 1, "b": -1, "tie": 0}[vote.choice]
    rows: list[tuple[Pair, Side]] = [(p, "a" if lead[p.name] > 0 else "b") for p in pairs if lead[p.name]]
    asked = sum(pair.name in lead for pair in pairs)
    return Preferred(rows, asked - len(rows), len(pairs) - asked)


def write_pairs(folder: Path, found: Preferred, held_out: float) -> list[str]:
    """Write winners and losers as tables to train on; lines about what was written and left out.

    ``metadata.jsonl`` has the picture that won (``file_name``), the other (``loser``) and the text;
    ``heldout.jsonl`` the same of the share ``held_out`` of the prompts, by their texts alone. Pairs of
    pictures that differ in size are left out. Raises :class:`DataError` where no pair is left, a picture is
    damaged, or ``folder`` holds a table already.
    """
    rows: dict[str, list[str]] = {TABLE: [], HELD_OUT: []}
    differ: list[str] = []
    for pair, side in found.rows:
        winner, loser = (pair.a, pair.b) if side == "a" else (pair.b, pair.a)
        sizes = []
        for path in (winner, loser):
            try:
                with open_picture(path) as picture:
                    sizes.append(picture.size)
            except PictureError as error:
                raise DataError(f"{path}: {error}") from error
        if sizes[0] != sizes[1]:
            differ.append(f"{pair.name} ({' and '.join(f'{h} x {w}' for w, h in sizes)})")
            continue
        names = [os.path.relpath(path.resolve(), folder.resolve()) for path in (winner, loser)]
        row = {"file_name": names[0], "loser": names[1], "text": pair.prompt.text}
        share = int(hashlib.sha256(pair.prompt.text.encode()).hexdigest()[:8], 16) / 2**32
        rows[HELD_OUT if share < held_out else TABLE].append(json.dumps(row, ensure_ascii=False) + "\n")
    if not rows[TABLE]:
        raise DataError(
            f"{folder}: no pair to train on: {found.even} are even, {found.unasked} without votes, "
            f"{len(differ)} of other sizes, {len(rows[HELD_OUT])} held out"
        )
    if there := [name for name in rows if (folder / name).exists()]:
        raise DataError(f"{folder}: holds {' and '.join(there)} already: name another folder, or remove them")
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        if lines:
            (folder / name).write_text("".join(lines), encoding="utf-8")
    said = [f"{folder}: {len(rows[TABLE])} pairs in {TABLE}, {len(rows[HELD_OUT])} held out in {HELD_OUT}"]
    left = [(found.even, "with ties or even votes"), (found.unasked, "without votes")]
    said += [f"left out: {count} pairs {why}" for count, why in left if count]
    return said + ([f"left out: {len(differ)} pairs of other sizes, such as {differ[0]}"] if differ else [])


def _named_prompts(a: Path, b: Path, indices: Sequence[int]) -> list[Prompt]:
    """The prompts that the pictures of ``a`` name; those of ``b`` must not name others."""
    prompts = []
    for index in indices:
        paths = [found(folder, [Prompt(index, "")])[0].path for folder in (a, b)]
        texts = [text for path in paths if (text := named_prompt(path)) is not None]
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
    facts = [
        [pair.name, pair.prompt.text, *((path.name, path.stat().st_size) for path in (pair.a, pair.b))]
        for pair in pairs
    ]
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Study:
    """The questions to raters, and their answers so far."""

    def __init__(self, pairs: Sequence[Pair], questions: Sequence[str], seed: int, votes: VoteFile) -> None:
        self.pairs, self.questions, self.seed, self.votes = list(pairs), list(questions), seed, votes
        self._key = secrets.token_bytes(32)
        self._pictures: dict[str, Path] = {}
        self._orders: dict[str, list[Item]] = {}

    def task(self, rater: str, at: int | None = None) -> dict[str, Any]:
        """Question ``at`` of the rater's order, or the first that is not answered, as the page shows it."""
        items = self._order(rater)
        votes = self.votes.votes
        answered = [votes.get((rater, item.pair.name, item.question)) for item in items]
        done = sum(answer is not None for answer in answered)
        if at is None:
            at = next((index for index, answer in enumerate(answered) if answer is None), len(items))
        state: dict[str, Any] = {"done": done, "of": len(items), "at": at}
        if not 0 <= at < len(items):
            return state | {"finished": done == len(items), "at": len(items)}
        item, answer = items[at], answered[at]
        place: Place | None = None  # of the chosen picture on the page
        if answer is not None:
            place = "tie" if answer.choice == "tie" else "left" if answer.choice == item.left else "right"
        return state | {
            "item": item.name,
            "text": item.pair.prompt.text,
            "question": QUESTIONS[item.question],
            "left": self._address(rater, item.pair, item.left),
            "right": self._address(rater, item.pair, item.right),
            "answer": place,
        }

    def vote(self, rater: str, name: str, place: Place, seconds: float) -> int:
        """Keep the rater's answer to the question called ``name``; its number in the rater's order."""
        for index, item in enumerate(self._order(rater)):
            if item.name == name:
                choice = item.chosen(place)
                self.votes.add(Vote(rater, item.pair.name, item.question, choice, item.left, seconds))
                return index
        raise BadRequestError(f"no such question: {name}")

    def picture(self, token: str) -> bytes | None:
        """The picture behind an address, as PNG without what its file says about its making."""
        path = self._pictures.get(token)
        if path is None:
            return None
        (image,) = Opened([path])
        buffer = BytesIO()
        image.save(buffer, "PNG", compress_level=1)  # text fields are written only when handed over
        return buffer.getvalue()

    def _order(self, rater: str) -> list[Item]:
        if rater not in self._orders:
            self._orders[rater] = order(self.pairs, self.questions, rater, self.seed)
        return self._orders[rater]

    def _address(self, rater: str, pair: Pair, side: Side) -> str:
        token = hmac.new(self._key, f"{rater}\0{pair.name}\0{side}".encode(), hashlib.sha256).hexdigest()[:32]
        self._pictures[token] = pair.a if side == "a" else pair.b
        return f"/picture/{token}"
