"""Changing a picture: the levels of a strength, blending outside a mask, a strength for each place."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
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
    Trajectory,
)
from sat.diffusion.schedule import Discrete, FlowMatching, Level, Schedule, ZeroSNR
from sat.mixins.edit import Edit, StrengthBy, latent_mask
from sat.mixins.relay import RelayNoise
from tests.diffusion import SHAPE, drawn
from tests.tolerances import EXACT, F64

ALL: dict[str, Sampler] = {
    "ddim": DDIM(), "ddim eta": DDIM(eta=0.7), "ddim share": DDIM(share=0.1), "euler": Euler(),
    "euler churn": Euler(churn=4.0), "heun": Heun(), "ancestral": EulerAncestral(),
    "2s": DPMSolver2SAncestral(), "2m": DPMSolver2M(), "multistep": LinearMultistep(),
}  # fmt: skip
every_sampler = pytest.mark.parametrize("sampler", ALL.values(), ids=ALL.keys())
SCHEDULES: dict[str, Schedule] = {
    "exploding": Discrete(), "zero-snr": ZeroSNR(), "leading": ZeroSNR(spacing="leading"),
    "karras": Discrete(spacing="karras"), "flow": FlowMatching(),
}  # fmt: skip
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
RELAY = Process({"relay": RelayNoise(500.0)})
WRITTEN_OUT = 1e-6
GIVEN, NOISE, LOW = drawn(1)(), drawn(2)(), drawn(4)()
MASK = torch.zeros(1, 1, *SHAPE[2:], dtype=torch.float64)
MASK[..., 1:3, 2:4], MASK[..., 0, 0] = 1.0, 0.4
MAP = torch.linspace(0, 1, MASK.numel(), dtype=torch.float64).view_as(MASK)


def bent(x: Tensor, at: Level) -> Tensor:
    """A denoiser without any symmetry."""
    scale = math.hypot(at.alpha, at.sigma)
    return torch.tanh(0.5 * x / scale + 0.3 * at.sigma / scale)


def drawn_with(
    edit: Edit | None, sampler: Sampler, schedule: Schedule, steps: int = 12, process: Process | None = None
) -> Tensor:
    """Steps of the engine with an edit, for :func:`bent` as the network, in float64."""
    process, ctx = process or Process(), ProcessContext(LOW)
    if edit is not None:
        process, ctx = edit.around(process, schedule, steps), edit.context(ctx, NOISE)
        ctx = ProcessContext(LOW, ctx.init, NOISE, ctx.mask)  # the engine's noise is float32
    levels = process.hooks.levels(schedule, steps)
    at_sigma = partial(process.hooks.level_at_sigma, schedule)
    return sampler(bent, NOISE, Trajectory(levels, process, ctx, at_sigma, drawn(3)))


# -- strength


def levels_of(schedule: Schedule, strength: float, by: StrengthBy, steps: int = 50) -> list[Level]:
    return Edit(GIVEN, strength, by).around(Process(), schedule, steps).hooks.levels(schedule, steps)


@each_schedule
@pytest.mark.parametrize("strength", [0.05, 0.3, 0.6, 0.95])
def test_a_strength_by_noise_starts_at_exactly_that_share_and_goes_on_with_the_runs_own_levels(
    schedule: Schedule, strength: float
) -> None:
    whole, levels = schedule.levels(50), levels_of(schedule, strength, "noise")
    assert levels[0].noise_share == pytest.approx(strength, abs=1e-9)
    assert levels[1:] == [level for level in whole if level.noise_share < strength - 1e-6]
    assert len(levels) >= 2 and levels[-1].sigma == 0


@pytest.mark.parametrize("strength", [1e-5, 0.02, 1 - 1e-5])
def test_any_strength_above_0_takes_a_step(strength: float) -> None:
    for by in ("noise", "steps"):
        for steps in (1, 4):
            assert len(levels_of(ZeroSNR(), strength, by, steps)) >= 2


@pytest.mark.parametrize(("strength", "steps"), [(0.3, 15), (0.58, 29), (0.01, 1), (0.999, 50), (1.0, 50)])
def test_a_strength_by_steps_takes_the_last_share_of_them_whatever_floats_make_of_it(
    strength: float, steps: int
) -> None:
    """50 * 0.58 is 28.999999999999996: pipelines that cut it down take 28."""
    assert levels_of(ZeroSNR(), strength, "steps") == ZeroSNR().levels(50)[-steps - 1 :]


@pytest.mark.parametrize(("strength", "share"), [(0.1, 0.57), (0.3, 0.87), (0.5, 0.96), (0.75, 0.995)])
def test_counting_steps_makes_strength_far_too_strong_on_plus(strength: float, share: float) -> None:
    first = levels_of(ZeroSNR(shift=4.0), strength, "steps")[0]
    assert first.noise_share == pytest.approx(share, abs=0.006)
    assert levels_of(ZeroSNR(shift=4.0), strength, "noise")[0].noise_share == pytest.approx(strength)


@each_schedule
def test_strength_0_is_the_given_picture_without_a_step(schedule: Schedule) -> None:
    for by in ("noise", "steps"):
        for name in ALL:
            assert torch.equal(drawn_with(Edit(GIVEN, 0.0, by), ALL[name], schedule), GIVEN), name


@every_sampler
@each_schedule
def test_strength_1_is_text_to_image_also_where_the_first_level_has_signal(
    schedule: Schedule, sampler: Sampler
) -> None:
    plain = drawn_with(None, sampler, schedule)
    assert torch.equal(drawn_with(Edit(GIVEN, 1.0), sampler, schedule), plain)
    everywhere = Edit(GIVEN, 1.0, mask=torch.ones_like(MASK))
    assert torch.equal(drawn_with(everywhere, sampler, schedule), plain)


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="expected 0 to 1"):
        Edit(GIVEN, strength).around(Process(), ZeroSNR(), 4)


def test_relay_starts_from_its_own_mixture_of_both_pictures() -> None:
    edit = Edit(GIVEN, 0.4)
    process = edit.around(RELAY, Discrete(), 12)
    first = process.hooks.levels(Discrete(), 12)[0]
    assert first.noise_share == pytest.approx(0.4) and 0 < first.relay_blend < 1
    x = process.start(NOISE, first, edit.context(ProcessContext(LOW), NOISE))
    mixture = (1 - first.relay_blend) * GIVEN + first.relay_blend * LOW
    assert (x - (first.alpha * mixture + first.sigma * NOISE)).abs().max() < WRITTEN_OUT


def test_a_strength_above_relays_start_is_the_whole_of_relay() -> None:
    whole = RELAY.hooks.levels(Discrete(), 12)
    assert whole[0].noise_share < 0.95
    assert Edit(GIVEN, 0.95).around(RELAY, Discrete(), 12).hooks.levels(Discrete(), 12) == whole


# -- masks and maps


def reference(kept: Any, schedule: Schedule, steps: int, relay: bool, eta: float) -> Tensor:
    """Inpainting by blending, written out: no process, no sampler. ``kept(level, i)`` is what stays."""
    levels = (RELAY if relay else Process()).hooks.levels(schedule, steps)
    draw = drawn(3)

    def mean(x0: Tensor, at: Level) -> Tensor:
        return at.alpha * ((1 - at.relay_blend) * x0 + at.relay_blend * LOW)

    def blend(x: Tensor, at: Level, i: int) -> Tensor:
        original = mean(GIVEN, at) + at.sigma * NOISE
        stays = kept(at, i)
        return stays * original + (1 - stays) * x

    a, s = levels[0].alpha, levels[0].sigma
    x = a * LOW + s * NOISE if relay else math.sqrt(a * a + s * s) * NOISE
    x = blend(x, levels[0], 0)
    for i, (at, then) in enumerate(pairwise(levels)):
        x0 = bent(x, at)
        eps = (x - mean(x0, at)) / at.sigma
        up = 0.0
        if eta and at.alpha and then.sigma:
            ratio = (then.sigma / then.alpha) / (at.sigma / at.alpha)
            up = eta * then.sigma * math.sqrt(1 - ratio**2)
        x = mean(x0, then) + math.sqrt(then.sigma**2 - up**2) * eps
        if up:
            x = x + up * draw()
        x = blend(x, then, i + 1)
    return x


@pytest.mark.parametrize("relay", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [Discrete(), ZeroSNR()], ids=["exploding", "zero-snr"])
def test_blending_equals_a_loop_written_out(schedule: Schedule, eta: float, relay: bool) -> None:
    edit, process = Edit(GIVEN, 1.0, mask=MASK), RELAY if relay else Process()
    ours = drawn_with(edit, DDIM(eta=eta), schedule, process=process)
    theirs = reference(lambda at, i: 1 - MASK, schedule, 12, relay, eta)
    assert (ours - theirs).abs().max() < WRITTEN_OUT


@pytest.mark.parametrize("relay", [False, True])
@pytest.mark.parametrize("by", ["noise", "steps"])
def test_a_map_equals_a_loop_written_out(by: StrengthBy, relay: bool) -> None:
    process = RELAY if relay else Process()

    def kept(at: Level, i: int) -> Tensor:
        share = at.sigma / math.hypot(at.alpha, at.sigma) if by == "noise" else 1 - i / 12
        return (share >= MAP - 1e-6).double()

    ours = drawn_with(Edit(GIVEN, 1.0, by, MAP, is_map=True), DDIM(), Discrete(), process=process)
    assert (ours - reference(kept, Discrete(), 12, relay, 0.0)).abs().max() < WRITTEN_OUT


@every_sampler
@each_schedule
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_outside_the_mask_every_sampler_ends_at_the_given_picture_itself(
    sampler: Sampler, schedule: Schedule, strength: float
) -> None:
    out = drawn_with(Edit(GIVEN, strength, mask=MASK), sampler, schedule)
    outside = (MASK == 0).expand_as(out)
    assert (out - GIVEN)[outside].abs().max() == EXACT
    assert (out - GIVEN)[(MASK == 1).expand_as(out)].abs().mean() > 0.1


@every_sampler
def test_with_every_sampler_what_is_kept_has_the_noise_of_the_level(sampler: Sampler) -> None:
    """Whenever the network looks: the given picture under noise of that level's deviation."""
    seen: list[tuple[Level, Tensor]] = []
    edit = Edit(GIVEN, 1.0, mask=torch.zeros_like(MASK))
    process, ctx = edit.around(Process(), Discrete(), 12), edit.context(ProcessContext(), NOISE)
    ctx = ProcessContext(None, ctx.init, NOISE, ctx.mask)

    def look(x: Tensor, at: Level) -> Tensor:
        seen.append((at, (x - at.alpha * GIVEN) / at.sigma))
        return bent(x, at)

    at_sigma = partial(process.hooks.level_at_sigma, Discrete())
    levels = process.hooks.levels(Discrete(), 12)
    sampler(look, NOISE, Trajectory(levels, process, ctx, at_sigma, drawn(3)))
    raised = getattr(sampler, "churn", 0)
    for at, eps in seen[1:]:
        assert (eps - NOISE).abs().max() < F64 or (raised and 0.7 < eps.std() < 1.4), at


@pytest.mark.parametrize("by", ["noise", "steps"])
def test_a_place_of_a_map_ends_where_a_run_of_its_own_strength_would(by: StrengthBy) -> None:
    """It is held until the last level of the run at or above its strength."""
    schedule, strength = Discrete(), 0.5
    edit = Edit(GIVEN, 1.0, by, torch.full_like(MASK, strength), is_map=True)
    levels = schedule.levels(12)
    shares = [at.noise_share if by == "noise" else 1 - i / 12 for i, at in enumerate(levels)]
    start = max(i for i, share in enumerate(shares) if share >= strength)
    x = levels[start].alpha * GIVEN + levels[start].sigma * NOISE
    for at, then in pairwise(levels[start:]):
        x = Process().step(x, bent(x, at), at, then, ProcessContext())
    assert (drawn_with(edit, DDIM(), schedule) - x).abs().max() < F64


def test_a_map_is_scaled_by_the_strength_and_black_is_kept() -> None:
    half = drawn_with(Edit(GIVEN, 0.5, mask=torch.ones_like(MASK), is_map=True), DDIM(), Discrete())
    assert torch.equal(half, drawn_with(Edit(GIVEN, 0.5), DDIM(), Discrete()))
    nothing = Edit(GIVEN, 1.0, mask=torch.zeros_like(MASK), is_map=True)
    assert torch.equal(drawn_with(nothing, DDIM(), Discrete()), GIVEN)


def test_edit_and_relay_show_as_owners_and_off_means_not_there() -> None:
    plain = Process()
    assert plain.resolved.owners["after_step"] == ("default",)
    edited = Edit(GIVEN, 0.5, mask=MASK).around(RELAY, Discrete(), 12)
    assert edited.resolved.owners["after_step"] == ("keep_outside", "default")
    assert edited.resolved.owners["start"] == ("keep_outside", "from_picture", "relay")
    assert "from_picture" not in RELAY.mixins


# -- masks of pixels on cells


def test_a_cell_with_one_pixel_of_the_mask_is_drawn_anew() -> None:
    mask = torch.zeros(1, 1, 32, 48)
    mask[..., 9, 17] = 1
    cells = latent_mask(mask, 8)
    assert cells.shape == (1, 1, 4, 6) and cells[0, 0, 1, 2] == 1 and cells.sum() == 1


def test_a_mask_grows_by_whole_cells_and_then_falls_off_linearly() -> None:
    mask = torch.zeros(1, 1, 72, 88)
    mask[..., 32:40, 40:48] = 1
    assert latent_mask(mask, 8, grow=1)[0, 0, 4].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    soft = latent_mask(mask, 8, grow=1, feather=1)[0, 0, 4]
    expected = [0, 0, 1 / 3, 2 / 3, 1, 1, 1, 2 / 3, 1 / 3, 0, 0]
    assert torch.allclose(soft, torch.tensor(expected), atol=1e-6)
