"""How much each noise level counts in the loss, as weights on the squared error of the network's own output."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sat.diffusion.level import Level


class Weighting(Protocol):
    """(B, 1, 1, 1) weights, or 1."""

    def __call__(self, level: Level) -> Tensor | float: ...


class Uniform:
    """Every level alike in the network's own output: the official loss, both for v and for eps.

    The official code states it as a weight on the x0 error, 1 / sigma^2: the same thing.
    """

    def __call__(self, level: Level) -> Tensor | float:
        return 1.0


class MinSNR:
    """min(snr, gamma) weights on x0, restated for v prediction: min(snr, gamma) / (snr + 1).

    Source: arXiv:2303.09556, eq. 8 (gamma 5).
    """

    def __init__(self, gamma: float = 5.0) -> None:
        self.gamma = gamma

    def __call__(self, level: Level) -> Tensor | float:
        alpha, sigma = torch.as_tensor(level.net_alpha), torch.as_tensor(level.net_sigma)
        snr = (alpha / sigma) ** 2
        return snr.clamp(max=self.gamma) / (snr + 1)
