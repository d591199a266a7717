"""Samplers: each against its formula written out, and against exact answers where those are known."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

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
    SamplerError,
    Trajectory,
)
from sat.diffusion.schedule import CLEAN, Discrete, FlowMatching, Level, Schedule, ZeroSNR
from sat.mixins.relay import RelayNoise
from tests.diffusion import SHAPE, Gaussian, drawn, exploding, level, path, preserving
from tests.tolerances import EXACT, F64

ALL: dict[str, Sampler] = {
    "ddim": DDIM(), "ddim eta": DDIM(eta=0.7), "ddim share": DDIM(share=0.1), "euler": Euler(),
    "euler churn": Euler(churn=4.0), "heun": Heun(), "heun churn": Heun(churn=4.0),
    "ancestral": EulerAncestral(), "2s": DPMSolver2SAncestral(), "2s eta 0": DPMSolver2SAncestral(eta=0.0),
    "2m": DPMSolver2M(), "multistep": LinearMultistep(),
}  # fmt: skip
every_sampler = pytest.mark.parametrize("sampler", ALL.values(), ids=ALL.keys())
SCHEDULES: dict[str, Schedule] = {
    f"{name} {spacing}": kind(spacing=spacing)
    for name, kind in {
        "exploding": Discrete, "zero-snr": ZeroSNR,
        "zero-snr before": partial(ZeroSNR, rescale="before_spacing"),
    }.items()
    for spacing in ("trailing", "leading", "karras")
}  # fmt: skip
SCHEDULES["flow"] = FlowMatching().sized((64, 96))
SCHEDULES["flow as v"] = FlowMatching(spacing="trailing", timestep_of=ZeroSNR())
SPACED = {name: schedule for name, schedule in SCHEDULES.items() if "karras" not in name}
X0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LOW = torch.randn(SHAPE, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
SIGMAS = [12.0, 6.5, 2.0, 0.7, 0.1, 0.0]
EXPLODING = [*(exploding(s) for s in SIGMAS[:-1]), CLEAN]


def bent(x: Tensor, at: Level) -> Tensor:
    """A denoiser without any symmetry; what is predicted depends on x and on the noise."""
    scale = math.hypot(at.alpha, at.sigma)
    return torch.tanh(0.5 * x / scale + 0.3 * at.sigma / scale)


@every_sampler
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("steps", [1, 2, 3, 13])
def test_a_perfect_denoiser_is_sampled_exactly(sampler: Sampler, schedule: Schedule, steps: int) -> None:
    out = sampler(lambda x, at: X0, NOISE, path(schedule.levels(steps), schedule.level_at_sigma))
    assert (out - X0).abs().max() < F64


@every_sampler
@pytest.mark.parametrize("schedule", SPACED.values(), ids=SPACED.keys())
@pytest.mark.parametrize("blend", ["linear", "sigma", "exp"])
def test_a_perfect_denoiser_is_sampled_exactly_with_relay(
    sampler: Sampler, schedule: Schedule, blend: Any
) -> None:
    process = Process({"relay": RelayNoise(500.0, blend)})
    for steps in (1, 7):
        levels = process.hooks.levels(schedule, steps)
        walk = path(levels, partial(process.hooks.level_at_sigma, schedule), process, LOW)
        assert (sampler(lambda x, at: X0, NOISE, walk) - X0).abs().max() < F64


@every_sampler
@pytest.mark.parametrize("schedule", [Discrete(), ZeroSNR()], ids=["exploding", "zero-snr"])
def test_the_callback_hears_every_step_once_in_order(sampler: Sampler, schedule: Schedule) -> None:
    heard: list[tuple[int, int, bool]] = []

    def callback(done: int, total: int, x0: Tensor) -> None:
        heard.append((done, total, bool((x0 == X0).all())))

    sampler(lambda x, at: X0, NOISE, path(schedule.levels(5), schedule.level_at_sigma), callback)
    assert heard == [(i, 5, True) for i in range(1, 6)]


@every_sampler
def test_the_same_draws_give_the_same_image(sampler: Sampler) -> None:
    walks = [path(EXPLODING) for _ in range(2)]
    first, second = (sampler(bent, NOISE, walk) for walk in walks)
    assert torch.equal(first, second)


@every_sampler
@pytest.mark.parametrize("schedule", [Discrete(), ZeroSNR()], ids=["exploding", "zero-snr"])
def test_the_start_is_not_written_to(sampler: Sampler, schedule: Schedule) -> None:
    """The official sampler scales the caller's noise in place."""
    noise = NOISE.clone()
    sampler(bent, noise, path(schedule.levels(4), schedule.level_at_sigma))
    assert torch.equal(noise, NOISE)


@pytest.mark.parametrize(
    ("sampler", "exploding_evaluations", "zero_snr_evaluations"),
    [
        (DDIM(), 6, 6), (Euler(), 6, 6), (Heun(), 11, 10), (DPMSolver2SAncestral(), 11, 10),
        (DPMSolver2M(), 6, 6), (LinearMultistep(), 6, 6), (EulerAncestral(), 6, 6),
    ],
)  # fmt: skip
def test_evaluations_of_the_network(
    sampler: Sampler, exploding_evaluations: int, zero_snr_evaluations: int
) -> None:
    """Two a step for the single-step solvers of order 2, but one from pure noise and one at the last."""
    for schedule, count in ((Discrete(), exploding_evaluations), (ZeroSNR(), zero_snr_evaluations)):
        seen: list[Level] = []
        sampler(lambda x, at: seen.append(at) or X0, NOISE, path(schedule.levels(6), schedule.level_at_sigma))  # noqa: B023
        assert len(seen) == count


# -- formulas, as k-diffusion and the papers write them


def test_euler_is_its_formula() -> None:
    x = NOISE * (1 + SIGMAS[0] ** 2) ** 0.5
    for sigma, next_sigma in zip(SIGMAS, SIGMAS[1:], strict=False):
        x = x + (x - bent(x, exploding(sigma))) / sigma * (next_sigma - sigma)
    assert (Euler()(bent, NOISE, path(EXPLODING)) - x).abs().max() < F64


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_euler_without_churn_is_ddim(schedule: Schedule) -> None:
    walk = path(schedule.levels(7), schedule.level_at_sigma)
    assert (Euler()(bent, NOISE, walk) - DDIM()(bent, NOISE, walk)).abs().max() == EXACT


def test_churn_raises_the_noise_first() -> None:
    """arXiv:2206.00364, algorithm 2; ``churn`` is spread over the steps and limited to sqrt(2) - 1."""
    x, draw = NOISE * (1 + SIGMAS[0] ** 2) ** 0.5, drawn()
    for sigma, next_sigma in zip(SIGMAS, SIGMAS[1:], strict=False):
        gamma = min(3.0 / 5, math.sqrt(2) - 1) if 0.5 <= sigma <= 7.0 else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma:
            x = x + (sigma_hat**2 - sigma**2) ** 0.5 * 1.1 * draw()
        x = x + (x - bent(x, exploding(sigma_hat))) / sigma_hat * (next_sigma - sigma_hat)
    got = Euler(churn=3.0, lowest=0.5, highest=7.0, noise=1.1)(bent, NOISE, path(EXPLODING))
    assert (got - x).abs().max() < F64


def test_heun_is_its_formula() -> None:
    x = NOISE * (1 + SIGMAS[0] ** 2) ** 0.5
    for sigma, next_sigma in zip(SIGMAS, SIGMAS[1:], strict=False):
        slope = (x - bent(x, exploding(sigma))) / sigma
        reached = x + slope * (next_sigma - sigma)
        if next_sigma:
            slope = (slope + (reached - bent(reached, exploding(next_sigma))) / next_sigma) / 2
            reached = x + slope * (next_sigma - sigma)
        x = reached
    assert (Heun()(bent, NOISE, path(EXPLODING)) - x).abs().max() < F64


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_euler_ancestral_is_its_formula(eta: float) -> None:
    x, draw = NOISE * (1 + SIGMAS[0] ** 2) ** 0.5, drawn()
    for sigma, next_sigma in zip(SIGMAS, SIGMAS[1:], strict=False):
        sigma_up = min(next_sigma, eta * (next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2) ** 0.5)
        sigma_down = (next_sigma**2 - sigma_up**2) ** 0.5
        x = x + (x - bent(x, exploding(sigma))) / sigma * (sigma_down - sigma)
        x = x + 0.9 * sigma_up * draw()
    got = EulerAncestral(eta, noise=0.9)(bent, NOISE, path(EXPLODING))
    assert (got - x).abs().max() < F64


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_is_euler_ancestral_on_an_exploding_schedule(eta: float) -> None:
    ancestral = EulerAncestral(eta)(bent, NOISE, path(EXPLODING))
    assert (DDIM(eta)(bent, NOISE, path(EXPLODING)) - ancestral).abs().max() < F64
    assert (DDIM()(bent, NOISE, path(EXPLODING)) - ancestral).abs().max() > 1e-3


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_is_equation_12_of_its_paper(eta: float) -> None:
    """arXiv:2010.02502: a = alpha-bar, eq. 16 for the noise, eq. 12 for the step."""
    bars = [0.02, 0.11, 0.4, 0.8, 0.97, 1.0]
    levels = [level(a**0.5, (1 - a) ** 0.5) for a in bars]
    x, draw = NOISE, drawn()
    for i, (a, b) in enumerate(zip(bars, bars[1:], strict=False)):
        x0 = bent(x, levels[i])
        eps = (x - a**0.5 * x0) / (1 - a) ** 0.5
        sigma_up = eta * ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5
        x = b**0.5 * x0 + (1 - b - sigma_up**2) ** 0.5 * eps + sigma_up * draw()
    assert (DDIM(eta)(bent, NOISE, path(levels, preserving)) - x).abs().max() < F64


def test_ddim_with_a_share_is_the_official_step() -> None:
    """The official ``DDIMSampler``: that share of the next level's noise is drawn, whatever the step."""
    x, draw = NOISE * (1 + SIGMAS[0] ** 2) ** 0.5, drawn()
    for sigma, next_sigma in zip(SIGMAS, SIGMAS[1:], strict=False):
        slope = (x - bent(x, exploding(sigma))) / sigma
        x = x + slope * (next_sigma * (1 - 0.1**2) ** 0.5 - sigma) + 0.1 * next_sigma * draw()
    assert (DDIM(share=0.1)(bent, NOISE, path(EXPLODING)) - x).abs().max() < F64


def test_dpm_solver_2m_is_its_formula() -> None:
    """arXiv:2211.01095, algorithm 2, in t = -log sigma."""
    x, old, last = NOISE * (1 + SIGMAS[0] ** 2) ** 0.5, None, 0.0
    for sigma, next_sigma in zip(SIGMAS, SIGMAS[1:], strict=False):
        x0 = bent(x, exploding(sigma))
        if not next_sigma:
            x = x0
            break
        h = math.log(sigma / next_sigma)
        mixed = x0 if old is None else (1 + h / (2 * last)) * x0 - h / (2 * last) * old
        x, old, last = next_sigma / sigma * x - math.expm1(-h) * mixed, x0, h
    assert (DPMSolver2M()(bent, NOISE, path(EXPLODING)) - x).abs().max() < F64


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_dpm_solver_2s_is_its_formula(eta: float) -> None:
    """arXiv:2211.01095, algorithm 1 at r = 1/2, to the lowered noise of an ancestral step."""
    x, draw = NOISE * (1 + SIGMAS[0] ** 2) ** 0.5, drawn()
    for sigma, next_sigma in zip(SIGMAS, SIGMAS[1:], strict=False):
        sigma_up = min(next_sigma, eta * (next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2) ** 0.5)
        sigma_down = (next_sigma**2 - sigma_up**2) ** 0.5
        x0 = bent(x, exploding(sigma))
        if sigma_down:
            h = math.log(sigma / sigma_down)
            half = sigma * math.exp(-h / 2)
            middle = half / sigma * x - math.expm1(-h / 2) * x0
            x = sigma_down / sigma * x - math.expm1(-h) * bent(middle, exploding(half))
        else:
            x = x0
        x = x + sigma_up * draw()
    assert (DPMSolver2SAncestral(eta)(bent, NOISE, path(EXPLODING)) - x).abs().max() < F64


def test_multistep_is_exact_for_cubic_noise_after_three_steps() -> None:
    """Adams-Bashforth of order 4: increments are the integral of any cubic once four slopes are known."""
    visited: list[Tensor] = []

    def cubic(s: float) -> float:
        return 0.3 - 1.2 * s + 0.5 * s**2 - 0.1 * s**3

    def integral(s: float) -> float:
        return 0.3 * s - 0.6 * s**2 + 0.5 / 3 * s**3 - 0.025 * s**4

    def denoise(x: Tensor, at: Level) -> Tensor:
        visited.append(x)
        return x - at.sigma * cubic(at.sigma)

    sigmas = [5.0, 4.1, 3.4, 2.2, 1.5, 0.6, 0.0]
    out = LinearMultistep()(denoise, NOISE, path([*(exploding(s) for s in sigmas[:-1]), CLEAN]))
    visited.append(out)
    for i in range(3, 6):
        moved = visited[i + 1] - visited[i] - (integral(sigmas[i + 1]) - integral(sigmas[i]))
        assert moved.abs().max() < F64
    assert (visited[1] - visited[0] - (integral(sigmas[1]) - integral(sigmas[0]))).abs().max() > 0.1


def test_multistep_of_order_one_is_euler() -> None:
    out = LinearMultistep(order=1)(bent, NOISE, path(EXPLODING))
    assert (out - Euler()(bent, NOISE, path(EXPLODING))).abs().max() < F64


# -- the order of the error, on Gaussian data, whose flow is known


def geometric(steps: int) -> list[Level]:
    return [exploding(8.0 * (0.05 / 8.0) ** (i / steps)) for i in range(steps + 1)]


def from_pure_noise(steps: int) -> list[Level]:
    """Zero-SNR levels, evenly spaced in the angle: alpha from exactly 0."""
    return [level(math.sin(1.5 * i / steps), math.cos(1.5 * i / steps)) for i in range(steps + 1)]


def relayed(steps: int) -> list[Level]:
    """From the low-resolution image, whose share falls to 0 with the noise."""
    return [level(1.0, 3.0 * (1 - 0.98 * i / steps), (1 - i / steps)) for i in range(steps + 1)]


def error(sampler: Sampler, levels: list[Level], relay: bool = False) -> float:
    """Largest error at the last level."""
    data = Gaussian(low=-0.4 if relay else 0.0)
    low = torch.full(SHAPE, data.low, dtype=torch.float64) if relay else None
    process = Process({"relay": RelayNoise()} if relay else None)
    level_at_sigma = exploding if levels[0].alpha == 1 else preserving
    walk = path(levels, level_at_sigma, process, low)
    start = process.start(NOISE, levels[0], ProcessContext(low))
    want = data.flow(start, levels[0], levels[-1])
    return float((sampler(data.denoise, NOISE, walk) - want).abs().max())


SECOND: list[Sampler] = [Heun(), DPMSolver2M(), DPMSolver2SAncestral(eta=0.0), LinearMultistep(order=2)]


@pytest.mark.parametrize("sampler", SECOND, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("grid", [geometric, from_pure_noise], ids=["exploding", "zero-snr"])
def test_twice_the_steps_quarter_the_error_of_second_order(sampler: Sampler, grid: Any) -> None:
    errors = [error(sampler, grid(steps)) for steps in (40, 80, 160)]
    assert errors[0] < 0.05
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 3.4 < coarse / fine < 5.5


@pytest.mark.parametrize("sampler", [DDIM(), Euler()], ids=["ddim", "euler"])
@pytest.mark.parametrize("grid", [geometric, from_pure_noise], ids=["exploding", "zero-snr"])
def test_twice_the_steps_halve_the_error_of_first_order(sampler: Sampler, grid: Any) -> None:
    errors = [error(sampler, grid(steps)) for steps in (40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.7 < coarse / fine < 2.4


@pytest.mark.parametrize(
    ("sampler", "order"), [(DDIM(), 1), (Heun(), 2), (DPMSolver2M(), 2), (LinearMultistep(2), 2)]
)
def test_relay_keeps_the_order_of_a_sampler(sampler: Sampler, order: int) -> None:
    coarse, fine = (error(sampler, relayed(steps), relay=True) for steps in (80, 160))
    assert coarse < 0.1
    assert 0.8 * 2**order < coarse / fine < 1.4 * 2**order


@pytest.mark.parametrize("sampler", [*SECOND, LinearMultistep()], ids=lambda s: type(s).__name__)
def test_solvers_of_higher_order_are_finite_and_beat_ddim_at_zero_snr(sampler: Sampler) -> None:
    schedule, data = ZeroSNR(), Gaussian()
    for steps in (1, 2, 3, 10):
        levels = schedule.levels(steps)
        out = sampler(data.denoise, NOISE, path(levels, schedule.level_at_sigma))
        assert out.isfinite().all()
    levels = schedule.levels(10)[:-1]  # the last step is of first order in all
    want = data.flow(NOISE, levels[0], levels[-1])
    mine, plain = (s(data.denoise, NOISE, path(levels, schedule.level_at_sigma)) for s in (sampler, DDIM()))
    assert (mine - want).abs().max() < (plain - want).abs().max() / 1.5


# -- stochastic samplers keep the distribution


@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(eta=1.0),
        DDIM(eta=0.5),
        EulerAncestral(),
        DPMSolver2SAncestral(),
        Euler(churn=4.0),
        Heun(churn=60.0),
    ],
    ids=["ddim 1", "ddim 0.5", "ancestral", "2s", "euler churn", "heun churn"],
)
@pytest.mark.parametrize("grid", [geometric, from_pure_noise], ids=["exploding", "zero-snr"])
def test_drawing_noise_anew_keeps_the_distribution(sampler: Sampler, grid: Any) -> None:
    """Mean and deviation at the last level, over 40000 values: 1% is 3 standard errors and the steps' own."""
    shape = (1, 4, 100, 100)
    levels, data = grid(200), Gaussian()
    level_at_sigma = exploding if levels[0].alpha == 1 else preserving
    noise = drawn(11, shape)()
    if levels[0].alpha:  # the sampler's own start is for data of mean 0 and deviation 1
        mean, _, deviation = data.split(levels[0])
        noise = (mean + deviation * noise) / math.hypot(levels[0].alpha, levels[0].sigma)
    out = sampler(data.denoise, noise, path(levels, level_at_sigma, shape=shape))
    mean, _, deviation = data.split(levels[-1])
    assert float(out.std()) == pytest.approx(deviation, rel=0.015)
    assert float(out.mean()) == pytest.approx(mean, abs=0.015)


@pytest.mark.parametrize("sampler", [Euler(churn=3.0), Heun(churn=3.0)], ids=["euler", "heun"])
@pytest.mark.parametrize("start", [exploding, preserving], ids=["exploding", "preserving"])
def test_churn_shows_the_network_what_its_level_says(sampler: Sampler, start: Any) -> None:
    """x_t - mean(x0) has deviation sigma at every evaluation, with relay too."""
    shape = (1, 4, 100, 100)
    low = torch.full(shape, 3.0, dtype=torch.float64)
    x0 = torch.full(shape, -1.0, dtype=torch.float64)
    process = Process({"relay": RelayNoise()})
    levels = [start(s)._replace(relay_blend=s / 5) for s in (5.0, 3.0, 1.0, 0.2)]
    walk = path(
        [*levels, CLEAN], lambda s: start(s)._replace(relay_blend=min(1.0, s / 5)), process, low, shape
    )
    seen: list[float] = []

    def denoise(x: Tensor, at: Level) -> Tensor:
        rest = x - process.hooks.mean(x0, at, walk.ctx)
        assert float(rest.std()) == pytest.approx(at.sigma, rel=0.02)
        assert float(rest.mean()) == pytest.approx(0, abs=0.02 * at.sigma)
        seen.append(at.sigma / at.alpha)
        return x0

    sampler(denoise, drawn(11, shape)(), walk)
    assert max(seen) > 5.5


# -- what a sampler asks for


@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(eta=0.1),
        DDIM(share=0.1),
        EulerAncestral(),
        DPMSolver2SAncestral(),
        Euler(churn=1.0),
        Heun(churn=1.0),
    ],
)
def test_a_sampler_that_draws_says_that_it_needs_generators(sampler: Sampler) -> None:
    with pytest.raises(SamplerError, match="draws noise at its steps: give the images' generators"):
        sampler(bent, NOISE, Trajectory(EXPLODING, Process(), level_at_sigma=exploding))


@pytest.mark.parametrize("sampler", [DPMSolver2SAncestral(), Euler(churn=1.0), Heun(churn=1.0)])
def test_a_sampler_that_evaluates_between_levels_says_that_it_needs_them(sampler: Sampler) -> None:
    with pytest.raises(SamplerError, match="between two levels: give the schedule's `level_at_sigma`"):
        sampler(bent, NOISE, Trajectory(EXPLODING, Process(), noise_sampler=drawn()))


@pytest.mark.parametrize("sampler", [DDIM(), Euler(), Heun(), DPMSolver2M(), LinearMultistep()])
def test_a_deterministic_sampler_asks_for_neither(sampler: Sampler) -> None:
    assert sampler(bent, NOISE, Trajectory(EXPLODING, Process())).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(eta=1.5), "eta 1.5 and share 0 are 0 to 1"),
        (lambda: DDIM(eta=-0.1), "eta -0.1"),
        (lambda: DDIM(eta=0.5, share=0.5), "one of them is 0"),
        (lambda: Euler(churn=-1), "churn is -1, expected at least 0"),
        (lambda: LinearMultistep(order=0), "order is 0, expected at least 1"),
    ],
)
def test_impossible_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
