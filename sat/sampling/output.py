"""The folder of a run: one folder a prompt, PNG files with their settings inside, contact sheets, resuming.

The layout ``OUT/<index>_<name>/000000000.png`` is the official one; the relay stage reads it.
"""

from __future__ import annotations

import contextlib
import json
import re
import string
import struct
import unicodedata
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from sat.config.record import Label
from sat.errors import UserError
from sat.sampling.prompts import NO_ROW, Prompt
from sat.util import host
from sat.util.pictures import LARGEST_FILE, PictureError, open_picture

STAGES = "stages"
"""Folder of the records, and perhaps the pictures, of a cascade's stages."""

BEGAN = "began.json"
"""File in a run's folder: the digest of its config and prompts, by which a later start finds it again."""

NAME_LENGTH = 20
"""Characters of the prompt in a folder's name."""

_SAFE = frozenset(string.ascii_letters + string.digits + "_-")
_NUMBERED = re.compile(r"(\d+)_")
IMAGE = re.compile(r"\d{9}\.png")
"""Names of the pictures in a prompt's folder."""


class OutputError(UserError, OSError):
    """The output folder cannot be used."""

    exit_code = 1


def safe_name(text: str) -> str:
    """The first 20 safe characters of a prompt: spaces become ``_``, accents fall off, others are left out.

    Safe means ASCII letters, digits, ``_`` and ``-``: valid on every file system, in a shell and in a URL.
    May be empty; a folder's name has the prompt's number before it, so it is never reserved, as ``CON`` is.
    """
    kept: list[str] = []
    for character in text:
        for part in unicodedata.normalize("NFKD", character):
            letter = "_" if part.isspace() else part
            if letter in _SAFE:
                kept.append(letter)
        if len(kept) >= NAME_LENGTH:
            break
    return "".join(kept[:NAME_LENGTH])


def folder_name(prompt: Prompt) -> str:
    """``<index>_<safe prefix of the prompt>``."""
    return f"{prompt.index}_{safe_name(prompt.text)}"


@dataclass(frozen=True)
class OutputFolder:
    """Folder of one run's pictures."""

    root: Path
    label: Label
    batch_size: int  # images a prompt
    columns: int | None = None  # of the grid; None = as square as can be
    more: Callable[[Prompt, int], Mapping[str, str]] | None = None  # PNG fields of one image's own inputs
    _made: set[Path] = field(default_factory=set, repr=False, compare=False)

    def folder(self, prompt: Prompt) -> Path:
        """The folder of one prompt."""
        return self.root / folder_name(prompt)

    def image_path(self, prompt: Prompt, index: int) -> Path:
        """The file of image ``index`` of a prompt."""
        return self.folder(prompt) / f"{index:09d}.png"

    def missing(self, prompt: Prompt) -> list[int]:
        """Images of ``prompt`` that are not there whole with exactly this run's settings."""
        return [i for i in range(self.batch_size) if not self._whole(self.image_path(prompt, i), prompt, i)]

    def requests(self, prompts: Sequence[Prompt], *, resume: bool) -> list[tuple[Prompt, list[int]]]:
        """``prompts`` with the numbers of the images to draw; with ``resume``, of those not finished yet."""
        if not resume:
            return [(prompt, list(range(self.batch_size))) for prompt in prompts]
        return [(prompt, self.missing(prompt)) for prompt in prompts if not self.finished(prompt)]

    def finished(self, prompt: Prompt) -> bool:
        """True if all files of ``prompt`` are there, whole and of these settings."""
        grid = self.folder(prompt) / "grid.png"
        return not self.missing(prompt) and (self.batch_size == 1 or self._whole(grid, prompt, None))

    def write_image(self, prompt: Prompt, index: int, image: Image.Image) -> Path:
        """Write image ``index`` of ``prompt``."""
        path = self.image_path(prompt, index)
        self._write(path, image, self._fields(prompt, index))
        return path

    def finish(self, prompt: Prompt) -> list[Path]:
        """Draw the grid of several images and drop an earlier run's leftovers; the files of ``prompt``."""
        folder = self.folder(prompt)
        paths = [self.image_path(prompt, i) for i in range(self.batch_size)]
        stale = {p for p in folder.glob("*.png") if IMAGE.fullmatch(p.name)} - set(paths)
        stale.update(draft for draft in folder.glob(f".*{host.TEMPORARY}") if host.abandoned(draft))
        if self.batch_size > 1:
            sheet = folder / "grid.png"
            self._write(sheet, grid([opened(p) for p in paths], self.columns), self._fields(prompt, None))
            paths.append(sheet)
        else:
            stale.add(folder / "grid.png")
        for path in stale:
            with contextlib.suppress(OSError):
                path.unlink()
        return paths

    def strangers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Prompt folders that are there but belong to none of ``prompts``: left by another run."""
        ours = {folder_name(prompt) for prompt in prompts}
        return [name for names in numbered(self.root).values() for name in names if name not in ours]

    def next_index(self) -> int:
        """The smallest number above those of all prompt folders that are there."""
        return max(numbered(self.root), default=-1) + 1

    def _fields(self, prompt: Prompt, index: int | None) -> dict[str, str]:
        label = self.label
        if prompt.row != NO_ROW:
            label = replace(label, **prompt.row.own("seed", "height", "width", "negative_prompt"))
        seed, last = label.seed, label.seed + self.batch_size - 1
        fields = label.fields(prompt.text, f"{seed}-{last}" if index is None else str(seed + index))
        return fields if self.more is None else {**fields, **self.more(prompt, index or 0)}

    def _whole(self, path: Path, prompt: Prompt, index: int | None) -> bool:
        found, wanted = read_png_text(path) if path.is_file() else None, self._fields(prompt, index)
        again = {"parameters": wanted["parameters"]}  # which files of before do not have
        return found is not None and found | again == wanted

    def _write(self, path: Path, image: Image.Image, fields: Mapping[str, str]) -> None:
        try:
            if path.parent not in self._made:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._made.add(path.parent)
            write_png(path, image, fields)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def prove_writable(root: Path) -> None:
    """Make the folder ``root`` and write to it; :class:`OutputError` if that cannot be."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        host.write_text(root / ".writable", "")
        (root / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to output folder {root}: {error.strerror or error}") from error


def run_folder(root: Path, purpose: str, *, join: bool) -> tuple[Path, bool]:
    """The folder of a run that was told to draw into ``root``, and True if it began there before.

    A folder that holds pictures is another run's: the next is ``root-2``, ``root-3`` and so on. ``join``: go
    on where the run of this ``purpose`` began (:data:`BEGAN`), if there is one.
    """
    root = root if root.name else root.resolve()
    name = re.compile(rf"{re.escape(root.name)}-([1-9]\d*)")
    numbers = {1: root} | {
        int(match[1]): path for path in root.parent.glob("*-*") if (match := name.fullmatch(path.name))
    }
    if join:
        for number in sorted(numbers, reverse=True):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                if json.loads((numbers[number] / BEGAN).read_text())["purpose"] == purpose:
                    return numbers[number], True
    if not numbered(root):
        return root, False
    taken = [number for number, path in numbers.items() if numbered(path)]
    return root.with_name(f"{root.name}-{max(taken) + 1}"), False


def numbered(root: Path) -> dict[int, list[str]]:
    """Names of the prompt folders in ``root``, by number."""
    found: dict[int, list[str]] = {}
    if root.is_dir():
        for entry in sorted(root.iterdir()):
            if (match := _NUMBERED.match(entry.name)) and entry.is_dir():
                found.setdefault(int(match[1]), []).append(entry.name)
    return found


def opened(path: Path) -> Image.Image:
    """The RGB pixels of a picture's file, which is closed again."""
    try:
        with open_picture(path) as image:
            return image.convert("RGB")
    except PictureError as error:
        raise PictureError(f"{path}: {error}") from error


# -- pictures and tensors, contact sheets, PNG files with text


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


class GridAxis(NamedTuple):
    """One direction of a grid: the name of a setting, and its values."""

    name: str
    values: list[float | str]

    @classmethod
    def of(cls, text: str) -> GridAxis:
        """``guidance=1,3,5``, or ``seed=0..3`` for 0, 1, 2, 3."""
        name, _, listed = text.partition("=")
        if (ends := re.fullmatch(r"(\d+)\.\.(\d+)", listed)) is not None:
            return cls(name, list(range(int(ends[1]), int(ends[2]) + 1)))
        return cls(name, [_number(value) for value in listed.split(",")])


def _number(text: str) -> float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def labelled_grid(rows: Sequence[Sequence[Image.Image]], down: GridAxis, right: GridAxis) -> Image.Image:
    """The pictures with the values of both axes at the top and at the left."""
    width = max(picture.width for row in rows for picture in row) + 4
    height = max(picture.height for row in rows for picture in row) + 4
    labels = [f"{down.name} {value}".strip() for value in down.values]
    tops = [f"{right.name} {value}" for value in right.values]
    left = 6 + 7 * max(map(len, labels))
    width = max(width, 6 + 7 * max(map(len, tops)))
    out = Image.new("RGB", (left + width * len(rows[0]), 18 + height * len(rows)), "white")
    draw = ImageDraw.Draw(out)
    for j, text in enumerate(tops):
        draw.text((left + j * width, 3), text, "black")
    for i, row in enumerate(rows):
        draw.text((3, 18 + i * height + height // 2 - 6), labels[i], "black")
        for j, picture in enumerate(row):
            out.paste(picture, (left + j * width, 18 + i * height))
    return out


def write_png(path: Path, image: Image.Image, text: Mapping[str, str] | None = None) -> None:
    """Write ``image`` with the ``text`` fields to ``path``, which appears whole or not at all."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)  # Latin-1 where it fits (tEXt), UTF-8 where it does not (iTXt)
    host.write_atomic(path, lambda file: image.save(file, format="PNG", pnginfo=info))


def read_png_text(path: Path) -> dict[str, str] | None:
    """The text fields of a PNG file, or None if it is missing, cut short or damaged anywhere.

    Pillow forgives a file that is cut after its last pixel, so the chunks' checksums are looked at first.
    """
    try:
        data = host.read_bounded(path, LARGEST_FILE)
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
