"""Encoding and decoding in pieces: memory is bounded by the piece, not by the batch and the picture.

Slicing takes some images at a time and changes nothing. Tiling also cuts each image into overlapping squares
and crossfades where they meet. A tile sees neither what lies beyond its border nor the statistics by which
the whole picture is normalised: the result is near the plain one, not equal. One tile is the plain path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sat.first_stage.model import AutoencoderKL, Posterior

Work = Callable[[Sequence[Callable[[], Tensor]]], Iterable[Tensor]]
"""Runs jobs with results of one shape, and gives the results in order."""


def one_by_one(jobs: Sequence[Callable[[], Tensor]]) -> Iterable[Tensor]:
    """Run all jobs here, each when its result is asked for."""
    return (job() for job in jobs)


SMALLEST_TILE = 8
"""Latent cells; below, the convolutions see more border than picture."""


class Window(NamedTuple):
    """A tile along one axis."""

    start: int  # in latent cells
    weights: Tensor  # of each cell, or pixel, of the tile


@dataclass(frozen=True)
class Tiling:
    """Pieces that a batch of pictures is worked on in.

    ``tile``: side of the squares in latent cells; None takes whole pictures.
    ``overlap``: latent cells that neighbours share at least; None is a quarter of the tile.
    ``batch``: pictures at a time.
    """

    tile: int | None = None
    overlap: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < SMALLEST_TILE:
            raise ValueError(
                f"first-stage tile is {self.tile} latent cells (memory.decode_tile), "
                f"expected at least {SMALLEST_TILE}"
            )
        if self.tile is not None and self.overlap is not None and not 0 <= self.overlap < self.tile:
            raise ValueError(f"tile overlap is {self.overlap} latent cells, expected 0 to {self.tile - 1}")
        if self.batch < 1:
            raise ValueError(f"first-stage batch is {self.batch}, expected at least 1 image at a time")

    @property
    def shared(self) -> int:
        """Latent cells that neighbouring tiles share at least."""
        return (self.tile or 0) // 4 if self.overlap is None else self.overlap

    def windows(self, cells: int, scale: int = 1) -> list[Window]:
        """Tiles along an axis of ``cells`` latent cells, with weights per 1/``scale`` of a cell.

        All have the tile's length (or the axis', if that is shorter) and are spread evenly. The weights
        of the tiles at a place add up to one; towards a neighbour they fall linearly.
        """
        tile = self.tile or cells
        length = min(tile, cells)
        count = 1 + -(-(cells - length) // (tile - self.shared))
        starts = [round(index * (cells - length) / max(count - 1, 1)) for index in range(count)]
        ramp = torch.arange(1, length * scale + 1, dtype=torch.float64) / (self.shared * scale + 1)
        flat = torch.ones_like(ramp)
        total = torch.zeros(cells * scale, dtype=torch.float64)
        raw = []
        for index, start in enumerate(starts):
            rise = ramp if index > 0 else flat
            fall = ramp.flip(0) if index < count - 1 else flat
            raw.append(torch.minimum(rise, fall).clamp(max=1.0))
            total[start * scale : (start + length) * scale] += raw[-1]
        return [
            Window(start, weights / total[start * scale : (start + length) * scale])
            for start, weights in zip(starts, raw, strict=True)
        ]


def encode_tiled(
    first_stage: AutoencoderKL, image: Tensor, tiling: Tiling, work: Work = one_by_one
) -> Posterior:
    """Posterior (B, C, h, w) of images (B, 3, H, W) in [-1, 1], piece by piece; its moments are blended."""
    first_stage.check_image(image)
    f = first_stage.factor
    height, width = image.shape[2] // f, image.shape[3] // f
    side = tiling.tile or max(height, width)

    def moments(part: Tensor, top: int, left: int) -> Tensor:
        """(b, 2C, side, side) of the square at (top, left), all in cells."""
        square = part[..., f * top : f * (top + side), f * left : f * (left + side)]
        return first_stage.encode(square).moments

    return Posterior.from_moments(_in_pieces(moments, image, (height, width), 1, tiling, work))


def decode_tiled(
    first_stage: AutoencoderKL, latent: Tensor, tiling: Tiling, work: Work = one_by_one
) -> Tensor:
    """Images (B, 3, f*h, f*w) of unscaled latents (B, C, h, w), piece by piece with blended seams."""
    first_stage.check_latent(latent)
    height, width = latent.shape[2:]
    side = tiling.tile or max(height, width)

    def pixels(part: Tensor, top: int, left: int) -> Tensor:
        """(b, 3, f*side, f*side) of the square at (top, left), in cells."""
        return first_stage.decode(part[..., top : top + side, left : left + side])

    return _in_pieces(pixels, latent, (height, width), first_stage.factor, tiling, work)


def _in_pieces(
    make: Callable[[Tensor, int, int], Tensor],
    x: Tensor,
    cells: tuple[int, int],
    scale: int,
    tiling: Tiling,
    work: Work,
) -> Tensor:
    """``make`` of all images of ``x``, some at a time: (B, …, scale h, scale w) for (h, w) ``cells``."""
    parts = torch.split(x, tiling.batch)
    if tiling.tile is None or max(cells) <= tiling.tile:
        made = [make(part, 0, 0) for part in parts]
    else:
        rows, columns = (tiling.windows(side, scale) for side in cells)
        made = [_blend(partial(make, part), rows, columns, scale, work) for part in parts]
    return made[0] if len(made) == 1 else torch.cat(made)


def _blend(
    make: Callable[[int, int], Tensor], rows: list[Window], columns: list[Window], scale: int, work: Work
) -> Tensor:
    """The weighted sum of the tiles ``make(top, left)`` (cells) at their places, in float32 or wider."""
    places = [(row, column) for row in rows for column in columns]
    tiles = work([partial(make, row.start, column.start) for row, column in places])
    height, width = (side[-1].start * scale + len(side[-1].weights) for side in (rows, columns))
    total: Tensor | None = None
    for (row, column), tile in zip(places, tiles, strict=True):
        dtype = torch.promote_types(tile.dtype, torch.float32)
        if total is None:
            total = torch.zeros(*tile.shape[:2], height, width, dtype=dtype, device=tile.device)
        weights = (row.weights[:, None] * column.weights).to(total)
        top, left = row.start * scale, column.start * scale
        total[..., top : top + tile.shape[2], left : left + tile.shape[3]] += tile.to(dtype) * weights
    assert total is not None, "an axis has at least one window"
    return total.to(tile.dtype)
