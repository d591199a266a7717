"""Consistency and distribution matching on Gaussian data, where student, teacher and scores are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from sat.diffusion.distillation import (
    LevelTable,
    angle,
    consistency_target,
    derivative,
    matching_target,
    nearer_levels,
    tangent,
)
from sat.diffusion.loss import AngleWeighting
from sat.diffusion.prediction import Denoiser, Eps, Flow, Preconditioned, Prediction, V
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.samplers import Renoise
from sat.diffusion.schedule import CLEAN, Discrete, FlowMatching, Level, Schedule, ZeroSNR
from sat.mixins.relay import RelayNoise
from tests import small
from tests.diffusion import SHAPE, Gaussian, drawn, path

PROCESSES = {"plain": Process(), "relay": Process({"relay": RelayNoise(500)})}
SCHEDULES: dict[str, Schedule] = {"exploding": Discrete(), "zero-SNR": ZeroSNR(), "flow": FlowMatching()}
LOW = 0.3


class Wide(Gaussian):
    """Student that lies on every path, for levels whose fields are tensors too."""

    def consistent(self, x: Tensor, at: Level) -> Tensor:
        """The exact end of the path through x."""
        factor = at.alpha * (1 - at.relay_blend)
        offset = at.alpha * at.relay_blend * self.low + factor * self.mean
        spread = (torch.as_tensor(factor * self.deviation) ** 2 + torch.as_tensor(at.sigma) ** 2).sqrt()
        return self.mean + self.deviation * (x - offset) / spread


def wide(level: Level) -> Level:
    return Level(*(torch.tensor(float(value), dtype=torch.float64) for value in level))


def slopes(level: Level) -> Level:
    """d/dt of a variance-preserving level: alpha = cos t, sigma = sin t."""
    return Level(-level.sigma, level.alpha, torch.zeros(()), -level.sigma, level.alpha, torch.zeros(()))


@pytest.mark.parametrize("timestep", [0, 100, 500, 900, 999])
def test_the_tangent_of_the_exact_flow_map_is_zero_by_jvp(timestep: int) -> None:
    data, level = Wide(), wide(nearer_levels(Process(), ZeroSNR(), 0.1)[0][timestep])
    x = drawn()()
    teacher = Gaussian.denoise(data, x, Level(*map(float, level)))
    eps = (x - level.alpha * teacher) / level.sigma
    dx = -level.sigma * teacher + level.alpha * eps  # of x = cos t x0 + sin t eps
    x0, change = derivative(data.consistent, x, level, dx, slopes(level))
    torch.testing.assert_close(x0, data.consistent(x, level), atol=1e-14, rtol=0)
    assert tangent(x0, teacher, change, level).abs().max() < 1e-12
    follow = tangent(x0, teacher, change, level, warm=0.0)  # what pulls it to the teacher's own x0
    assert timestep == 999 or follow.abs().max() > 1e-3


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_tangent_of_the_exact_flow_map_is_nearly_zero_by_difference(
    schedule: Schedule, process: Process
) -> None:
    """For every process, as nearer x is a step along the teacher; ten times nearer, a tenth is left."""
    data, ctx = Wide(low=LOW), ProcessContext(torch.full(SHAPE, LOW, dtype=torch.float64))
    left: dict[float, list[float]] = {1e-3: [], 1e-4: []}
    for apart, found in left.items():
        here, near = nearer_levels(process, schedule, apart)
        for place in (len(here) // 10, len(here) // 2, len(here) - 1):
            level, nearer, x = wide(here[place]), wide(near[place]), drawn()()
            teacher = data.denoise(x, here[place])
            x_near = process.step(x, teacher, level, nearer, ctx)
            gap = angle(level) - angle(nearer)
            change = (data.consistent(x, level) - data.consistent(x_near, nearer)) / gap
            found.append(float(tangent(data.consistent(x, level), teacher, change, level).abs().max()))
    if process is PROCESSES["plain"]:
        assert max(left[1e-4]) < 1e-3
    assert all(b < 0.12 * a for a, b in zip(*left.values(), strict=True)), left


def test_nearer_levels_lie_on_the_schedule_with_timesteps_between() -> None:
    here, near = nearer_levels(Process(), ZeroSNR(), 0.02)
    assert here[999].alpha < 1e-15 and near[999].alpha == pytest.approx(math.sin(0.02))
    assert 900 < near[999].timestep < 999 and near[0].timestep == 0
    for level, nearer in zip(here[50::100], near[50::100], strict=True):
        assert float(angle(level) - angle(nearer)) == pytest.approx(0.02, abs=1e-6)
        assert level.timestep - 70 < nearer.timestep < level.timestep
        assert nearer.alpha**2 + nearer.sigma**2 == pytest.approx(1)
        assert (nearer.net_alpha, nearer.net_sigma) == (nearer.alpha, nearer.sigma)


def test_an_error_of_the_target_is_one_of_the_trigflow_network() -> None:
    """1 / sin^2 t |D - target|^2 = |F - F^- - g / (|g| + c)|^2, D = cos t x - sin t F; V's weight is 1."""
    t = torch.tensor(0.9, dtype=torch.float64)
    level = wide(
        Level(float(torch.cos(t)), float(torch.sin(t)), 0.0, float(torch.cos(t)), float(torch.sin(t)))
    )
    make = drawn()
    x, f, f_minus, g = make(), make(), make(), make()
    x0, x0_minus = (torch.cos(t) * x - torch.sin(t) * value for value in (f, f_minus))
    target = consistency_target(x0_minus, g, level)
    unit = g / (g.square().mean((1, 2, 3), keepdim=True).sqrt() + 0.1)
    expected = (f - f_minus - unit).square()
    torch.testing.assert_close((x0 - target).square() / torch.sin(t) ** 2, expected)
    assert AngleWeighting()(level, V().gain(level)) == pytest.approx(1.0)
    g[0, 0, 0, 0] = torch.inf
    assert torch.equal(consistency_target(x0, g, level)[0], x0[0])  # it is left as it is


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_matching_in_x0_is_matching_of_scores(schedule: Schedule, process: Process) -> None:
    """fake - real = (score_fake - score_real) sigma^2 / a, a the factor of x0: relay's picture cancels."""
    ctx = ProcessContext(torch.full(SHAPE, LOW, dtype=torch.float64))
    level = process.hooks.levels(schedule, 10)[3]
    make = drawn()
    x, real, fake, x0 = make(), make(), make(), make()
    scores = [(process.hooks.mean(it, level, ctx) - x) / level.sigma**2 for it in (fake, real)]
    factor = level.alpha * (1 - level.relay_blend)
    pulled = (scores[0] - scores[1]) * level.sigma**2 / factor
    weight = (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(x0 - matching_target(x0, real, fake), pulled / weight, atol=1e-12, rtol=1e-10)


def test_one_step_matching_with_exact_scores_finds_mean_and_deviation() -> None:
    """A generator m + q z against N(0.7, 0.4^2): within 1 percent after 1500 steps of Adam."""
    generator = torch.Generator().manual_seed(0)
    m, q = (torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (0.0, 1.0))
    optimizer = torch.optim.Adam([m, q], 5e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    levels = Discrete().levels(50)
    for _ in range(1500):
        z, eps = (torch.randn(256, 1, 1, 1, generator=generator, dtype=torch.float64) for _ in range(2))
        level = levels[int(torch.randint(50, (), generator=generator))]
        x0 = m + q * z
        x = x0.detach() + level.sigma * eps
        real = Gaussian(0.7, 0.4).denoise(x, level)
        fake = Gaussian(m.item(), q.item()).denoise(x, level)
        target = matching_target(
            x0.detach().view(1, 256, 1, 1), real.view(1, 256, 1, 1), fake.view(1, 256, 1, 1)
        )
        optimizer.zero_grad()
        (x0 - target.view_as(x0)).square().mean().backward()
        optimizer.step()
        rates.step()
    assert m.item() == pytest.approx(0.7, rel=0.01)
    assert abs(q.item()) == pytest.approx(0.4, rel=0.01)


def test_renoise_draws_all_noise_anew_and_ends_at_x0() -> None:
    """x = alpha x0 + sigma eps, eps fresh at each level, also after the first, which holds noise alone."""
    levels, seen, made = ZeroSNR().levels(3), list[Tensor](), drawn(7)
    own = drawn(7)
    fresh = [own(), own()]

    def denoise(x: Tensor, level: Level) -> Tensor:
        seen.append(x)
        return torch.full_like(x, 0.25 * len(seen))

    trajectory = replace(path(levels), noise_sampler=made)
    out = Renoise()(denoise, drawn()(), trajectory)
    for place in (1, 2):
        expected = levels[place].alpha * 0.25 * place + levels[place].sigma * fresh[place - 1]
        torch.testing.assert_close(seen[place], expected)
    assert torch.equal(out, torch.full_like(out, 0.75)) and levels[-1] == CLEAN


def test_the_exact_derivative_of_a_network_is_the_limit_of_differences() -> None:
    """CogView3-Plus in float64, with timesteps that move along: 1e-5 nearer, within a few percent."""
    network = small.plus().double()
    small.fill(network)
    size = (8, 6)
    prepared = network.prepare(small.condition(2, dtype=torch.float64), size)
    denoise = Denoiser(network, V())
    here, near = (
        LevelTable(levels).at(torch.tensor([300, 700]), torch.float64)
        for levels in nearer_levels(Process(), ZeroSNR(), 1e-5)
    )
    x = torch.randn(
        2, network.channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        x0, gap = denoise(x, here, prepared), angle(here) - angle(near)
        x_near = Process().step(x, x0, here, near, ProcessContext())
        slope = Level(*((a - b) / gap.view_as(a) for a, b in zip(here, near, strict=True)))  # type: ignore[arg-type,operator]
        found, change = derivative(lambda x, at: denoise(x, at, prepared), x, here, (x - x_near) / gap, slope)
        expected = (x0 - denoise(x_near, near, prepared)) / gap
    torch.testing.assert_close(found, x0)
    assert (change - expected).norm() < 0.05 * expected.norm()
    assert expected.norm() > 1


OWN: dict[str, tuple[Prediction, Schedule]] = {
    "exploding eps": (Eps(), Discrete()), "zero-SNR v": (V(), ZeroSNR()), "flow": (Flow(), FlowMatching())
}  # fmt: skip


@pytest.mark.parametrize("to", ["x0", "v"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("base", "schedule"), OWN.values(), ids=OWN)
def test_a_student_of_another_prediction_has_its_bases_x0_and_input(
    base: Prediction, schedule: Schedule, process: Process, to: Literal["x0", "v"]
) -> None:
    """The right output, also of noise that relay's picture is part of, gives x0 back at every level."""
    own, make = Preconditioned(base, to), drawn()
    x0, eps, ctx = make(), make(), ProcessContext(make())
    for level in process.hooks.levels(schedule, 10)[:-1]:
        level = level._replace(net_alpha=level.alpha, net_sigma=level.sigma)  # of the official table: rounded
        x = process.noise(x0, eps, level, ctx)
        out = own.target(x0, process.noise_seen(x0, eps, level, ctx), level)
        torch.testing.assert_close(own.to_x0(out, x, level), x0, atol=1e-11, rtol=1e-11)
        assert torch.equal(own.scale_in(x, level), base.scale_in(x, level))
        off = own.to_x0(out + 1, x, level) - own.to_x0(out, x, level)
        assert float(off.square().mean()) == pytest.approx(float(own.gain(level)), rel=1e-9)


@pytest.mark.parametrize(("base", "schedule"), OWN.values(), ids=OWN)
def test_the_picture_is_all_that_such_a_student_adds_to_noise(base: Prediction, schedule: Schedule) -> None:
    """c_skip = alpha / n^2 and c_out = -sigma / n: EDM's for unit variance, V's on a preserving schedule."""
    for level in schedule.levels(10)[:-1]:
        level = level._replace(net_alpha=level.alpha, net_sigma=level.sigma)
        one, none = torch.ones(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
        own = Preconditioned(base, "v")
        r = level.scaled_sigma if level.alpha else math.inf  # sigma / alpha
        c_skip, c_out = (float(own.to_x0(*pair, level).mean()) for pair in ((none, one), (one, none)))
        assert c_out == pytest.approx(-1 / math.hypot(1, 1 / r) if level.alpha else -1)
        assert c_skip * level.alpha == pytest.approx(1 / (1 + r**2), abs=1e-12)
        if isinstance(base, V):
            torch.testing.assert_close(own.to_x0(one, 2 * one, level), base.to_x0(one, 2 * one, level))
    noisiest = schedule.levels(1)[0]
    eps, still = drawn()(), drawn(5)()
    skipped = Preconditioned(base, "v").to_x0(torch.zeros_like(eps), noisiest.sigma * eps, noisiest)
    assert skipped.abs().max() <= 0.07 * eps.abs().max()  # none of the noise
    wrong = base.target(still, eps, noisiest) + 0.01 * eps  # a copy of the noise that is 1 percent off
    speckle = base.to_x0(wrong, noisiest.alpha * still + noisiest.sigma * eps, noisiest) - still
    assert float(speckle.std()) == pytest.approx(
        0.01 * float(base.gain(noisiest)) ** 0.5 * float(eps.std()), rel=1e-6
    )
