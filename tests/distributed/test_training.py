"""Training on two gloo ranks: equal to one process, exact to resume, sure to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.background import Runs
from tests.distributed.training_ranks import ANEW, SPLITS, STAGES
from tests.tolerances import BF16, EXACT, F32
from tests.training import CONFIG

CLIP = CONFIG.clip or 0.0
ROOT = Path(__file__).parents[2]
FLOAT32 = ("zero0", "zero1", "zero2", "zero3", "offload2", "offload3")
HALF = ("bf16", "bf16_zero2", "bf16_zero3")


RUNS = Runs("tests.distributed.training_ranks")


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    folder = RUNS()
    return torch.load(folder / "results.pt", weights_only=False)


def value(results: dict[str, list[dict[str, Any]]], case: str, rank: int = 0) -> Any:
    end = results[case][rank]
    assert end["code"] == 0, end
    return end["value"]


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.mark.parametrize("stage", FLOAT32)
def test_two_ranks_train_as_one_process_with_two_micro_batches(results, stage) -> None:
    one, two = value(results, "single"), value(results, f"{stage}/run")
    assert difference(one["weights"], two["weights"]) <= F32
    torch.testing.assert_close(two["norms"], one["norms"], rtol=F32, atol=0)
    assert min(one["norms"]) > CLIP, "clipping acts"
    assert two["evaluated"] == pytest.approx(one["evaluated"].item(), abs=F32)


@pytest.mark.parametrize("case", ["turns0", "turns1", "turns2", "turns_plain"])
def test_roles_that_learn_in_turn_rest_with_their_state(results, case) -> None:
    """A resting role stays as it is to the bit, at every stage and after a resume, and momentum waits too."""
    found, one = value(results, case), value(results, "turns_plain")
    own = [{name: p for name, p in step.items() if not name.startswith("ema.")} for step in found]
    for step, (before, after) in enumerate(zip(own[:4], own[1:5], strict=True), 1):
        learns = "net" if step % 3 == 0 else "norm"
        changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {learns}, (step, changed)
    for ours, theirs in zip(found, one, strict=True):
        assert difference(ours, theirs) <= F32
    assert difference(found[4], found[5]) <= EXACT


def test_torch_alone_trains_as_deepspeed_does(results) -> None:
    ours, theirs = value(results, "plain/run"), value(results, "single")
    assert difference(ours["weights"], theirs["weights"]) <= EXACT
    assert ours["norms"] == theirs["norms"]
    assert difference(ours["inside"], theirs["inside"]) <= EXACT
    assert difference(value(results, "plain/resumed")["weights"], ours["weights"]) <= EXACT
    (first, _), (second, skipped), (third, _) = value(results, "plain/poisoned")["history"]
    assert skipped == 1 and torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize("split", list(SPLITS)[1:])
def test_a_step_is_the_same_however_it_is_split(results, split) -> None:
    whole, run = value(results, "split 8"), value(results, f"split {split}")
    assert difference(whole["weights"], run["weights"]) <= F32
    torch.testing.assert_close(run["norms"], whole["norms"], rtol=F32, atol=0)


def test_a_run_of_the_older_draws_goes_on_by_their_rule(results) -> None:
    end = value(results, "older")
    assert difference(end["weights"], end["again"]) <= EXACT
    assert end["rules"] == (1, 1, 1)
    assert difference(end["weights"], value(results, "single")["weights"]) > 10 * F32


@pytest.mark.parametrize("stage", (*HALF, "autocast"))
def test_half_precision_stays_near_float32(results, stage) -> None:
    full, half = value(results, "zero0/run")["weights"], value(results, f"{stage}/run")["weights"]
    assert 0 < difference(full, half) <= BF16


@pytest.mark.parametrize("stage", HALF[1:])
def test_stages_are_one_run_in_bf16(results, stage) -> None:
    one, two = (value(results, f"{name}/run")["weights"] for name in ("bf16", stage))
    assert difference(one, two) <= (EXACT if stage == "bf16_zero2" else BF16)


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_hold_the_same_weights(results, stage) -> None:
    ours, theirs = (value(results, f"{stage}/run", rank)["weights"] for rank in (0, 1))
    assert difference(ours, theirs) <= EXACT


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(results, stage) -> None:
    end = value(results, f"{stage}/resumed")
    assert end["start"] == 5
    assert difference(end["weights"], value(results, f"{stage}/run")["weights"]) <= EXACT
    assert end["position"] == {"position": 60}


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_with_a_nan_loss_on_one_rank_changes_nothing_anywhere(results, stage) -> None:
    for rank in (0, 1):
        (first, _), (second, skipped), (third, _) = value(results, f"{stage}/poisoned", rank)["history"]
        assert skipped == 1
        assert torch.equal(first, second)
        assert not torch.equal(second, third)
        assert torch.isfinite(third).all()


@pytest.mark.parametrize("stage", STAGES)
def test_averages_stand_in_for_the_weights_and_leave_no_trace(results, stage) -> None:
    end = value(results, f"{stage}/run")
    for name, inside in end["inside"].items():
        average = end["weights"][f"ema.{name}"]
        assert torch.equal(inside, average.to(inside.dtype)), name
        assert not torch.equal(inside, end["weights"][name]), name
        assert torch.equal(end["masters"][name].to(inside.dtype), end["weights"][name]), name
    assert difference(end["weights"], end["after"]) <= EXACT


@pytest.mark.parametrize("stage", HALF)
def test_averages_are_of_the_float32_masters(results, stage) -> None:
    end = value(results, f"{stage}/run")
    for name, master in end["masters"].items():
        assert end["weights"][name].dtype == torch.bfloat16
        assert not torch.equal(master, end["weights"][name].float()), name


def test_tables_keep_their_precision_in_bf16(results) -> None:
    assert value(results, "bf16/run")["table"].item() == torch.tensor(1 / 3).item()


@pytest.mark.parametrize("case", ANEW)
def test_a_run_goes_on_in_another_layout_as_if_nothing_had_happened(results, case) -> None:
    source = ANEW[case][0]
    whole = value(results, source if source == "single" else f"{source}/run")["weights"]
    end = value(results, case)
    assert end["start"] == 5
    assert end["position"] == {"position": 60}, "images in order, none lost, none twice"
    assert difference(end["weights"], whole) <= (BF16 if source == "bf16" else 1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_steps_the_same_groups_by_a_scheduler_of_torch(results, stage) -> None:
    first, run = (value(results, f"own{n}/run")["weights"] for n in (0, stage))
    assert difference(first, run) <= F32
    assert difference(run, value(results, "zero0/run")["weights"]) > 100 * F32


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_hundred_steps_of_every_stage_are_those_of_torch_alone(results, stage) -> None:
    """With the older settings' tolerance, ten times over: sums of 200 steps in another order."""
    one, two = value(results, "new/plain")["weights"], value(results, f"new{stage}/run")["weights"]
    assert "1 net.0.weight" in one, "the second average"
    assert difference(one, two) <= 10 * F32


@pytest.mark.parametrize("stage", [0, 3])
def test_a_scheduler_of_torch_resumes_to_the_bit(results, stage) -> None:
    end = value(results, f"own{stage}/resumed")
    assert end["start"] == 5
    assert difference(end["weights"], value(results, f"own{stage}/run")["weights"]) <= EXACT


def test_an_optimizer_of_few_bits_resumes_to_the_bit_in_its_layout_and_in_no_other(results) -> None:
    ended, again = value(results, "blocks/run")["weights"], value(results, "blocks/resumed")["weights"]
    assert difference(ended, again) <= EXACT
    said = results["blocks/anew"][0]["error"]
    assert "train.zero 1 -> 2" in said
    assert "cannot be shared out anew" in said


def test_another_number_of_images_a_step_is_not_taken_by_accident(results) -> None:
    said = results["batch"][0]["error"]
    assert "6 images a step (2 x 3 x accumulate 1); 1 ranks make it 3" in said
    assert "set train.accumulate=2 to go on alike" in said


def test_saving_in_the_background_changes_nothing_and_leaves_whole_checkpoints(results) -> None:
    end = value(results, "background")
    assert difference(end["weights"], value(results, "zero0/run")["weights"]) <= EXACT
    assert end["saved"] == list(range(1, 11))


def test_a_streak_of_nan_losses_ends_the_run_on_all_ranks(results) -> None:
    for end in results["hopeless"]:
        assert end["code"] == 1
        assert "3 steps in a row" in end["error"]
        assert "lower train.lr" in end["error"]
        assert "the last good checkpoint is" in end["error"]
        assert "step_00000004" in end["error"], "whose weights are those before the streak"


def test_a_run_whose_last_steps_were_skipped_fails(results) -> None:
    (end,) = results["bad_end"]
    assert end["code"] == 1
    assert "the last 8 steps to step 10 were skipped" in end["error"]
    assert "the weights are those of step 2" in end["error"]


def test_a_dead_rank_ends_the_others_with_a_reason(results) -> None:
    assert results["dying"][1]["code"] == 7
    assert "the connection to another rank broke off" in value(results, "dying")


def test_one_rank_asked_to_stop_stops_all_at_one_step_and_saves(results) -> None:
    for rank in (0, 1):
        assert value(results, "stopping", rank) == {"step": 2, "saved": [2]}


@pytest.mark.parametrize("case", ["held_out", "held_out_background"])
def test_a_run_ends_and_keeps_checkpoints_by_its_held_out_loss(results, case) -> None:
    """Best at step 3 of 10, and not for three validations after it; every fourth step stays."""
    for rank in (0, 1):
        end = value(results, case, rank)
        assert end["step"] == 6
        assert end["done"] == (True, True)
        assert end["saved"] == [3, 4, 6]
        assert end["best"] == "step_00000003"
        assert end["again"] == 6


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_norms_of_the_groups_are_parts_of_the_whole(results, stage) -> None:
    """Means over steps: each group's is the same at every stage, and together they are about the whole."""
    end, first = value(results, f"own{stage}/run"), value(results, "own0/run")
    for row, reference, norm in zip(end["by_group"], first["by_group"], end["norms"], strict=True):
        assert sorted(row) == ["grad_norm/group_0", "grad_norm/group_1", "grad_norm/model", "grad_norm/norm"]
        assert row == pytest.approx(reference, rel=1e-4)  # orders of sums
        together = sum(part**2 for part in row.values()) ** 0.5
        assert together == pytest.approx(norm, rel=0.02)  # means of roots over two steps
