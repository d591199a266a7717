"""Stored outputs of the official code, and the command that compares with them.

The files are outputs of THUDM/CogView3 (``sat/``) in float32 on small random models; ``check.py`` says how
they are read.
"""

from __future__ import annotations

import json
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
        ("unet_base", "out.output", 1 + 3e-4),
        ("unet_base", "mid.output_block4_mean_abs", 1 + 3e-4),
        ("unet_base", "w.middle_block.1.transformer_blocks.0.attn2.to_v.weight", 1.1),
        ("vae16", "out.decode_z", 1 + 3e-4),
        ("vae4", "out.sample", 1 + 3e-4),
        ("vae4", "in.posterior_noise", 1.1),
        ("conditioner", "out.c.crossattn", 1 + 3e-4),
        ("sampler_zerosnr_ddim_10", "in.noise", 1 + 1e-2),
        ("sampler_euler_edm_10", "in.noise", 1 + 1e-2),
        ("sampler_euler_edm_10", "mid.denoiser_sigma", 1 + 3e-6),
        ("sampler_euler_edm_distill_4", "mid.network_kw.scale_emb", 1 + 3e-3),
        ("sampler_heun_edm_10", "mid.x_after_step", 1 + 3e-4),
        ("sampler_dpmpp2m_10", "mid.denoised_before_guider", 1 + 3e-4),
        ("sampler_relay_12of24", "in.image", 1 + 1e-2),
        ("loss_zerosnr", "out.loss_per_sample", 1 + 3e-4),
        ("loss_standard_eps", "in.rng1.randn_like", 1 + 1e-2),
        ("loss_relay_linear", "in.lr_input", 1 + 1e-2),
        ("loss_relay_linear", "in.rng3.randn", 2.0),
        ("tables_discretization", "out.zerosnr_shift4.alpha_sqrt_append0.n50", 1 + 3e-6),
        ("embeddings", "out.timestep_embedding.dim320", 1 + 3e-3),
        ("embeddings", "out.pos_embed_sincos.dim80.h24.w32", 1 + 3e-6),
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


@pytest.mark.parametrize(
    ("stem", "entry", "value"),
    [
        ("sampler_zerosnr_ddim_10", "cfg_scale", "4"),
        ("sampler_euler_edm_distill_4", "cfg_cond_scale", "7"),
        ("sampler_euler_edm_10", "num_steps", "11"),
        ("sampler_heun_edm_10", "sampler", "EulerEDMSampler"),
        ("sampler_relay_12of24", "partial_num_steps", "11"),
        ("loss_relay_linear", "offset_noise_level", "0.1"),
        ("loss_relay_linear", "partial_num_steps", "400"),
        ("loss_relay_linear", "blurring_schedule", "exp"),
    ],
)
def test_what_the_metadata_says_is_what_is_run(stem: str, entry: str, value: str, tmp_path: Path) -> None:
    path = changed(DATA / f"{stem}.safetensors", tmp_path, lambda tensors: None, {entry: value})
    assert main([str(path)]) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lpips.safetensors", "kind not supported yet; supported names begin with dit_, unet_"),
        ("dit_missing.safetensors", "not a readable safetensors file"),
    ],
)
def test_what_cannot_be_checked_is_said(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert message in capsys.readouterr().out


def without(*names: str) -> Change:
    """Take tensors out."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    ("stem", "change", "metadata", "message"),
    [
        ("sampler_euler_edm_10", without(), {"sampler": "MadeUp"}, "sampler 'MadeUp' is not supported"),
        ("sampler_euler_edm_10", without(), {"s_churn": "2"}, "more noise than in.randn_like_draws holds"),
        ("sampler_euler_edm_10", without(), {"num_steps": "many"}, "no number 'num_steps', but 'many'"),
        ("sampler_relay_12of24", without("in.image"), {}, "relay needs one latent, in.image*, in.lr*"),
        ("loss_relay_linear", without("in.lr_input"), {}, "a relay loss needs in.lr_input"),
        (
            "loss_relay_linear",
            without(),
            {"blurring_schedule": "x"},
            "blurring_schedule 'x' is not supported",
        ),
        ("loss_zerosnr", without(), {"type": "lpips"}, "'lpips' of a loss is not supported: VGG takes three"),
        ("loss_zerosnr", without(), {"loss_type": "l2"}, "metadata that is not understood: loss_type"),
        ("loss_zerosnr", without(), {"config": '{"type": "l2", "power": 3}'}, "not understood: config.power"),
        ("sampler_dpmpp2m_10", without(), {"s_tail": "2"}, "metadata that is not understood: s_tail"),
        ("loss_standard_eps", without(), {"rng_calls": '["randn_like"]'}, "lack randint"),
        ("unet_base", without("in.y"), {}, "has no tensor 'in.y'"),
    ],
)
def test_what_a_kind_lacks_is_said(
    stem: str,
    change: Change,
    metadata: dict[str, str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(changed(DATA / f"{stem}.safetensors", tmp_path, change, metadata))]) == 2
    assert message in capsys.readouterr().out


def test_stored_guidance_features_reach_the_unet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zero weights: the output is that of the network without; others: it is not."""
    with safe_open(DATA / "unet_base.safetensors", "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    metadata = {"config": json.dumps({**config, "cfg_cond_embed_dim": 24})}

    def told(share: float, width: int = 24) -> Change:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors["w.w_proj.weight"] = share * torch.ones(32, 24)
            tensors["in.scale_emb"] = torch.linspace(-1, 2, 2 * width).reshape(2, width)

        return change

    path = DATA / "unet_base.safetensors"
    assert main([str(changed(path, tmp_path, told(0.0), metadata))]) == 0
    assert main([str(changed(path, tmp_path, told(0.1), metadata))]) == 1
    assert main([str(changed(path, tmp_path, told(0.1, 30), metadata))]) == 2
    assert "in.scale_emb is 30 wide, w_proj 24" in capsys.readouterr().out


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
