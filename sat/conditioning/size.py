"""Size conditions: what a picture's original size was, where it was cut, how large it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sat.embeddings import sinusoid


class Sizes(NamedTuple):
    """Size conditions of B images in pixels, each (B, 2): (height, width), (top, left), (height, width)."""

    original: Tensor
    crop: Tensor
    target: Tensor

    @classmethod
    def uncropped(cls, height: int, width: int, batch: int) -> Sizes:
        """What the official sampler gives: original = target = the requested size, nothing cut off."""
        size = torch.tensor([[height, width]]).expand(batch, 2)
        return cls(size, torch.zeros_like(size), size)


class SizeConditioner(nn.Module):
    """Sizes -> (B, 6 * dim) float32: a sinusoid of ``dim`` channels for each of six numbers, no parameters.

    In the order original height and width, crop top and left, target height and width.
    Source: official ``encoders/modules.py:995-1003``.
    """

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"the size embedding's dim is {dim}, expected at least 1")
        self.dim = dim

    @property
    def width(self) -> int:
        """Channels of the size vector, V."""
        return 6 * self.dim

    def forward(self, original: Tensor, crop: Tensor, target: Tensor) -> Tensor:
        """(B, 6 * dim) float32 of three (B, 2) tensors of pixels."""
        for name, pair in (("original", original), ("crop", crop), ("target", target)):
            if pair.shape != (original.shape[0], 2):
                raise ValueError(
                    f"{name} sizes have shape {tuple(pair.shape)}, expected ({original.shape[0]}, 2)"
                )
        numbers = torch.cat([original, crop, target], 1)
        return sinusoid(numbers.flatten(), self.dim).view(len(numbers), self.width)
