"""Drawings of one style: finding a concept's icon and drawing it on white."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Protocol, TypedDict, cast

import PIL.Image

from sat.apps.emoji.concepts import Archive, Concept, PackageError, Style, code_points

RENDER = 128  # pixels: SVG are drawn at this size or the asked one, whichever is larger


class Icon(TypedDict, total=False):
    """One icon or alias of an Iconify set; what is absent is inherited from the parent, then from the set."""

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
        self.by_code = {code_points(code): name for code, name in chars.items()}
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
        return _resized(PIL.Image.open(io.BytesIO(bytes(png))).convert("RGB"), size)


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
        image = PIL.Image.open(io.BytesIO(self.archive.read(name))).convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        return _resized(PIL.Image.alpha_composite(white, image).convert("RGB"), size)


def open_drawings(style: Style, archive: Archive) -> Drawings:
    """The drawings in ``archive``, read as ``style`` says."""
    return SvgDrawings(archive) if style.kind == "svg" else WebpDrawings(archive)


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
