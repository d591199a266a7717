"""From a picture file to the tensor trained on, with the size conditions of the way it was cut."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from sat.util.pictures import WHITE, open_picture, shown

KEPT = 32  # lengths of the training size: of a longer strip the middle alone is resized


class Resized(NamedTuple):
    """A picture resized to cover the target, and the size of its file as (height, width)."""

    pixels: NDArray[np.uint8]  # (H', W', 3), H' >= H and W' >= W, one of them equal
    original_size: tuple[int, int]
    start: tuple[int, int] = (0, 0)  # (top, left) of the pixels in the whole resized picture


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

    def resize(self, picture: PIL.Image.Image) -> Resized:
        """An RGB picture resized to just cover the target; of a long strip the middle ``KEPT`` lengths."""
        height, width = picture.height, picture.width
        factor = max(self.height / height, self.width / width)
        wide, tall = max(self.width, round(width * factor)), max(self.height, round(height * factor))
        top, left = (max(0, (a - KEPT * b) // 2) for a, b in ((tall, self.height), (wide, self.width)))
        if top or left:
            x, y = width / wide, height / tall
            picture = picture.resize(
                (wide - 2 * left, tall - 2 * top),
                PIL.Image.Resampling.LANCZOS,
                box=(left * x, top * y, (wide - left) * x, (tall - top) * y),
            )
        elif (wide, tall) != picture.size:
            picture = picture.resize((wide, tall), PIL.Image.Resampling.LANCZOS)
        return Resized(np.asarray(picture), (height, width), (top, left))

    def place(self, resized: Resized, placement: Placement) -> tuple[Tensor, tuple[int, int]]:
        """The picture (3, height, width) in [-1, 1] and the (top, left) pixels it was cut at."""
        spare_y, spare_x = resized.pixels.shape[0] - self.height, resized.pixels.shape[1] - self.width
        if self.crop == "center":
            top, left = spare_y // 2, spare_x // 2
        else:
            top, left = int(placement.top * (spare_y + 1)), int(placement.left * (spare_x + 1))
        pixels = resized.pixels[top : top + self.height, left : left + self.width]
        if self.augment is not None:
            pixels = augmented(pixels, self.augment, placement)
        return to_tensor(pixels), (top + resized.start[0], left + resized.start[1])


def augmented(pixels: NDArray[np.uint8], augment: Augment, placement: Placement) -> NDArray[np.uint8]:
    """``pixels`` (H, W, 3) scaled about the middle and shifted, white where nothing is left."""
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
        fillcolor=WHITE,
    )
    return np.asarray(picture)


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) bytes as (3, H, W) float32 in [-1, 1]."""
    image = rearrange(torch.from_numpy(np.array(pixels)), "h w c -> c h w")
    return image.contiguous().float().div_(127.5).sub_(1.0)
