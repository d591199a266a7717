"""The autoencoder against diffusers' AutoencoderKL, weights moved through the real key rules both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from diffusers import AutoencoderKL as Peer
from torch import Tensor

from sat.checkpoint.format import as_lazy
from sat.checkpoint.load import load
from sat.checkpoint.rules import as_theirs
from sat.first_stage import AutoencoderKL
from sat.first_stage.keys import DIFFUSERS
from tests.small import fill
from tests.tolerances import F64


@dataclass(frozen=True)
class Variant:
    """One autoencoder in both vocabularies."""

    width: int
    multipliers: tuple[int, ...]
    res_blocks: int
    channels: int
    groups: int
    full: bool = False  # mid attention and quant convolutions

    def ours(self) -> AutoencoderKL:
        return AutoencoderKL(
            self.width, self.multipliers, self.res_blocks, self.channels, self.groups,
            mid_attention=self.full, quant_convs=self.full,
        ).double().eval()  # fmt: skip

    def peer(self) -> Peer:
        levels = len(self.multipliers)
        return Peer(
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=[self.width * m for m in self.multipliers], layers_per_block=self.res_blocks,
            latent_channels=self.channels, norm_num_groups=self.groups, use_quant_conv=self.full,
            use_post_quant_conv=self.full, mid_block_add_attention=self.full,
        ).double().eval()  # fmt: skip


VARIANTS = {
    "16 channels, as CogView3-Plus": Variant(4, (1, 4, 8, 8), 3, 16, 4),
    "4 channels, attention and quant convolutions, as CogView3": Variant(8, (1, 2, 4, 4), 2, 4, 8, full=True),
    "small model": Variant(16, (1, 2, 4, 8), 1, 16, 8),
    "three levels": Variant(6, (1, 3, 2), 2, 5, 3, full=True),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request: pytest.FixtureRequest) -> tuple[Peer, AutoencoderKL]:
    """diffusers' model, and ours loaded from its weights."""
    peer, ours = request.param.peer(), request.param.ours()
    fill(peer)
    report = load(ours, peer.state_dict(), "first_stage")
    assert report.layout == "DIFFUSERS" and report.loaded == len(peer.state_dict())
    return peer, ours


def assert_near(mine: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-10 of the peer's spread."""
    assert mine.shape == theirs.shape
    assert 0 < theirs.std() < torch.inf
    assert (mine - theirs).abs().max() / theirs.std() < F64


@torch.no_grad()
def test_posterior_equals_diffusers(pair: tuple[Peer, AutoencoderKL]) -> None:
    peer, ours = pair
    image = torch.rand(2, 3, 3 * ours.factor, 5 * ours.factor).double() * 2 - 1
    theirs, mine = peer.encode(image).latent_dist, ours.encode(image)
    assert mine.mean.shape == (2, ours.channels, 3, 5)
    assert_near(mine.mode(), theirs.mean)
    assert_near(mine.logvar, theirs.logvar)
    assert_near(mine.kl(), theirs.kl())  # both in nats, summed over the latent


@torch.no_grad()
def test_decoding_equals_diffusers(pair: tuple[Peer, AutoencoderKL]) -> None:
    peer, ours = pair
    latent = torch.randn(2, ours.channels, 3, 5).double()
    assert_near(ours.decode(latent), peer.decode(latent).sample)


def test_gradients_equal_diffusers(pair: tuple[Peer, AutoencoderKL]) -> None:
    peer, ours = pair
    image = torch.rand(1, 3, 2 * ours.factor, 3 * ours.factor).double() * 2 - 1
    peer.decode(peer.encode(image).latent_dist.mode()).sample.square().sum().backward()
    ours(image).square().sum().backward()
    assert_near(ours.encoder.stem.weight.grad, peer.encoder.conv_in.weight.grad)
    assert_near(ours.decoder.stem.weight.grad, peer.decoder.conv_in.weight.grad)


def test_written_weights_are_those_of_diffusers(pair: tuple[Peer, AutoencoderKL]) -> None:
    """Ours -> diffusers' names: the same keys, shapes and values."""
    peer, ours = pair
    written: Mapping[str, Tensor] = as_theirs(as_lazy(ours.state_dict()), DIFFUSERS)
    theirs = peer.state_dict()
    assert sorted(written) == sorted(theirs)
    assert all(torch.equal(written[key], theirs[key]) for key in theirs)
