"""Files of 8 bits a weight: values within half a step, controls that steer as before, and what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sat.checkpoint.eight_bits import Whole, packed
from sat.checkpoint.format import CheckpointError, InMemory
from sat.cli.convert import main
from sat.config.build import build_engine
from sat.config.load import load
from sat.control.base import BaseModel
from sat.control.files import read, read_info, write
from sat.pipeline import Pipeline
from tests.configs import DEBUG, ROOT
from tests.unit.test_control_files import written

WEIGHTS = {
    "a": torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0)),
    "zero": torch.zeros(2, 4),
    "bias": torch.rand(5, generator=torch.Generator().manual_seed(1)),
    "table": torch.arange(6).view(2, 3),
}


def test_a_row_of_small_values_is_as_exact_as_any() -> None:
    small = WEIGHTS["a"] * 1e-12
    assert (Whole(InMemory(packed({"a": small})))["a"] - small).norm() < 0.01 * small.norm()


def test_a_weight_is_within_half_a_step_of_its_row() -> None:
    found = packed(WEIGHTS)
    assert {name: t.dtype for name, t in found.items()} == {
        "a": torch.int8, "a.scale": torch.float32, "zero": torch.int8, "zero.scale": torch.float32,
        "bias": torch.float32, "table": torch.int64,
    }  # fmt: skip
    again = Whole(InMemory(found))
    step = WEIGHTS["a"].flatten(1).abs().amax(1) / 127
    assert ((again["a"] - WEIGHTS["a"]).abs().flatten(1).amax(1) <= 0.5001 * step).all()
    assert all(torch.equal(again[name], WEIGHTS[name]) for name in ("zero", "bias", "table"))


def test_what_is_whole_again_has_the_names_and_types_of_before() -> None:
    again = Whole(InMemory(packed(WEIGHTS)))
    assert {*again} == {*WEIGHTS} and len(again) == len(WEIGHTS)
    assert all(again.info(name) == (t.shape, t.dtype) for name, t in WEIGHTS.items())
    plain = Whole(InMemory(WEIGHTS | {"x.scale": torch.ones(2)}))  # a weight of that name, of no codes
    assert {*plain} == {*WEIGHTS, "x.scale"}


@pytest.mark.parametrize("scale", [None, torch.ones(4)])
def test_codes_without_their_scales_are_refused(scale: torch.Tensor | None) -> None:
    damaged = {name: t for name, t in packed(WEIGHTS).items() if name != "a.scale"}
    with pytest.raises(CheckpointError, match=r"'a' is of 8 bits and has no scales \[5\]"):
        Whole(InMemory(damaged if scale is None else damaged | {"a.scale": scale}))


def test_a_control_of_eight_bits_steers_as_before(tmp_path: Path) -> None:
    file, picture = written(tmp_path), Image.linear_gradient("L")
    assert main([str(file), str(tmp_path / "small"), "--to", "native", "--dtype", "int8"]) == 0
    pipe = Pipeline.from_config([DEBUG], device="cpu")

    def drawn(control: Path) -> torch.Tensor:
        return pipe("a", seed=1, controls=[{"control": control, "image": picture}]).latents

    plain, whole, small = pipe("a", seed=1).latents, drawn(file), drawn(tmp_path / "small")
    assert 0 < (small - whole).norm() < 0.03 * (whole - plain).norm()
    assert read_info(tmp_path / "small") == read_info(file)


def test_tables_of_a_control_are_not_rounded(tmp_path: Path) -> None:
    experiment = load([DEBUG])
    network = build_engine(experiment, device="cpu", dtype=torch.float32).network
    control, info = read(written(tmp_path), BaseModel(network, experiment.model))
    tables = {name: t for name, t in control.named_buffers() if name in control.state_dict()}
    assert tables, "a ControlNet has a table of positions"
    for dtype in (torch.int8, torch.bfloat16):
        write(tmp_path / "b.safetensors", control.state_dict(), info, dtype, {*tables})
        with safe_open(tmp_path / "b.safetensors", "pt") as opened:
            assert all(torch.equal(opened.get_tensor(name), t) for name, t in tables.items())
    main([str(tmp_path / "edges.safetensors"), str(tmp_path / "out"), "--to", "native", "--dtype", "int8"])
    with safe_open(tmp_path / "out/control.safetensors", "pt") as opened:
        assert all(torch.equal(opened.get_tensor(name), t) for name, t in tables.items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_control_in_the_types_it_had_has_the_same_bits(tmp_path: Path, dtype: str) -> None:
    file = ROOT / "checkpoints/tiny_control/edges.safetensors"
    assert main([str(file), str(tmp_path / "one"), "--to", "native", "--dtype", dtype]) == 0
    assert main([str(tmp_path / "one"), str(tmp_path / "two"), "--to", "native"]) == 0
    first, again = (load_file(tmp_path / name / "control.safetensors") for name in ("one", "two"))
    assert first.keys() == again.keys()
    assert all(t.dtype == again[name].dtype and torch.equal(t, again[name]) for name, t in first.items())
    assert read_info(tmp_path / "one") == read_info(tmp_path / "two")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "peft"], "written --to native or diffusers, not peft"),
        (["--to", "native", "--model", "checkpoints/tiny"], "--model is for one written --to diffusers"),
        (["--to", "native", "--text", "x"], "leave out --text"),
        (["--to", "native", "--only", "model"], "leave out --only"),
        (["--to", "native", "--merge-lora", "x"], "leave out --merge-lora"),
        (
            ["--to", "diffusers", "--model", "checkpoints/tiny", "--dtype", "int8"],
            "int8 is for a",
        ),
    ],
)
def test_what_a_control_has_no_use_for_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(written(tmp_path)), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e6, "fp16", r"1 tensors hold values beyond the range of float16 .*'zeros.0.bias' \(1e\+06\)"),
        (math.nan, "int8", "'zeros.0.bias' holds values that are not finite"),
        (math.inf, "bf16", "'zeros.0.bias' holds values that are not finite"),
    ],
)
def test_values_that_a_type_cannot_hold_are_refused(
    value: float, dtype: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path)
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    tensors["zeros.0.bias"][0] = value
    write(file, tensors, read_info(file))
    assert main([str(file), str(tmp_path / "out"), "--to", "native", "--dtype", dtype]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_written_as_integers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ROOT / "checkpoints/tiny"), str(tmp_path / "out"), "--to", "native", "--dtype", "int8"]
    assert main(words) == 2
    assert "read as integers by memory.quantize.network=int8" in capsys.readouterr().err
