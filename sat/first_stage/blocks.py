"""Convolution blocks of the autoencoder: residual block, halving, doubling and single-head attention.

Every block keeps the memory format it is given: hand in channels-last images to run channels-last throughout,
which on a CPU in bf16 is several times faster. Letters: B batch, C channels, h,w rows and columns of the map.
Source: official ``sgm/modules/diffusionmodules/model.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORM_EPS = 1e-6


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Affine GroupNorm with the epsilon 1e-6 of the official autoencoders."""
    if channels % groups:
        raise ValueError(
            f"first_stage: {channels} channels cannot be normalised in {groups} groups; "
            f"width times every multiplier must be a multiple of groups"
        )
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class Pointwise(nn.Conv2d):
    """1x1 convolution (B, C_in, h, w) -> (B, C_out, h, w).

    For float32 pictures on the CPU it is a matrix product: oneDNN's 1x1 convolution rounds differently with
    the number of threads, and a picture must not depend on that.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(x)
        weight = self.weight[:, :, 0, 0]
        if x.is_contiguous():  # either way the memory format stays
            out = torch.matmul(weight, x.flatten(2)).view(len(x), len(weight), *x.shape[2:])
            return out if self.bias is None else out + self.bias[:, None, None]
        return F.linear(x.permute(0, 2, 3, 1), weight, self.bias).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """(B, C_in, h, w) -> (B, C_out, h, w): two normalised 3x3 convolutions added to the input.

    The input passes through a 1x1 convolution where the widths differ.
    """

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = Pointwise(channels, out_channels) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        spare = not torch.is_grad_enabled()  # the norm's output is nobody else's
        y = self.conv1(F.silu(self.norm1(x), inplace=spare))  # (B, C_out, h, w)
        y = self.conv2(F.silu(self.norm2(y), inplace=spare))
        out: Tensor = y.add_(self.shortcut(x)) if spare else self.shortcut(x) + y
        return out


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2): a 3x3 convolution of stride 2, padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2h, 2w): every cell repeated twice each way, then a 3x3 convolution.

    Of the nine cells that the convolution sees, five repeat others: on the CPU, where arithmetic is what
    counts, each of the four kinds of output cells is a 2x2 convolution of the small map, with the weights of
    repeated cells added up. The sums are the same in another order, with 4/9 of the products.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            return out
        b, c, h, w = x.shape
        rows_first = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if rows_first else torch.contiguous_format
        out = torch.empty(b, c, 2 * h, 2 * w, dtype=x.dtype, device=x.device, memory_format=layout)
        weight = self.conv.weight.to(torch.promote_types(x.dtype, torch.float32))
        for row, half in enumerate(_phases(weight, 2)):
            for column, kernel in enumerate(_phases(half, 3)):
                kernel = kernel.to(x.dtype, memory_format=layout)
                part = F.conv2d(x, kernel, self.conv.bias, padding=1)  # one cell too many each way
                out[..., row::2, column::2] = part[..., row : row + h, column : column + w]
        return out


def _phases(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Along ``axis``, three weights on repeated cells as two on the cells: for even outputs, and for odd."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)


class Attention(nn.Module):
    """Single-head self-attention over all cells, added to its input; (B, C, h, w) -> the same.

    Logits are scaled by 1/sqrt(C). Only the 4-channel autoencoder has it, in the middle.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        cells = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")  # (B, one head, h w, C)
        y = F.scaled_dot_product_attention(self.q(cells), self.k(cells), self.v(cells))
        out: Tensor = rearrange(self.proj(y), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + out


class Middle(nn.Module):
    """(B, C, h, w) -> the same: two residual blocks at the lowest resolution, attention between or not."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, groups)
        self.attention = Attention(channels, groups) if attention else nn.Identity()
        self.block2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        out: Tensor = self.block2(self.attention(self.block1(x)))
        return out
