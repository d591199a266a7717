"""Size vectors: order, frequencies and messages (values of the official code are in tests/golden)."""

from __future__ import annotations

import math

import pytest
import torch

from sat.conditioning.conditioner import SizeConditioner, Sizes


def test_the_six_numbers_come_in_the_order_original_crop_target():
    size = SizeConditioner(dim=4)
    vector = size(torch.tensor([[10, 20]]), torch.tensor([[3, 4]]), torch.tensor([[50, 60]]))
    assert vector.shape == (1, 24) and vector.dtype == torch.float32
    for slot, number in enumerate([10, 20, 3, 4, 50, 60]):
        expected = [math.cos(number), math.cos(number / 100), math.sin(number), math.sin(number / 100)]
        torch.testing.assert_close(
            vector[0, 4 * slot : 4 * slot + 4], torch.tensor(expected), rtol=0, atol=1e-5
        )


def test_the_official_width_is_1536():
    size = SizeConditioner()
    assert size.width == 1536
    assert size(*Sizes.uncropped(1024, 768, 3)).shape == (3, 1536)
    assert not list(size.parameters())


def test_uncropped_sizes_are_height_then_width():
    sizes = Sizes.uncropped(1024, 768, 2)
    assert sizes.original.tolist() == sizes.target.tolist() == [[1024, 768]] * 2
    assert sizes.crop.tolist() == [[0, 0]] * 2


def test_integers_and_floats_agree():
    size = SizeConditioner(dim=6)
    sizes = Sizes.uncropped(2048, 512, 1)
    assert size(*sizes).equal(size(*(pair.float() for pair in sizes)))


@pytest.mark.parametrize("crop", [torch.zeros(2, 3), torch.zeros(1, 2), torch.zeros(2)])
def test_a_pair_of_the_wrong_shape_is_named(crop):
    with pytest.raises(ValueError, match="crop sizes have shape .*expected \\(2, 2\\)"):
        SizeConditioner(4)(torch.zeros(2, 2), crop, torch.zeros(2, 2))


def test_no_channels_are_refused():
    with pytest.raises(ValueError, match="dim is 0, expected at least 1"):
        SizeConditioner(0)
