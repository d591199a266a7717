"""A network as samplers and losses see it: ``denoise(x, level) -> x0``, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from sat.conditioning.condition import Condition
from sat.diffusion.level import Level, Scalar
from sat.diffusion.prediction import Parameterisation


class Network(Protocol):
    """What every image network offers. ``prepared`` is its own business; only ``prepare`` makes one."""

    def prepare(self, cond: Condition, size: tuple[int, int], indices: Sequence[float] = ()) -> Any:
        """Everything that depends on the condition and the latent size (h, w) but not on the step.

        ``indices`` are the timesteps that will follow, so that what depends on them alone is computed now
        too.
        """
        ...

    def __call__(self, x: Tensor, index: Scalar, prepared: Any) -> Tensor:
        """(B, C, h, w) at timestep ``index``, one float for all or (B,) -> the network's output."""
        ...


class Denoiser:
    """Predicted x0 of a network under a parameterisation; float32 in and out, whatever its dtype."""

    def __init__(self, network: Network, parameterisation: Parameterisation) -> None:
        self.network = network
        self.parameterisation = parameterisation

    def __call__(self, x: Tensor, level: Level, prepared: Any) -> Tensor:
        """(B, C, h, w) at ``level`` -> predicted x0."""
        out = self.output(x, level, prepared)
        return self.parameterisation.to_x0(out, x, level)

    def output(self, x: Tensor, level: Level, prepared: Any) -> Tensor:
        """The raw network output, cast back to the dtype of ``x``."""
        return self.network(self.parameterisation.scale_in(x, level), level.index, prepared).to(x.dtype)
