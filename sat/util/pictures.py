"""Picture files: opened in one place, in known formats alone. Without torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sat.util.host import check_regular

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000")
"""Formats that are opened, whatever a file is called. Pillow knows many more; EPS starts a program."""
LARGEST_FILE = 2 << 30
"""Bytes of a picture's file: Pillow's limit of about 179 million pixels, 16 bits a channel, fits."""
LONGEST = 100
"""Longer side of a picture to train on, in shorter ones."""
WHITE = (255, 255, 255)
_AT_ONCE = 1 << 20  # pixels that are put on white at a time


class PictureError(ValueError):
    """A file that is no picture of a known format, or is damaged, or too large."""


@contextlib.contextmanager
def open_picture(source: Path | BytesIO) -> Iterator[Image.Image]:
    """The picture of a regular file or of its bytes; the only place where one is opened.

    Its pixels are not read yet. Whatever goes wrong with it, also within the ``with``, is a
    :class:`PictureError` that does not name the file.
    """
    try:
        if isinstance(source, Path):
            check_regular(source, LARGEST_FILE)
        elif source.getbuffer().nbytes > LARGEST_FILE:
            raise PictureError(f"has more than {LARGEST_FILE} bytes")
        with Image.open(source, formats=_formats()) as image:
            if image.format == "JPEG2000":  # the only decoder that takes a file cut off for a whole one
                data = source.read_bytes() if isinstance(source, Path) else source.getvalue()
                if b"\xff\xd9" not in data:
                    raise PictureError("cannot be read: it ends without an end mark")
            yield image
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        empty = not (source.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes)
        what = "an empty file" if empty else f"not a picture in one of the formats {', '.join(_formats())}"
        raise PictureError(what) from error
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, errors of bombs
        known = isinstance(error, OSError) and error.strerror
        raise PictureError(str(known or f"cannot be read: {error or type(error).__name__}")) from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def check_shape(size: tuple[int, int]) -> None:
    """Raise PictureError for an empty picture and for one that is a mere line. ``size``: (height, width)."""
    if not 0 < max(size) <= LONGEST * min(size):
        raise PictureError(
            f"{size[0]} x {size[1]} (height x width): one side is over {LONGEST} times the other"
        )


def shown(file: Image.Image) -> Image.Image:
    """An opened picture as RGB on white, turned as its EXIF says."""
    check_shape((file.height, file.width))
    ImageOps.exif_transpose(file, in_place=True)
    return on_white(file)


def on_white(picture: Image.Image) -> Image.Image:
    """``picture`` as RGB, its transparent parts white; itself if that changes nothing.

    Rows are converted some at a time, so that large pictures are not held several times over.
    """
    picture.load()
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    out = Image.new("RGB", picture.size)
    step = max(1, _AT_ONCE // picture.width)
    for top in range(0, picture.height, step):
        part = picture.crop((0, top, picture.width, min(picture.height, top + step)))
        if part.mode.startswith(("I", "F")):  # convert() would clip them
            most = 1.0 if part.mode == "F" else 65535.0
            values = np.asarray(part, dtype=np.float64)
            low, high = values.min(), values.max()
            if not (low >= 0 and high <= most):
                raise PictureError(f"values from {low:g} to {high:g}, expected 0 to {most:g}")
            values = np.where(values == part.info.get("transparency"), most, values)
            part = Image.fromarray(np.rint(values * (255.0 / most)).astype(np.uint8))
        elif part.has_transparency_data:
            white = Image.new("RGBA", part.size, (*WHITE, 255))
            part = Image.alpha_composite(white, part.convert("RGBA"))
        out.paste(part.convert("RGB"), (0, top))
    return out


# -- pictures that a user names: opened whole, and brought to the size of a run


Fit = Literal["crop", "pad", "stretch"]
"""``crop`` covers the size and cuts the rest off evenly; ``pad`` shows the whole picture in the middle and
repeats its edges around it; ``stretch`` gives it another shape."""


class Pixels(NamedTuple):
    """A picture as RGB, transparent parts on white, and its alpha channel (L) where it has one."""

    rgb: Image.Image
    alpha: Image.Image | None


def open_whole(path: Path) -> Pixels:
    """The picture of a file, decoded whole and turned as its EXIF says; any mode becomes RGB.

    A :class:`PictureError` names the file.
    """
    try:
        with open_picture(path) as file:
            check_shape((file.height, file.width))
            ImageOps.exif_transpose(file, in_place=True)
            return with_alpha(file)
    except PictureError as error:
        raise PictureError(f"{path}: {error}") from error


def with_alpha(picture: Image.Image) -> Pixels:
    """``picture`` of any mode as RGB on white, and its alpha channel if anything in it is transparent."""
    alpha = None
    if picture.has_transparency_data and not picture.mode.startswith(("I", "F")):
        alpha = picture.convert("RGBA").getchannel("A")
        alpha = None if alpha.getextrema() == (255, 255) else alpha
    return Pixels(on_white(picture), alpha)


def fitted(picture: Image.Image, height: int, width: int, fit: Fit, fill: int | None = None) -> Image.Image:
    """``picture`` at ``height`` x ``width`` pixels; of that size already, its very pixels.

    ``fill`` is the value around a padded picture; None repeats its edges.
    """
    if picture.size == (width, height):
        return picture
    kept, inner = fit_boxes(picture.size, height, width, fit)
    left, top, right, bottom = inner
    resampling = Image.Resampling.BILINEAR if picture.mode == "L" else Image.Resampling.LANCZOS
    out = picture.resize((right - left, bottom - top), resampling, box=kept)
    if out.size == (width, height):
        return out
    around = [(top, height - bottom), (left, width - right), (0, 0)][: 2 + (picture.mode != "L")]
    if fill is None:
        return Image.fromarray(np.pad(np.asarray(out), around, mode="edge"))
    return Image.fromarray(np.pad(np.asarray(out), around, constant_values=fill))


def fit_boxes(
    size: tuple[int, int], height: int, width: int, fit: Fit
) -> tuple[tuple[float, float, float, float], tuple[int, int, int, int]]:
    """The part of a picture of ``size`` (width, height) that stays, and where it goes in the frame.

    Both are (left, top, right, bottom), in pixels of the picture and of the frame.
    """
    wide, tall = size
    whole, frame = (0.0, 0.0, float(wide), float(tall)), (0, 0, width, height)
    if fit == "crop":
        scale = min(wide / width, tall / height)  # pixels of the picture in one of the frame
        x, y = (wide - scale * width) / 2, (tall - scale * height) / 2
        return (x, y, wide - x, tall - y), frame
    if fit == "pad":
        scale = max(wide / width, tall / height)
        across, down = max(1, round(wide / scale)), max(1, round(tall / scale))
        left, top = (width - across) // 2, (height - down) // 2
        return whole, (left, top, left + across, top + down)
    return whole, frame


def fit_message(size: tuple[int, int], height: int, width: int, fit: Fit) -> str | None:
    """Sentence about what :func:`fitted` does to a picture of ``size`` (width, height); None for nothing."""
    wide, tall = size
    if (wide, tall) == (width, height):
        return None
    (left, top, right, bottom), inner = fit_boxes(size, height, width, fit)
    cut = 1 - (right - left) * (bottom - top) / (wide * tall)
    added = 1 - (inner[2] - inner[0]) * (inner[3] - inner[1]) / (width * height)
    what = f", {cut:.0%} of it cut off" if cut > 0.005 else ""
    what += f", {added:.0%} of the frame padded" if added > 0.005 else ""
    stretched = (width / wide) / (height / tall)
    if fit == "stretch" and abs(stretched - 1) > 0.005:
        what += f", {max(stretched, 1 / stretched):.2f} times {'wider' if stretched > 1 else 'taller'}"
    return f"{tall} x {wide} brought to {height} x {width} (height x width) by fit {fit}{what}"
