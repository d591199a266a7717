"""Samplers against diffusers' schedulers, step by step on one bent network of x and timestep.

20 and 50 steps of 1000: where the spacing divides the timesteps, "trailing" there and here is the same list.
diffusers' multistep scheduler needs scipy: ``LinearMultistep`` has its test in tests/unit/test_samplers.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from sat.diffusion.prediction import Eps, V
from sat.diffusion.process import Process
from sat.diffusion.samplers import DDIM, DPMSolver2M, Euler, EulerAncestral, Heun, Sampler, Trajectory
from sat.diffusion.schedule import CLEAN, Discrete, Level, scaled_linear_alphas, timesteps
from tests.tolerances import F32

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def apart(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest value: their tables, and some states, are float32."""
    return float((mine - theirs).abs().max() / theirs.abs().max())


def network(x: Tensor, t: float) -> Tensor:
    return torch.tanh(0.4 * x + t / 700)


def ours(sampler: Sampler, levels: list[Level], generator: torch.Generator | None = None) -> Tensor:
    """Predicts noise, from unit variance."""
    return sampler(
        lambda x, at: Eps().to_x0(network(Eps().scale_in(x, at), float(at.timestep)), x, at),
        NOISE,
        Trajectory(
            levels,
            Process(),
            noise_sampler=lambda: torch.randn(NOISE.shape, generator=generator, dtype=torch.float64),
        ),
    )


def peer(scheduler: Any, steps: int, start: Tensor, generator: torch.Generator | None = None) -> Tensor:
    scheduler.set_timesteps(steps)
    x = start
    extra = {} if generator is None else {"generator": generator}
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t).double(), float(t))
        x = scheduler.step(out, t, x, **extra).prev_sample
    return x.double()


def exploding_start(levels: list[Level]) -> Tensor:
    return NOISE * (1 + float(levels[0].sigma) ** 2) ** 0.5


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [(Euler(), EulerDiscreteScheduler), (DDIM(), EulerDiscreteScheduler), (Heun(), HeunDiscreteScheduler)],
)
def test_equals_diffusers_on_the_exploding_schedule(sampler: Sampler, scheduler: Any, steps: int) -> None:
    levels = Discrete().levels(steps)
    theirs = peer(scheduler(**TABLE, timestep_spacing="trailing"), steps, exploding_start(levels))
    mine = ours(sampler, levels)
    assert mine.std() > 0.5
    assert apart(mine, theirs) < F32


@pytest.mark.parametrize("steps", [20, 50])
def test_ancestral_steps_equal_diffusers(steps: int) -> None:
    levels = Discrete().levels(steps)
    scheduler = EulerAncestralDiscreteScheduler(**TABLE, timestep_spacing="trailing")
    theirs = peer(scheduler, steps, exploding_start(levels), torch.Generator().manual_seed(4))
    mine = ours(EulerAncestral(), levels, torch.Generator().manual_seed(4))
    assert apart(mine, theirs) < F32


def preserving(steps: int) -> list[Level]:
    bars = scaled_linear_alphas()
    chosen = [(i, bars[i]) for i in timesteps(steps, 1000)]
    return [*(Level(a**0.5, (1 - a) ** 0.5, float(i), a**0.5, (1 - a) ** 0.5) for i, a in chosen), CLEAN]


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("scale", ["exploding", "preserving"])
def test_dpm_solver_equals_diffusers(scale: str, steps: int) -> None:
    """diffusers keeps x at unit variance; on the exploding schedule ours is the same point further out."""
    scheduler = DPMSolverMultistepScheduler(
        **TABLE, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        timestep_spacing="trailing", lower_order_final=True, final_sigmas_type="zero",
    )  # fmt: skip
    theirs = peer(scheduler, steps, NOISE)
    levels = Discrete().levels(steps) if scale == "exploding" else preserving(steps)
    assert apart(ours(DPMSolver2M(), levels), theirs) < F32


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_with_eta_equals_diffusers_on_a_preserving_schedule(eta: float) -> None:
    scheduler = DDIMScheduler(
        **TABLE, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
        prediction_type="v_prediction",
    )  # fmt: skip
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(4)
    theirs = NOISE
    levels = preserving(20)
    for i, t in enumerate(scheduler.timesteps):
        drawn = torch.randn(NOISE.shape, generator=generator, dtype=torch.float64) if eta else None
        # At the last step the peer has a next timestep of -1, and no noise left to draw.
        out = network(theirs, float(t))
        if i == 19:
            a = float(scheduler.alphas_cumprod[t])
            theirs = a**0.5 * theirs - (1 - a) ** 0.5 * out
        else:
            theirs = scheduler.step(out, t, theirs, eta=eta, variance_noise=drawn).prev_sample
    again = torch.Generator().manual_seed(4)
    mine = DDIM(eta)(
        lambda x, at: V().to_x0(network(x, float(at.timestep)), x, at),
        NOISE,
        Trajectory(
            levels,
            Process(),
            noise_sampler=lambda: torch.randn(NOISE.shape, generator=again, dtype=torch.float64),
        ),
    )
    assert apart(mine, theirs) < F32
