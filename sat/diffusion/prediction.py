"""Predictions of a network (eps, v, x0, flow), and the network behind ``denoise(x, level) -> x0``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from sat.conditioning.conditioner import Condition
from sat.diffusion.schedule import Level, Scalar


class Prediction(Protocol):
    """The network's input scaling, its target, and x0 from its output; (B, C, h, w) float32 throughout."""

    def scale_in(self, x: Tensor, level: Level) -> Tensor:
        """The network's input, from x_t."""
        ...

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        """x0 from the network's output."""
        ...

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """The right output of the network, for x_t = alpha x0 + sigma eps."""
        ...

    def gain(self, level: Level) -> Scalar:
        """The factor from a squared error of the output to one of x0."""
        ...


class V:
    """v = alpha eps - sigma x0, for variance-preserving schedules.

    Source: arXiv:2202.00512, appendix D; official ``ZeroSNRScaling``.
    """

    def scale_in(self, x: Tensor, level: Level) -> Tensor:
        return x

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        return level.net_alpha * x - level.net_sigma * out  # x0 = alpha x - sigma v

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return level.net_alpha * eps - level.net_sigma * x0  # v = alpha eps - sigma x0

    def gain(self, level: Level) -> Scalar:
        return level.net_sigma**2


class X0:
    """The clean image itself, for any schedule; the network's input is x_t at unit variance."""

    def scale_in(self, x: Tensor, level: Level) -> Tensor:
        return x / (level.net_alpha**2 + level.net_sigma**2) ** 0.5

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        return out

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return x0

    def gain(self, level: Level) -> Scalar:
        return 1.0


class Eps:
    """The noise itself, for variance-exploding schedules.

    The network's input is scaled to unit variance. Source: official ``EpsScaling``.
    """

    def scale_in(self, x: Tensor, level: Level) -> Tensor:
        return x / (level.net_alpha**2 + level.net_sigma**2) ** 0.5

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        return (x - level.net_sigma * out) / level.net_alpha  # x0 = (x - sigma eps) / alpha

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return eps

    def gain(self, level: Level) -> Scalar:
        return (level.net_sigma / level.net_alpha) ** 2


class Flow:
    """eps - x0, the velocity of a straight path; exact on every schedule.

    Source: arXiv:2210.02747; CogView4 (``FlowMatchEulerDiscreteScheduler`` of diffusers).
    """

    def scale_in(self, x: Tensor, level: Level) -> Tensor:
        return x

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        # x = alpha x0 + sigma eps and eps = out + x0: x0 = (x - sigma out) / (alpha + sigma)
        return (x - level.net_sigma * out) / (level.net_alpha + level.net_sigma)

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return eps - x0

    def gain(self, level: Level) -> Scalar:
        return (level.net_sigma / (level.net_alpha + level.net_sigma)) ** 2


class FlowFromV:
    """A network trained for v, on a flow schedule: x_t at unit norm goes in, its v is that of the same noise.

    With n = sqrt(alpha^2 + sigma^2), x_t / n = (alpha / n) x0 + (sigma / n) eps is variance preserving, and
    eps - x0 = ((sigma - alpha) x_t / n + (alpha + sigma) v) / n. Its schedule tells the network the timestep
    it knows: ``FlowMatching(timestep_of=…)``. Source: arXiv:2506.02221 (diffusion models as flow models).
    """

    def scale_in(self, x: Tensor, level: Level) -> Tensor:
        return x / _norm(level)

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        n = _norm(level)
        return (level.net_alpha * (x / n) - level.net_sigma * out) / n

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        return (level.net_alpha * eps - level.net_sigma * x0) / _norm(level)

    def gain(self, level: Level) -> Scalar:
        return (level.net_sigma / _norm(level)) ** 2


class Preconditioned:
    """Another prediction by a network that was trained for ``base``: x0 = c_skip x_t + c_out F.

    The input stays; the output F becomes, with n = sqrt(alpha^2 + sigma^2),

        ``x0``: c_skip = 0, c_out = 1
        ``v``:  c_skip = alpha / n^2, c_out = -sigma / n     (F is v of x_t / n)

    At the noisiest level c_skip is (nearly) 0, so the picture is all that the network adds. For ``Eps`` and
    ``Flow`` x0 is there what is left of x_t without the network's copy of the noise, times up to 1 / alpha:
    the error of that copy is speckle in a picture of one step. F is no affine function of the base's output
    with bounded factors, so weights learn it by a short regression. ``v`` has EDM's c_skip and c_out for data
    of unit variance. Source: arXiv:2206.00364, table 1; arXiv:2202.00512, appendix D.
    """

    def __init__(self, base: Prediction, to: Literal["x0", "v"]) -> None:
        self.base, self.to = base, to

    def scale_in(self, x: Tensor, level: Level) -> Tensor:
        return self.base.scale_in(x, level)

    def to_x0(self, out: Tensor, x: Tensor, level: Level) -> Tensor:
        if self.to == "x0":
            return out
        n = _norm(level)
        return (level.net_alpha * (x / n) - level.net_sigma * out) / n

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        if self.to == "x0":
            return x0
        return (level.net_alpha * eps - level.net_sigma * x0) / _norm(level)

    def gain(self, level: Level) -> Scalar:
        return 1.0 if self.to == "x0" else (level.net_sigma / _norm(level)) ** 2


def _norm(level: Level) -> Scalar:
    n: Scalar = (level.net_alpha**2 + level.net_sigma**2) ** 0.5
    return n


class Network(Protocol):
    """The contract of every image network. Only its own ``prepare`` knows what ``prepared`` holds."""

    def prepare(self, cond: Condition, size: tuple[int, int], timesteps: Sequence[float] = ()) -> Any:
        """Everything that depends on the condition and the latent size (h, w) but not on x.

        ``timesteps`` are those that will follow, so that what depends on them alone is computed now too.
        """
        ...

    def __call__(self, x: Tensor, timestep: Scalar, prepared: Any) -> Tensor:
        """(B, C, h, w) at ``timestep``, one float for all or (B,) -> the network's output."""
        ...


class Denoiser:
    """Predicted x0 of a network that predicts eps, v, x0 or flow; float32 in and out, whatever its dtype."""

    def __init__(self, network: Network, prediction: Prediction) -> None:
        self.network = network
        self.prediction = prediction

    def __call__(self, x: Tensor, level: Level, prepared: Any) -> Tensor:
        """(B, C, h, w) at ``level`` -> predicted x0."""
        out = self.output(x, level, prepared)
        return self.prediction.to_x0(out, x, level)

    def output(self, x: Tensor, level: Level, prepared: Any) -> Tensor:
        """(B, C, h, w) at ``level`` -> the network's raw output, in the dtype of ``x``."""
        return self.network(self.prediction.scale_in(x, level), level.timestep, prepared).to(x.dtype)
