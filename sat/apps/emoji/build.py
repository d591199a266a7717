"""Emoji sets drawn as PNG files, with ``metadata.jsonl``, ``heldout.jsonl`` and ``sources.json`` beside."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypedDict, cast

import PIL.Image

from sat.apps.emoji.concepts import (
    FIREFOX_NAMES,
    HELD_OUT_STYLE,
    ICON_NAMES,
    ICON_STYLES,
    LABELS,
    STYLES,
    Archive,
    Concept,
    PackageError,
    captions,
    chosen_labels,
    code_points,
    fetch,
    read_concepts,
    select,
)
from sat.data.records import HELD_OUT, TABLE
from sat.errors import UserError
from sat.util.pictures import open_picture

logger = logging.getLogger(__name__)

UNNAMED = (
    "blob",
    "emojitwo",
    "firefox",
    "monotone",
    "streamline",
    *ICON_STYLES,
)  # their packages' chars.json names no characters: icons are found by name
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
RENDER = 128  # pixels: SVG are drawn at this size or the requested one, whichever is larger


class StyleError(UserError, ValueError):
    """Styles that do not exist or do not go together."""


@dataclass(frozen=True)
class Written:
    """Counts of the pictures of each style."""

    trained: Counter[str] = field(default_factory=Counter)  # style -> images
    held_out: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)  # concepts that a style does not draw
    failed: list[str] = field(default_factory=list)  # file name: reason


def is_held_out(concept: Concept, style: str) -> bool:
    """True for pairs kept from training: the six named ones and 4 % by a digest of code point and style.

    The digest makes the choice the same for every subset of concepts, styles and sizes. A style with the
    outlines of another keeps the other's pairs.
    """
    style = (STYLES[style].shapes if style in STYLES else None) or style
    digest = hashlib.sha256(f"{concept.code}/{style}".encode()).digest()
    drawn: bool = int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE
    return drawn or (concept.label, style) in HELD_OUT_PAIRS


def build(out: Path, packages: Path, styles: Sequence[str], which: str, size: int) -> Written:
    """Write ``out/<style>/<slug>.png`` of (size, size) pixels and the metadata files; the counts.

    ``packages`` holds the npm tarballs (missing ones are fetched into it); ``which`` is "all", "core" or a
    file of labels. ``metadata.jsonl`` lists pictures for training, ``heldout.jsonl`` the pairs kept aside.
    """
    unknown = [style for style in styles if style not in STYLES]
    if unknown or not styles:
        raise StyleError(f"--styles {','.join(styles)!r}: expected one or more of {', '.join(STYLES)}")
    if HELD_OUT_STYLE in styles and len(styles) > 1:
        raise StyleError(
            f"--styles {','.join(styles)!r}: {HELD_OUT_STYLE!r} is held out from the training of the small "
            "model, write it to a folder of its own"
        )
    chosen_labels(which)  # before packages are fetched
    named = NAMED_BY if any(style in UNNAMED for style in styles) else ()
    with ExitStack() as stack:
        archives = {
            package.name: stack.enter_context(Archive(fetch(package, packages)))
            for package in (LABELS, *(STYLES[style].package for style in dict.fromkeys((*styles, *named))))
        }
        concepts = select(read_concepts(archives[LABELS.name]), which)
        drawings: dict[str, Drawings] = {}
        for style in styles:
            archive = archives[STYLES[style].package.name]
            drawings[style] = (SvgDrawings if STYLES[style].kind == "svg" else WebpDrawings)(archive)
        others = [SvgDrawings(archives[STYLES[style].package.name]).by_code for style in named]
        written = Written()
        rows: dict[str, list[Mapping[str, object]]] = {TABLE: [], HELD_OUT: []}
        for style in styles:
            (out / style).mkdir(parents=True, exist_ok=True)
            for concept in concepts:
                icon = drawings[style].find(concept, _names(concept, style, others))
                if icon is None:
                    written.missing[style] += 1
                    continue
                file_name = f"{style}/{concept.slug}.png"
                try:
                    drawings[style].draw(icon, size).save(out / file_name, optimize=True)
                except (ValueError, OSError) as error:  # a broken drawing is listed, not fatal
                    written.failed.append(f"{file_name}: {error}")
                    continue
                held_out = is_held_out(concept, style)
                (written.held_out if held_out else written.trained)[style] += 1
                texts = captions(concept, style)
                row = {
                    "file_name": file_name,
                    "text": [caption.text for caption in texts],
                    "weights": [caption.weight for caption in texts],
                    "concept": concept.label,
                    "style": style,
                    "split": "heldout" if held_out else "train",
                }
                rows[HELD_OUT if held_out else TABLE].append(row)
            logger.info("%s: %d images, %d held out", style, written.trained[style], written.held_out[style])
        for table, lines in rows.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
            (out / table).write_text(text, "utf-8")
        _write_sources(out, archives, styles, which, size, written)
    return written


def _names(concept: Concept, style: str, others: Sequence[Mapping[str, str]]) -> list[str]:
    """Names that a set without code points may have for ``concept``: its slug, and those in other sets."""
    names = [concept.slug, *(codes[concept.code] for codes in others if concept.code in codes)]
    if style == "firefox":
        called = FIREFOX_NAMES.get(concept.label, "")
        return [called, *(n.replace("-", "") for n in (*names, concept.character_slug))]
    if style == "streamline":  # several drawings of a thing are numbered
        return [f"{name}{ending}" for name in names for ending in ("", "-1", "-face", "-face-1")]
    if style in ICON_STYLES:
        bare = [name.removesuffix("-face") for name in (*names, ICON_NAMES.get(concept.label, ""))]
        return [f"{name}{ending}" for name in bare for ending in ("", "-head", "-filled")]
    return names


def _write_sources(
    out: Path, archives: dict[str, Archive], styles: Sequence[str], which: str, size: int, written: Written
) -> None:
    """Write the origin of every picture: ``out/sources.json``."""
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


# -- drawings: finding a concept's icon in a package, and drawing it on white


class Icon(TypedDict, total=False):
    """One icon or alias of an Iconify set; absent fields come from its parent, then from the set."""

    body: str
    parent: str
    left: float
    top: float
    width: float
    height: float
    hFlip: bool
    vFlip: bool
    rotate: int


class IconSet(TypedDict, total=False):
    """An Iconify ``icons.json``."""

    icons: dict[str, Icon]
    aliases: dict[str, Icon]
    width: float
    height: float


class Drawings(Protocol):
    """The drawings of one style."""

    def find(self, concept: Concept, names: Iterable[str]) -> str | None:
        """Name of the concept's icon, by code point, else by the first of ``names`` that exists."""
        ...

    def draw(self, name: str, size: int) -> PIL.Image.Image:
        """The icon ``name`` as an RGB image of (size, size) pixels on white."""
        ...


class SvgDrawings:
    """An Iconify package: SVG bodies in ``icons.json``, code points in ``chars.json``, which may be empty."""

    def __init__(self, archive: Archive) -> None:
        self.icons = cast("IconSet", archive.json("icons.json"))
        chars = cast("Mapping[str, str]", archive.json("chars.json"))
        self.by_code = {code_points(code): name for code, name in chars.items() if not _private(code)}
        if not self.icons.get("icons"):
            raise PackageError(f"{archive.path}: package/icons.json holds no icons")

    def find(self, concept: Concept, names: Iterable[str]) -> str | None:
        """Name of the concept's icon, by code point where the package has them, else the first known name."""
        if self.by_code:
            return self.by_code.get(concept.code)
        known = self.icons["icons"].keys() | self.icons.get("aliases", {}).keys()
        return next((name for name in names if name in known), None)

    def draw(self, name: str, size: int) -> PIL.Image.Image:
        """The icon ``name`` as an RGB image of (size, size) pixels on white."""
        try:
            import resvg_py
        except ImportError as error:
            raise PackageError("drawing SVG needs resvg-py: pip install resvg-py") from error
        side = max(size, RENDER)
        png = resvg_py.svg_to_bytes(
            svg_string=svg(self.icons, name),
            width=side,
            height=side,
            background="#ffffff",
            skip_system_fonts=True,
        )
        with open_picture(io.BytesIO(bytes(png))) as image:
            return _resized(image.convert("RGB"), size)


def _private(code: str) -> bool:
    """True for a code point without a character: it is one of a package's own font."""
    return "-" not in code and unicodedata.category(chr(int(code, 16))) == "Co"


class WebpDrawings:
    """A package of ``assets/<code points>.webp`` with transparency."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        prefix, suffix = "package/assets/", ".webp"
        self.by_code = {
            code_points(name.removeprefix(prefix).removesuffix(suffix)): name.removeprefix("package/")
            for name in sorted(archive.names)
            if name.startswith(prefix) and name.endswith(suffix)
        }
        if not self.by_code:
            raise PackageError(f"{archive.path}: no package/assets/*.webp")

    def find(self, concept: Concept, names: Iterable[str]) -> str | None:
        """File of the concept's picture; ``names`` are not needed."""
        return self.by_code.get(concept.code)

    def draw(self, name: str, size: int) -> PIL.Image.Image:
        """The picture in file ``name`` as an RGB image of (size, size) pixels on white."""
        with open_picture(io.BytesIO(self.archive.read(name))) as image:
            white = PIL.Image.new("RGBA", image.size, "white")
            return _resized(PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"), size)


def svg(icons: IconSet, name: str) -> str:
    """The whole SVG document of ``name``, aliases and their flips and quarter turns resolved.

    Source: the IconifyJSON format (iconify.design/docs/types/iconify-json-data.html): flips and turns of an
    alias add to those of its parent; a turn exchanges width and height.
    """
    icon = _resolve(icons, name)
    left, top = icon.get("left", 0.0), icon.get("top", 0.0)
    width = icon.get("width", icons.get("width", 16.0))
    height = icon.get("height", icons.get("height", 16.0))
    moves = []
    middle = (left + width / 2, top + height / 2)
    if icon.get("rotate", 0) % 4:
        moves.append(f"rotate({icon['rotate'] % 4 * 90} {middle[0]} {middle[1]})")
    if icon.get("hFlip"):
        moves.append(f"translate({2 * middle[0]} 0) scale(-1 1)")
    if icon.get("vFlip"):
        moves.append(f"translate(0 {2 * middle[1]}) scale(1 -1)")
    body = f'<g transform="{" ".join(moves)}">{icon["body"]}</g>' if moves else icon["body"]
    if icon.get("rotate", 0) % 2:
        left, top, width, height = middle[0] - height / 2, middle[1] - width / 2, height, width
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def _resolve(icons: IconSet, name: str) -> Icon:
    """The icon ``name`` with its chain of aliases merged into it."""
    found = icons["icons"].get(name)
    if found is not None:
        return found
    alias = icons.get("aliases", {}).get(name)
    if alias is None or "parent" not in alias:
        raise PackageError(f"no icon named {name!r}")
    parent = _resolve(icons, alias["parent"])
    merged = cast("Icon", {**parent, **alias})
    merged["hFlip"] = parent.get("hFlip", False) != alias.get("hFlip", False)
    merged["vFlip"] = parent.get("vFlip", False) != alias.get("vFlip", False)
    merged["rotate"] = parent.get("rotate", 0) + alias.get("rotate", 0)
    return merged


def _resized(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """``image`` at (size, size) pixels; whole-number reductions average boxes, others use Lanczos."""
    if image.size == (size, size):
        return image
    if image.width == image.height and image.width % size == 0:
        return image.reduce(image.width // size)
    return image.resize((size, size), PIL.Image.Resampling.LANCZOS)
