"""Sinusoidal features of scalars and the small MLP behind them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim) float32, [cos | sin], frequencies 10000^(-k / half) for k = 0 … half - 1.

    An odd ``dim`` ends in a 0. Source: official ``util.py:207``.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * freqs
    return F.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, dim % 2))


def guidance_sinusoid(w: Tensor, dim: int) -> Tensor:
    """(B,) guidance strengths -> (B, dim) float32, [sin | cos] of 1000 w at 10000^(-k / (half - 1)).

    The order and the denominator differ from :func:`sinusoid`. Source: official ``sampling.py:24-50``.
    """
    half = dim // 2
    # In this order: at thousands of radians the rounding of the frequencies shows (5e-4 at w = 7.5).
    freqs = torch.exp(
        torch.arange(half, dtype=torch.float32, device=w.device) * (-math.log(10000) / (half - 1))
    )
    angles = 1000 * w.float()[:, None] * freqs
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, dim % 2))


def mlp(inputs: int, hidden: int) -> nn.Sequential:
    """Linear, SiLU, Linear: (…, inputs) -> (…, hidden)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
