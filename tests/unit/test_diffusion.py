"""Schedules, the process, parameterisations, guidance, the sampler and the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sat.conditioning.condition import Condition
from sat.diffusion.denoiser import Denoiser
from sat.diffusion.guidance import ClassifierFree, Unguided
from sat.diffusion.level import Level
from sat.diffusion.loss import DenoisingLoss
from sat.diffusion.parameterisation import Eps, Parameterisation, V
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.sampler import DDIM
from sat.diffusion.schedule import Discrete, Schedule, ZeroSNR, scaled_linear_alphas, snr_shift
from sat.diffusion.spacing import timesteps
from tests.tolerances import F32

CTX = ProcessContext()
SCHEDULES: list[Schedule] = [
    ZeroSNR(),
    ZeroSNR(shift=1.0, rescale="before_spacing", quantise=False),
    Discrete(),
]


def test_trailing_steps_start_at_the_last_level() -> None:
    assert timesteps(50, 1000)[:2] == [999, 979] and timesteps(50, 1000)[-1] == 19
    assert timesteps(24, 1000) == [math.trunc(999 - i * 999 / 24) for i in range(24)]
    assert timesteps(4, 1000, "leading") == [750, 500, 250, 0]


@pytest.mark.parametrize("steps", [0, 1001])
def test_an_impossible_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be between 1 and 1000 .*, got {steps}"):
        timesteps(steps, 1000)


def test_shift_divides_the_signal_to_noise_ratio() -> None:
    a = scaled_linear_alphas()
    shifted = snr_shift(a, 4.0)
    assert np.allclose(shifted / (1 - shifted), a / (1 - a) / 4)
    assert np.array_equal(snr_shift(a, 1.0), a)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_levels_go_monotonically_from_noise_to_data(schedule: Schedule, steps: int) -> None:
    levels = schedule.levels(steps)
    assert len(levels) == steps + 1
    sigmas = [level.sigma for level in levels]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[-1] == 0
    assert levels[0].index == 999 and levels[-1].alpha == 1


def test_zero_snr_starts_without_signal_and_keeps_its_variance() -> None:
    levels = ZeroSNR().levels(10)
    assert levels[0].alpha == 0 and levels[0].sigma == 1
    assert all(abs(level.alpha**2 + level.sigma**2 - 1) < 1e-12 for level in levels)


def test_rescaling_order_changes_alpha_by_what_the_facts_say() -> None:
    """Traps 8: 1.2e-3 at 50 steps, 6.1e-3 at 10."""
    for steps, bound in ((50, 1.2e-3), (10, 6.1e-3)):
        after = ZeroSNR().levels(steps)
        before = ZeroSNR(rescale="before_spacing").levels(steps)
        worst = max(abs(a.alpha - b.alpha) for a, b in zip(after, before, strict=True))
        assert worst == pytest.approx(bound, rel=0.05)


def test_quantised_level_is_the_nearest_trained_one() -> None:
    schedule = ZeroSNR()
    for level in schedule.levels(10)[:-1]:
        assert abs(level.net_alpha - level.alpha) == pytest.approx(
            np.abs(schedule.trained - level.alpha).min()
        )
        assert level.net_alpha in schedule.trained
    exact = ZeroSNR(rescale="before_spacing").levels(10)
    assert all(level.net_alpha == level.alpha for level in exact)


def test_a_schedule_refuses_a_shift_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        ZeroSNR(shift=0)


@pytest.mark.parametrize(("schedule", "parameterisation"), [(ZeroSNR(), V()), (Discrete(), Eps())])
def test_x0_follows_from_the_target(schedule: Schedule, parameterisation: Parameterisation) -> None:
    x0, eps = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    level = schedule.at(torch.tensor([999, 17]))
    x = Process().noise(x0, eps, level, CTX)
    back = parameterisation.to_x0(parameterisation.target(x0, eps, level), x, level)
    assert (back - x0).abs().max() < 1e-4  # eps prediction loses digits to sigma 14.6


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_a_perfect_denoiser_is_sampled_exactly(schedule: Schedule, steps: int) -> None:
    x0 = torch.randn(2, 3, 4, 5)
    out = DDIM()(lambda x, level: x0, torch.randn(2, 3, 4, 5), schedule.levels(steps), Process(), CTX)
    assert torch.equal(out, x0)


def test_the_step_keeps_the_noise_of_the_data() -> None:
    process, levels = Process(), ZeroSNR().levels(5)
    x0, eps = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for now, to in zip(levels, levels[1:], strict=False):
        moved = process.step(process.noise(x0, eps, now, CTX), x0, now, to, CTX)
        assert (moved - process.noise(x0, eps, to, CTX)).abs().max() < F32


def test_the_callback_hears_every_step() -> None:
    heard: list[tuple[int, int]] = []
    DDIM()(
        lambda x, level: 0 * x, torch.randn(1, 1, 2, 2), ZeroSNR().levels(3), Process(), CTX,
        lambda done, total, x0: heard.append((done, total)),
    )  # fmt: skip
    assert heard == [(1, 3), (2, 3), (3, 3)]


def rows() -> tuple[Condition, Condition]:
    cond = Condition(torch.ones(2, 3, 4), torch.ones(2, 6))
    return cond, cond.null()


def test_unconditional_rows_come_first() -> None:
    both = ClassifierFree(5.0).rows(*rows())
    assert both.text[:2].abs().max() == 0 and both.text[2:].min() == 1
    assert both.vector.min() == 1  # sizes stay


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    level = ZeroSNR().levels(2)[0]
    x = torch.zeros(2, 1, 1, 1)

    def denoise(x: Tensor, level: Level) -> Tensor:
        return torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(4, 1, 1, 1)

    out = ClassifierFree(3.0)(denoise, x, level)
    assert out.flatten().tolist() == [1 + 3 * (4 - 1), 2 + 3 * (8 - 2)]


def test_scale_one_is_unguided() -> None:
    cond, uncond = rows()
    assert ClassifierFree(1.0).rows(cond, uncond) is Unguided().rows(cond, uncond)
    x = torch.randn(2, 1, 2, 2)
    assert torch.equal(ClassifierFree(1.0)(lambda x, level: 2 * x, x, ZeroSNR().levels(2)[0]), 2 * x)


class Fixed:
    """A network that returns what it is told to."""

    def __init__(self, out: Tensor) -> None:
        self.out = out

    def prepare(self, cond: Condition, size: tuple[int, int], indices: object = ()) -> None: ...

    def __call__(self, x: Tensor, index: object, prepared: object) -> Tensor:
        return self.out


@pytest.mark.parametrize(("schedule", "parameterisation"), [(ZeroSNR(), V()), (Discrete(), Eps())])
def test_the_loss_is_the_weighted_error_of_x0(schedule: Schedule, parameterisation: Parameterisation) -> None:
    """The official statement: x0 error weighted by 1 / sigma^2."""
    x0, out = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    loss = DenoisingLoss()
    draw = loss.draw(x0, schedule, torch.Generator().manual_seed(0))
    denoiser = Denoiser(Fixed(out), parameterisation)
    mine = loss(denoiser, x0, None, draw, schedule, Process(), CTX)
    level = schedule.at(draw.index)
    x = level.alpha * x0 + level.sigma * draw.eps
    theirs = ((denoiser(x, level, None) - x0) ** 2 / level.sigma**2).mean((1, 2, 3))
    assert torch.allclose(mine, theirs, rtol=1e-4)
    assert mine.shape == (3,)


def test_offset_noise_shifts_whole_images() -> None:
    x0 = torch.zeros(3, 2, 8, 9)
    plain = DenoisingLoss().draw(x0, ZeroSNR(), torch.Generator().manual_seed(0))
    offset = DenoisingLoss(offset_noise=0.5).draw(x0, ZeroSNR(), torch.Generator().manual_seed(0))
    moved = offset.eps - plain.eps
    assert torch.equal(plain.index, offset.index)
    assert moved.std((1, 2, 3)).max() < F32 and moved.mean((1, 2, 3)).abs().min() > 0


def test_draws_come_from_the_generator() -> None:
    x0 = torch.zeros(3, 2, 4, 5)
    a, b = (DenoisingLoss().draw(x0, ZeroSNR(), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a.eps, b.eps) and torch.equal(a.index, b.index)
