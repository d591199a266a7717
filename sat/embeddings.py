"""Scalars on their way into a network: sent to its device, sinusoidal features, the small MLP behind them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; on the way to an accelerator it is pinned, so that the host does not wait."""
    if x.device.type != "cpu" or device.type in ("cpu", "meta") or not torch.cuda.is_available():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


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


class GuidanceEmbedding(nn.Linear):
    """Guidance strengths (B,) -> (B, width), added to a timestep's features; zeros until it is trained.

    Source: arXiv:2210.03142; official ``openaimodel.py:1023`` (``w_proj``).
    """

    def __init__(self, inputs: int, width: int) -> None:
        if inputs < 4:
            raise ValueError(f"guidance_dim {inputs}: expected at least 4 features, or null for none")
        super().__init__(inputs, width, bias=False)

    def reset_parameters(self) -> None:
        """Zeros: a model that learns to take the strength starts as the one that does not."""
        nn.init.zeros_(self.weight)

    def adopt(self, shape: tuple[int, ...]) -> None:
        """Take the number of features that a checkpoint's weight of ``shape`` has: no config need say it."""
        if len(shape) == 2 and shape[1] != self.in_features:
            self.in_features = shape[1]
            self.weight = nn.Parameter(self.weight.new_zeros(self.out_features, shape[1]))

    def forward(self, strength: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        features = guidance_sinusoid(strength, self.in_features)
        return super().forward(features.to(self.weight.dtype))


def embedded(embedding: GuidanceEmbedding | None, strength: Tensor | None) -> Tensor | None:
    """Features of guidance strengths (B,); None where a network is given none."""
    if strength is None:
        return None
    if embedding is None:
        raise ValueError(
            "a guidance strength is given as an input, but this network takes none (guidance_dim is null)"
        )
    out: Tensor = embedding(strength)
    return out


def one_row(rows: Tensor) -> Tensor:
    """The first of ``rows`` where all are alike, else all."""
    if len(rows) == 1:
        return rows
    return rows[:1] if bool((rows == rows[:1]).all()) else rows


def mlp(inputs: int, hidden: int) -> nn.Sequential:
    """Linear, SiLU, Linear: (…, inputs) -> (…, hidden)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
