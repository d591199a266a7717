"""train.py on the toy UNet: base and relay training, distillation in rounds, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from sat.cli.sample import main
from tests.background import Runs
from tests.configs import DEBUG
from tests.smoke.unet_runs import TOY
from tests.training import rows


class Ran(NamedTuple):
    """The folder of all runs, how each ended, and the tokenizer."""

    folder: Path
    ends: dict[str, dict[str, object]]
    spiece: Path

    def good(self, name: str) -> str:
        """What a run that ended well said."""
        end = self.ends[name]
        assert end["code"] == (75 if name.endswith("cut") else 0), end["err"]
        return str(end["out"]) + str(end["err"])

    def weights(self, name: str, step: int) -> dict[str, torch.Tensor]:
        """The exported weights of a run."""
        return load_file(
            self.folder / name / "checkpoints" / f"step_{step:08d}" / "native" / "model.safetensors"
        )


RUNS = Runs("tests.smoke.unet_runs", spiece=True)


@pytest.fixture(scope="module")
def ran() -> Ran:
    folder = RUNS()
    return Ran(folder, json.loads((folder / "ends.json").read_text()), RUNS.tokenizer)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_base_trains_with_offset_noise_and_min_snr(ran: Ran) -> None:
    ran.good("base")
    losses = [row["loss"] for row in rows(ran.folder / "base") if "lr" in row]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    assert any("validation/shuffled" in row for row in rows(ran.folder / "base"))


def test_recomputing_the_transformers_changes_nothing(ran: Ran) -> None:
    ran.good("recomputed")
    assert "trains no transformer" not in ran.good("recomputed")
    assert same(ran.weights("base", 4), ran.weights("recomputed", 4))


def test_relay_trains_below_its_start_with_and_without_cached_latents(ran: Ran) -> None:
    for name in ("relay", "relay_cached", "relay_plus"):
        ran.good(name)
    scored = next(row for row in rows(ran.folder / "relay") if "validation/loss" in row)
    levels = {int(key.rpartition("_")[2]) for key in scored if key.startswith("validation/loss_")}
    assert levels == {50, 150, 250, 350, 450}  # shares of relay's 500 timesteps, not of 1000
    assert not same(ran.weights("relay", 4), ran.weights("base", 4))


def test_distillation_goes_through_its_rounds_and_each_leaves_a_checkpoint(ran: Ran) -> None:
    said = ran.good("distilled")
    assert said.index("round steps_4: 4 sampling steps") < said.index("round steps_2: 2 sampling steps")
    assert "guidance.weight" not in ran.weights("base", 4)
    first, second = ran.weights("distilled/steps_4", 4), ran.weights("distilled/steps_2", 4)
    assert first["guidance.weight"].abs().max() > 0  # learned, from zero
    assert not same(first, second)


def test_a_round_begins_with_the_weights_of_the_one_before(ran: Ran) -> None:
    native = ran.folder / "distilled" / "steps_4" / "checkpoints" / "step_00000004" / "native"
    record = json.loads((ran.folder / "distilled" / "steps_2" / "run.json").read_text())
    own = json.loads((ran.folder / "distilled" / "steps_4" / "run.json").read_text())
    assert record["weights"]["model"] and record["weights"]["model"] != own["weights"]["model"]
    assert str(native) in (ran.folder / "distilled" / "steps_2" / "resolved.yaml").read_text()


def test_rounds_cut_within_and_between_are_the_uninterrupted_ones(ran: Ran) -> None:
    assert "minutes of train.max_minutes are over: saving at step 1 of 4" in ran.good("cut")
    assert "round steps_2" not in ran.good("cut")
    ran.good("rest")
    for name in ("steps_4", "steps_2"):
        assert same(ran.weights(f"cut/{name}", 4), ran.weights(f"distilled/{name}", 4))


def test_rounds_of_factors_cut_within_and_between_are_the_uninterrupted_ones(ran: Ran) -> None:
    """Cut in the first round, after it, and in the second: factors, their average, state of the optimizer."""
    whole = ran.good("rounds_lora")
    assert "round steps_2" in whole and "round steps_2" not in ran.good("rounds_lora_cut")
    for name in ("rounds_lora_on", "rounds_lora_rest"):
        ran.good(name)
    assert "saving at step 1 of 4" in ran.good("rounds_lora_second_cut")
    ends = {}
    for name in ("rounds_lora", "rounds_lora_cut", "rounds_lora_between"):
        last = [
            ran.folder / name / stage / "checkpoints" / "step_00000004" for stage in ("steps_4", "steps_2")
        ]
        files = [file for step in last for file in sorted(step.rglob("*.safetensors"))]
        ends[name] = {f"{file.relative_to(ran.folder / name)}": load_file(file) for file in files}
    first, second = (value for name, value in ends["rounds_lora"].items() if "adapter" in name)
    assert not same(first, second)
    for other in ("rounds_lora_cut", "rounds_lora_between"):
        assert ends[other].keys() == ends["rounds_lora"].keys()
        for name, value in ends["rounds_lora"].items():
            assert same(value, ends[other][name]), (other, name)


def test_consistency_trains_weights_or_factors_and_goes_on_where_it_was_cut(ran: Ran) -> None:
    """Over the plain UNet, and with relay as factors of which the same network is the teacher."""
    for name in ("consistent", "consistent_cut", "consistent_on", "consistent_lora", "consistent_exact_plus"):
        ran.good(name)
    assert same(ran.weights("consistent", 4), ran.weights("consistent_cut", 4))
    for name in ("consistent", "consistent_lora"):
        steps = [row for row in rows(ran.folder / name) if "lr" in row]
        assert all(0 < row["loss"] < 10 and row["tangent"] > 0 for row in steps), steps
        assert any("validation/tangent" in row for row in rows(ran.folder / name))
    exact = ran.ends["consistent_exact"]  # group norms after convolutions have none in torch
    assert exact["code"] and "CogView3UNet has an operator without it" in str(exact["err"])
    lora = ran.folder / "consistent_lora" / "checkpoints" / "step_00000004"
    assert list(lora.rglob("adapter*.safetensors"))


def test_matching_trains_student_and_critic_in_turn_and_goes_on_where_it_was_cut(ran: Ran) -> None:
    """Copies over the plain UNet (DMD2), and with relay two sets of factors on one network (rCM)."""
    for name in ("matching", "matching_lora", "matching_lora_cut", "matching_lora_on"):
        ran.good(name)
    for name, own in (("matching", set()), ("matching_lora", {"consistency", "tangent"})):
        steps = [row for row in rows(ran.folder / name) if "lr" in row]
        turns = [{"matching", "consistency", "critic", "tangent"} & row.keys() for row in steps]
        for row, role in zip(steps, ["student", "critic"] * 2, strict=True):
            assert row[role] == row["loss"] and row[f"grad_norm_{role}"] == row["grad_norm"]
        assert all(row["critic_accuracy"] < 1 for row in steps[1::2])
        assert turns == [{"matching", *own}, {"critic"}] * 2, turns
        assert any("validation/critic" in row for row in rows(ran.folder / name))
    cut, whole = (
        load_file(next((ran.folder / name).rglob("step_00000004/**/adapter*.safetensors")))
        for name in ("matching_lora_cut", "matching_lora")
    )
    assert same(cut, whole) and not any("critic" in name for name in whole)
    ran.good("matching_zero3")


def test_rounds_are_not_trained_over(ran: Ran) -> None:
    end = ran.ends["again"]
    assert end["code"] == 2 and "holds rounds already: --resume goes on from there" in str(end["err"])


def test_relay_and_plus_are_distilled_by_the_same_code(ran: Ran) -> None:
    for name in ("relay_distilled", "plus_distilled"):
        ran.good(name)
        assert ran.weights(f"{name}/steps_2", 2)["guidance.weight"].abs().max() > 0


def test_a_network_that_cannot_take_the_strength_is_refused(ran: Ran) -> None:
    end = ran.ends["no_embedding"]
    assert end["code"] != 0 and "set model.params.guidance_dim" in str(end["err"])


def test_distilled_weights_sample_with_a_distilled_config_and_no_other(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(native: Path, out: str, *words: str) -> tuple[int, str]:
        code = main([
            "--base", str(DEBUG), str(TOY / "base.yaml"), *words, f"conditioning.tokenizer={ran.spiece}",
            f"checkpoint.model={native}", "checkpoint.random=0", "parallel.device=cpu", "--prompt", "x",
            "--output-dir", str(tmp_path / out),
        ])  # fmt: skip
        return code, capsys.readouterr().err

    distilled = ran.folder / "distilled" / "steps_2" / "checkpoints" / "step_00000004" / "native"
    plain = ran.folder / "base" / "checkpoints" / "step_00000004" / "native"
    takes = (
        "model.params.guidance_dim=64",  # not the checkpoint's 16, which wins
        "sampling.guider={target: sat.diffusion.guidance.Embedded, params: {scale: 2.0}}", "sampling.steps=2",
    )  # fmt: skip
    code, said = sample(distilled, "a", *takes)
    assert code == 0, said
    code, said = sample(distilled, "b")
    assert code == 2 and "these are distilled weights: use a distilled model's config" in said
    code, said = sample(plain, "c", *takes)
    assert code == 1 and "these weights are not distilled: use the undistilled model's config" in said
