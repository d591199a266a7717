"""train.py on the toy model: what a run leaves behind, resuming to the bit, stopping, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import CogView3PlusPipeline
from PIL import Image
from safetensors.torch import load_file

from sat.cli.convert import main as convert
from sat.cli.train import main
from sat.config.load import load
from sat.pipeline import Pipeline
from sat.train.resume import RunFolder, torn
from tests.background import Runs
from tests.checkpoints import tokenizer
from tests.configs import DEBUG, ROOT
from tests.smoke.training_runs import write
from tests.training import averages, rows, same
from tests.training import state as whole_state


class Ran(NamedTuple):
    """The folder of all runs, and how each ended."""

    folder: Path
    ends: dict[str, dict[str, object]]


RUNS = Runs("tests.smoke.training_runs", spiece=True)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


@pytest.fixture(scope="module")
def ran() -> Ran:
    folder = RUNS()
    return Ran(folder, json.loads((folder / "ends.json").read_text()))


def good(ran: Ran, name: str) -> str:
    """What a run that ended well said; "half" ones stop early."""
    end = ran.ends[name]
    assert end["code"] == (75 if name.endswith("half") else 0), end["err"]
    return str(end["out"]) + str(end["err"])


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return whole_state(run / "checkpoints" / f"step_{step:08d}")


def test_rotary_positions_train_and_leave_no_table(ran) -> None:
    good(ran, "rope")
    assert len([row for row in rows(ran.folder / "rope") if "lr" in row]) == 2
    native = ran.folder / "rope" / "checkpoints" / "step_00000002" / "native"
    names = set(load_file(native / "model.safetensors"))
    assert not any("position" in name or "rope" in name for name in names)
    assert {name for name in names if ".mixins.adaln." in name}


def test_a_run_leaves_its_config_record_metrics_samples_and_checkpoints(ran) -> None:
    good(ran, "whole")
    run = ran.folder / "whole"
    assert {path.name for path in run.iterdir()} == {
        "resolved.yaml", "run.json", "metrics.jsonl", "samples", "checkpoints", "tensorboard",
        "ended.json", "validation.json",
    }  # fmt: skip
    assert load([run / "resolved.yaml"]).train.steps == 6
    record = json.loads((run / "run.json").read_text())
    assert (record["world"], record["seeds"]["train"]) == (1, 0)
    with Image.open(run / "samples" / "step_00000006" / "00_red_apple.png") as image:
        assert (image.height, image.width) == (48, 64)
    assert [saved.step for saved in RunFolder(run).saved()] == [3, 6]
    steps = [row for row in rows(run) if "lr" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]) >= {
        "loss",
        "lr",
        "grad_norm",
        "images_per_second",
        "data_wait",
        "memory_gb",
        "epoch",
    }
    assert [row["step"] for row in rows(run) if "validation/shuffled" in row] == [3, 6]
    assert steps[-1]["images"] == 48
    tokens = 3 * 4 + 8  # of an image: 48 x 64 pixels are 6 x 8 latent cells, in patches of 2 x 2; and text
    for row in steps:
        assert row["tokens_per_second"] == pytest.approx(tokens * row["images_per_second"])
        assert 0 < row["mfu"] < 1


def test_tensorboard_has_the_rows(ran) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ran.folder / "whole" / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    wanted = [(row["step"], row["loss"]) for row in rows(ran.folder / "whole") if "lr" in row]
    assert [step for step, _ in written] == [step for step, _ in wanted]
    assert [value for _, value in written] == pytest.approx([value for _, value in wanted])


def test_a_run_cut_in_three_is_the_uninterrupted_one_bit_for_bit(ran) -> None:
    good(ran, "half")
    good(ran, "rest")
    assert same(state(ran.folder / "half", 6), state(ran.folder / "whole", 6))
    losses = [[r["loss"] for r in rows(ran.folder / name) if "lr" in r] for name in ("half", "whole")]
    assert losses[0] == losses[1]


def test_minutes_end_a_run_with_a_checkpoint(ran) -> None:
    said = good(ran, "half")
    assert "minutes of train.max_minutes are over: saving at step 1 of 6" in said


def test_a_run_folder_with_checkpoints_is_not_trained_over(ran) -> None:
    end = ran.ends["again"]
    assert end["code"] == 2
    assert "holds checkpoints up to step 1: --resume goes on from there" in end["err"]


def test_the_end_of_a_run_stands_in_its_folder(ran) -> None:
    done, stopped = (json.loads((ran.folder / name / "ended.json").read_text()) for name in ("vae", "early"))
    assert (done["code"], done["step"], done["reason"]) == (0, 2, "done")
    assert (stopped["code"], stopped["step"]) == (75, 1)
    assert "train.max_minutes are over: saved at step 1 of 6, --resume goes on" in stopped["reason"]
    failed = json.loads((ran.folder / "nan" / "ended.json").read_text())
    assert (failed["code"], "not finite in 2 steps" in failed["reason"]) == (1, True)
    assert not list(ran.folder.glob("*/.writer*")), "locks are given back"


def test_a_prolonged_run_keeps_to_its_choice_of_rate(ran) -> None:
    assert "train.steps 6 -> 8: the last rate of the cosine is kept behind it" in good(ran, "longer")
    rates = [row["lr"] for row in rows(ran.folder / "longer") if "lr" in row]
    assert rates[6:] == [rates[5]] * 2
    assert rates[:6] == [row["lr"] for row in rows(ran.folder / "whole") if "lr" in row]


def test_a_finished_run_says_so(ran) -> None:
    assert "step 6 of 6 is done: raise train.steps to go on" in good(ran, "done")


def test_a_torn_checkpoint_is_named_and_the_one_before_taken(ran) -> None:
    said = good(ran, "torn")
    assert "step_00000006 is torn (no COMPLETE file" in said
    assert "resumed from" in said
    assert "at step 3 of 6" in said
    assert same(state(ran.folder / "half", 6), state(ran.folder / "whole", 6))


def test_the_native_checkpoint_holds_the_averages_and_samples(ran, tmp_path) -> None:
    from sat.cli.sample import main as sample

    native = ran.folder / "whole" / "checkpoints" / "step_00000006" / "native"
    kept = averages(native.parent)
    weights = load_file(native / "model.safetensors")
    trained = {name.removeprefix("network."): v for name, v in kept.items() if name.startswith("network.")}
    assert trained
    assert all(torch.equal(weights[name].flatten(), value) for name, value in trained.items())
    code = sample([
        "--base", str(DEBUG), "--prompt", "a dog", "--output-dir", str(tmp_path / "out"),
        "parallel.device=cpu", "conditioning.tokenizer=null",
        f"checkpoint.model={native}", f"checkpoint.text={native}",
    ])  # fmt: skip
    assert code == 0


def test_cached_latents_are_trained_on(ran) -> None:
    assert "encoding 44 images 2 times" in good(ran, "cached")
    native = ran.folder / "cached" / "checkpoints" / "step_00000002"
    assert (native / "native" / "model.safetensors").is_file()
    assert not averages(native)


def test_wandb_is_written_offline_without_a_key(ran) -> None:
    said = good(ran, "cached")
    assert "wandb does not start" not in said
    (written,) = (ran.folder / "cached" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"tokens_per_second" in written.read_bytes()


def test_what_a_run_trained_draws_the_same_through_diffusers(ran, tmp_path) -> None:
    run, out = ran.folder / "cached", tmp_path / "theirs"
    with_first_stage = ["--first-stage", str(ran.folder / "vae" / "checkpoints" / "step_00000002" / "native")]
    assert convert([str(run), str(out), "--to", "diffusers", *with_first_stage]) == 0
    theirs = CogView3PlusPipeline.from_pretrained(out, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    native = run / "checkpoints" / "step_00000002" / "native"
    ours = Pipeline.from_config(
        [run / "resolved.yaml"],
        ["model.params.double_norm=false", "diffusion.schedule.params.rescale=before_spacing",
         "diffusion.schedule.params.quantise=false", "data=null", "train=null",
         f"checkpoint={{model: {native}, text: {native}, first_stage: {with_first_stage[1]},"
         " allow_config: [model.params.double_norm]}"],
        device="cpu", dtype="fp32",
    )  # fmt: skip
    noise = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    picture = theirs(
        "a red apple", height=48, width=64, num_inference_steps=10, guidance_scale=3.0, latents=noise.clone(),
        max_sequence_length=8, output_type="pt",
    ).images  # fmt: skip
    latents = ours(["a red apple"], steps=10, guidance=3.0, latents=noise).latents
    assert picture.std() > 0.02  # not flat, not saturated
    assert (picture - ours.generator.engine.decode(latents)).abs().max() < 1e-3


def test_a_part_that_began_at_random_is_not_converted_in_silence(ran, tmp_path, capsys) -> None:
    assert convert([str(ran.folder / "cached"), str(tmp_path / "out"), "--to", "diffusers"]) == 2
    assert "began with a random first stage and left it as it was: name one with --first-stage" in (
        capsys.readouterr().err
    )


def test_a_run_is_converted_from_the_average_that_is_asked_for(ran, tmp_path, capsys) -> None:
    run = ran.folder / "rope"
    native = run / "checkpoints" / "step_00000002" / "native_0.05"
    ask = [str(run), str(tmp_path / "out"), "--to", "native", "--only", "model"]
    assert convert([*ask, "--average", "0.3"]) == 2
    assert "has no average of decay 0.3; train.ema is 0.2, 0.05" in capsys.readouterr().err
    assert convert([*ask, "--average", "0.05"]) == 0
    made, wanted, first = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", native, native.parent / "native")
    )
    assert same(made, wanted) and not same(wanted, first)


def test_bf16_weights_train_validate_sample_and_save(ran) -> None:
    good(ran, "bf16")
    run = ran.folder / "bf16"
    assert (run / "samples" / "step_00000002" / "01_a_dog.png").is_file()
    tensors = load_file(run / "checkpoints" / "step_00000002" / "native" / "model.safetensors")
    assert tensors["time.0.weight"].dtype == torch.bfloat16


def test_bf16_weights_need_sharded_masters(ran) -> None:
    end = ran.ends["lonely_bf16"]
    assert end["code"] == 2
    assert "train.zero: `dtype` bf16 needs 1, 2 or 3" in end["err"]


def test_the_first_stage_trains_by_the_same_loop(ran) -> None:
    good(ran, "vae")
    assert all(row["psnr"] > 0 for row in rows(ran.folder / "vae"))
    place = ran.folder / "vae" / "checkpoints" / "step_00000002" / "native"
    assert [file.name for file in place.glob("*.safetensors")] == ["first_stage.safetensors"]


def test_a_streak_of_nan_losses_ends_the_run(ran) -> None:
    end = ran.ends["nan"]
    assert end["code"] == 1
    assert "not finite in 2 steps in a row" in end["err"]
    assert "lower train.lr (1e+38)" in end["err"]


def test_missing_data_is_told_before_anything_is_built(ran) -> None:
    end = ran.ends["no_data"]
    assert end["code"] == 2
    assert "data.sources.0.path: there is no '/nowhere'" in end["err"]
    assert not (ran.folder / "no_data").exists()


def test_check_and_print_config_build_nothing(ran) -> None:
    said = good(ran, "check")
    assert "config ok: 6 steps of 4 x 2 images a data rank at 48 x 64 (height x width), fp32, ZeRO 0" in said
    assert "objective:" in good(ran, "config")
    assert not (ran.folder / "check").exists()


def test_a_config_without_training_is_refused(capsys, tmp_path) -> None:
    assert main(["--base", str(DEBUG), "--output-dir", str(tmp_path)]) == 2
    assert "the config has no `train` section" in capsys.readouterr().err


# ---------------------------------------------------------------------- processes of their own


def start(
    base: list[str], out: Path, *arguments: str, launcher: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """A process of train.py that saves at every step."""
    command = [sys.executable, *launcher, "train.py", *base, "--output-dir", str(out), *arguments]
    quick = [
        "train.save_every=1",
        "train.sample_every=null",
        "train.validate_every=null",
        "train.keep_last=100",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *quick],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until ``condition`` holds; an error if the process ends before."""
    for _ in range(6000):
        if condition():
            return
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        time.sleep(0.02)
    process.kill()
    raise AssertionError("the run made no progress")


def steps(run: Path) -> list[int]:
    return [saved.step for saved in RunFolder(run).saved()]


_DIES_IN_A_SAVE = """
import os, runpy, sys
from sat.train.shards import Share
write, count = Share.write, []
def act(self, *given):
    done = write(self, *given)
    count.append(1)
    if len(count) == 2:
        os.kill(os.getpid(), 9)
    return done
Share.write = act
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed_while_saving(base: list[str], out: Path, *arguments: str) -> Path:
    """Of a run that is killed while it writes its second checkpoint, behind a whole one: the torn folder."""
    process = start(base, out, *arguments, launcher=("-c", _DIES_IN_A_SAVE))
    said = process.communicate(timeout=240)[1]
    assert process.returncode == -signal.SIGKILL, said
    assert steps(out)
    folders = {file.parent.parent for file in out.glob("checkpoints/step_*/state/*")}
    (folder,) = [folder for folder in folders if torn(folder)]
    return folder


def test_a_run_killed_while_saving_resumes_to_the_same_bits(ran, spiece, tmp_path) -> None:
    base, out = write(tmp_path, spiece), tmp_path / "run"
    killed_while_saving(base, out)
    first = steps(out)[-1]
    left = killed_while_saving(base, out, "--resume", "train.background_save=true")
    last = steps(out)[-1]
    assert last >= first
    process = start(base, out, "--resume")
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    assert f"{left.name} is torn" in said
    assert f"at step {last} of 6" in said
    assert same(state(out, 6), state(ran.folder / "whole", 6))
    assert not any(torn(path) for path in (out / "checkpoints").iterdir())


def test_sigterm_under_torchrun_saves_and_ends(spiece, tmp_path) -> None:
    out = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--standalone")
    process = start(write(tmp_path, spiece), out, "--steps", "100000", launcher=launcher)
    wait_for(lambda: bool(steps(out)), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=240)[1]
    assert "asked to stop: saving at step" in said  # torchrun itself returns 1 after a signal
    (last,) = steps(out)[-1:]
    assert f"saving at step {last} of 100000" in said
    ended = json.loads((out / "ended.json").read_text())
    assert (ended["code"], ended["step"]) == (75, last)


def test_ctrl_c_saves_and_exits_without_an_error(spiece, tmp_path) -> None:
    out = tmp_path / "run"
    process = start(write(tmp_path, spiece), out, "--steps", "100000")
    wait_for(lambda: bool(steps(out)), process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 75, said
    assert f"saving at step {steps(out)[-1]} of 100000" in said
