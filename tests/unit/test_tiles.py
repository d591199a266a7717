"""Denoising by overlapping squares."""

import pytest
import torch
from torch import Tensor

from sat.diffusion.schedule import Level
from sat.diffusion.tiles import Tiled, tile_size

LEVEL = Level(1.0, 0.5, 3.0, 1.0, 0.5)


@pytest.mark.parametrize("size", [(20, 37), (16, 16), (9, 40), (33, 16)])
def test_a_local_denoiser_is_not_changed_by_tiles(size: tuple[int, int]) -> None:
    """Weights add up to one at every cell, each tile is put back where it was taken."""
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    tiled = Tiled(lambda part, level, at: 2 * part + level.sigma, tile=16)
    assert torch.allclose(tiled(x, LEVEL), 2 * x + 0.5, atol=1e-12)


def test_no_tile_is_larger_than_asked_and_neighbours_overlap() -> None:
    seen: list[torch.Size] = []

    def denoise(part: Tensor, level: Level, at: object) -> Tensor:
        seen.append(part.shape)
        return part

    Tiled(denoise, tile=16)(torch.zeros(1, 1, 40, 30), LEVEL)
    assert {tuple(shape[2:]) for shape in seen} == {(16, 16)}
    assert len(seen) == 3 * 3  # with a quarter in common, two tiles reach 28 cells only


def test_the_middle_of_a_tile_counts_more_than_its_border() -> None:
    calls = iter([0.0, 1.0])
    tiled = Tiled(lambda part, level, at: torch.full_like(part, next(calls)), tile=16)
    row = tiled(torch.zeros(1, 1, 16, 24, dtype=torch.float64), LEVEL)[0, 0, 0]
    assert (row[:8] == 0).all() and (row[16:] == 1).all()
    inside = row[8:16]
    assert (inside.diff() > 0).all() and torch.allclose(inside + inside.flip(0), torch.ones_like(inside))


def test_a_latent_smaller_than_a_tile_is_seen_whole() -> None:
    assert tile_size((6, 40), 16) == (6, 16)
    x = torch.randn(1, 1, 6, 10)
    assert torch.allclose(Tiled(lambda part, level, at: part, tile=16)(x, LEVEL), x)
