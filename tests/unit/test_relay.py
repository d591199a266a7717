"""Relay: where it starts, which steps it takes, its blends, training, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sat.diffusion.loss import DenoisingLoss
from sat.diffusion.prediction import X0, Denoiser, Eps, Prediction, V
from sat.diffusion.process import Process, ProcessContext, ProcessHooks, ProcessInput
from sat.diffusion.samplers import DDIM, Trajectory
from sat.diffusion.schedule import CLEAN, Discrete, Level, Schedule, ZeroSNR
from sat.mixin import HookConflictError, Mixin
from sat.mixins.relay import RelayNoise, steps_of_whole
from sat.pipeline import Pipeline
from sat.sampling.output import from_pil, to_pil
from tests.diffusion import drawing
from tests.tolerances import EXACT, F32, F64

ROOT = Path(__file__).parents[2]
SHAPE = (2, 3, 4, 5)


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CLEAR, LOW, NOISE = drawn(1), drawn(2), drawn(3)
CTX = ProcessContext(LOW)
SCHEDULES: dict[str, Schedule] = {"exploding": Discrete(), "zero-snr": ZeroSNR()}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def relay(partial: float = 500.0, blend: Any = "linear") -> Process:
    return Process({"relay": RelayNoise(partial, blend)})


def fade(share: float) -> float:
    """1 - exp(-sin^4) of a quarter turn, scaled to end at 1."""
    return math.expm1(-(math.sin(share * math.pi / 2) ** 4)) / math.expm1(-1)


@each_schedule
def test_without_any_ratio_relay_is_plain(schedule: Schedule) -> None:
    levels = [level._replace(relay_blend=0.0) for level in schedule.levels(6)]
    for level, next_level in zip(levels, levels[1:], strict=False):
        plain = Process().step(NOISE, CLEAR, level, next_level, ProcessContext())
        assert (relay().step(NOISE, CLEAR, level, next_level, CTX) - plain).abs().max() == EXACT
        assert torch.equal(relay().noise(CLEAR, NOISE, level, CTX), Process().noise(CLEAR, NOISE, level, CTX))


@each_schedule
def test_sampling_starts_at_the_noised_low_resolution_image(schedule: Schedule) -> None:
    """Unscaled noise on the low-resolution latent: original_behaviour.md, section 7."""
    first = relay().hooks.levels(schedule, 12)[0]
    assert first.relay_blend == 1
    start = relay().start(NOISE, first, CTX)
    assert (start - (first.alpha * LOW + first.sigma * NOISE)).abs().max() < F64
    assert (start - relay().noise(CLEAR, NOISE, first, CTX)).abs().max() < F64  # x0 has no part


@each_schedule
@pytest.mark.parametrize(
    ("steps", "partial", "whole"), [(12, 500.0, 24), (1, 200.0, 5), (3, 750.0, 4), (4, 1000.0, 4)]
)
def test_its_steps_are_the_last_of_a_run_over_all_timesteps(
    schedule: Schedule, steps: int, partial: float, whole: int
) -> None:
    """12 steps of 500 are 499, 457, …; 1 of 200 is a single evaluation at 199."""
    levels = relay(partial).hooks.levels(schedule, steps)
    plain = schedule.levels(whole)[-(steps + 1) :]
    assert [level._replace(relay_blend=0.0) for level in levels] == plain
    if steps == 12:
        assert [level.timestep for level in levels[:2]] == [499, 457]
    if steps == 1:
        assert [level.timestep for level in levels[:-1]] == [199]


@each_schedule
@pytest.mark.parametrize("blend", ["linear", "sigma", "exp"])
def test_the_ratio_of_a_sampling_level_is_its_blend(schedule: Schedule, blend: str) -> None:
    levels = relay(500.0, blend).hooks.levels(schedule, 12)
    noise = [level.sigma / level.alpha for level in levels]
    for done, level in enumerate(levels):
        left = (12 - done) / 12
        want = {"linear": left, "sigma": noise[done] / noise[0], "exp": fade(left)}[blend]
        assert level.relay_blend == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert levels[-1].relay_blend == 0 and levels[-1]._replace(relay_blend=0.0) == CLEAN


@each_schedule
@pytest.mark.parametrize("blend", ["linear", "sigma", "exp"])
def test_the_ratio_of_a_training_level_is_its_blend(schedule: Schedule, blend: str) -> None:
    index = torch.tensor([0, 3, 250, 499])
    level = relay(500.0, blend).hooks.at(schedule, index)
    plain = schedule.at(index)
    assert all(torch.equal(a, b) for a, b in zip(level[:5], plain[:5], strict=True))
    for row, t in enumerate(index.tolist()):
        want = {
            "linear": t / 500,
            "sigma": schedule.sigma_at(t) / schedule.sigma_at(500),
            "exp": fade((t + 1) / 500),
        }[blend]
        assert float(level.relay_blend[row]) == pytest.approx(want, rel=1e-4, abs=1e-6)  # float32


@each_schedule
@pytest.mark.parametrize("blend", ["linear", "sigma", "exp"])
def test_a_level_between_two_has_a_ratio_between_theirs(schedule: Schedule, blend: str) -> None:
    process = relay(500.0, blend)
    levels = process.hooks.levels(schedule, 12)
    for level, next_level in zip(levels[:-2], levels[1:-1], strict=True):
        noise = math.sqrt(level.sigma * next_level.sigma / (level.alpha * next_level.alpha))
        middle = process.hooks.level_at_sigma(schedule, noise)
        assert level.relay_blend > middle.relay_blend > next_level.relay_blend
        again = process.hooks.level_at_sigma(schedule, level.sigma / level.alpha)
        assert again.relay_blend == pytest.approx(level.relay_blend, abs=6e-3)  # traps 8


def test_a_step_is_the_official_one() -> None:
    """x <- r x + (1 - r + beta) D - beta image, beta = r k / p - (k - 1) / p, k counting down from p."""
    process, steps = relay(), 12
    levels = process.hooks.levels(Discrete(), steps)
    x = LOW + levels[0].sigma * NOISE
    for i, (level, next_level) in enumerate(zip(levels, levels[1:], strict=False)):
        r, k = next_level.sigma / level.sigma, steps - i
        beta = r * k / steps - (k - 1) / steps
        x = r * x + (1 - r + beta) * torch.tanh(x + i) - beta * LOW
    index = {level.timestep: i for i, level in enumerate(levels)}
    out = DDIM()(
        lambda x, level: torch.tanh(x + index[level.timestep]), NOISE, Trajectory(levels, process, CTX)
    )
    assert (out - x).abs().max() < F64


@each_schedule
def test_x_is_a_blend_under_noise(schedule: Schedule) -> None:
    level = relay().hooks.at(schedule, torch.tensor([430, 20]))
    a, s, r = (t.double() for t in (level.alpha, level.sigma, level.relay_blend))
    want = a * (CLEAR * (1 - r) + LOW * r) + s * NOISE
    assert (relay().noise(CLEAR, NOISE, level, CTX) - want).abs().max() < F32


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(Discrete(), Eps()), (ZeroSNR(), V()), (Discrete(), X0()), (ZeroSNR(), X0())],
    ids=["eps", "v", "x0 exploding", "x0 zero-snr"],
)
def test_a_network_that_meets_its_target_gives_the_clean_image(
    schedule: Schedule, prediction: Prediction
) -> None:
    """The blend counts as noise, so that the target is for the clean image and not for the blend."""
    process = relay()
    level = Level(*(t.double() for t in process.hooks.at(schedule, torch.tensor([499, 60]))))
    x = process.noise(CLEAR, NOISE, level, CTX)
    seen = process.noise_seen(CLEAR, NOISE, level, CTX)
    assert (level.alpha * CLEAR + level.sigma * seen - x).abs().max() < F64
    out = prediction.target(CLEAR, seen, level)
    # The levels are float32: alpha^2 + sigma^2, which v relies on, is 1 to seven digits.
    assert (prediction.to_x0(out, x, level) - CLEAR).abs().max() < F32


class Meets:
    """A network that returns a given output."""

    def __init__(self, out: Tensor) -> None:
        self.out = out

    def prepare(self, cond: object, size: tuple[int, int], timesteps: object = ()) -> None: ...

    def __call__(self, x: Tensor, timestep: object, prepared: object) -> Tensor:
        return self.out


@each_schedule
def test_the_loss_is_the_error_of_the_clean_image(schedule: Schedule) -> None:
    """Official ``LinearRelayDiffusionLoss``: weight sigma^-2 on x0, the target is the clean x."""
    prediction: Prediction = Eps() if isinstance(schedule, Discrete) else V()
    x0, low, out = CLEAR.float(), LOW.float(), NOISE.float()
    loss, process, ctx = DenoisingLoss(), relay(), ProcessContext(LOW.float())
    draw = loss.draw(x0.shape[1:], process.hooks.span(schedule), drawing(x0, 0))
    got = loss(Denoiser(Meets(out), prediction), x0, None, draw, schedule, process, ctx)
    plain = schedule.at(draw.timestep)
    r = (draw.timestep / 500)[:, None, None, None]
    x = plain.alpha * ((1 - r) * x0 + r * low) + plain.sigma * draw.eps
    theirs = ((prediction.to_x0(out, x, plain) - x0) ** 2 / plain.sigma**2).mean((1, 2, 3))
    assert torch.allclose(got, theirs, rtol=1e-4)


@each_schedule
@pytest.mark.parametrize(("partial", "span"), [(500.0, 500), (200.0, 200), (0.5, 1), (1500.0, 1000)])
def test_training_draws_below_where_relay_starts(schedule: Schedule, partial: float, span: int) -> None:
    assert relay(partial).hooks.span(schedule) == span
    drawn_ = DenoisingLoss().draw((1, 1, 1), span, drawing(range(2000), 0))
    assert drawn_.timestep.max() == span - 1 or span == 1000


@pytest.mark.parametrize(
    ("steps", "partial", "fits"),
    [(3, 200.5, "none"), (13, 500.3, "1, …"), (501, 500.0, "1, 2, 3"), (1, 300.0, "3, 6, 9")],
)
def test_steps_that_do_not_fit_are_refused_with_those_that_do(steps: int, partial: float, fits: str) -> None:
    message = rf"{steps} steps do not fit the {partial:g} of 1000 timesteps.*\(these fit: {fits}"
    with pytest.raises(ValueError, match=message):
        relay(partial).hooks.levels(Discrete(), steps)


def test_every_step_count_it_offers_fits() -> None:
    for partial in (500.0, 200.0, 300.0, 125.0):
        with pytest.raises(ValueError) as caught:
            steps_of_whole(int(partial) + 1, partial, 1000)
        offered = str(caught.value).split("these fit: ")[1].rstrip(")").split(", ")[:-1]
        assert offered
        for steps in map(int, offered):
            assert steps_of_whole(steps, partial, 1000) * partial / 1000 == steps


def test_karras_spacing_is_refused() -> None:
    with pytest.raises(ValueError, match="relay takes trailing or leading spacing"):
        relay().hooks.levels(Discrete(spacing="karras"), 4)


@pytest.mark.parametrize("use", ["start", "mean"])
def test_a_missing_low_resolution_image_is_named(use: str) -> None:
    level = relay().hooks.levels(Discrete(), 12)[0]
    with pytest.raises(
        ValueError, match=r"relay needs the low-resolution image's latent.*sampling.input_dir"
    ):
        getattr(relay().hooks, use)(NOISE, level, ProcessContext())


@pytest.mark.parametrize(
    ("params", "message"),
    [({"partial": 0.0}, "partial is 0 timesteps"), ({"factor": 1}, "factor is 1, expected an enlargement")],
)
def test_impossible_settings_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelayNoise(**params)


@pytest.mark.parametrize("blend", ["linear", "exp", "sigma"])
def test_relay_over_all_timesteps_of_a_zero_snr_schedule_is_finite_or_refused(blend: str) -> None:
    """At the last timestep noise is infinite: a blend along the noise has no meaning there."""
    process = relay(1000.0, blend)
    if blend == "sigma":
        with pytest.raises(ValueError, match="sigma.*signal"):
            process.hooks.levels(ZeroSNR(), 4)
        with pytest.raises(ValueError, match="sigma.*signal"):
            process.hooks.at(ZeroSNR(), torch.tensor([999, 3]))
        return
    levels = process.hooks.levels(ZeroSNR(), 4)
    assert all(0 <= level.relay_blend <= 1 for level in levels)
    out = DDIM()(lambda x, level: CLEAR, NOISE, Trajectory(levels, process, CTX))
    assert (out - CLEAR).abs().max() < F64


def test_the_process_says_which_picture_it_needs_and_who_owns_its_hooks() -> None:
    process = relay()
    assert process.input == ProcessInput("low_res", factor=2, required=True)
    assert Process().input is None
    assert "mean            relay -> default" in str(process.resolved)


def test_two_mixins_that_need_different_pictures_are_refused() -> None:
    class Other(Mixin):
        host = ProcessHooks

        def __init__(self, factor: int) -> None:
            super().__init__()
            self.input = ProcessInput("low_res", factor)

    assert Process({"relay": RelayNoise(), "same": Other(2)}).input == ProcessInput("low_res", 2)
    with pytest.raises(HookConflictError, match=r"\['relay', 'other'\] need different input pictures"):
        Process({"relay": RelayNoise(), "other": Other(4)})


def test_a_flat_image_survives_shrinking_and_enlarging() -> None:
    image = torch.rand(2, 3, 1, 1).expand(2, 3, 8, 12)
    given = ProcessInput("low_res", 2)
    assert given.size(8, 12) == (4, 6)
    assert given.shrink(image).shape == (2, 3, 4, 6) and given.enlarge(image).shape == (2, 3, 16, 24)
    assert (given.enlarge(given.shrink(image)) - image).abs().max() < F32


def test_back_projection_takes_a_picture_to_those_that_shrink_to_the_given_one() -> None:
    """The missing part falls with each round; detail that shrinking does not see stays."""
    generator = torch.Generator().manual_seed(0)
    given = torch.nn.functional.avg_pool2d(torch.rand(2, 3, 12, 16, generator=generator), 3, 1, 1)
    stripes = 0.1 * (1 - 2 * (torch.arange(32) % 2)).expand(2, 3, 24, 32)
    drawn = 0.25 + 0.5 * ProcessInput("low_res", 2).enlarge(given) + stripes
    one = ProcessInput("low_res", 2)
    left = [(one.shrink(one.consistent(drawn, given, n)) - given).abs().mean() for n in (0, 1, 3)]
    assert left[1] < 0.3 * left[0] and left[2] < 0.5 * left[1]
    steps = one.consistent(drawn, given, 3).diff(dim=-1)[..., ::2]  # within a cell of the given picture
    assert steps.mean().item() == pytest.approx(-0.2, abs=0.02)


def test_a_pipeline_projects_back_onto_the_picture_it_enlarges() -> None:
    small = to_pil(0.2 + 0.6 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)))
    common = ["sampling.steps=1", "sampling.guider={target: sat.diffusion.guidance.Unguided}"]
    made = {}
    for rounds in (0, 2):
        key = f"sampling.back_projections={rounds}"
        pipeline = Pipeline.from_config(ROOT / "configs/tiny_relay.yaml", [*common, key], device="cpu")
        made[rounds] = pipeline(["a red apple"], seed=0, images=[small]).images[0]
    plain, given = ((from_pil(p)[None] + 1) / 2 for p in (made[0], small))
    expected = ProcessInput("low_res", 2).consistent(plain, given, 2)
    got = (from_pil(made[2])[None] + 1) / 2
    assert (got - expected).abs().max() < 2 / 255  # the plain one is of bytes
    assert (got - plain).abs().max() > 0.1
