"""Properties of tiles and posteriors."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sat.first_stage import Posterior
from sat.first_stage.tiling import Tiling
from tests.tolerances import F64


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    tile = draw(st.integers(8, 40))
    return Tiling(tile, draw(st.none() | st.integers(0, tile - 1)))


@given(tilings(), st.integers(1, 200), st.sampled_from([1, 2, 8]))
def test_weights_of_all_tiles_add_up_to_one(tiling: Tiling, cells: int, scale: int) -> None:
    total = torch.zeros(cells * scale, dtype=torch.float64)
    for start, weights in tiling.windows(cells, scale):
        assert (weights > 0).all()
        total[start * scale : start * scale + len(weights)] += weights
    assert (total - 1).abs().max() < F64


@given(tilings(), st.integers(1, 200))
def test_tiles_cover_the_axis_with_the_least_overlap_or_more(tiling: Tiling, cells: int) -> None:
    windows = tiling.windows(cells)
    length = min(tiling.tile, cells)
    starts = [window.start for window in windows]
    assert starts[0] == 0 and starts[-1] + length == cells
    assert all(len(window.weights) == length for window in windows)
    assert all(
        later - earlier <= length - tiling.shared for earlier, later in zip(starts, starts[1:], strict=False)
    )
    assert all(later > earlier for earlier, later in zip(starts, starts[1:], strict=False))


@given(st.integers(0, 2**31), st.floats(-60, 60))
def test_divergence_is_never_negative_and_zero_only_for_the_standard_normal(seed: int, logvar: float) -> None:
    mean = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(seed)).double()
    assert (Posterior(mean, torch.full_like(mean, logvar)).kl() > 0).all()
    assert (Posterior(mean * 0, mean * 0).kl() == 0).all()


@given(st.integers(0, 2**31))
def test_moments_round_trip(seed: int) -> None:
    moments = 40 * torch.randn(2, 6, 2, 3, generator=torch.Generator().manual_seed(seed))
    once = Posterior.from_moments(moments)
    assert torch.equal(Posterior.from_moments(once.moments).moments, once.moments)
    assert torch.equal(once.mode(), moments[:, :3])
