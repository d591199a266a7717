"""What holds for every schedule, sampler, number of steps and condition."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sat.conditioning.conditioner import Condition
from sat.diffusion.guidance import ClassifierFree, IntervalLimited, Unguided
from sat.diffusion.prediction import X0, Eps, Prediction, V
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.samplers import (
    DDIM,
    DPMSolver2M,
    DPMSolver2SAncestral,
    Euler,
    EulerAncestral,
    Heun,
    LinearMultistep,
    Sampler,
)
from sat.diffusion.schedule import Discrete, FlowMatching, Level, Schedule, ZeroSNR, karras, timesteps
from sat.mixins.relay import RelayNoise, steps_of_whole
from tests.diffusion import SHAPE, Gaussian, path, preserving
from tests.tolerances import F64

spacings = st.sampled_from(["trailing", "leading", "karras"])
exploding = st.builds(Discrete, spacing=spacings)
zero_snr = st.builds(
    ZeroSNR,
    shift=st.floats(0.2, 9.0),
    spacing=spacings,
    rescale=st.sampled_from(["after_spacing", "before_spacing"]),
    quantise=st.booleans(),
)
flow = st.builds(
    FlowMatching,
    base_shift=st.floats(0.2, 9.0),
    spacing=st.sampled_from(["linspace", "trailing"]),
    timestep_of=st.sampled_from([None, ZeroSNR()]),
)
schedules = st.one_of(exploding, zero_snr, flow)
samplers = st.one_of(
    st.builds(DDIM, eta=st.floats(0, 1)),
    st.builds(DDIM, share=st.floats(0, 1)),
    st.builds(Euler, churn=st.floats(0, 20)),
    st.builds(Heun, churn=st.floats(0, 20)),
    st.builds(EulerAncestral, eta=st.floats(0, 1)),
    st.builds(DPMSolver2SAncestral, eta=st.floats(0, 1)),
    st.just(DPMSolver2M()),
    st.builds(LinearMultistep, order=st.integers(1, 4)),
)
ratios = st.floats(0, 1)
seeds = st.integers(0, 2**31)


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(schedules, samplers, st.integers(1, 60), seeds)
def test_a_perfect_denoiser_is_sampled_exactly(
    schedule: Schedule, sampler: Sampler, steps: int, seed: int
) -> None:
    x0 = drawn(seed)
    out = sampler(lambda x, at: x0, drawn(seed + 1), path(schedule.levels(steps), schedule.level_at_sigma))
    assert (out - x0).abs().max() < 1e-8  # churn at 60 levels of noise up to 1e3 costs digits


@given(
    schedules.filter(lambda s: s.spacing != "karras"), samplers, st.integers(1, 30), seeds,
    st.sampled_from(["linear", "sigma", "exp"]), st.sampled_from([500.0, 250.0, 1000.0]),
)  # fmt: skip
def test_a_perfect_denoiser_is_sampled_exactly_with_relay(
    schedule: Schedule, sampler: Sampler, steps: int, seed: int, blend: Any, share: float
) -> None:
    if share == 1000 and isinstance(schedule, ZeroSNR | FlowMatching):
        blend = "linear"
    process = Process({"relay": RelayNoise(share, blend)})
    x0, low = drawn(seed), drawn(seed + 2)
    walk = path(
        process.hooks.levels(schedule, steps), partial(process.hooks.level_at_sigma, schedule), process, low
    )
    assert (sampler(lambda x, at: x0, drawn(seed + 1), walk) - x0).abs().max() < 1e-8


@given(schedules, st.integers(1, 200))
def test_levels_go_from_noise_to_data(schedule: Schedule, steps: int) -> None:
    levels = schedule.levels(steps)
    noise = [level.sigma / level.alpha if level.alpha else math.inf for level in levels]
    assert len(levels) == steps + 1 and levels[-1].alpha == 1 and levels[-1].sigma == 0
    assert all(a > b for a, b in zip(noise, noise[1:], strict=False))
    timesteps = [level.timestep for level in levels[:-1]]
    assert timesteps == sorted(timesteps, reverse=True) and all(0 <= i <= 1000 for i in timesteps)


@given(st.integers(1, 1000), st.sampled_from(["trailing", "leading"]))
def test_timesteps_are_distinct_and_descend(steps: int, spacing: Any) -> None:
    chosen = timesteps(steps, 1000, spacing)
    assert len(set(chosen)) == steps and chosen == sorted(chosen, reverse=True)
    assert chosen[0] == 999 if spacing == "trailing" else chosen[-1] == 0


@given(st.integers(2, 100), st.floats(1e-3, 1.0), st.floats(1.1, 100.0), st.floats(0.5, 12.0))
def test_karras_levels_fall_from_the_largest_to_the_smallest(
    steps: int, smallest: float, largest: float, rho: float
) -> None:
    got = karras(steps, smallest, largest, rho)
    assert got[0] == pytest.approx(largest) and got[-1] == pytest.approx(smallest)
    assert all(a > b for a, b in zip(got, got[1:], strict=False))


@given(st.floats(1e-3, 1e3), seeds, st.sampled_from([V(), X0()]))
def test_x0_follows_from_the_target_where_variance_is_preserved(
    noise: float, seed: int, prediction: Prediction
) -> None:
    level, x0, eps = preserving(noise), drawn(seed), drawn(seed + 1)
    x = Process().noise(x0, eps, level, ProcessContext())
    back = prediction.to_x0(prediction.target(x0, eps, level), x, level)
    assert (back - x0).abs().max() < F64


@given(st.floats(1e-3, 1e3), st.floats(0.05, 3.0), seeds)
def test_x0_follows_from_the_noise_at_any_scale(noise: float, alpha: float, seed: int) -> None:
    level, x0, eps = Level(alpha, noise * alpha, 0.0, alpha, noise * alpha), drawn(seed), drawn(seed + 1)
    x = Process().noise(x0, eps, level, ProcessContext())
    assert (Eps().to_x0(Eps().target(x0, eps, level), x, level) - x0).abs().max() < F64 * max(1, noise)


@given(st.floats(1e-2, 50.0), st.floats(1e-2, 50.0), ratios, ratios, seeds)
def test_a_step_keeps_the_noise_that_is_in_x(
    sigma: float, next_sigma: float, blend: float, next_blend: float, seed: int
) -> None:
    process, ctx = Process({"relay": RelayNoise()}), ProcessContext(drawn(seed + 2))
    level, next_level = (
        preserving(sigma)._replace(relay_blend=blend),
        preserving(next_sigma)._replace(relay_blend=next_blend),
    )
    x0, eps = drawn(seed), drawn(seed + 1)
    moved = process.step(process.noise(x0, eps, level, ctx), x0, level, next_level, ctx)
    assert (moved - process.noise(x0, eps, next_level, ctx)).abs().max() < 1e-9  # divides by sigma of 0.01


@given(st.floats(1e-2, 50.0), seeds)
def test_relay_without_ratio_is_plain(noise: float, seed: int) -> None:
    relay, ctx = Process({"relay": RelayNoise()}), ProcessContext(drawn(seed + 2))
    level, next_level = preserving(noise), preserving(noise / 2)
    x, x0 = drawn(seed), drawn(seed + 1)
    assert torch.equal(
        relay.step(x, x0, level, next_level, ctx), Process().step(x, x0, level, next_level, ProcessContext())
    )


@given(st.integers(1, 500), st.sampled_from([100.0, 200.0, 250.0, 300.0, 500.0, 750.0, 1000.0]))
def test_relay_takes_its_share_of_a_whole_number_of_steps_or_refuses(steps: int, share: float) -> None:
    try:
        whole = steps_of_whole(steps, share, 1000)
    except ValueError as error:
        assert f"{steps} steps do not fit" in str(error)
        assert steps > share or steps * 1000 % share
        return
    assert whole * share == steps * 1000 and steps <= share


@given(st.floats(-3, 12), st.floats(0, 1), seeds)
def test_guidance_between_equal_predictions_changes_nothing(scale: float, rescale: float, seed: int) -> None:
    x0 = drawn(seed)
    out = ClassifierFree(scale, rescale)(lambda x, at: x0.repeat(len(x) // 2, 1, 1, 1), x0, preserving(1.0))
    assert (out - x0).abs().max() < F64


@given(st.floats(0, 999), seeds)
def test_scale_one_is_unguided_inside_and_outside_an_interval(timestep: float, seed: int) -> None:
    x, level = drawn(seed), preserving(1.0)._replace(timestep=timestep)
    for guider in (ClassifierFree(1.0), IntervalLimited(1.0, 200, 700)):
        assert torch.equal(guider(Gaussian().denoise, x, level), Unguided()(Gaussian().denoise, x, level))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.booleans(), st.booleans(), seeds)
def test_conditions_come_apart_as_they_were_put_together(
    sizes: list[int], masked: bool, guided: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    parts = []
    for n in sizes:
        text, vector = torch.randn(n, 5, 3, generator=g), torch.randn(n, 4, generator=g)
        mask = torch.rand(n, 5, generator=g) > 0.5 if masked else None
        part = Condition(text, vector, mask)
        parts.append(part.guided(torch.rand(n, generator=g)) if guided else part)
    whole, start = Condition.cat(parts), 0
    for part in parts:
        back = whole.rows(slice(start, start + len(part)))
        start += len(part)
        for name in ("text", "vector", "text_mask", "guidance"):
            a, b = getattr(back, name), getattr(part, name)
            assert (a is None and b is None) or torch.equal(a, b)
