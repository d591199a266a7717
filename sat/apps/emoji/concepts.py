"""Concepts: what an emoji shows, by its English label; which of them are used."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypedDict, cast

from sat.apps.emoji.packages import Archive

PEOPLE_GROUP, COMPONENT_GROUP, FLAG_GROUP = 1, 2, 9  # emojibase's meta/groups.json
JOINER, VARIATION = "200d", "fe0f"


class Entry(TypedDict):
    """The fields used of one entry in emojibase's ``en/data.json``."""

    label: str
    hexcode: str
    tags: list[str]
    group: int
    subgroup: int


@dataclass(frozen=True)
class Concept:
    """One thing an emoji shows."""

    label: str  # "red apple"
    code: str  # code points in lower case without variation selectors: "1f34e"
    tags: tuple[str, ...]  # emojibase's keywords, those of the label itself excluded
    group: int

    @property
    def slug(self) -> str:
        """The label as a file name: "red-apple"."""
        return slug(self.label)


def slug(label: str) -> str:
    """``label`` in ASCII lower case with hyphens, as Iconify names its icons."""
    plain = unicodedata.normalize("NFKD", label.replace("’", "").replace("'", ""))
    plain = plain.encode("ascii", "ignore").decode()
    plain = plain.replace("#", " hash ").replace("*", " asterisk ")
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def code_points(hexcode: str) -> str:
    """``hexcode`` in lower case without variation selectors, which packages write or leave out at will."""
    return "-".join(part for part in hexcode.lower().split("-") if part != VARIATION)


def read_concepts(labels: Archive) -> list[Concept]:
    """All usable concepts in emojibase's order: no flags, components, people sequences or skin tones."""
    found = []
    for entry in cast("list[Entry]", labels.json("en/data.json")):
        group = entry.get("group")
        if group is None or group in (COMPONENT_GROUP, FLAG_GROUP):
            continue
        code = code_points(entry["hexcode"])
        if group == PEOPLE_GROUP and JOINER in code.split("-"):
            continue
        words = set(entry["label"].lower().split())
        tags = tuple(
            tag for tag in entry.get("tags", []) if tag.lower() not in words | {entry["label"].lower()}
        )
        found.append(Concept(entry["label"], code, tags, group))
    return found


def core_labels() -> list[str]:
    """The curated labels in ``core_concepts.txt``."""
    return parse_labels(resources.files("sat.apps.emoji").joinpath("core_concepts.txt").read_text("utf-8"))


def parse_labels(text: str) -> list[str]:
    """Labels of a list with one per line; lines that start with ``#`` and empty ones are skipped."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def select(concepts: Sequence[Concept], which: str) -> list[Concept]:
    """Concepts named by ``which``: "all", "core" or a file of labels, in which case does not matter."""
    if which == "all":
        return list(concepts)
    if which == "core":
        wanted = core_labels()
    else:
        path = Path(which)
        if not path.is_file():
            raise ValueError(
                f"--concepts {which!r}: expected 'all', 'core' or a file with one label per line"
            )
        wanted = parse_labels(path.read_text("utf-8"))
    by_label: Mapping[str, Concept] = {concept.label.lower(): concept for concept in concepts}
    unknown = [label for label in wanted if label.lower() not in by_label]
    if unknown:
        raise ValueError(f"unknown concept {', '.join(_with_nearest(label, by_label) for label in unknown)}")
    return [by_label[label.lower()] for label in dict.fromkeys(wanted)]


def _with_nearest(label: str, known: Iterable[str]) -> str:
    """``label`` quoted, with the nearest known one."""
    near = difflib.get_close_matches(label.lower(), list(known), n=1)
    return f"{label!r} (did you mean {near[0]!r}?)" if near else repr(label)
