"""Images in and out: files of known formats, uint8 conversion, contact sheets, PNG files with text."""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from sat.util.host import check_regular, read_bounded, write_atomic

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000")
"""Formats that are opened, whatever a file is called. Pillow knows many more; EPS starts a program."""
LARGEST_FILE = 2 << 30
"""Bytes of a picture's file: Pillow's limit of about 179 million pixels, 16 bits a channel, fits."""
_PNG = b"\x89PNG\r\n\x1a\n"


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


def to_uint8(image: Tensor) -> Tensor:
    """Pixels 0…255 (uint8) of values in [0, 1], truncated as officially; values outside are clamped."""
    return (image.detach().float().clamp(0, 1) * 255).to(torch.uint8).cpu()


def to_pil(image: Tensor) -> Image.Image:
    """A PIL image of one ``image`` (3, H, W) in [0, 1] or already uint8."""
    pixels = image.cpu() if image.dtype == torch.uint8 else to_uint8(image)
    return Image.fromarray(np.ascontiguousarray(rearrange(pixels, "c h w -> h w c").numpy()))


def from_pil(image: Image.Image) -> Tensor:
    """Tensor (3, H, W) float32 in [-1, 1] of a picture."""
    pixels = rearrange(torch.from_numpy(np.array(image.convert("RGB"))), "h w c -> c h w")
    return pixels.contiguous().float() / 127.5 - 1


def grid(images: Sequence[Image.Image], columns: int | None = None, padding: int = 2) -> Image.Image:
    """One sheet of equally large ``images``, row by row, on black with ``padding`` pixels around each.

    ``columns`` None makes the sheet as square as it can be. The layout is torchvision's ``make_grid``,
    which the official scripts call.
    """
    if not images:
        raise ValueError("a grid needs at least one image")
    across = columns if columns is not None else int(np.ceil(np.sqrt(len(images))))
    if across < 1:
        raise ValueError(f"grid columns must be at least 1, got {columns}")
    across = min(across, len(images))
    width, height = images[0].size
    if any(image.size != (width, height) for image in images):
        raise ValueError(f"a grid needs images of one size, got {sorted({image.size for image in images})}")
    down = -(-len(images) // across)
    sheet = Image.new("RGB", (across * (width + padding) + padding, down * (height + padding) + padding))
    for i, image in enumerate(images):
        row, column = divmod(i, across)
        sheet.paste(image, (column * (width + padding) + padding, row * (height + padding) + padding))
    return sheet


def write_png(path: Path, image: Image.Image, text: Mapping[str, str] | None = None) -> None:
    """Write ``image`` with the ``text`` fields to ``path``, which appears whole or not at all."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)  # Latin-1 where it fits (tEXt), UTF-8 where it does not (iTXt)
    write_atomic(path, lambda file: image.save(file, format="PNG", pnginfo=info))


def read_png_text(path: Path) -> dict[str, str] | None:
    """The text fields of a PNG file, or None if it is missing, cut short or damaged anywhere.

    Pillow forgives a file that is cut after its last pixel, so the chunks' checksums are looked at first.
    """
    try:
        data = read_bounded(path, LARGEST_FILE)
        if not data.startswith(_PNG):
            return None
        at, kind = len(_PNG), b""
        while kind != b"IEND":
            (length,) = struct.unpack_from(">I", data, at)
            (checksum,) = struct.unpack_from(">I", data, at + 8 + length)
            chunk = data[at + 4 : at + 8 + length]
            if checksum != zlib.crc32(chunk):
                return None
            at, kind = at + 12 + length, chunk[:4]
        with open_picture(BytesIO(data)) as image:
            image.load()  # text may also stand after the pixels
            texts = image.text if isinstance(image, PngImageFile) else None
            return None if texts is None else {key: str(value) for key, value in texts.items()}
    except (OSError, PictureError, struct.error):  # a broken file, to Pillow and us
        return None
