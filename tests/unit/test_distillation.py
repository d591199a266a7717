"""The student's target: what one step needs to arrive where two did, for every process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sat.config.load import load_full
from sat.diffusion.distillation import LevelTable, step_gain, student_target
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.schedule import Discrete, Level, Schedule, ZeroSNR
from sat.mixins.relay import RelayNoise
from sat.train.objectives.distillation import Distillation
from tests.configs import ROOT

SHAPE = (2, 3, 4, 5)
PROCESSES = {"plain": Process(), "relay": Process({"relay": RelayNoise(500)})}
SCHEDULES = {"exploding": Discrete(), "zero-SNR": ZeroSNR(shift=1.0)}


def noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def intervals(process: Process, schedule: Schedule, steps: int) -> list[tuple[Level, Level, Level]]:
    """(level, middle, next_level) of every student step."""
    levels = process.hooks.levels(schedule, steps)
    middles = process.hooks.levels(schedule, 2 * steps)[1::2]
    return list(zip(levels, middles, levels[1:], strict=False))


@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_one_step_with_the_target_arrives_where_two_teacher_steps_did(
    schedule: Schedule, process: Process, steps: int
) -> None:
    ctx = ProcessContext(noise(9))
    for level, middle, next_level in intervals(process, schedule, steps):
        x, first, second = noise(0), noise(1), noise(2)
        arrived = process.step(process.step(x, first, level, middle, ctx), second, middle, next_level, ctx)
        target = student_target(process, x, arrived, level, next_level, ctx)
        # The gain of a short step is small, and so is what rounding does to where it arrives.
        assert torch.allclose(process.step(x, target, level, next_level, ctx), arrived, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_teacher_of_one_mind_is_the_target_itself(schedule: Schedule, process: Process) -> None:
    """x0 does not change between the teacher's steps: one step with it arrives at the same place."""
    ctx, x0 = ProcessContext(noise(9)), noise(1)
    for level, middle, next_level in intervals(process, schedule, 8):
        x = noise(0)
        arrived = process.step(process.step(x, x0, level, middle, ctx), x0, middle, next_level, ctx)
        assert torch.allclose(student_target(process, x, arrived, level, next_level, ctx), x0, atol=1e-8)


def test_the_target_is_that_of_progressive_distillation_where_the_process_preserves_variance() -> None:
    """(x'' - (s''/s) x) / (a'' - (s''/s) a), arXiv:2202.00512 section 3."""
    process, ctx = Process(), ProcessContext()
    level, _, next_level = intervals(process, ZeroSNR(), 8)[3]
    x, arrived = noise(0), noise(1)
    keep = float(next_level.sigma) / float(level.sigma)
    expected = (arrived - keep * x) / (float(next_level.alpha) - keep * float(level.alpha))
    assert torch.allclose(student_target(process, x, arrived, level, next_level, ctx), expected, atol=1e-10)


def test_the_relay_target_is_that_of_the_paper() -> None:
    """CogView3, eq. 8 and 9, solved for x0: with r and r'' the shares of the low-resolution latent."""
    process = PROCESSES["relay"]
    level, _, next_level = intervals(process, Discrete(), 6)[2]
    x, arrived, low = noise(0), noise(1), noise(2)
    keep, r, r2 = (
        float(next_level.sigma) / float(level.sigma),
        float(level.relay_blend),
        float(next_level.relay_blend),
    )
    expected = (arrived - r2 * low - keep * (x - r * low)) / ((1 - r2) - keep * (1 - r))
    assert torch.allclose(
        student_target(process, x, arrived, level, next_level, ProcessContext(low)), expected, atol=1e-10
    )


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_a_linear_teacher_has_a_linear_target(process: Process) -> None:
    """Teacher x0 = a x + b: both steps are affine in x, and so is the student's target, in closed form."""
    a, b = 0.3, -0.2
    ctx = ProcessContext(torch.zeros(SHAPE, dtype=torch.float64))
    level, middle, next_level = intervals(process, Discrete(), 5)[1]

    def teacher_step(x: Tensor, start: Level, end: Level) -> Tensor:
        return process.step(x, a * x + b, start, end, ctx)

    x = noise(0)
    target = student_target(
        process, x, teacher_step(teacher_step(x, level, middle), middle, next_level), level, next_level, ctx
    )

    def coefficients(start: Level, end: Level) -> tuple[float, float]:
        """step = slope x + offset, with low = 0."""
        keep = float(end.sigma) / float(start.sigma)
        gain = (1 - float(end.relay_blend)) - keep * (1 - float(start.relay_blend))
        return keep + gain * a, gain * b

    (s1, o1), (s2, o2) = coefficients(level, middle), coefficients(middle, next_level)
    keep = float(next_level.sigma) / float(level.sigma)
    gain = (1 - float(next_level.relay_blend)) - keep * (1 - float(level.relay_blend))
    expected = ((s2 * s1 - keep) * x + s2 * o1 + o2) / gain
    assert torch.allclose(target, expected, atol=1e-10)


def test_levels_are_looked_up_image_by_image() -> None:
    levels = Discrete().levels(4)
    level = LevelTable(levels).at(torch.tensor([3, 0]))
    assert level.sigma.shape == (2, 1, 1, 1) and level.timestep.shape == (2,)
    assert torch.allclose(level.sigma.flatten(), torch.tensor([levels[3].sigma, levels[0].sigma]))
    assert level.timestep.tolist() == [levels[3].timestep, levels[0].timestep]


def test_the_gain_of_a_step_to_the_image_is_one() -> None:
    levels = Discrete().levels(4)
    assert step_gain(Process(), levels[3], levels[4]) == 1
    assert 0 < step_gain(Process(), levels[0], levels[1]) < 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounds": [25, 8]}, "goes from 25 steps to 8; expected 13 to 24"),
        ({"rounds": [50]}, "goes from 50 steps to 50; expected 25 to 49"),
        ({"rounds": []}, "rounds is empty"),
        ({"guidance": [4.0, 2.0]}, r"guidance is \[4.0, 2.0\], expected 0 <= smallest <= largest"),
    ],
)
def test_rounds_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation.rounds(values)


def test_each_round_has_its_folder_its_place_and_its_steps() -> None:
    rounds = Distillation.rounds({"teacher_steps": 12, "rounds": [6, 3]})
    assert [(r.name, dict(r.params), r.steps) for r in rounds] == [
        ("steps_6", {"round": 0}, 6),
        ("steps_3", {"round": 1}, 3),
    ]


@pytest.mark.parametrize(
    ("method", "setting"), [("consistency", "alone"), ("dmd2", "rounds"), ("progressive", "gap")]
)
def test_settings_of_another_method_are_refused(method: str, setting: str) -> None:
    (found,) = Distillation.broken({"method": method, setting: 1, "guidance": None}, 1)
    assert found == (setting, f"is not of method {method}: leave it out")


@pytest.mark.parametrize(
    ("old", "given", "method"),
    [("consistency.Consistency", "{gap: 0.02}", "consistency"), ("matching.Matching", "{gap: 0.02}", "dmd2"),
     ("matching.Matching", "{gap: 0.02, method: rcm}", "rcm")],
)  # fmt: skip
def test_a_config_that_names_a_method_by_its_class_keeps_working(old: str, given: str, method: str) -> None:
    objective = f"train.objective={{target: sat.train.objectives.{old}, params: {given}}}"
    loaded = load_full([ROOT / "configs/tiny.yaml", ROOT / "configs/sft.yaml"], [objective])
    made = loaded.experiment.train.objective  # type: ignore[union-attr]
    assert made.target == "sat.train.objectives.distillation.Distillation"
    assert made.params == {"method": method, "gap": 0.02}
    assert any(f"{old} is now called" in line for line in loaded.notices)
