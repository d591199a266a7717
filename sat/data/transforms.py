"""From a picture file to the tensor trained on, with the size conditions of the way it was cut."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from sat.data.records import MASK, Record
from sat.util.pictures import WHITE, PictureError, check_shape, open_picture, shown

MESH = 4  # cells a side of the mesh that a picture is warped by
KEPT = 32  # lengths of the training size: of a longer strip the middle alone is resized


class Resized(NamedTuple):
    """A picture resized to cover the target, and the size of its file as (height, width)."""

    pixels: NDArray[np.uint8]  # (H', W', 3), H' >= H and W' >= W, one of them equal
    original_size: tuple[int, int]
    start: tuple[int, int] = (0, 0)  # (top, left) of the pixels in the whole resized picture
    extras: Mapping[str, NDArray[np.uint8]] = MappingProxyType({})  # of the same H' and W'; masks (H', W')

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return self.pixels.nbytes + sum(pixels.nbytes for pixels in self.extras.values())


class Placed(NamedTuple):
    """A picture as trained on, the (top, left) pixels it was cut at, and its extras cut alike."""

    image: Tensor  # (3, H, W) in [-1, 1]
    crop: tuple[int, int]
    extras: dict[str, Tensor]  # (3, H, W) in [-1, 1]; masks (1, H, W) in [0, 1]


@dataclass(frozen=True)
class Augment:
    """Random placement on white: ``shift`` up to that share of a side, ``scale`` from smallest to largest.

    ``turn``: up to that many degrees either way. ``warp``: the corners of a mesh of 4 x 4 move by up to that
    share of a side. ``mirror``: share of pictures mirrored, which makes wrong letters and wrong hands.
    """

    shift: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    turn: float = 0.0
    warp: float = 0.0
    mirror: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.shift <= 0.5:
            raise ValueError(f"data.augment.shift {self.shift}: expected 0 to 0.5 of the side")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"data.augment.scale {list(self.scale)}: expected 0 < smallest <= largest")
        for name, value, most in (
            ("turn", self.turn, 180),
            ("warp", self.warp, 0.2),
            ("mirror", self.mirror, 1),
        ):
            if not 0 <= value <= most:
                raise ValueError(f"data.augment.{name} {value}: expected 0 to {most}")

    @property
    def mesh(self) -> bool:
        """True if more is asked for than a scale and a shift."""
        return bool(self.turn or self.warp or self.mirror)


class Placement(NamedTuple):
    """Crop, scale and shift of one picture as random numbers, each uniform in [0, 1); 0.5 is the middle."""

    top: float = 0.5
    left: float = 0.5
    scale: float = 0.5
    down: float = 0.5
    right: float = 0.5
    turn: float = 0.5
    mirror: float = 0.5
    warp: Sequence[float] = (0.5,) * (2 * (MESH + 1) ** 2)  # down and right of the mesh's corners


@dataclass(frozen=True)
class Transform:
    """Brings pictures to ``height`` x ``width`` pixels: resize to cover, cut, place."""

    height: int
    width: int
    crop: Literal["center", "random"] = "center"
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(
                f"data.height {self.height} and data.width {self.width}: expected at least 1 pixel"
            )
        if self.crop not in ("center", "random"):
            raise ValueError(f"data.crop {self.crop!r}: expected 'center' or 'random'")

    def load(self, source: Path | BytesIO) -> Resized:
        """The picture in a file, turned as its EXIF says, on white, resized to just cover the target."""
        with open_picture(source) as file:
            return self.resize(shown(file))

    def load_all(self, record: Record) -> Resized:
        """As :meth:`load`, of a record's picture, with its extra pictures brought to the same size."""
        return self.resize(*opened(record))

    def resize(
        self, picture: PIL.Image.Image, extras: Mapping[str, PIL.Image.Image] = MappingProxyType({})
    ) -> Resized:
        """An RGB picture resized to just cover the target; of a long strip the middle ``KEPT`` lengths.

        ``extras``, in RGB or, for masks, L, are brought to the same size, whatever theirs.
        """
        height, width = picture.height, picture.width
        factor = max(self.height / height, self.width / width)
        wide, tall = max(self.width, round(width * factor)), max(self.height, round(height * factor))
        top, left = (max(0, (a - KEPT * b) // 2) for a, b in ((tall, self.height), (wide, self.width)))

        def covering(one: PIL.Image.Image) -> NDArray[np.uint8]:
            flat = one.mode == "L"  # a mask: no values beyond its own at edges
            kind = PIL.Image.Resampling.BILINEAR if flat else PIL.Image.Resampling.LANCZOS
            if top or left:
                x, y = one.width / wide, one.height / tall
                box = (left * x, top * y, (wide - left) * x, (tall - top) * y)
                one = one.resize((wide - 2 * left, tall - 2 * top), kind, box=box)
            elif (wide, tall) != one.size:
                one = one.resize((wide, tall), kind)
            return np.asarray(one)

        made = {name: covering(one) for name, one in extras.items()}
        return Resized(covering(picture), (height, width), (top, left), made)

    def drawn(self, numbers: random.Random) -> Placement:
        """A placement by the next ``numbers``: five, and those of the mesh where it is asked for."""
        top, left, scale, down, right = (numbers.random() for _ in range(5))
        placement = Placement(top, left, scale, down, right)
        if self.augment is None or not self.augment.mesh:
            return placement
        turn, mirror = numbers.random(), numbers.random()
        warp = [numbers.random() for _ in range(2 * (MESH + 1) ** 2)]
        return placement._replace(turn=turn, mirror=mirror, warp=warp)

    def place(self, resized: Resized, placement: Placement) -> Placed:
        """The picture (3, height, width) in [-1, 1], cut and placed, and its extras with it."""
        spare_y, spare_x = resized.pixels.shape[0] - self.height, resized.pixels.shape[1] - self.width
        if self.crop == "center":
            top, left = spare_y // 2, spare_x // 2
        else:
            top, left = int(placement.top * (spare_y + 1)), int(placement.left * (spare_x + 1))
        made: dict[str, Tensor] = {}
        for name, pixels in {"": resized.pixels, **resized.extras}.items():
            cut = pixels[top : top + self.height, left : left + self.width]
            if self.augment is not None:
                cut = augmented(cut, self.augment, placement)
            made[name] = to_tensor(cut)
        return Placed(made.pop(""), (top + resized.start[0], left + resized.start[1]), made)


def opened(record: Record) -> tuple[PIL.Image.Image, dict[str, PIL.Image.Image]]:
    """The picture of ``record`` in RGB, and its extra pictures; a mask in L, white where it counts.

    An extra picture may have another size, but has the picture's aspect ratio.
    """
    extras: dict[str, PIL.Image.Image] = {}
    own = {name for name, one in record.extras.items() if one.name == record.name}
    with open_picture(record.file()) as file:
        if own:
            check_shape((file.height, file.width))
            PIL.ImageOps.exif_transpose(file, in_place=True)
            extras = dict.fromkeys(own, opacity(file))
        picture = shown(file)
    for name, one in record.extras.items():
        if name in own:
            continue
        try:
            with open_picture(one.file()) as file:
                found = shown(file)
            if abs(found.width * picture.height - picture.width * found.height) > found.width + found.height:
                raise PictureError(
                    f"{found.height} x {found.width}, another aspect ratio than the picture's "
                    f"{picture.height} x {picture.width}"
                )
        except (OSError, ValueError) as error:
            raise PictureError(f"{name} {one.name}: {error}") from error
        extras[name] = found.convert("L") if name == MASK else found
    return picture, extras


def opacity(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Opacity of a picture in L: 255 where it has no transparency."""
    if not picture.has_transparency_data:
        return PIL.Image.new("L", picture.size, 255)
    if picture.mode.startswith(("I", "F")):
        raise PictureError(f"transparency of pixels in {picture.mode} is not read: save it in 8 bits")
    return picture.convert("RGBA").getchannel("A")


def augmented(pixels: NDArray[np.uint8], augment: Augment, placement: Placement) -> NDArray[np.uint8]:
    """``pixels`` (H, W, 3) scaled and turned about the middle, shifted, warped; white where nothing is left.

    Of a mask (H, W) nothing there counts.
    """
    height, width = pixels.shape[:2]
    low, high = augment.scale
    scale = low + (high - low) * placement.scale
    down = (2 * placement.down - 1) * augment.shift * height
    right = (2 * placement.right - 1) * augment.shift * width
    if scale == 1 and down == 0 and right == 0 and not augment.mesh:
        return pixels
    turn = math.radians(2 * placement.turn - 1) * augment.turn
    cos, sin = math.cos(turn), math.sin(turn)
    flip = -1.0 if placement.mirror < augment.mirror else 1.0
    # (x, y) of the result comes from M ((x, y) - middle - shift) + middle, M = flip rotation / scale
    x0, y0 = width / 2 + right, height / 2 + down
    inverse = (
        flip * cos / scale, -flip * sin / scale, width / 2 - flip * (cos * x0 - sin * y0) / scale,
        sin / scale, cos / scale, height / 2 - (sin * x0 + cos * y0) / scale,
    )  # fmt: skip
    kind: PIL.Image.Transform = PIL.Image.Transform.AFFINE
    data: Any = inverse
    if augment.warp:
        kind, data = PIL.Image.Transform.MESH, _mesh(inverse, augment.warp, placement.warp, height, width)
    picture = PIL.Image.fromarray(pixels).transform(
        (width, height),
        kind,
        data,
        resample=PIL.Image.Resampling.BICUBIC,
        fillcolor=0 if pixels.ndim == 2 else WHITE,
    )
    return np.asarray(picture)


def _mesh(
    inverse: Sequence[float], warp: float, numbers: Sequence[float], height: int, width: int
) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Boxes of the result, and each one's corners in the picture: ``inverse`` of its own, moved."""
    a, b, c, d, e, f = inverse
    xs, ys = ([round(side * i / MESH) for i in range(MESH + 1)] for side in (width, height))
    moved = {}
    for place, (i, j) in enumerate(itertools.product(range(MESH + 1), repeat=2)):
        x = xs[j] + (2 * numbers[2 * place + 1] - 1) * warp * width
        y = ys[i] + (2 * numbers[2 * place] - 1) * warp * height
        moved[i, j] = (a * x + b * y + c, d * x + e * y + f)
    boxes = list[tuple[tuple[int, ...], tuple[float, ...]]]()
    for i, j in itertools.product(range(MESH), repeat=2):  # corners from top left down and round
        corners = (*moved[i, j], *moved[i + 1, j], *moved[i + 1, j + 1], *moved[i, j + 1])
        boxes.append(((xs[j], ys[i], xs[j + 1], ys[i + 1]), corners))
    return boxes


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) bytes as (3, H, W) float32 in [-1, 1], or (H, W) as (1, H, W) in [0, 1]."""
    if pixels.ndim == 2:
        return torch.from_numpy(np.array(pixels))[None].float().div_(255)
    image = rearrange(torch.from_numpy(np.array(pixels)), "h w c -> c h w")
    return image.contiguous().float().div_(127.5).sub_(1.0)
