"""Images in and out: uint8 conversion, contact sheets, PNG files with text."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from sat.util.host import read_bounded, write_atomic
from sat.util.pictures import LARGEST_FILE, PictureError, open_picture

_PNG = b"\x89PNG\r\n\x1a\n"


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
