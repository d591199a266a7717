"""Image -> moments of the latent distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sat.first_stage.blocks import Downsample, Middle, ResBlock, group_norm


class EncoderLevel(nn.Module):
    """Residual blocks at one resolution, then halving unless it is the last level."""

    def __init__(self, channels: int, out_channels: int, *, blocks: int, groups: int, halve: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(channels if index == 0 else out_channels, out_channels, groups)
            for index in range(blocks)
        )
        self.down = Downsample(out_channels) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h/2, w/2), or (B, C_out, h, w) on the last level."""
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.down(x)
        return out


class Encoder(nn.Module):
    """(B, image_channels, H, W) in [-1, 1] -> (B, 2C, h, w): the mean, then the log variance.

    ``widths`` are the feature widths of the levels, finest first; each level but the last halves the image.
    Source: official ``sgm/modules/diffusionmodules/model.py`` Encoder.
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
        last = len(widths) - 1
        self.stem = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            EncoderLevel(widths[max(i - 1, 0)], width, blocks=blocks, groups=groups, halve=i < last)
            for i, width in enumerate(widths)
        )
        self.middle = Middle(widths[-1], groups, mid_attention)
        self.norm = group_norm(widths[-1], groups)
        self.head = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, image_channels, H, W) -> (B, 2C, h, w)."""
        x = self.stem(image)
        for level in self.levels:
            x = level(x)
        out: Tensor = self.head(F.silu(self.norm(self.middle(x))))
        return out
