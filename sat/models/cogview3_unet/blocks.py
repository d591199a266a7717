"""The UNet's layers around its transformers: residual blocks and changes of resolution.

Letters: B batch, C channels, h, w rows and columns of the map, E embedding width.
Source: official ``sgm/modules/diffusionmodules/openaimodel.py``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sat.mixins.cross_attention import CrossAttention
from sat.mixins.feature_map import FeatureMap
from sat.transformer import BlockSpec, Transformer

TRANSFORMER = BlockSpec(affine=True, qkv_bias=False, mlp="geglu", gelu="none")
"""Affine norms with eps 1e-5, q, k and v without bias, GEGLU with exact GELU."""


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Affine group norm with eps 1e-5."""
    if channels % groups:
        raise ValueError(
            f"{channels} channels cannot be normalised in {groups} groups; width times every multiplier "
            f"must be a multiple of groups"
        )
    return nn.GroupNorm(groups, channels)


class ResBlock(nn.Module):
    """(B, C_in, h, w) and the activated embedding (B or 1, E) -> (B, C_out, h, w).

    The embedding is added between two normalised 3x3 convolutions; the input passes a 1x1 convolution where
    the widths differ. The second convolution starts at zero.
    """

    def __init__(self, channels: int, out_channels: int, emb_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(emb)[:, :, None, None]
        out: Tensor = self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2): a 3x3 convolution of stride 2, padded alike on all sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shrink(x)
        return out


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2h, 2w): every cell repeated twice each way, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.grow = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.grow(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def spatial_transformer(channels: int, depth: int, head_dim: int, text_dim: int, groups: int) -> Transformer:
    """``depth`` blocks over the cells of a map, each attending to all cells and to the text."""
    if channels % head_dim:
        raise ValueError(f"a width of {channels} does not divide into heads of {head_dim}")
    heads = channels // head_dim
    mixins = {
        "map": FeatureMap(channels, channels, groups),
        "cross": CrossAttention(channels, heads, head_dim, text_dim, depth),
    }
    return Transformer(channels, heads, depth, mixins, TRANSFORMER)
