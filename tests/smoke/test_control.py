"""Controls from train.py to sample.py: what learns and is written, exact resumption, caches, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from sat.cli.sample import main as sample
from sat.control.files import FILE, read_info
from tests.background import Runs
from tests.configs import DEBUG, ROOT
from tests.smoke.test_training import Ran, good
from tests.training import same, state

RUNS = Runs("tests.smoke.control_runs", spiece=True)


@pytest.fixture(scope="module")
def ran() -> Ran:
    folder = RUNS()
    return Ran(folder, json.loads((folder / "ends.json").read_text()))


def native(ran: Ran, name: str, step: int) -> Path:
    return ran.folder / name / "checkpoints" / f"step_{step:08d}" / "native"


def test_the_control_alone_learns_and_is_written(ran: Ran) -> None:
    good(ran, "whole")
    place = native(ran, "whole", 4)
    assert [file.name for file in place.iterdir()] == [FILE]
    found = state(place.parent)
    trained = [name for name in found if " weight/" in name]
    assert trained and all(".mixins.control." in name for name in trained)
    tensors = load_file(place / FILE)
    assert all(v.any() for n, v in tensors.items() if n.startswith("zeros."))
    info = read_info(ran.folder / "whole")
    assert info.picture is not None and info.picture.target.endswith("Edges") and info.norms


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(ran: Ran) -> None:
    good(ran, "half")
    good(ran, "rest")
    steps = [ran.folder / name / "checkpoints" / "step_00000004" for name in ("whole", "half")]
    assert same(*(state(step) for step in steps))


def test_caches_hold_what_the_control_takes(ran: Ran) -> None:
    for name in ("blockwise", "cached", "again", "inpaint", "unet"):
        good(ran, name)
    assert "22 of them to make" in good(ran, "cached") or "of them to make" in good(ran, "cached")
    assert "0 of them to make" in good(ran, "again")
    shapes = {
        json.loads(facts.read_text())["as"]: {
            tuple(load_file(file)["extra"].shape) for file in facts.parent.glob("*/*.safetensors")
        }
        for facts in (ran.folder / "cache").glob("extra-*/made_from.json")
    }
    assert shapes["latent"] == {(4, 4, 6)}
    assert shapes["inpaint"] == {(5, 4, 6)}
    assert shapes["pixels"] == {(3, 32, 48)}
    one, two = (load_file(native(ran, name, 2) / FILE) for name in ("cached", "again"))
    assert same(one, two)


def test_the_model_learns_with_a_frozen_control_on_it_and_is_written_without(ran: Ran) -> None:
    good(ran, "sft")
    written = load_file(native(ran, "sft", 1) / "model.safetensors")
    assert not any(".control." in name for name in written)
    began = load_file(native(ran, "whole", 4) / FILE)
    assert began


def test_lora_learns_with_a_frozen_control_and_beside_a_learning_one(ran: Ran) -> None:
    good(ran, "lora")
    assert [f.name for f in native(ran, "lora", 1).iterdir()] == ["adapter.safetensors"]
    adapted = load_file(native(ran, "lora", 1) / "adapter.safetensors")
    assert adapted and not any("control" in name for name in adapted), "its own layers are left alone"
    good(ran, "both")
    assert sorted(f.name for f in native(ran, "both", 2).iterdir()) == ["adapter.safetensors", FILE]


def test_training_goes_on_from_a_control(ran: Ran) -> None:
    good(ran, "further")
    one, two = load_file(native(ran, "whole", 4) / FILE), load_file(native(ran, "further", 1) / FILE)
    assert one.keys() == two.keys()
    assert all((one[n] - two[n]).abs().max() < 1e-5 for n in one)


def test_a_control_of_a_distilled_model_learns_at_its_strength_and_samples_are_steered(ran: Ran) -> None:
    assert "the control learns at its guidance strength 3" in good(ran, "distilled")
    tensors = load_file(native(ran, "distilled", 1) / FILE)
    assert all(v.any() for n, v in tensors.items() if n.startswith("zeros."))
    assert read_info(ran.folder / "distilled").base.params["guidance_dim"] == 8
    assert "samples in between are drawn without the control" in good(ran, "unsteered")
    assert len(list((ran.folder / "distilled" / "samples").rglob("*.png"))) >= 2


def test_a_plan_counts_the_control(ran: Ran) -> None:
    assert "trained" in good(ran, "plan") or "weights" in good(ran, "plan")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_pictures", "adapters.control.picture: pictures of data.sources come without a control's"),
        ("text", "the text encoder does not learn beside a control: set train_text to false"),
    ],
)
def test_settings_without_sense_are_refused(ran: Ran, name: str, message: str) -> None:
    end = ran.ends[name]
    assert end["code"] == 2
    assert message in str(end["err"])


def test_sample_draws_with_the_trained_control(ran: Ran, tmp_path: Path) -> None:
    picture = next((ROOT / "data" / "emoji_sample").rglob("*.png"))
    drawn = {}
    for name, scale in (("steered", 1), ("off", 0), ("plain", None)):
        words = ["--base", str(DEBUG), "--prompt", "a", "--output-dir", str(tmp_path / name)]
        if scale is not None:
            words += ["--control", f"{ran.folder / 'whole'}:{picture}:{scale}", "--control-preprocess"]
        assert sample([*words, "parallel.device=cpu"]) == 0
        drawn[name] = np.asarray(Image.open(next((tmp_path / name).glob("0_*/*0.png"))))
    assert (drawn["off"] == drawn["plain"]).all()
    assert (drawn["steered"] != drawn["plain"]).any()
