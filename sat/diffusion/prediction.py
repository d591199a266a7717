"""Predictions of a network (eps, v, x0), and the network behind ``denoise(x, level) -> x0``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from sat.conditioning.condition import Condition
from sat.diffusion.schedule import Level, Scalar


class Prediction(Protocol):
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


# -- a network as samplers and losses see it: ``denoise(x, level) -> x0``, in float32


class Network(Protocol):
    """What every image network offers. ``prepared`` is its own business; only ``prepare`` makes one."""

    def prepare(self, cond: Condition, size: tuple[int, int], timesteps: Sequence[float] = ()) -> Any:
        """Everything that depends on the condition and the latent size (h, w) but not on the step.

        ``timesteps`` are the timesteps that will follow, so that what depends on them alone is computed now
        too.
        """
        ...

    def __call__(self, x: Tensor, timestep: Scalar, prepared: Any) -> Tensor:
        """(B, C, h, w) at timestep ``timestep``, one float for all or (B,) -> the network's output."""
        ...


class Denoiser:
    """Predicted x0 of a network under a prediction; float32 in and out, whatever its dtype."""

    def __init__(self, network: Network, prediction: Prediction) -> None:
        self.network = network
        self.prediction = prediction

    def __call__(self, x: Tensor, level: Level, prepared: Any) -> Tensor:
        """(B, C, h, w) at ``level`` -> predicted x0."""
        out = self.output(x, level, prepared)
        return self.prediction.to_x0(out, x, level)

    def output(self, x: Tensor, level: Level, prepared: Any) -> Tensor:
        """The raw network output, cast back to the dtype of ``x``."""
        return self.network(self.prediction.scale_in(x, level), level.timestep, prepared).to(x.dtype)
