"""Latent -> image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.first_stage.blocks import Middle, ResBlock, Upsample, group_norm


class DecoderLevel(nn.Module):
    """Residual blocks at one resolution, then doubling unless it is the last level."""

    def __init__(self, channels: int, out_channels: int, *, blocks: int, groups: int, double: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(channels if index == 0 else out_channels, out_channels, groups)
            for index in range(blocks)
        )
        self.up = Upsample(out_channels) if double else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, 2h, 2w), or (B, C_out, h, w) on the last level."""
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.up(x)
        return out


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, image_channels, H, W), about [-1, 1], not clamped.

    ``widths`` are the feature widths finest first, as for the encoder; level 0 is the coarsest (the first to
    run) and each level has one block more than the encoder's. Every level but the last doubles the image.
    Source: official ``sgm/modules/diffusionmodules/model.py`` Decoder.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        blocks: int,
        groups: int,
        latent_channels: int,
        image_channels: int = 3,
        mid_attention: bool = False,
    ) -> None:
        super().__init__()
        coarse_first = list(reversed(widths))
        last = len(coarse_first) - 1
        self.stem = nn.Conv2d(latent_channels, coarse_first[0], 3, padding=1)
        self.middle = Middle(coarse_first[0], groups, mid_attention)
        self.levels = nn.ModuleList(
            DecoderLevel(
                coarse_first[max(i - 1, 0)], width, blocks=blocks + 1, groups=groups, double=i < last
            )
            for i, width in enumerate(coarse_first)
        )
        self.norm = group_norm(coarse_first[-1], groups)
        self.head = nn.Conv2d(coarse_first[-1], image_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, image_channels, H, W)."""
        x = self.middle(self.stem(latent))
        for level in self.levels:
            x = level(x)
        out: Tensor = self.head(F.silu(self.norm(x), inplace=not torch.is_grad_enabled()))
        return out
