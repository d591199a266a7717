"""Requests for pictures, the settings stored in a PNG file, and the pictures of the output folder."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from PIL import Image

from sat.errors import UserError
from sat.sampling.output import IMAGE, numbered, read_png_text
from sat.util.pictures import open_picture

_NAME = re.compile(r"\d+_[\w-]{0,20}/\d{9}\.png", re.ASCII)
_THUMBNAIL = 256  # pixels, the longer side


class RequestError(UserError, ValueError):
    """A request that this server cannot draw; the text is shown to the user.

    ``param`` is the field of the API that is meant, None where no single one is.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class ControlUse:
    """A trained control that is offered, by its name, and a picture for it (docs/control.md).

    ``start`` and ``end`` are shares of the noise range; ``preprocess``: the picture is a plain one.
    """

    name: str
    image: Image.Image
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """A request for pictures. ``guidance`` None: the model has no strength to set. Sizes in pixels."""

    prompt: str
    height: int
    width: int
    steps: int
    guidance: float | None
    seed: int  # of image 0; image i uses seed + i
    count: int = 1
    negative_prompt: str = ""
    adapters: Mapping[str, float] = field(default_factory=dict)  # name -> strength
    image: Image.Image | None = None  # to change; without a mask, words are not needed
    mask: Image.Image | None = None  # L, of the image's size: white is drawn anew
    strength: float | None = None  # of the change, 0 to 1
    sampler: str = ""  # its name on the page; empty: the config's
    control: ControlUse | None = None


@dataclass(frozen=True)
class Limits:
    """Upper bounds of one request."""

    count: int = 8
    steps: int = 200
    prompt: int = 4000  # characters
    guidance: float = 100.0
    strength: float = 4.0  # of an adapter, either way
    scale: float = 2.0  # of a control
    cells: int = 36  # pictures of a grid

    def check(self, request: GenerationRequest) -> None:
        """Raise :class:`RequestError` with a sentence unless ``request`` keeps to them."""
        if not request.prompt.strip() and (request.image is None or request.mask is not None):
            raise RequestError("the prompt is empty: say what to draw", "prompt")
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
            if len(text) > self.prompt:
                words = f"the {name.replace('_', ' ')} has {len(text)} characters"
                raise RequestError(f"{words}, more than {self.prompt}", name)
        ranges: dict[str, tuple[float, float, float]] = {
            "pictures": (request.count, 1, self.count),
            "steps": (request.steps, 1, self.steps),
            "seed": (request.seed, 0, 2**32 - max(request.count, 1)),
            "guidance": (request.guidance or 0.0, -self.guidance, self.guidance),
            "strength": (request.strength or 0.0, 0, 1),
        }
        if (use := request.control) is not None:
            ranges["strength of the control"] = (use.scale, 0, self.scale)
            if not 0 <= use.start <= use.end <= 1:
                got = f"{use.start:g} to {use.end:g}"
                raise RequestError(f"the control acts from {got}: expected 0 <= start <= end <= 1")
        strengths = {f"strength of {name}": value for name, value in request.adapters.items()}
        ranges |= {name: (value, -self.strength, self.strength) for name, value in strengths.items()}
        for name, (value, least, most) in ranges.items():
            if not least <= value <= most:
                huge = isinstance(value, int) and abs(value) >= 10**15  # neither a float nor a text of it
                got = "a number of more than 15 digits" if huge else f"{value:.10g}"
                param = {"pictures": "n"}.get(name, None if name in strengths else name)
                raise RequestError(f"{name}: expected {least:.10g} to {most:.10g}, got {got}", param)


class Settings(NamedTuple):
    """The text fields of a picture; None where there is none, or no number."""

    prompt: str
    negative_prompt: str
    height: int | None
    width: int | None
    steps: int | None
    guidance: float | None
    seed: int | None
    model: str
    adapters: Mapping[str, float] = MappingProxyType({})
    more: Mapping[str, str] = MappingProxyType({})
    """Fields of :data:`MORE` that are there, and the text of all settings as ``parameters``."""


MORE = ("parameters", "sampler", "init_image", "mask", "strength", "edit", "control", "grid")
"""Text fields that are shown as they are."""


def settings_of(path: Path) -> Settings:
    """The settings in a PNG file that this program wrote; :class:`RequestError` says why there are none."""
    fields = read_png_text(path)
    if fields is None:
        raise RequestError("this is no whole PNG file, so no settings can be read from it")
    if "prompt" not in fields or "seed" not in fields:
        raise RequestError(
            "this picture holds no settings: it was not drawn here, or another program saved it"
        )

    def whole(name: str) -> int | None:
        text = fields.get(name, "").partition("-")[0]  # the sheet of several pictures names a range of seeds
        return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else None

    def number(name: str) -> float | None:
        try:
            value = float(fields.get(name, ""))
        except ValueError:
            return None
        return value if -1e6 < value < 1e6 else None

    return Settings(
        fields["prompt"], fields.get("negative_prompt", ""), whole("height"), whole("width"), whole("steps"),
        number("guidance"), whole("seed"), fields.get("model", ""), _adapters(fields.get("lora", "")),
        {name: fields[name] for name in MORE if name in fields},
    )  # fmt: skip


def _adapters(text: str) -> dict[str, float]:
    """Strengths by name of a field such as ``fur:0.5, silk:1``; other text is left out."""
    found: dict[str, float] = {}
    for part in text.split(", "):
        name, _, value = part.rpartition(":")
        with contextlib.suppress(ValueError):
            if name and math.isfinite(float(value)):
                found[name] = float(value)
    return found


class Pictures:
    """The pictures below an output folder, by names ``<index>_<words>/<number>.png`` and by nothing else."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def newest(self, most: int) -> list[str]:
        """Names, the latest first."""
        found: list[str] = []
        for _, folders in sorted(numbered(self.root).items(), reverse=True):
            for folder in folders:
                names = sorted(p.name for p in (self.root / folder).iterdir() if IMAGE.fullmatch(p.name))
                found += [f"{folder}/{name}" for name in names if _NAME.fullmatch(f"{folder}/{name}")]
            if len(found) >= most:
                break
        return found[:most]

    def name(self, path: Path) -> str:
        """The name of a picture that was just drawn."""
        return path.resolve().relative_to(self.root).as_posix()

    def at(self, name: str) -> Path:
        """The file of a picture; :class:`RequestError` unless it is one of this folder, links followed."""
        path = (self.root / name).resolve()
        if not _NAME.fullmatch(name) or not path.is_relative_to(self.root) or not path.is_file():
            raise RequestError("there is no such picture")
        return path

    def has(self, name: str) -> bool:
        """True if there is a picture of this name."""
        try:
            return self.at(name).is_file()
        except RequestError:
            return False

    def new(self, words: str) -> Path:
        """The file of a picture in a new folder, numbered after all others."""
        folder = self.root / f"{max(numbered(self.root), default=-1) + 1}_{words}"
        folder.mkdir(parents=True)
        return folder / f"{0:09d}.png"

    def delete(self, name: str) -> None:
        """Remove a picture, the sheet that shows it, and its folder once nothing is left in it.

        The folder of the highest number stays, empty: its number must not name another picture.
        """
        path = self.at(name)
        folder = path.parent
        path.unlink()
        (folder / "grid.png").unlink(missing_ok=True)
        if int(folder.name.partition("_")[0]) < max(numbered(self.root), default=0):
            with contextlib.suppress(OSError):  # others are in it
                folder.rmdir()

    def thumbnail(self, name: str) -> Image.Image:
        """The picture, no longer than 256 pixels."""
        path = self.at(name)
        return _small(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _small(path: Path, changed: int) -> Image.Image:
    """``changed`` makes a rewritten file another entry."""
    with open_picture(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return small
