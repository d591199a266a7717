"""Official tensor names of the autoencoder: where each of ours goes, and back."""

from __future__ import annotations

import pytest
import torch

from sat.checkpoint.format import as_lazy
from sat.checkpoint.load import load
from sat.checkpoint.rules import as_theirs
from sat.first_stage import AutoencoderKL
from sat.first_stage.keys import SAT


def four_channels(levels: int = 3) -> AutoencoderKL:
    """Every kind of layer: attention, quant convolutions, shortcuts."""
    return AutoencoderKL(4, (1, 2, 3, 4)[:levels], 1, 4, 2, mid_attention=True, quant_convs=True)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("encoder.stem.weight", "encoder.conv_in.weight"),
        ("encoder.levels.1.blocks.0.shortcut.bias", "encoder.down.1.block.0.nin_shortcut.bias"),
        ("encoder.levels.0.down.conv.weight", "encoder.down.0.downsample.conv.weight"),
        ("encoder.middle.block2.conv1.weight", "encoder.mid.block_2.conv1.weight"),
        ("encoder.norm.weight", "encoder.norm_out.weight"),
        ("decoder.levels.0.blocks.1.conv2.weight", "decoder.up.2.block.1.conv2.weight"),
        ("decoder.levels.1.up.conv.bias", "decoder.up.1.upsample.conv.bias"),
        ("decoder.levels.2.blocks.0.shortcut.weight", "decoder.up.0.block.0.nin_shortcut.weight"),
        ("decoder.middle.attention.norm.weight", "decoder.mid.attn_1.norm.weight"),
        ("decoder.head.bias", "decoder.conv_out.bias"),
        ("quant.weight", "quant_conv.weight"),
        ("post_quant.bias", "post_quant_conv.bias"),
    ],
)
def test_names(ours: str, theirs: str) -> None:
    state = four_channels().state_dict()
    assert torch.equal(as_theirs(as_lazy(state), SAT)[theirs], state[ours])


def test_attention_is_a_1x1_convolution_there() -> None:
    state = four_channels().state_dict()
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("proj", "proj_out")):
        written = as_theirs(as_lazy(state), SAT)[f"encoder.mid.attn_1.{theirs}.weight"]
        assert torch.equal(written, state[f"encoder.middle.attention.{ours}.weight"][:, :, None, None])


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_written_and_read_again_it_is_the_same(levels: int) -> None:
    one, other = four_channels(levels), four_channels(levels)
    theirs = as_theirs(as_lazy(one.state_dict()), SAT)
    assert len(theirs) == len(one.state_dict())
    load(other, dict(theirs), "first_stage")
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
