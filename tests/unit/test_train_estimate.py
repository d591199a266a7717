"""Estimates of the toy model: the sizes that are counted, and the changes that fit a budget."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sat.cli.commands.estimate import estimate
from sat.cli.train import main, size
from sat.config.build import build_engine
from sat.config.load import load
from sat.config.schema import Experiment, OffloadConfig
from sat.train.estimate import PROCESS, Estimate, Estimator, find_settings, zero3_offload
from sat.train.measure import PACKED, largest_size, sections
from tests.configs import DEBUG, ROOT

BASE = [DEBUG, ROOT / "configs" / "tiny_train.yaml"]
OFFLOADED = ROOT / "configs" / "zero3_offload.yaml"
SETTINGS = (
    "train.sample_every=null", "train.batch_size=4", "data.height=48", "data.width=64",
    "checkpoint.first_stage=null", "data.cache_views=0", "train.objective.params.train_text=false",
    f"data.sources=[{{path: {ROOT}/data/emoji_sample}}]", "data.validation=[]", "train.validate_every=null",
)  # fmt: skip
LORA = "adapters.lora={rank: 2, targets: [attention]}"
DISTILLATION = (
    "train.objective={target: sat.train.objectives.distillation.Distillation}", "model.params.guidance_dim=8",
    "sampling.guider={target: sat.diffusion.guidance.Embedded, params: {scale: 1.0}}",
)  # fmt: skip
FIRST_STAGE = "train.objective={target: sat.train.objectives.first_stage.FirstStageObjective, params: {}}"


def experiment(*overrides: Any) -> Experiment:
    return load(BASE, [*SETTINGS, *overrides])


ESTIMATOR = Estimator()  # measures each micro-batch once for all tests


@cache
def estimated(*overrides: Any, ranks: int = 1) -> Estimate:
    return ESTIMATOR.estimate(experiment(*overrides), ranks)


def test_weights_are_those_of_the_engine_that_training_builds() -> None:
    real = build_engine(experiment(), device="cpu", dtype=torch.bfloat16)
    weights = estimated().weights
    assert weights.trained_elements == sum(p.numel() for p in real.network.parameters())
    assert weights.trained == 2 * weights.trained_elements
    text = [*real.conditioner.text.parameters(), *real.conditioner.text.buffers()]
    assert weights.frozen["text encoder"] == sum(p.numel() * p.element_size() for p in text)


def test_masters_state_and_average_are_shared_out_by_zero() -> None:
    elements = estimated().weights.trained_elements
    alone, eight = estimated(), estimated(ranks=8)
    assert (alone.masters, alone.optimizer, alone.average) == (
        4 * elements,
        pytest.approx(8 * elements),
        4 * elements,
    )
    assert eight.masters == 4 * -(-elements // 8)
    assert eight.gradients == 2 * elements
    assert estimated("train.zero=2", ranks=8).gradients == 2 * -(-elements // 8)


def test_zero_0_keeps_no_masters_and_everything_on_every_rank() -> None:
    now = estimated("train.zero=0", "train.dtype=fp32", ranks=8)
    elements = now.weights.trained_elements
    assert (now.masters, now.bucket) == (0, 0)
    assert (now.gradients, now.average) == (4 * elements, 4 * elements)


def test_sgd_keeps_no_state() -> None:
    assert estimated("train.optimizer={target: torch.optim.SGD, params: {}}").optimizer == 0


def test_checkpointing_keeps_less_and_computes_more() -> None:
    without, with_it = (
        estimated().measured.trace,
        estimated("train.activation_checkpointing=true").measured.trace,
    )
    assert with_it.kept < without.kept
    assert with_it.flops > without.flops


def test_activations_grow_with_batch_and_size() -> None:
    one = estimated().measured.trace.kept
    assert estimated("train.batch_size=8").measured.trace.kept == pytest.approx(2 * one, rel=0.05)
    assert estimated("data.height=32").measured.trace.kept < one


def test_lora_trains_the_factors_alone() -> None:
    now, whole = estimated(LORA), estimated()
    dim, rank, depth = 32, 2, 2
    assert now.weights.trained_elements == depth * (3 * 2 * rank * dim + 2 * rank * dim)
    assert now.weights.frozen["network"] == whole.weights.trained + whole.weights.frozen["network"]
    assert now.masters == 4 * now.weights.trained_elements


def test_frozen_weights_packed_beside_lora_are_there_twice() -> None:
    settings = (LORA, "train.dtype=fp32", "parallel.device=cpu")
    dim, depth = 32, 2
    qkv, proj, up, down = 3 * dim**2, dim**2, 4 * dim**2, 4 * dim**2
    assert estimated(*settings).weights.frozen[PACKED] == 4 * depth * (qkv + proj + up + down)
    assert PACKED not in estimated(*settings, "train.pack=false").weights.frozen
    assert PACKED not in ESTIMATOR.estimate(experiment(*settings), 1, zero=3).weights.frozen


def test_distillation_holds_a_teacher() -> None:
    now = estimated(*DISTILLATION)
    assert now.weights.frozen["teacher"] >= now.weights.trained


def test_two_sets_of_factors_are_two_roles_on_one_network() -> None:
    """The third role, the teacher, is the network without them: nothing is held for it."""
    matching = DISTILLATION[0][:-1] + ", params: {method: dmd2}}"
    now, plain = estimated(LORA, matching), estimated(LORA)
    roles = now.weights.roles
    assert roles == {"student": plain.weights.trained_elements, "critic": plain.weights.trained_elements}
    assert now.weights.frozen["network"] == plain.weights.frozen["network"]
    assert "teacher" not in now.weights.frozen


def test_first_stage_training_has_no_text() -> None:
    now = estimated(FIRST_STAGE, "train.autocast=bf16", "train.dtype=fp32", "train.zero=0")
    assert "first stage" not in now.weights.frozen
    assert now.measured.text_tokens == 0


def test_caches_stand_for_text_encoder_and_first_stage() -> None:
    assert {"text encoder", "first stage"} <= set(estimated().weights.frozen)
    assert set(estimated("data.cache=somewhere").weights.frozen) == {"network"}  # its tables


def test_tokens_are_patches_and_text() -> None:
    measured = estimated().measured
    cells = (48 // 8) * (64 // 8)
    assert (measured.image_tokens, measured.text_tokens) == (cells // 4, 8)


def test_largest_bucket_is_estimated() -> None:
    _, data = sections(
        experiment("data.height=null", "data.width=null", "data.buckets={area: [1024, 3072], step: 16}")
    )
    height, width = largest_size(data)
    assert height * width == 3072


def test_gpu_holds_the_whole_gradient_buffer_and_the_cpu_what_is_written() -> None:
    assert estimated("parallel.device=cuda").bucket == 2 * 500_000_000
    host = estimated("parallel.device=cpu")
    assert host.bucket == 2 * host.weights.trained_elements


def test_the_process_takes_of_the_memory_on_a_cpu_alone() -> None:
    host = estimated("parallel.device=cpu")
    assert host.process == host.lasting - replace(host, host=False).lasting - host.loading == PROCESS


def test_gaps_between_tensors_count_on_a_cpu_alone(capsys) -> None:
    host = estimated("parallel.device=cpu")
    used = host.lasting + max(phase.extra for phase in host.phases)
    assert host.total == pytest.approx(used + 0.06 * (used - PROCESS), abs=1)
    other = replace(host, host=False)
    assert other.total == other.lasting + max(phase.extra for phase in other.phases)
    estimate(experiment("parallel.device=cpu"), 1, None)
    told = capsys.readouterr().out
    (gaps,) = re.findall(r"gaps between tensors +([\d.]+) +6% of what is in use", told)
    (total,) = re.findall(r"most at a time +([\d.]+)", told.partition("otherwise")[0])
    assert float(gaps) == pytest.approx(0.06 / 1.06 * (float(total) - 0.42), abs=0.002)


def test_weights_without_a_file_are_drawn_in_float32_first() -> None:
    host = estimated("parallel.device=cpu")
    (drawing,) = [phase for phase in host.phases if phase.name == "drawing weights"]
    assert host.lasting + drawing.extra == host.process + host.measured.drawn
    assert 4 * host.weights.trained_elements < host.measured.drawn < 5 * host.weights.total
    assert "drawing weights" not in [phase.name for phase in replace(host, host=False).phases]


def test_whatever_fits_already_needs_no_change() -> None:
    found = find_settings(ESTIMATOR, experiment("parallel.device=cpu"), 1, 10**12)
    assert found.found is found.now
    assert found.alone == ()


def test_changes_that_fit_are_estimated_not_guessed() -> None:
    before = experiment("parallel.device=cpu")
    now = ESTIMATOR.estimate(before, 1)
    total, budget = now.total, int(now.process + 0.6 * (now.total - now.process))
    found = find_settings(ESTIMATOR, before, 1, budget)
    assert found.found is not None
    changed = before
    for change in found.found.changes:
        changed = change.apply(changed)
    assert ESTIMATOR.estimate(changed, 1).total == found.found.total <= budget < total
    assert {c.setting.partition("=")[0] for o in found.alone for c in o.changes} == {
        "data.cache", "train.zero", "train.activation_checkpointing", "train.batch_size",
        "LoRA (configs/lora.yaml laid over it)",
    }  # fmt: skip


def test_on_a_gpu_sharing_out_weights_and_offloading_are_offered_after_what_costs_less() -> None:
    before = experiment("parallel.device=cuda", "train.zero=2")
    offered = [str(o) for o in find_settings(ESTIMATOR, before, 8, 1000).alone]
    assert offered.index("train.zero=3") + 1 == offered.index("configs/zero3_offload.yaml laid over it")
    assert [setting.partition("=")[0] for setting in offered].index("train.batch_size") < offered.index(
        "train.zero=3"
    )
    away = zero3_offload(before)
    enough = ESTIMATOR.estimate(away, 8).total
    found = find_settings(ESTIMATOR, before, 8, enough)
    assert found.found is not None
    assert found.found.total <= enough < ESTIMATOR.estimate(before, 8).total
    assert sections(away)[0].offload == sections(load([*BASE, OFFLOADED], SETTINGS))[0].offload
    assert sections(away)[0].zero == 3


def test_more_ranks_are_tried_with_what_is_offloaded_already() -> None:
    before = zero3_offload(experiment("parallel.device=cuda"))
    assert find_settings(ESTIMATOR, before, 2, 1000).found is None


def test_what_no_change_brings_into_the_budget_is_said() -> None:
    found = find_settings(ESTIMATOR, experiment("parallel.device=cpu"), 1, 1000)
    assert found.found is None
    assert found.best.total > 1000


def test_a_smaller_batch_keeps_the_images_of_a_step() -> None:
    before = experiment("parallel.device=cpu")
    train = sections(before)[0]
    for change in (c for o in find_settings(ESTIMATOR, before, 1, 1000).alone for c in o.changes):
        after = sections(change.apply(before))[0]
        assert after.batch_size * after.accumulate == train.batch_size * train.accumulate


def test_offloading_takes_optimizer_and_weights_out_of_a_gpus_memory() -> None:
    plain = replace(estimated(ranks=8), zero=3, host=False)
    away = replace(plain, offload=OffloadConfig(optimizer=True, parameters=True))
    weights = plain.measured.weights.trained // 8
    assert plain.lasting - away.lasting == plain.masters + plain.optimizer + plain.average + weights
    assert away.offloaded == plain.lasting - away.lasting + 4 * plain.share
    assert replace(away, host=True).offloaded == replace(away, host=True).locked == 0


def test_pinned_buffers_of_an_offloaded_optimizer_are_rounded_up_to_powers_of_two() -> None:
    plain = replace(estimated(ranks=8), zero=3, host=False)
    away = replace(plain, offload=OffloadConfig(optimizer=True, parameters=True))
    weights, full = plain.measured.weights.trained // 8, 4 * plain.share
    up = [1 << (size - 1).bit_length() for size in (full, weights)]
    assert away.locked == 2 * up[0] + up[1] - full - weights  # gradients twice
    second = replace(away, zero=2)
    narrow = 1 << (plain.gradient * plain.share - 1).bit_length()
    assert second.locked == 2 * up[0] + narrow - 2 * full and second.offloaded_weights == 0


TEAMS = pytest.mark.skipif(torch.__version__ < "2.6", reason="collectives want data")


@pytest.mark.skipif(torch.__version__ >= "2.6", reason="teams can be estimated")
def test_an_old_torch_says_that_it_cannot_estimate_a_team() -> None:
    with pytest.raises(RuntimeError, match="cannot estimate a team, as its collectives take no tensors"):
        estimated("parallel.sequence=2", ranks=2)


@TEAMS
def test_tensor_ranks_hold_a_share_of_the_weights_and_of_what_is_kept_for_the_backward_pass() -> None:
    even = "conditioning.text.params.heads=4"
    whole, split = estimated(even, ranks=4), estimated(even, "parallel.tensor=2", ranks=4)
    assert 0.5 < split.weights.trained_elements / whole.weights.trained_elements < 0.8
    assert split.weights.frozen["text encoder"] < whole.weights.frozen["text encoder"]
    assert split.measured.trace.kept < whole.measured.trace.kept
    assert (whole.sharing, split.sharing) == (4, 2)
    assert split.masters == 4 * -(-split.weights.trained_elements // 2)


@TEAMS
def test_sequence_ranks_keep_a_share_of_the_activations() -> None:
    whole, split = estimated(ranks=2), estimated("parallel.sequence=2", ranks=2)
    assert split.weights == whole.weights
    assert split.measured.trace.kept < whole.measured.trace.kept
    assert split.masters == whole.masters


def test_zero_3_shares_out_the_weights() -> None:
    now = replace(estimated(ranks=8), zero=3)
    whole = estimated().measured.weights
    gathered = whole.trained + whole.frozen["network"]
    assert now.weights.trained == whole.trained // 8 + gathered


@pytest.mark.parametrize(
    ("text", "bytes_"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 << 29), ("500MB", 500 * 10**6)]
)
def test_sizes_are_read(text: str, bytes_: int) -> None:
    assert size(text) == bytes_


@pytest.mark.parametrize("text", ["24", "GB", "-1GB", "24 TB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="24GB"):
        size(text)


def test_the_run_folder_is_the_configs_or_has_the_name_of_its_last_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So the config that a run wrote goes on in that run's folder."""
    files = [*map(str, BASE), str(tmp_path / "mine.yaml")]
    for text, folder in (("{}", "runs/mine"), ("output: {dir: there}", "there")):
        Path(files[-1]).write_text(text)
        assert main(["--base", *files, *SETTINGS, "--print-config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["output"]["dir"] == folder


def test_fit_belongs_to_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--base", str(DEBUG), "--fit", "24GB"])
    assert "--plan" in capsys.readouterr().err


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(file) for file in BASE]
    assert (
        main(["--base", *files, *SETTINGS, "parallel.device=cpu", "--plan", "--ranks", "8", "--fit", "1MB"])
        == 0
    )
    out = capsys.readouterr().out
    for part in (
        "8 ranks",
        "weights, trained",
        "optimizer state",
        "activations",
        "process, libraries",
        "ZeRO 3",
        "TFLOP",
        "does not fit",
    ):
        assert part in out
