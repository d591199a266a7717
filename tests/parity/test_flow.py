"""Flow matching against diffusers' scheduler and the published formulas, and v networks turned into flow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from sat.diffusion.loss import DenoisingLoss, Draw, FlowWeighting
from sat.diffusion.prediction import Denoiser, Flow, FlowFromV, V
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.samplers import DDIM, Euler
from sat.diffusion.schedule import FlowMatching, Level, ZeroSNR, sized
from sat.diffusion.timesteps import LogitNormal, Mode, Timesteps
from sat.mixins.relay import RelayNoise
from tests.diffusion import path
from tests.tolerances import EXACT, F32, F64
from tests.unit.test_diffusion import Fixed

CTX = ProcessContext()


def cells(height: int, width: int) -> tuple[int, int]:
    return height // 8, width // 8


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (512, 1536), (2048, 2048)])
@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_levels_equal_diffusers_and_the_network_is_told_unshifted_time(
    size: tuple[int, int], steps: int
) -> None:
    peer = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, max_image_seq_len=4096,
        use_dynamic_shifting=True, time_shift_type="linear", shift=1.0,
    )  # fmt: skip
    mu = 0.25 + 0.75 * math.sqrt(size[0] * size[1] / 256 / 256)
    asked = np.linspace(1000, 1, steps).astype(np.int64).astype(np.float32)
    peer.set_timesteps(timesteps=asked, sigmas=asked / 1000, mu=mu)
    levels = FlowMatching().sized(cells(*size)).levels(steps)
    assert [level.timestep for level in levels[:-1]] == [float(t) for t in asked]
    assert [level.timestep for level in levels[:-1]] == peer.timesteps.tolist()
    for level, sigma in zip(levels, peer.sigmas.tolist(), strict=True):
        assert abs(level.sigma - sigma) < 1e-7 and level.alpha == 1 - level.sigma


def test_the_table_of_ten_steps_at_1024_is_the_published_one() -> None:
    levels = FlowMatching().sized((128, 128)).levels(10)
    sigmas = [1, 0.963, 0.9193, 0.8668, 0.8028, 0.7227, 0.6198, 0.4826, 0.2907, 0.0032, 0]
    assert [round(level.sigma, 4) for level in levels] == [round(s, 4) for s in sigmas]


def test_the_shift_grows_with_the_root_of_the_picture() -> None:
    mus = [FlowMatching().sized(cells(side, side)).mu for side in (256, 512, 1024, 2048)]
    assert mus == [1.0, 1.75, 3.25, 6.25]
    assert sized(ZeroSNR(), (8, 8)).levels(3) == ZeroSNR().levels(3)


def test_an_euler_step_on_flow_equals_diffusers() -> None:
    peer = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )
    asked = np.linspace(1000, 1, 7).astype(np.int64).astype(np.float32)
    peer.set_timesteps(timesteps=asked, sigmas=asked / 1000, mu=1.75)
    x = theirs = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    levels = FlowMatching().sized((64, 64)).levels(7)
    seen = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        seen.append(level.timestep)
        return Flow().to_x0(torch.tanh(x + level.timestep / 1000), x, level)

    mine = Euler()(denoise, x, path(levels))
    for t in peer.timesteps:
        theirs = peer.step(torch.tanh(theirs + t.double() / 1000), t, theirs).prev_sample
    assert seen == peer.timesteps.tolist()
    assert (mine - theirs).abs().max() < F32  # the peer's table is float32


@pytest.mark.parametrize("kind", ["none", "sigma_sqrt", "cosmap"])
def test_the_loss_of_a_batch_equals_the_published_formula(kind: str) -> None:
    x0, eps, out = torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 6)
    index, seen = torch.tensor([0, 380, 999]), []

    class Told(Fixed):
        def __call__(self, x: Tensor, timestep: object, prepared: object) -> Tensor:
            seen.append((x, timestep))
            return super().__call__(x, timestep, prepared)

    schedule = FlowMatching().sized((4, 6))
    got = DenoisingLoss(FlowWeighting(kind))(  # type: ignore[arg-type]
        Denoiser(Told(out), Flow()), x0, None, Draw(index, eps), schedule, Process(), CTX
    )
    mu = 0.25 + 0.75 * math.sqrt(6 / 256)
    s = (index + 1).double() / 1000
    sigma = (mu / (mu + 1 / s - 1))[:, None, None, None]
    weight = {
        "none": torch.ones_like(sigma), "sigma_sqrt": sigma**-2,
        "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
    }[kind]  # fmt: skip
    want = (weight * (out - (eps - x0)) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    x, told = seen[0]
    assert (x - ((1 - sigma) * x0 + sigma * eps)).abs().max() < 1e-6
    assert told.tolist() == [1, 381, 1000]  # type: ignore[attr-defined]


def test_relay_over_flow_fades_to_the_low_resolution_latent() -> None:
    x0, eps, low = (torch.randn(2, 3, 4, 6, dtype=torch.float64) for _ in range(3))
    process, schedule = Process({"relay": RelayNoise(500.0)}), FlowMatching().sized((4, 6))
    ctx = ProcessContext(low_res=low)
    level = process.hooks.at(schedule, torch.tensor([250, 100]))
    level = Level(*(v.double() if isinstance(v, Tensor) else v for v in level))
    r = torch.tensor([0.5, 0.2], dtype=torch.float64)[:, None, None, None]
    x = process.noise(x0, eps, level, ctx)
    assert (x - ((1 - level.sigma) * ((1 - r) * x0 + r * low) + level.sigma * eps)).abs().max() < 1e-7
    target = Flow().target(x0, process.noise_seen(x0, eps, level, ctx), level)
    assert (Flow().to_x0(target, x, level) - x0).abs().max() < F32  # levels of training are float32


# -- a v network as a flow model


V_SCHEDULE = ZeroSNR(shift=4.0, quantise=False)


def network(x: Tensor, timestep: float) -> Tensor:
    """A "v" without any symmetry, of input and timestep."""
    return torch.tanh(0.7 * x + torch.roll(x, 1, -1) * timestep / 700)


def test_v_weights_draw_the_same_picture_as_flow() -> None:
    """Step by step on equal noise: x_flow = x_v sqrt((1 - sigma)^2 + sigma^2), and one picture at the end."""
    flow = FlowMatching(spacing="trailing", timestep_of=V_SCHEDULE).sized((64, 48))
    levels = flow.levels(12)
    norms = [math.hypot(level.alpha, level.sigma) for level in levels]
    preserving = [
        Level(a / n, s / n, t, a / n, s / n) for (a, s, t, *_), n in zip(levels, norms, strict=True)
    ]
    noise = torch.randn(2, 3, 4, 5, dtype=torch.float64)

    def by_flow(x: Tensor, level: Level) -> Tensor:
        inner = FlowFromV().scale_in(x, level)
        return FlowFromV().to_x0(network(inner, float(level.timestep)), x, level)

    def by_v(x: Tensor, level: Level) -> Tensor:
        return V().to_x0(network(x, float(level.timestep)), x, level)

    assert (DDIM()(by_flow, noise, path(levels)) - DDIM()(by_v, noise, path(preserving))).abs().max() < F64


def test_the_v_network_is_told_the_timestep_of_the_same_noise() -> None:
    flow = FlowMatching(timestep_of=V_SCHEDULE).sized((64, 48))
    for level in flow.levels(9)[:-1]:
        there = V_SCHEDULE.sigma_at(level.timestep)
        if math.isinf(there):
            assert level.alpha == 0 and level.timestep == 999
        elif 0 < level.timestep < 998:
            assert level.scaled_sigma == pytest.approx(there, rel=2e-2)  # between two rows of the table
    trained = flow.at(torch.arange(1000))
    ascending = trained.timestep
    assert bool((ascending.diff() >= 0).all()) and ascending[-1] == 999 and ascending.max() <= 999


def test_the_velocity_of_a_v_network_is_eps_minus_x0() -> None:
    x0, eps = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    for level in FlowMatching().sized((64, 48)).levels(5)[:-1]:
        x = level.alpha * x0 + level.sigma * eps
        out = FlowFromV().target(x0, eps, level)
        n = math.hypot(level.alpha, level.sigma)
        velocity = ((level.sigma - level.alpha) * x / n + (level.alpha + level.sigma) * out) / n
        assert (velocity - (eps - x0)).abs().max() < F64
        assert (FlowFromV().to_x0(out, x, level) - x0).abs().max() < F64
        assert (Flow().to_x0(velocity, x, level) - x0).abs().max() < F64


@pytest.mark.parametrize("kind", ["none", "sigma_sqrt", "cosmap"])
def test_one_weighting_means_the_same_error_for_flow_and_for_v(kind: str) -> None:
    level = FlowMatching().sized((64, 48)).at(torch.tensor([40, 500, 990]))
    out, target = torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 6)
    loss = DenoisingLoss(FlowWeighting(kind))  # type: ignore[arg-type]
    flow = loss.error(out, target, level, Denoiser(Fixed(out), Flow()))
    n = (level.alpha**2 + level.sigma**2) ** 0.5  # velocity = … + v / n
    as_v = loss.error(out * n, target * n, level, Denoiser(Fixed(out), FlowFromV()))
    torch.testing.assert_close(flow, as_v)


# -- chances and refusals


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.8, 1.29, 1.75])
def test_mode_has_the_quantiles_of_the_published_draw(scale: float) -> None:
    chances = Mode(scale).chances(FlowMatching(), 200)
    assert float(chances.sum()) == pytest.approx(1, abs=1e-9) and float(chances.min()) >= 0
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    drawn = (1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)).clamp(0, 1)
    counted = torch.histc(drawn, 200, 0, 1) / len(u)
    assert (chances - counted).abs().max() < 2e-5


def test_mode_refuses_a_scale_that_turns_back() -> None:
    with pytest.raises(ValueError, match="Mode: scale is 2, expected -1 to 1.752"):
        Mode(2.0)


@pytest.mark.parametrize("timesteps", [Mode(), LogitNormal()])
def test_chances_are_of_unshifted_time(timesteps: Timesteps) -> None:
    small, large = FlowMatching().sized((8, 8)), FlowMatching().sized((256, 256))
    assert (timesteps.chances(small, 50) - timesteps.chances(large, 50)).abs().max() == EXACT


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base_shift": -1.0}, "base_shift -1 and max_shift 0.75: expected at least 0"),
        ({"base_shift": 0.0, "max_shift": 0.0}, "a sum above 0"),
        ({"patch": 0}, "patch 0"),
    ],
)
def test_an_impossible_shift_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatching(**wrong)  # type: ignore[arg-type]
