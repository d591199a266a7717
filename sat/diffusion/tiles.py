"""Denoising a large latent by overlapping squares: memory is bounded by the square, not by the picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sat.diffusion.schedule import Level
from sat.first_stage.tiling import Tiling

SPREAD = 0.3
"""Standard deviation of a tile's weights, as a share of its side."""


Tile = tuple[slice, slice]
"""Rows and columns of a latent."""


class Tiled:
    """``denoise`` of squares of ``tile`` latent cells, their predictions averaged with Gaussian weights.

    It is told the square's place in the latent too.
    Every square is shown to the network as a picture of its own size, at the same noise level; the middle of
    a square counts most, so that no seam is seen. Squares share at least ``overlap`` cells, None a quarter.
    Source: Mixture of Diffusers, arXiv:2302.02412; CogView3, arXiv:2403.05121, figure 9.
    """

    def __init__(
        self, denoise: Callable[[Tensor, Level, Tile], Tensor], tile: int, overlap: int | None = None
    ) -> None:
        self.denoise = denoise
        self.tiling = Tiling(tile, overlap)

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """(rows, C, h, w) -> predicted x0 of the same shape."""
        height, width = x.shape[2:]
        total, weight = torch.zeros_like(x), x.new_zeros(height, width)  # x0 = sum of w x0_tile / sum of w
        for top in self.tiling.windows(height):
            for left in self.tiling.windows(width):
                rows, columns = len(top.weights), len(left.weights)
                at = slice(top.start, top.start + rows), slice(left.start, left.start + columns)
                place, share = (..., *at), _bell(rows, x)[:, None] * _bell(columns, x)
                total[place] += self.denoise(x[place], level, at) * share
                weight[place] += share
        return total / weight


def tile_size(size: tuple[int, int], tile: int) -> tuple[int, int]:
    """(h, w) of the squares that a latent of ``size`` cells is cut into: ``tile``, or the side if smaller."""
    return min(size[0], tile), min(size[1], tile)


def _bell(cells: int, like: Tensor) -> Tensor:
    """Gaussian weights (cells,) about the middle."""
    offset = (torch.arange(cells, dtype=like.dtype, device=like.device) + 0.5) / cells - 0.5
    return torch.exp(-0.5 * (offset / SPREAD) ** 2)
