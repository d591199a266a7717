"""The autoencoder's shapes, refusals and memory format, and the posterior against its formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sat.first_stage import AutoencoderKL, Posterior
from tests.tolerances import BF16, EXACT, F32, F64


def small(**changes: object) -> AutoencoderKL:
    """Widths 4, 8, 8: factor 4, 3 latent channels."""
    params = {"width": 4, "multipliers": (1, 2, 2), "res_blocks": 1, "latent_channels": 3, "groups": 2}
    return AutoencoderKL(**(params | changes)).eval()  # type: ignore[arg-type]


def test_defaults_are_the_autoencoder_of_cogview3_plus() -> None:
    with torch.device("meta"):
        net = AutoencoderKL()
    assert (net.factor, net.channels, net.scale_factor) == (8, 16, 1.0)
    assert sum(p.numel() for p in net.parameters()) == 406_100_643


def test_the_four_channel_variant_has_the_published_size() -> None:
    with torch.device("meta"):
        net = AutoencoderKL(
            128, (1, 2, 4, 4), 2, 4, mid_attention=True, quant_convs=True, scale_factor=0.13025
        )
    assert (net.factor, net.channels, net.scale_factor) == (8, 4, 0.13025)
    assert sum(p.numel() for p in net.parameters()) == 83_653_863


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_each_level_but_the_last_halves_the_image(levels: int) -> None:
    net = small(multipliers=(1,) * levels)
    assert net.factor == 2 ** (levels - 1)
    posterior = net.encode(torch.zeros(1, 3, 2 * net.factor, 3 * net.factor))
    assert posterior.mean.shape == (1, 3, 2, 3)
    assert net.decode(posterior.mode()).shape == (1, 3, 2 * net.factor, 3 * net.factor)


def test_groups_must_divide_every_width() -> None:
    with pytest.raises(ValueError, match=r"20 channels .* 32 groups; width times every multiplier"):
        AutoencoderKL(width=20)


@pytest.mark.parametrize("name", ["width", "res_blocks", "latent_channels", "groups", "image_channels"])
def test_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} 0.*at least 1"):
        small(**{name: 0})


def test_a_level_is_needed() -> None:
    with pytest.raises(ValueError, match=r"multipliers \[\]"):
        small(multipliers=())


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_scale_factor_must_be_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="first_stage.scale_factor is .* expected a positive number"):
        small(scale_factor=scale)


@pytest.mark.parametrize(
    ("size", "nearest"), [((10, 12), "8 x 12"), ((12, 15), "12 x 16"), ((1, 4), "4 x 4"), ((0, 8), "4 x 8")]
)
def test_an_image_off_the_factor_is_refused_with_the_nearest_size(
    size: tuple[int, int], nearest: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"image is {size[0]} x {size[1]} .*multiples of 4, nearest: {nearest}"
    ):
        small().encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 1, 3, 8, 8)])
def test_an_image_batch_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image batch is .*expected \(B, 3, H, W\)"):
        small().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 4), (1, 3, 0, 4)])
def test_a_latent_batch_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latent batch is .*expected \(B, 3, h, w\)"):
        small().decode(torch.zeros(shape))


def test_padding_before_halving_is_on_the_right_and_below() -> None:
    """The first output cell sees input rows 0 to 2, the last one the two last rows and zeros."""
    down = small().encoder.levels[0].down
    nn.init.ones_(down.conv.weight)
    nn.init.zeros_(down.conv.bias)
    x = torch.zeros(1, 4, 6, 6)
    x[..., 0, 0] = 1.0
    assert down(x)[0, 0, 0, 0] == 4 and down(x).sum() == 4 * 4
    x = torch.zeros(1, 4, 6, 6)
    x[..., 2, 5] = 1.0
    assert down(x)[0, 0, :, 2].tolist() == [4, 4, 0]


def test_attention_follows_its_formula() -> None:
    net = small(mid_attention=True).double()
    attention = net.encoder.middle.attention
    x = torch.randn(2, 8, 3, 5).double()
    cells = attention.norm(x).flatten(2).transpose(1, 2)
    weights = (attention.q(cells) @ attention.k(cells).transpose(1, 2) / math.sqrt(8)).softmax(-1)
    expected = x + attention.proj(weights @ attention.v(cells)).transpose(1, 2).reshape(x.shape)
    assert (attention(x) - expected).abs().max() < F64


@torch.no_grad()
def test_channels_last_images_stay_channels_last_and_give_the_same() -> None:
    net = small(mid_attention=True)
    image = torch.randn(2, 3, 12, 20)
    last = net(image.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert (last - net(image)).abs().max() < F32


@torch.no_grad()
def test_inputs_are_cast_to_the_weights() -> None:
    net = small()
    image = torch.rand(1, 3, 16, 24) * 2 - 1
    exact = net(image)
    half = net.to(torch.bfloat16)(image)
    assert half.dtype == torch.bfloat16
    assert (
        0 < (half - exact).abs().mean() < 3 * BF16 * exact.std()
    )  # some twenty layers round one after another


def posterior(seed: int = 0) -> Posterior:
    return Posterior.from_moments(
        torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(seed)).double()
    )


def test_log_variance_is_clamped() -> None:
    made = Posterior(torch.zeros(1, 1, 1, 3), torch.tensor([-40.0, 3.0, 25.0]).view(1, 1, 1, 3))
    assert made.logvar.flatten().tolist() == [-30, 3, 20]
    assert made.moments.shape == (1, 2, 1, 3)


def test_a_sample_is_the_mean_plus_noise_times_the_deviation() -> None:
    p = posterior()
    noise = torch.randn(p.mean.shape).double()
    assert (p.sample(noise) - (p.mean + noise * p.logvar.exp().sqrt())).abs().max() < F64
    assert (p.sample(torch.zeros_like(noise)) - p.mode()).abs().max() == EXACT


def test_a_generator_makes_samples_repeatable() -> None:
    p = posterior()
    one, same, other = (p.sample(generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_kl_is_the_closed_form() -> None:
    p = posterior()
    normal = torch.distributions.Normal(p.mean, p.std)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    assert (p.kl() - expected).abs().max() < F64


def test_kl_of_half_precision_is_float32() -> None:
    p = posterior()
    half = Posterior(p.mean.half(), p.logvar.half())
    assert half.kl().dtype == torch.float32


def test_wrong_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise is \(1, 3, 4, 5\), the latent \(2, 3, 4, 5\)"):
        posterior().sample(torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match="noise or a generator, not both"):
        posterior().sample(torch.zeros(2, 3, 4, 5), generator=torch.Generator())
    with pytest.raises(ValueError, match="mean .* and logvar .* differ"):
        Posterior(torch.zeros(1, 3, 4, 5), torch.zeros(1, 3, 4, 4))
