"""Writes an emoji set as a folder of PNG files with ``metadata.jsonl`` and ``heldout.jsonl``."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from sat.apps.emoji.concepts import (
    HELD_OUT_STYLE,
    LABELS,
    STYLES,
    Archive,
    Concept,
    captions,
    fetch,
    read_concepts,
    select,
)
from sat.apps.emoji.icons import Drawings, SvgDrawings, open_drawings
from sat.data.records import HELD_OUT, TABLE

logger = logging.getLogger(__name__)

UNNAMED = ("blob", "emojitwo")  # their packages' chars.json is empty: icons are found by name
NAMED_BY = ("noto", "twemoji", "flat")  # and these packages know more names than the label
HELD_OUT_SHARE = 0.04  # of all (concept, style) pairs
HELD_OUT_PAIRS = frozenset(
    {
        ("red apple", "twemoji"),
        ("dog face", "noto"),
        ("rocket", "flat"),
        ("sunflower", "blob"),
        ("blue heart", "twemoji"),
        ("pizza", "emojitwo"),
    }
)


@dataclass(frozen=True)
class Written:
    """What was written."""

    trained: Counter[str] = field(default_factory=Counter)  # style -> images
    held_out: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)  # concepts that a style does not draw
    failed: list[str] = field(default_factory=list)  # file name: reason


def is_held_out(concept: Concept, style: str) -> bool:
    """Whether the pair is kept from training: the six named ones and 4 % by a digest of code point and style.

    The digest makes the choice the same for every subset of concepts, styles and sizes.
    """
    digest = hashlib.sha256(f"{concept.code}/{style}".encode()).digest()
    drawn: bool = int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE
    return drawn or (concept.label, style) in HELD_OUT_PAIRS


def check_styles(styles: Sequence[str]) -> None:
    """Raises unless all ``styles`` are known and the held-out one, if asked for, stands alone."""
    unknown = [style for style in styles if style not in STYLES]
    if unknown or not styles:
        raise ValueError(f"--styles {','.join(styles)!r}: expected one or more of {', '.join(STYLES)}")
    if HELD_OUT_STYLE in styles and len(styles) > 1:
        raise ValueError(
            f"--styles {','.join(styles)!r}: {HELD_OUT_STYLE!r} is held out from the training of the small "
            "model, write it to a folder of its own"
        )


def build(out: Path, packages: Path, styles: Sequence[str], which: str, size: int) -> Written:
    """Writes ``out/<style>/<slug>.png`` of (size, size) pixels and the metadata files; returns what was done.

    ``packages`` holds the npm tarballs (missing ones are fetched into it); ``which`` is "all", "core" or a
    file of labels. ``metadata.jsonl`` lists what may be trained on, ``heldout.jsonl`` the pairs kept aside.
    """
    check_styles(styles)
    named = NAMED_BY if any(style in UNNAMED for style in styles) else ()
    with ExitStack() as stack:
        archives = {
            package.name: stack.enter_context(Archive(fetch(package, packages)))
            for package in (LABELS, *(STYLES[style].package for style in dict.fromkeys((*styles, *named))))
        }
        concepts = select(read_concepts(archives[LABELS.name]), which)
        drawings = {
            style: open_drawings(STYLES[style], archives[STYLES[style].package.name]) for style in styles
        }
        names = _NameFinder([archives[STYLES[style].package.name] for style in named])
        written = Written()
        rows: dict[str, list[dict[str, object]]] = {"train": [], "heldout": []}
        for style in styles:
            (out / style).mkdir(parents=True, exist_ok=True)
            for concept in concepts:
                row = _write_one(out, drawings[style], names, concept, style, size, written)
                if row is not None:
                    rows[str(row["split"])].append(row)
            logger.info("%s: %d images, %d held out", style, written.trained[style], written.held_out[style])
        _write_lines(out / TABLE, rows["train"])
        _write_lines(out / HELD_OUT, rows["heldout"])
        _write_sources(out, archives, styles, which, size, written)
    return written


class _NameFinder:
    """Names an icon may have in a set without code points: its label's slug and those other sets give it."""

    def __init__(self, others: Sequence[Archive]) -> None:
        self.by_code = [SvgDrawings(other).by_code for other in others]

    def __call__(self, concept: Concept) -> list[str]:
        others = (codes[concept.code] for codes in self.by_code if concept.code in codes)
        return list(dict.fromkeys([concept.slug, *others]))


def _write_one(
    out: Path,
    drawings: Drawings,
    names: _NameFinder,
    concept: Concept,
    style: str,
    size: int,
    written: Written,
) -> dict[str, object] | None:
    """Draws one picture and returns its metadata, or None where the style has none or it cannot be drawn."""
    icon = drawings.find(concept, names(concept))
    if icon is None:
        written.missing[style] += 1
        return None
    file_name = f"{style}/{concept.slug}.png"
    try:
        drawings.draw(icon, size).save(out / file_name, optimize=True)
    except (ValueError, OSError) as error:  # a broken drawing is listed, not fatal
        written.failed.append(f"{file_name}: {error}")
        return None
    held_out = is_held_out(concept, style)
    (written.held_out if held_out else written.trained)[style] += 1
    texts = captions(concept, style)
    return {
        "file_name": file_name,
        "text": [caption.text for caption in texts],
        "weights": [caption.weight for caption in texts],
        "concept": concept.label,
        "style": style,
        "split": "heldout" if held_out else "train",
    }


def _write_lines(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def _write_sources(
    out: Path, archives: dict[str, Archive], styles: Sequence[str], which: str, size: int, written: Written
) -> None:
    """Records where every picture came from: ``out/sources.json``."""
    packages = [LABELS, *(STYLES[style].package for style in styles)]
    record = {
        "concepts": which,
        "size": size,
        "images": dict(written.trained),
        "held_out": dict(written.held_out),
        "missing": dict(written.missing),
        "failed": written.failed,
        "packages": [
            {
                "name": package.name,
                "version": package.version,
                "sha256": archives[package.name].sha256(),
                "licence": package.licence,
                "author": package.author,
                "source": package.source,
            }
            for package in packages
        ],
    }
    (out / "sources.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
