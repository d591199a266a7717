"""What the network predicts, and how x0 follows from it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sat.diffusion.level import Level, Scalar


class Parameterisation(Protocol):
    """The network's input scaling, its target, and x0 from its output; float32 throughout."""

    def scale_in(self, x: Tensor, level: Level) -> Tensor:
        """What the network is shown, from x_t."""
        ...

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        """x0 from the network's output."""
        ...

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """What the network's output should be, for x_t = alpha x0 + sigma eps."""
        ...

    def gain(self, level: Level) -> Scalar:
        """How a squared error of the output becomes one of x0: the factor."""
        ...


class V:
    """v = alpha eps - sigma x0, for variance-preserving schedules; x0 = alpha x - sigma v.

    Source: arXiv:2202.00512, appendix D; official ``ZeroSNRScaling``.
    """

    def scale_in(self, x: Tensor, level: Level) -> Tensor:
        return x

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        return level.net_alpha * x - level.net_sigma * out

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return level.net_alpha * eps - level.net_sigma * x0

    def gain(self, level: Level) -> Scalar:
        return level.net_sigma**2


class X0:
    """The clean image itself, for any schedule; the network sees x_t at unit variance."""

    def scale_in(self, x: Tensor, level: Level) -> Tensor:
        return x / (level.net_alpha**2 + level.net_sigma**2) ** 0.5

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        return out

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return x0

    def gain(self, level: Level) -> Scalar:
        return 1.0


class Eps:
    """The noise itself, for variance-exploding schedules: x0 = x - sigma eps.

    The network's input is scaled to unit variance. Source: official ``EpsScaling``.
    """

    def scale_in(self, x: Tensor, level: Level) -> Tensor:
        return x / (level.net_alpha**2 + level.net_sigma**2) ** 0.5

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        return (x - level.net_sigma * out) / level.net_alpha

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return eps

    def gain(self, level: Level) -> Scalar:
        return (level.net_sigma / level.net_alpha) ** 2
