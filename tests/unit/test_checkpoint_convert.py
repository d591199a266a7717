"""Conversion: every pair of formats bit for bit, what is not stored is computed, the command's messages."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from sat.checkpoint import WRITERS, CheckpointError, detect, find_tokenizer, load, open_part, save_native
from sat.checkpoint.convert import DIFFUSION, UNET, Sources, convert, match_component
from sat.checkpoint.format import PARTS, InMemory
from sat.cli.convert import main, size
from sat.cli.main_guard import UsageError
from sat.config.check import build as build_component
from sat.util.host import machine
from tests.checkpoints import CONFIG, build, same, spec, tensors, tokenizer
from tests.unit.test_lock import dead_pid

ROOT = Path(__file__).parents[2]
FORMATS = sorted(WRITERS)
UNET_PARAMS = {
    "channels": 4, "width": 16, "multipliers": [1, 2], "blocks": 1, "attention": [2], "depths": [1, 1],
    "head_dim": 8, "text_dim": 24, "text_len": 8, "size_dim": 48, "groups": 4, "guidance_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    spiece = tokenizer(root / "spiece.model")
    for name, write in WRITERS.items():
        write(root / name, tensors(), CONFIG, tokenizer=spiece)
    return root


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("of", FORMATS)
def test_every_pair_of_formats_is_exact(written, tmp_path, of, to):
    done = convert(Sources(written / of), tmp_path / "out", to, build_component)
    assert done.notes == []
    assert detect(tmp_path / "out").name == to
    for part in PARTS:
        module = build(part, meta=True)
        load(module, tmp_path / "out", part)
        assert same(module.state_dict(), build(part).state_dict())
        assert dict(open_part(tmp_path / "out", part)).keys() == dict(open_part(written / to, part)).keys()
    config = detect(tmp_path / "out").config(tmp_path / "out")
    assert config["conditioning"] == CONFIG["conditioning"]
    assert config["diffusion"]["schedule"]["params"]["shift"] == 2.5
    spiece = find_tokenizer(tmp_path / "out")
    assert spiece is not None
    assert spiece.read_bytes() == (written / "spiece.model").read_bytes()


def test_around_the_formats_and_back_the_files_are_the_same(written, tmp_path):
    """native -> diffusers -> sat -> native: only metadata may differ, no tensor."""
    at = written / "native"
    for step, to in enumerate(("diffusers", "sat", "native")):
        convert(Sources(at), tmp_path / str(step), to, build_component)
        at = tmp_path / str(step)
    for part in PARTS:
        assert same(dict(open_part(at, part)), dict(open_part(written / "native", part)))


def test_a_source_without_config_needs_one(written, tmp_path):
    folder = Path(shutil.copytree(written / "sat", tmp_path / "sat"))
    (folder / "config_sections.json").unlink()
    with pytest.raises(
        CheckpointError, match="its model part carries no config and is not a published network.*--base"
    ):
        convert(Sources(folder), tmp_path / "out", "native", build_component)
    done = convert(Sources(folder), tmp_path / "out", "native", build_component, config=CONFIG)
    assert set(done.tensors) == set(PARTS)


def test_a_config_that_does_not_fit_is_refused_and_nothing_is_written(written, tmp_path):
    params = {**CONFIG["model"]["params"], "depth": 3}
    config = {**CONFIG, "model": {**CONFIG["model"], "params": params}}
    with pytest.raises(CheckpointError, match="does not fit CogView3Plus"):
        convert(Sources(written / "sat"), tmp_path / "out", "native", build_component, config=config)
    assert list(tmp_path.iterdir()) == []


def test_parts_may_come_from_their_own_places(written, tmp_path):
    """As the official weights lie on most disks."""
    sources = Sources(
        written / "sat" / "1",
        first_stage=written / "sat" / "vae" / "imagekl_ch4.pt",
        text=written / "diffusers" / "text_encoder",
        tokenizer=written / "spiece.model",
    )
    done = convert(sources, tmp_path / "out", "native", build_component, config=CONFIG)
    assert set(done.tensors) == set(PARTS)
    for part in PARTS:
        module = build(part, meta=True)
        load(module, tmp_path / "out", part)
        assert same(module.state_dict(), build(part).state_dict())


def test_a_first_stage_of_its_own_changes_its_own_section_alone(written, tmp_path):
    """It may have been trained beside another network, which its manifest still names."""
    elsewhere = {**CONFIG, "model": {**CONFIG["model"], "params": {**CONFIG["model"]["params"], "depth": 5}}}
    first_stage = {
        **CONFIG["first_stage"],
        "params": {**CONFIG["first_stage"]["params"], "scale_factor": 0.3},
    }
    own = {"first_stage": tensors()["first_stage"]}
    save_native(tmp_path / "vae", own, {**elsewhere, "first_stage": first_stage})
    sources = Sources(written / "native", first_stage=tmp_path / "vae")
    convert(sources, tmp_path / "out", "native", build_component)
    config = detect(tmp_path / "out").config(tmp_path / "out")
    assert config["model"]["params"]["depth"] == CONFIG["model"]["params"]["depth"]
    assert config["first_stage"]["params"]["scale_factor"] == 0.3


def test_a_text_encoder_without_tokenizer_is_noted(written, tmp_path):
    sources = Sources(written / "diffusers" / "text_encoder", only=("text",))
    done = convert(sources, tmp_path / "out", "native", build_component)
    assert done.notes == ["no spiece.model beside the text encoder: the native folder is without a tokenizer"]
    assert done.tensors == {"text": 17}


def test_a_tokenizer_that_is_not_there_is_named(written, tmp_path):
    with pytest.raises(CheckpointError, match="no such tokenizer file"):
        convert(Sources(written / "native", tokenizer=tmp_path), tmp_path / "out", "sat", build_component)


def test_one_part_can_be_converted_alone(written, tmp_path):
    done = convert(
        Sources(written / "native", only=("first_stage",)), tmp_path / "out", "diffusers", build_component
    )
    assert set(done.tensors) == {"first_stage"}
    assert detect(tmp_path / "out" / "vae").parts(tmp_path / "out" / "vae") == ["first_stage"]


def test_a_file_of_one_part_needs_its_name(written, tmp_path):
    file = written / "native" / "model.safetensors"
    with pytest.raises(CheckpointError, match="does not say which part it holds; name it with --only"):
        convert(Sources(file), tmp_path / "out", "sat", build_component, config=CONFIG)
    convert(Sources(file, only=("model",)), tmp_path / "out", "sat", build_component, config=CONFIG)


def test_progress_counts_all_bytes(written, tmp_path):
    seen = []

    def progress(total):
        seen.append(-total)
        return seen.append

    convert(Sources(written / "native"), tmp_path / "out", "diffusers", build_component, progress=progress)
    assert sum(seen[1:]) + 12 * 12 * 32 * 4 == -seen[0], (
        "all but the position table, which diffusers does not store"
    )


# -- the command


def test_the_command_converts(written, tmp_path, capsys):
    assert main([str(written / "native"), str(tmp_path / "out"), "--to", "diffusers", "--dtype", "bf16"]) == 0
    captured = capsys.readouterr()
    assert "diffusers, model 37 tensors, first_stage" in captured.out
    assert captured.err == ""
    found = open_part(tmp_path / "out", "model")
    assert found.info(next(iter(found))).dtype == torch.bfloat16


def test_the_command_reads_a_base(written, tmp_path):
    sizes = {"min": 32, "max": 96, "multiple": 8, "max_area": 96 * 96}
    sections = {**CONFIG, "sampling": {"height": 64, "width": 96, "sizes": sizes}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(sections))
    folder = Path(shutil.copytree(written / "sat", tmp_path / "sat"))
    (folder / "config_sections.json").unlink()
    arguments = [str(folder), str(tmp_path / "out"), "--to", "native"]
    assert main(arguments) == 1
    assert main([*arguments, "--base", str(tmp_path / "mine.yaml")]) == 0


def test_the_command_refuses_an_occupied_destination(written, tmp_path, capsys):
    (tmp_path / "x").write_text("mine")
    assert main([str(written / "native"), str(tmp_path), "--to", "sat"]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("text", "count"), [("500MB", 500_000_000), ("5GB", 5 * 10**9), ("1.5k", 1500), ("7", 7)]
)
def test_shard_sizes_are_read(text, count):
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "0", "five", "-1GB", "5XB"])
def test_a_wrong_shard_size_is_refused(text):
    with pytest.raises(UsageError, match="expected a size such as 500MB"):
        size(text)


def test_an_interrupted_conversion_leaves_nothing(written, tmp_path):
    """The signal comes while the partial folder is there."""
    code = (
        "import sys, time, sat.checkpoint.save as save\n"
        "write = save.write_safetensors\n"
        "def slow(path, infos, read, metadata):\n"
        "    done = write(path, infos, read, metadata); print('half', flush=True)\n"
        "    time.sleep(60); return done\n"
        "save.write_safetensors = slow\n"
        "from sat.cli.convert import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, str(written / "native"), str(tmp_path / "out"), "--to", "native"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    assert any(path.match(".out.*.partial") for path in tmp_path.iterdir())
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "nothing was left at the destination" in errors
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_left_is_removed_and_a_live_ones_draft_is_not(written, tmp_path, capsys):
    pids = (dead_pid(), os.getppid())
    dead, alive = (tmp_path / f".out.{machine()}-{pid}-0123456789ab.partial" for pid in pids)
    for draft in (dead, alive):
        draft.mkdir()
    assert main([str(written / "native"), str(tmp_path / "out"), "--to", "native"]) == 0
    assert (dead.exists(), alive.exists()) == (False, True)


@pytest.mark.parametrize("gone", ["vae/imagekl_ch4.pt", "t5-v1_1-xxl/spiece.model"])
def test_a_part_whose_file_is_gone_is_not_left_out_in_silence(written, tmp_path, capsys, gone):
    folder = shutil.copytree(written / "sat", tmp_path / "sat")
    (folder / gone).unlink()
    assert main([str(folder), str(tmp_path / "out"), "--to", "native"]) == 1
    assert f"names {Path(gone).name!r}, which is not there: copy the folder again" in capsys.readouterr().err
    assert main([str(folder), str(tmp_path / "out"), "--to", "native", "--only", "model"]) == 0


@pytest.mark.parametrize(
    ("name", "part", "features", "target"),
    [
        ("plus_sat", "model", None, "sat.models.cogview3_plus.CogView3Plus"),
        ("unet_sat", "model", None, "sat.models.cogview3_unet.CogView3UNet"),
        ("unet_sat", "model", 256, "sat.models.cogview3_unet.CogView3UNet"),
        ("vae16_sat", "first_stage", None, "sat.first_stage.model.AutoencoderKL"),
        ("vae4_sat", "first_stage", None, "sat.first_stage.model.AutoencoderKL"),
    ],
)
def test_published_networks_are_recognised_without_a_config(name, part, features, target):
    """By their full lists of names and shapes; a distilled network's own width of the guidance is taken."""
    tensors = dict(spec(name))
    if features is not None:
        tensors["model.diffusion_model.w_proj.weight"] = torch.empty(320, features, device="meta")
    component, module, found = match_component(Path(name), InMemory(tensors), part, None, build_component)
    assert component["target"] == target and not found.missing and not found.unexpected
    if features is not None:
        assert module.guidance.in_features == features


def test_a_unet_goes_to_the_official_layout_and_back_exactly_and_not_to_diffusers(tmp_path):
    net = build_component({"target": UNET, "params": UNET_PARAMS})
    config = {
        "model": {"target": UNET, "params": UNET_PARAMS},
        "diffusion": DIFFUSION[UNET],
        "conditioning": {"max_length": 8},
    }
    save_native(tmp_path / "native", {"model": net.state_dict()}, config)
    convert(Sources(tmp_path / "native"), tmp_path / "sat", "sat", build_component)
    convert(Sources(tmp_path / "sat"), tmp_path / "again", "native", build_component)
    assert same(dict(open_part(tmp_path / "again", "model")), dict(open_part(tmp_path / "native", "model")))
    with pytest.raises(CheckpointError, match="no diffusers names; it can be written as native or sat only"):
        convert(Sources(tmp_path / "native"), tmp_path / "out", "diffusers", build_component)


def test_a_model_trained_with_relay_is_not_written_as_a_plain_diffusers_one(tmp_path):
    process = {"target": "sat.diffusion.process.Process", "params": {"mixins": {"relay": {"target": "x"}}}}
    config = {**CONFIG, "diffusion": {**CONFIG["diffusion"], "process": process}}
    with pytest.raises(CheckpointError, match=r"no place for the noising process of this model \(relay\)"):
        WRITERS["diffusers"](tmp_path / "out", tensors(), config)
    assert not (tmp_path / "out").exists()
