"""Schedules, spacings, the process, predictions, weightings and the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sat.conditioning.conditioner import Condition
from sat.diffusion.loss import DenoisingLoss, MinSNR, SNRPlusOne, TruncatedSNR, Uniform, Weighting
from sat.diffusion.prediction import X0, Denoiser, Eps, Prediction, V
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.schedule import (
    Discrete,
    Schedule,
    ZeroSNR,
    karras,
    scaled_linear_alphas,
    snr_shift,
    timesteps,
)
from tests.diffusion import drawing
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


def test_leading_steps_are_evenly_spaced_and_end_at_the_first_level() -> None:
    for steps in (1, 3, 7, 24, 999, 1000):
        chosen = timesteps(steps, 1000, "leading")
        assert len(chosen) == steps and chosen[-1] == 0
        assert {a - b for a, b in zip(chosen, chosen[1:], strict=False)} <= {1000 // steps}


def test_karras_levels_follow_equation_5() -> None:
    """(max^(1/7) + i / (n - 1) (min^(1/7) - max^(1/7)))^7."""
    got = karras(5, 0.03, 14.0)
    for i, sigma in enumerate(got):
        root = (4 - i) / 4 * 14.0 ** (1 / 7) + i / 4 * 0.03 ** (1 / 7)
        assert sigma == pytest.approx(root**7, rel=1e-12)
    assert karras(1, 0.03, 14.0) == [pytest.approx(14.0)]


@pytest.mark.parametrize(
    "wrong", [(0, 0.1, 1.0, 7.0), (3, 0.0, 1.0, 7.0), (3, 2.0, 1.0, 7.0), (3, 0.1, 1.0, 0.0)]
)
def test_impossible_karras_levels_are_refused(wrong: tuple[int, float, float, float]) -> None:
    with pytest.raises(ValueError, match=f"0 < smallest <= largest and rho > 0; got steps {wrong[0]}"):
        karras(*wrong)


def test_karras_spacing_has_no_timesteps() -> None:
    with pytest.raises(ValueError, match="karras spacing gives noise levels, not timesteps"):
        timesteps(5, 1000, "karras")


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_karras_spacing_spans_the_schedule(steps: int) -> None:
    exploding = Discrete(spacing="karras").levels(steps)
    table = Discrete().trained
    assert [level.sigma for level in exploding[:-1]] == karras(steps, table[0], table[-1])
    preserving = ZeroSNR(spacing="karras").levels(steps)
    assert len(preserving) == steps + 1 and preserving[0].alpha == 0 and preserving[0].timestep == 999
    noise = [level.sigma / level.alpha for level in preserving[1:-1]]
    schedule = ZeroSNR()
    want = karras(steps - 1, schedule.sigma_at(0), schedule.sigma_at(998)) if steps > 1 else []
    assert noise == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_level_near_a_noise_has_it_exactly_and_shows_the_nearest_timestep(schedule: Schedule) -> None:
    for timestep in (3, 500, 998):
        noise = 1.0001 * schedule.sigma_at(timestep)
        level = schedule.level_at_sigma(noise)
        assert level.sigma / level.alpha == pytest.approx(noise, rel=1e-12)
        assert level.timestep == timestep
        inside = schedule.at(torch.tensor([timestep]))
        net = level.net_sigma / level.net_alpha
        quantised = not (isinstance(schedule, ZeroSNR) and not schedule.quantise)
        want = float(inside.sigma / inside.alpha) if quantised else noise
        assert net == pytest.approx(want, rel=1e-5)


def test_noise_is_interpolated_between_timesteps_and_infinite_at_the_last_of_a_zero_snr_schedule() -> None:
    table = Discrete().trained
    assert Discrete().sigma_at(7.25) == pytest.approx(0.75 * table[7] + 0.25 * table[8], rel=1e-12)
    assert ZeroSNR().sigma_at(999) == math.inf
    clean = ZeroSNR().trained[0]
    assert ZeroSNR().sigma_at(0) == pytest.approx((1 - clean**2) ** 0.5 / clean)


def test_exploding_levels_are_those_of_latent_diffusion() -> None:
    """14.6146 down to 0.0292: original_behaviour.md, section 7."""
    levels = Discrete().levels(4)
    assert levels[0].sigma == pytest.approx(14.6146, abs=1e-4) and levels[0].timestep == 999
    assert Discrete().trained[0] == pytest.approx(0.0292, abs=1e-4)
    assert all(level.alpha == level.net_alpha == 1 and level.net_sigma == level.sigma for level in levels)


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
    assert levels[0].timestep == 999 and levels[-1].alpha == 1


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


@pytest.mark.parametrize(("schedule", "prediction"), [(ZeroSNR(), V()), (Discrete(), Eps())])
def test_x0_follows_from_the_target(schedule: Schedule, prediction: Prediction) -> None:
    x0, eps = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    level = schedule.at(torch.tensor([999, 17]))
    x = Process().noise(x0, eps, level, CTX)
    back = prediction.to_x0(prediction.target(x0, eps, level), x, level)
    assert (back - x0).abs().max() < 1e-4  # eps prediction loses digits to sigma 14.6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_x0_prediction_is_the_clean_image_seen_at_unit_variance(schedule: Schedule) -> None:
    x0, eps = torch.randn(3, 4, 40, 50), torch.randn(3, 4, 40, 50)
    level = schedule.at(torch.tensor([999, 400, 17]))
    x = Process().noise(x0, eps, level, CTX)
    assert torch.equal(X0().to_x0(x0, x, level), x0) and torch.equal(X0().target(x0, eps, level), x0)
    assert (X0().scale_in(x, level).std((1, 2, 3)) - 1).abs().max() < 0.03


def test_noise_is_shown_to_an_eps_network_at_unit_variance() -> None:
    level = Discrete().at(torch.tensor([999, 17]))
    x = torch.randn(2, 3, 4, 5)
    want = x / (1 + level.sigma**2).sqrt()
    assert (Eps().scale_in(x, level) - want).abs().max() < F32
    assert torch.equal(V().scale_in(x, level), x)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_seen_as_noise_is_the_noise_without_relay(schedule: Schedule) -> None:
    x0, eps = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    level = schedule.at(torch.tensor([999, 17]))
    assert torch.equal(Process().noise_seen(x0, eps, level, CTX), eps)


def test_the_start_has_the_variance_of_the_first_level() -> None:
    noise = torch.randn(2, 3, 4, 5)
    assert torch.equal(Process().start(noise, ZeroSNR().levels(5)[0], CTX), noise)
    level = Discrete().levels(5)[0]
    assert (Process().start(noise, level, CTX) - noise * (1 + level.sigma**2) ** 0.5).abs().max() < 1e-5


def test_the_step_keeps_the_noise_of_the_data() -> None:
    process, levels = Process(), ZeroSNR().levels(5)
    x0, eps = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for level, next_level in zip(levels, levels[1:], strict=False):
        moved = process.step(process.noise(x0, eps, level, CTX), x0, level, next_level, CTX)
        assert (moved - process.noise(x0, eps, next_level, CTX)).abs().max() < F32


class Fixed:
    """A network that returns what it is told to."""

    def __init__(self, out: Tensor) -> None:
        self.out = out

    def prepare(self, cond: Condition, size: tuple[int, int], timesteps: object = ()) -> None: ...

    def __call__(self, x: Tensor, timestep: object, prepared: object) -> Tensor:
        return self.out


@pytest.mark.parametrize(("schedule", "prediction"), [(ZeroSNR(), V()), (Discrete(), Eps())])
def test_the_loss_is_the_weighted_error_of_x0(schedule: Schedule, prediction: Prediction) -> None:
    """The official statement: x0 error weighted by 1 / sigma^2."""
    x0, out = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    loss = DenoisingLoss()
    draw = loss.draw(x0.shape[1:], 1000, drawing(x0, 0))
    denoiser = Denoiser(Fixed(out), prediction)
    mine = loss(denoiser, x0, None, draw, schedule, Process(), CTX)
    level = schedule.at(draw.timestep)
    x = level.alpha * x0 + level.sigma * draw.eps
    theirs = ((denoiser(x, level, None) - x0) ** 2 / level.sigma**2).mean((1, 2, 3))
    assert torch.allclose(mine, theirs, rtol=1e-4)
    assert mine.shape == (3,)


def test_offset_noise_shifts_whole_images() -> None:
    x0 = torch.zeros(3, 2, 8, 9)
    plain = DenoisingLoss().draw(x0.shape[1:], 1000, drawing(x0, 0))
    offset = DenoisingLoss(offset_noise=0.5).draw(x0.shape[1:], 1000, drawing(x0, 0))
    moved = offset.eps - plain.eps
    assert torch.equal(plain.timestep, offset.timestep)
    assert moved.std((1, 2, 3)).max() < F32 and moved.mean((1, 2, 3)).abs().min() > 0


def test_draws_come_from_the_generator() -> None:
    x0 = torch.zeros(3, 2, 4, 5)
    a, b = (DenoisingLoss().draw(x0.shape[1:], 1000, drawing(x0, 7)) for _ in range(2))
    assert torch.equal(a.eps, b.eps) and torch.equal(a.timestep, b.timestep)


SNR_CASES: list[tuple[Weighting, object]] = [
    (MinSNR(5.0), lambda snr: min(snr, 5.0)),
    (MinSNR(1.5), lambda snr: min(snr, 1.5)),
    (TruncatedSNR(), lambda snr: max(snr, 1.0)),
    (SNRPlusOne(), lambda snr: snr + 1),
]
NOISY = torch.tensor([998, 700, 400, 120, 3])


@pytest.mark.parametrize(("weighting", "on_x0"), SNR_CASES, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(
    ("schedule", "prediction"), [(ZeroSNR(), V()), (Discrete(), Eps()), (ZeroSNR(), X0())]
)
def test_weightings_are_their_formula_on_the_error_of_x0(
    weighting: Weighting, on_x0: object, schedule: Schedule, prediction: Prediction
) -> None:
    x0, out = torch.randn(5, 2, 4, 5), torch.randn(5, 2, 4, 5)
    draw = DenoisingLoss().draw(x0.shape[1:], 1000, drawing(x0))._replace(timestep=NOISY)
    denoiser = Denoiser(Fixed(out), prediction)
    got = DenoisingLoss(weighting)(denoiser, x0, None, draw, schedule, Process(), CTX)
    level = schedule.at(NOISY)
    x = level.alpha * x0 + level.sigma * draw.eps
    error = ((denoiser(x, level, None) - x0) ** 2).mean((1, 2, 3))
    for i, timestep in enumerate(NOISY.tolist()):
        snr = 1 / schedule.sigma_at(timestep) ** 2
        assert float(got[i]) == pytest.approx(on_x0(snr) * float(error[i]), rel=2e-3)  # float32 x0 error


def test_snr_plus_one_is_uniform_in_v() -> None:
    level = ZeroSNR().at(NOISY)
    weight = torch.as_tensor(SNRPlusOne()(level, V().gain(level)))
    assert weight.flatten().tolist() == pytest.approx([1.0] * 5, rel=1e-5)
    assert Uniform()(level, V().gain(level)) == 1


def test_truncated_snr_learns_at_the_level_without_signal_where_min_snr_does_not() -> None:
    level = ZeroSNR().at(torch.tensor([999]))
    assert float(torch.as_tensor(TruncatedSNR()(level, V().gain(level)))) == 1
    assert float(torch.as_tensor(MinSNR()(level, V().gain(level)))) == 0


def test_min_snr_needs_a_positive_gamma() -> None:
    with pytest.raises(ValueError, match="MinSNR: gamma is 0, expected more than 0"):
        MinSNR(0)


def test_timesteps_are_drawn_below_the_span() -> None:
    drawn = DenoisingLoss().draw((1, 2, 3), 7, drawing(range(400), 0))
    assert set(drawn.timestep.tolist()) == set(range(7))
