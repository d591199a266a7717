"""Batched random changes of pictures on white: what a judge must see through."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Strength:
    """How far pictures are changed.

    ``shift``: share of the side; ``scale``: range of the factor; ``turn``: degrees; ``light``: largest change
    of brightness and contrast; ``blur``: share of pictures blurred (by halving and doubling); ``noise``:
    largest standard deviation, of values in [-1, 1].
    """

    shift: float = 0.08
    scale: tuple[float, float] = (0.75, 1.1)
    turn: float = 8.0
    light: float = 0.1
    blur: float = 0.4
    noise: float = 0.08


def augment(images: Tensor, strength: Strength, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] placed anew on white, some blurred, with light and noise changed."""
    count = len(images)

    def uniform(low: float, high: float, size: tuple[int, ...] = (count,)) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    angle = uniform(-strength.turn, strength.turn) * (math.pi / 180)
    scale = uniform(*strength.scale)
    shift = uniform(-strength.shift, strength.shift, (count, 2)) * 2  # the grid spans 2
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    inverse = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    matrix = torch.cat([inverse, -(inverse @ shift[:, :, None])], 2)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - images, grid, padding_mode="zeros", align_corners=False)  # white is 1
    soft = F.interpolate(F.avg_pool2d(moved, 2), images.shape[-2:], mode="bilinear", align_corners=False)
    blurred = (torch.rand(count, generator=generator) < strength.blur).float()[:, None, None, None]
    amount = uniform(0.3, 1.0)[:, None, None, None] * blurred
    out = moved + amount * (soft - moved)
    out = out * (1 + uniform(-strength.light, strength.light)[:, None, None, None])
    out = out + uniform(-strength.light, strength.light)[:, None, None, None]
    spread = uniform(0, strength.noise)[:, None, None, None]
    return (out + spread * torch.randn(out.shape, generator=generator)).clamp(-1, 1)
