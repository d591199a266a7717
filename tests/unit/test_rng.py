"""Noise of images: one generator each."""

import pytest
import torch

from sat.sampling.generator import image_noise

SHAPE = (16, 6, 10)


def test_image_i_of_a_seed_is_image_0_of_the_next_seeds() -> None:
    assert torch.equal(image_noise(3, 4, SHAPE), image_noise(7, 0, SHAPE))


def test_noise_is_that_of_a_generator_with_the_sum_of_seed_and_index() -> None:
    expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(12))
    assert torch.equal(image_noise(10, 2, SHAPE), expected)


def test_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    image_noise(0, 0, SHAPE)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_is_float32_whatever_the_default_dtype() -> None:
    expected = image_noise(0, 0, SHAPE)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(image_noise(0, 0, SHAPE), expected)
        assert image_noise(0, 0, SHAPE).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**32, 0), (2**32 - 1, 1)])
def test_a_seed_that_would_repeat_another_is_refused(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match=rf"seed {seed + index} is out of range: 0 to 4294967295"):
        image_noise(seed, index, SHAPE)
