"""From a picture file to the tensor trained on, with the size conditions of the way it was cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from sat.data.records import MASK, Record
from sat.util.pictures import WHITE, PictureError, check_shape, open_picture, shown

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

    There are no flips: they would make wrong letters and wrong hands.
    """

    shift: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.shift <= 0.5:
            raise ValueError(f"data.augment.shift {self.shift}: expected 0 to 0.5 of the side")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"data.augment.scale {list(self.scale)}: expected 0 < smallest <= largest")


class Placement(NamedTuple):
    """Crop, scale and shift of one picture as random numbers, each uniform in [0, 1); 0.5 is the middle."""

    top: float = 0.5
    left: float = 0.5
    scale: float = 0.5
    down: float = 0.5
    right: float = 0.5


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
    """``pixels`` (H, W, 3) scaled about the middle and shifted, white where nothing is left.

    Of a mask (H, W) nothing there counts.
    """
    height, width = pixels.shape[:2]
    low, high = augment.scale
    scale = low + (high - low) * placement.scale
    down = (2 * placement.down - 1) * augment.shift * height
    right = (2 * placement.right - 1) * augment.shift * width
    if scale == 1 and down == 0 and right == 0:
        return pixels
    inverse = (
        1 / scale, 0.0, width / 2 - (width / 2 + right) / scale,
        0.0, 1 / scale, height / 2 - (height / 2 + down) / scale,
    )  # fmt: skip
    picture = PIL.Image.fromarray(pixels).transform(
        (width, height),
        PIL.Image.Transform.AFFINE,
        inverse,
        resample=PIL.Image.Resampling.BICUBIC,
        fillcolor=0 if pixels.ndim == 2 else WHITE,
    )
    return np.asarray(picture)


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) bytes as (3, H, W) float32 in [-1, 1], or (H, W) as (1, H, W) in [0, 1]."""
    if pixels.ndim == 2:
        return torch.from_numpy(np.array(pixels))[None].float().div_(255)
    image = rearrange(torch.from_numpy(np.array(pixels)), "h w c -> c h w")
    return image.contiguous().float().div_(127.5).sub_(1.0)
