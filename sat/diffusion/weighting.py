"""How much each noise level counts in the loss, as weights on the squared error of the network's output.

``gain`` is what turns that into the squared error of x0: sigma^2 / alpha^2 for eps, sigma^2 for v.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sat.diffusion.level import Level, Scalar


class Weighting(Protocol):
    """(B, 1, 1, 1) weights, or 1."""

    def __call__(self, level: Level, gain: Scalar) -> Scalar: ...


class Uniform:
    """Every level alike in the network's own output: the official loss, both for v and for eps.

    The official code states it as a weight on the x0 error, 1 / sigma^2: the same thing.
    """

    def __call__(self, level: Level, gain: Scalar) -> Scalar:
        return 1.0


class MinSNR:
    """min(SNR, ``gamma``) on the error of x0. Source: arXiv:2303.09556, section 3.4."""

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ValueError(f"MinSNR: gamma is {gamma:g}, expected more than 0")
        self.gamma = gamma

    def __call__(self, level: Level, gain: Scalar) -> Scalar:
        return _snr(level).clamp(max=self.gamma) * gain


class TruncatedSNR:
    """max(SNR, 1) on the error of x0, for distillation. Source: arXiv:2202.00512, section 4."""

    def __call__(self, level: Level, gain: Scalar) -> Scalar:
        return _snr(level).clamp(min=1.0) * gain


class SNRPlusOne:
    """SNR + 1 on the error of x0, which is uniform in v. Source: arXiv:2202.00512, section 4."""

    def __call__(self, level: Level, gain: Scalar) -> Scalar:
        return (_snr(level) + 1) * gain


def _snr(level: Level) -> Tensor:
    """alpha^2 / sigma^2."""
    return torch.as_tensor(level.alpha) ** 2 / torch.as_tensor(level.sigma) ** 2
