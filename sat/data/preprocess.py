"""Control pictures made of plain ones: edges, silhouettes and the like, for training data and for sampling.

Each takes a picture (3, H, W) float32 in [-1, 1] and a source of random numbers, and returns one of that
shape and range (a mask has one channel more). Only :class:`Masks` draws.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114
"""Weights of a colour's luma (Rec. 601)."""


class Preprocess(Protocol):
    """Makes a control's picture."""

    def __call__(self, image: Tensor, numbers: random.Random) -> Tensor:
        """(3, H, W) in [-1, 1] -> the same."""
        ...


def luma(image: Tensor) -> Tensor:
    """Brightness (H, W) of a picture (3, H, W), in its range."""
    return _RED * image[0] + _GREEN * image[1] + _BLUE * image[2]


class Grey:
    """The picture without colour."""

    def __call__(self, image: Tensor, numbers: random.Random) -> Tensor:
        """Brightness as each channel."""
        return luma(image).expand(3, -1, -1).contiguous()


class Edges:
    """Thin white outlines on black: Canny's detector over the strongest colour channel.

    The picture is smoothed by a Gaussian of ``sigma`` pixels. A pixel is an edge where the slope is largest
    across it, and above ``high`` or connected to such a one by pixels above ``low``; slopes are those of
    values in [0, 1], Sobel's over 4. Source: Canny, 1986.
    """

    def __init__(self, sigma: float = 0.8, low: float = 0.08, high: float = 0.16) -> None:
        if not 0 <= low <= high or sigma < 0:
            raise ValueError(f"edges: expected 0 <= low <= high and sigma >= 0, got {low}, {high}, {sigma}")
        self.sigma, self.low, self.high = sigma, low, high

    def __call__(self, image: Tensor, numbers: random.Random) -> Tensor:
        """1 on edges, -1 elsewhere."""
        return self.edges(image).mul(2.0).sub(1.0).expand(3, -1, -1).contiguous()

    def edges(self, image: Tensor) -> Tensor:
        """(H, W) float32: 1 on edges, 0 elsewhere."""
        smooth = blurred(image.float().add(1).div(2), self.sigma)
        padded = F.pad(smooth[:, None], (1, 1, 1, 1), mode="replicate")  # (3, 1, H + 2, W + 2)
        sobel = smooth.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 4
        across = F.conv2d(padded, sobel[None, None])[:, 0]
        down = F.conv2d(padded, sobel.T[None, None])[:, 0]
        slopes = torch.hypot(across, down)
        slope, channel = slopes.max(0)  # (H, W)
        across, down = (one.gather(0, channel[None])[0] for one in (across, down))

        # Largest across the edge: compared with both neighbours along the nearest of four directions.
        direction = (torch.atan2(down, across) / (math.pi / 4)).round().long() % 4
        around = F.pad(slope[None, None], (1, 1, 1, 1))[0, 0]
        h, w = slope.shape
        thin = torch.zeros_like(slope, dtype=torch.bool)
        for which, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
            ahead = around[1 + y : 1 + y + h, 1 + x : 1 + x + w]
            behind = around[1 - y : 1 - y + h, 1 - x : 1 - x + w]
            thin |= (direction == which) & (slope >= ahead) & (slope > behind)

        found, weak = thin & (slope >= self.high), thin & (slope >= self.low)
        while True:  # grow the sure ones along the possible ones
            grown = F.max_pool2d(found.float()[None], 3, 1, 1)[0].bool() & weak
            if torch.equal(grown, found):
                return found.float()
            found = grown | found


class Silhouette:
    """White where the picture is not its background, black elsewhere.

    The background is the median colour of the border; a pixel belongs to the object if a channel differs by
    more than ``threshold`` of the range.
    """

    def __init__(self, threshold: float = 0.08) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"silhouette: expected a threshold of 0 to 1, got {threshold}")
        self.threshold = threshold

    def __call__(self, image: Tensor, numbers: random.Random) -> Tensor:
        """1 on the object, -1 elsewhere."""
        border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)  # (3, n)
        apart = (image - border.median(1).values[:, None, None]).abs().amax(0) / 2
        return (apart > self.threshold).float().mul(2).sub(1).expand(3, -1, -1).contiguous()


class Blur:
    """The picture smoothed by a Gaussian of ``sigma``, a share of the shorter side."""

    def __init__(self, sigma: float = 0.05) -> None:
        if not sigma > 0:
            raise ValueError(f"blur: expected a sigma of more than 0, got {sigma}")
        self.sigma = sigma

    def __call__(self, image: Tensor, numbers: random.Random) -> Tensor:
        """The smoothed picture."""
        return blurred(image, self.sigma * min(image.shape[1:]))


class Downscale:
    """The picture at 1 / ``factor`` of its size, enlarged again: for control by a small picture."""

    def __init__(self, factor: int = 4) -> None:
        if factor < 2:
            raise ValueError(f"downscale: expected a factor of at least 2, got {factor}")
        self.factor = factor

    def __call__(self, image: Tensor, numbers: random.Random) -> Tensor:
        """The coarse picture, of the same size."""
        size = [max(1, side // self.factor) for side in image.shape[1:]]
        small = F.interpolate(image[None], size, mode="area")
        large = F.interpolate(small, image.shape[1:], mode="bicubic", align_corners=False)
        return large[0].clamp(-1, 1)


class Masks:
    """The picture and, as a fourth channel, a random mask: 1 is to be drawn anew, -1 stays.

    ``whole`` of the masks cover everything, so that a model stays one that draws from text alone; the others
    are boxes or strokes, one to ``most`` of them.
    """

    def __init__(self, whole: float = 0.15, most: int = 3) -> None:
        if not 0 <= whole <= 1 or most < 1:
            raise ValueError(f"masks: expected a share `whole` and `most` of at least 1, got {whole}, {most}")
        self.whole, self.most = whole, most

    def __call__(self, image: Tensor, numbers: random.Random) -> Tensor:
        """(4, H, W): the picture and the mask."""
        height, width = image.shape[1:]
        mask = torch.zeros(1, height, width)
        if numbers.random() < self.whole:
            mask.fill_(1)
        else:
            for _ in range(numbers.randint(1, self.most)):
                draw: Callable[[Tensor, random.Random], None] = numbers.choice((_box, _stroke))
                draw(mask[0], numbers)
        return torch.cat([image, mask.mul(2).sub(1)])


def _box(mask: Tensor, numbers: random.Random) -> None:
    """Fill a box of 0.15 to 0.7 of each side."""
    (h, w) = mask.shape
    tall, wide = (max(1, round(side * numbers.uniform(0.15, 0.7))) for side in (h, w))
    top, left = numbers.randint(0, h - tall), numbers.randint(0, w - wide)
    mask[top : top + tall, left : left + wide] = 1


def _stroke(mask: Tensor, numbers: random.Random) -> None:
    """Fill a broken line of 2 to 6 pieces, 0.05 to 0.15 of the shorter side thick."""
    h, w = mask.shape
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    half = min(h, w) * numbers.uniform(0.025, 0.075)
    ends = [(numbers.uniform(0, h), numbers.uniform(0, w)) for _ in range(numbers.randint(3, 7))]
    for (y0, x0), (y1, x1) in zip(ends, ends[1:], strict=False):
        dy, dx = y1 - y0, x1 - x0
        along = ((y - y0) * dy + (x - x0) * dx).div(dy * dy + dx * dx + 1e-9).clamp(0, 1)
        mask[torch.hypot(y - y0 - along * dy, x - x0 - along * dx) <= half] = 1


def blurred(image: Tensor, sigma: float) -> Tensor:
    """``image`` (C, H, W) smoothed by a Gaussian of ``sigma`` pixels, its edges repeated."""
    if not sigma:
        return image
    reach = max(1, math.ceil(3 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = torch.exp(-at.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(image[:, None], (reach,) * 4, mode="replicate")
    out = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return out[:, 0]
