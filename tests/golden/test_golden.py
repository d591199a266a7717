"""Stored outputs of the official code, and the command that compares with them.

The files are outputs of THUDM/CogView3 (``sat/``) in float32 on small random models; ``check.py`` says how
they are read.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden.check import ROOT, check_file, main
from tests.golden.report import Report

DATA = Path(__file__).parent / "data"
FILES = sorted(DATA.glob("*.safetensors"))
Change = Callable[[dict[str, Tensor]], None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_official_outputs_are_reproduced(path: Path) -> None:
    report = check_file(path, echo=False)
    assert report.passed, "\n".join(map(str, report.lines))
    stored = {name for name in load_file(path) if name.startswith(("mid.", "out."))}
    assert stored <= report.names(), f"not compared: {stored - report.names()}"


def changed(path: Path, folder: Path, change: Change, metadata: dict[str, str] | None = None) -> Path:
    """A copy of a golden file after ``change`` to its tensors and additions to its metadata."""
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, "pt") as opened:
        texts = {**(opened.metadata() or {}), **(metadata or {})}
    copy = folder / path.name
    save_file(tensors, copy, texts)
    return copy


def scaled(name: str, factor: float) -> Change:
    """Multiply one tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name] * factor

    return change


@pytest.mark.parametrize(
    ("stem", "name", "factor"),
    [
        ("dit_plus_square", "out.output", 1 + 3e-4),
        ("dit_plus_square", "w.transformer.layers.1.mlp.dense_h_to_4h.bias", 1.1),
        ("vae16", "out.decode_z", 1 + 3e-4),
        ("conditioner", "out.c.crossattn", 1 + 3e-4),
        ("sampler_zerosnr_ddim_10", "in.noise", 1 + 1e-2),
        ("loss_zerosnr", "out.loss_per_sample", 1 + 3e-4),
        ("tables_discretization", "out.zerosnr_shift4.alpha_sqrt_append0.n50", 1 + 3e-6),
        ("embeddings", "out.timestep_embedding.dim320", 1 + 3e-6),
    ],
)
def test_a_difference_past_the_bound_is_found(stem: str, name: str, factor: float, tmp_path: Path) -> None:
    path = changed(DATA / f"{stem}.safetensors", tmp_path, scaled(name, factor))
    assert main([str(path)]) == 1


def test_nan_agrees_with_nan_only(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["out.x"][0, 0, 0, 0] = float("nan")

    assert main([str(changed(DATA / "sampler_zerosnr_ddim_10.safetensors", tmp_path, spoil))]) == 1


def test_a_tensor_nothing_compares_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["out.something_new"] = torch.zeros(2)

    assert main([str(changed(DATA / "tables_discretization.safetensors", tmp_path, add))]) == 1
    assert "out.something_new" in capsys.readouterr().out


def test_a_wrong_shape_is_a_failure() -> None:
    report = Report("file", echo=False)
    report.network("out.x", torch.zeros(2, 3), torch.zeros(2, 4))
    assert not report.passed and "shape (2, 3), stored (2, 4)" in report.lines[0].note


def test_other_schedules_than_the_stored_one_are_computed_from_the_names(tmp_path: Path) -> None:
    """A table under a name with other numbers must not pass with the old values."""

    def rename(tensors: dict[str, Tensor]) -> None:
        name = "out.zerosnr_shift4.alpha_sqrt_append0.n50"
        tensors[name.replace("shift4", "shift3")] = tensors.pop(name)

    assert main([str(changed(DATA / "tables_discretization.safetensors", tmp_path, rename))]) == 1


def test_another_guidance_scale_is_read_from_the_file(tmp_path: Path) -> None:
    path = changed(
        DATA / "sampler_zerosnr_ddim_10.safetensors", tmp_path, lambda tensors: None, {"cfg_scale": "4"}
    )
    assert main([str(path)]) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unet_base.safetensors", "kind not supported yet; supported names begin with dit_"),
        ("sampler_heun_edm_10.safetensors", "kind not supported yet"),
        ("dit_missing.safetensors", "not a readable safetensors file"),
    ],
)
def test_what_cannot_be_checked_is_said(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert message in capsys.readouterr().out


def test_the_command_runs_from_anywhere_and_prints_a_line_a_check(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/golden/check.py"), str(DATA / "loss_zerosnr.safetensors")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and all(
        line.startswith("ok ") and "abs" in line and "rel" in line for line in lines
    )
