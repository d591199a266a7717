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
"""Does jobs whose results have one shape, and gives the results in order."""


def one_by_one(jobs: Sequence[Callable[[], Tensor]]) -> Iterable[Tensor]:
    """All jobs here, each when its result is asked for."""
    return (job() for job in jobs)


SMALLEST_TILE = 8  # latent cells; below, the convolutions see more border than picture


class Window(NamedTuple):
    """A tile along one axis: where it starts (latent cells) and the weight of each cell or pixel of it."""

    start: int
    weights: Tensor


@dataclass(frozen=True)
class Tiling:
    """``tile`` and ``overlap`` in latent cells: the side of the squares, and the least that neighbours share.

    ``overlap`` None is a quarter of the tile. ``batch`` images are worked on at a time.
    """

    tile: int
    overlap: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        if self.tile < SMALLEST_TILE:
            raise ValueError(
                f"first-stage tile is {self.tile} latent cells (memory.decode_tile), "
                f"expected at least {SMALLEST_TILE}"
            )
        if self.overlap is not None and not 0 <= self.overlap < self.tile:
            raise ValueError(f"tile overlap is {self.overlap} latent cells, expected 0 to {self.tile - 1}")
        _check_batch(self.batch)

    @property
    def shared(self) -> int:
        """Latent cells that neighbouring tiles share at least."""
        return self.tile // 4 if self.overlap is None else self.overlap

    def windows(self, cells: int, scale: int = 1) -> list[Window]:
        """Tiles along an axis of ``cells`` latent cells, with weights per 1/``scale`` of a cell.

        All have the tile's length (or the axis', if that is shorter) and are spread evenly. The weights
        of the tiles at a place add up to one; towards a neighbour they fall linearly.
        """
        length = min(self.tile, cells)
        count = 1 + -(-(cells - length) // (self.tile - self.shared))
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


def encode_sliced(first_stage: AutoencoderKL, image: Tensor, batch: int = 1) -> Posterior:
    """``first_stage.encode`` of images (B, 3, H, W), ``batch`` at a time."""
    _check_batch(batch)
    parts = [first_stage.encode(part) for part in torch.split(image, batch)]
    return parts[0] if len(parts) == 1 else Posterior.from_moments(torch.cat([p.moments for p in parts]))


def decode_sliced(first_stage: AutoencoderKL, latent: Tensor, batch: int = 1) -> Tensor:
    """``first_stage.decode`` of unscaled latents (B, C, h, w), ``batch`` at a time."""
    _check_batch(batch)
    parts = [first_stage.decode(part) for part in torch.split(latent, batch)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def encode_tiled(
    first_stage: AutoencoderKL, image: Tensor, tiling: Tiling, work: Work = one_by_one
) -> Posterior:
    """Posterior (B, C, h, w) of images (B, 3, H, W) in [-1, 1], tile by tile; its moments are blended."""
    first_stage.check_image(image)
    factor = first_stage.factor
    height, width = image.shape[2] // factor, image.shape[3] // factor
    if max(height, width) <= tiling.tile:
        return encode_sliced(first_stage, image, tiling.batch)
    rows, columns = tiling.windows(height), tiling.windows(width)
    side = tiling.tile * factor

    def encode(part: Tensor, top: int, left: int) -> Tensor:
        top, left = top * factor, left * factor
        return first_stage.encode(part[..., top : top + side, left : left + side]).moments

    parts = [_blend(partial(encode, p), rows, columns, 1, work) for p in torch.split(image, tiling.batch)]
    return Posterior.from_moments(torch.cat(parts))


def decode_tiled(
    first_stage: AutoencoderKL, latent: Tensor, tiling: Tiling, work: Work = one_by_one
) -> Tensor:
    """Images (B, 3, f*h, f*w) of unscaled latents (B, C, h, w), tile by tile with blended seams."""
    first_stage.check_latent(latent)
    height, width = latent.shape[2:]
    if max(height, width) <= tiling.tile:
        return decode_sliced(first_stage, latent, tiling.batch)
    factor, side = first_stage.factor, tiling.tile
    rows, columns = tiling.windows(height, factor), tiling.windows(width, factor)

    def decode(part: Tensor, top: int, left: int) -> Tensor:
        return first_stage.decode(part[..., top : top + side, left : left + side])

    parts = [
        _blend(partial(decode, p), rows, columns, factor, work) for p in torch.split(latent, tiling.batch)
    ]
    return torch.cat(parts)


def _blend(
    make: Callable[[int, int], Tensor], rows: list[Window], columns: list[Window], scale: int, work: Work
) -> Tensor:
    """The weighted sum of the tiles ``make(top, left)`` (cells) at their places, in float32 or wider."""
    places = [(row, column) for row in rows for column in columns]
    tiles = work([partial(make, row.start, column.start) for row, column in places])
    total: Tensor | None = None
    for (row, column), tile in zip(places, tiles, strict=True):
        dtype = torch.promote_types(tile.dtype, torch.float32)
        if total is None:
            size = (*tile.shape[:2], _end(rows, scale), _end(columns, scale))
            total = torch.zeros(size, dtype=dtype, device=tile.device)
        weights = (row.weights[:, None] * column.weights).to(total)
        top, left = row.start * scale, column.start * scale
        total[..., top : top + tile.shape[2], left : left + tile.shape[3]] += tile.to(dtype) * weights
    assert total is not None, "an axis has at least one window"
    return total.to(tile.dtype)


def _end(windows: list[Window], scale: int) -> int:
    """Where the last window ends, in 1/``scale`` of a cell."""
    return windows[-1].start * scale + len(windows[-1].weights)


def _check_batch(batch: int) -> None:
    """Refuse a slice of no image."""
    if batch < 1:
        raise ValueError(f"first-stage batch is {batch}, expected at least 1 image at a time")
