"""Files of whole base and relay runs, written by the papers' formulas over our own parts.

No stored file covers these kinds: this proves how one is read, and the way from a picture to the sampler.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden.build import conditioner_config, engine
from tests.golden.check import check_file, main

DATA = Path(__file__).parent / "data"
SGM = "sgm.modules.diffusionmodules"
ENGINE = "model.diffusion_model."
TEXT = "conditioner.embedders.0.transformer."


def entry(name: str) -> Any:
    """The config of a stored file."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as opened:
        return json.loads(opened.metadata()["config"])


def weights() -> dict[str, Tensor]:
    """A UNet, the four-channel autoencoder and a text encoder, under the names of an engine checkpoint."""
    out = {}
    for name, tensor in load_file(DATA / "unet_base.safetensors").items():
        if name.startswith("w."):
            narrow = "attn2.to_k" in name or "attn2.to_v" in name  # the text encoder is 32 wide, not 40
            out[ENGINE + name[2:]] = tensor[:, :32].contiguous() if narrow else tensor
    for name, tensor in load_file(DATA / "vae4.safetensors").items():
        if name.startswith("w."):
            out[f"first_stage_model.{name[2:]}"] = tensor
    for name, tensor in load_file(DATA / "e2e_plus.safetensors").items():
        if name.startswith(f"w.{TEXT}"):
            out[name[2:]] = tensor
    return {name: tensor.float() for name, tensor in out.items()}


def config(relay: bool) -> dict[str, Any]:
    """The ``model`` section of the official base or relay config, in toy size."""
    levels = {"target": f"{SGM}.discretizer.LegacyDDPMDiscretization"}
    guider = {"target": f"{SGM}.guiders.VanillaCFG", "params": {"scale": 7.5}}
    steps = {"num_steps": 4, "discretization_config": levels, "guider_config": guider}
    name = "LinearRelayEDMSampler" if relay else "EulerEDMSampler"
    network = {**entry("unet_base"), "context_dim": 32}
    return {
        "scale_factor": 0.13025,
        **({"lr_scale": 2} if relay else {}),
        "denoiser_config": {
            "target": f"{SGM}.denoiser.DiscreteDenoiser",
            "params": {
                "num_idx": 1000,
                "scaling_config": {"target": f"{SGM}.denoiser_scaling.EpsScaling"},
                "discretization_config": levels,
            },
        },
        "network_config": {"target": f"{SGM}.openaimodel.UNetModel", "params": network},
        "conditioner_config": conditioner_config(16),
        "first_stage_config": entry("vae4"),
        "loss_fn_config": {"target": "torch.nn.Identity"},
        "sampler_config": {
            "target": f"{SGM}.sampling.{name}",
            "params": {**steps, "partial_num_steps": 2} if relay else steps,
        },
    }


def run(relay: bool) -> dict[str, Tensor]:
    """Inputs and results of a run of 64 x 96 pixels, two pictures."""
    torch.manual_seed(3)
    stored = {"in.noise": torch.randn(2, 4, 8, 12), "in.input_ids": torch.randint(0, 256, (2, 16))}
    whole, _ = engine(config(relay), weights())
    size = torch.tensor([[64, 96]] * 2)
    vector = whole.conditioner.size(size, torch.zeros_like(size), size)
    text = whole.conditioner.text(stored["in.input_ids"])
    rows = [torch.cat([torch.zeros_like(text), text]), torch.cat([vector, vector])]
    table = load_file(DATA / "tables_discretization.safetensors")["out.denoiser_table.eps_legacy"].double()
    times = [int(999 - 999 * i / 4) for i in range(4)][-2 if relay else 0 :]
    sigmas = [*(float(table[t]) for t in times), 0.0]
    low = torch.zeros_like(stored["in.noise"])
    x = stored["in.noise"] * math.sqrt(1 + sigmas[0] ** 2)
    if relay:
        stored["in.image"] = torch.rand(2, 3, 32, 48)
        stored["in.posterior_noise"] = torch.randn(2, 4, 8, 12)
        large = F.interpolate(stored["in.image"] * 2 - 1, size=(64, 96), mode="bilinear", align_corners=False)
        mean, logvar = whole.first_stage.quant(whole.first_stage.encoder(large)).chunk(2, 1)
        low = 0.13025 * (mean + torch.exp(logvar.clamp(-30, 20) / 2) * stored["in.posterior_noise"])
        x = low + sigmas[0] * stored["in.noise"]
        stored |= {"mid.lr_latent": low, "mid.image_upsampled": large}
    seen = []
    for i, t in enumerate(times):
        s, to, left = sigmas[i], sigmas[i + 1], len(times) - i
        eps = network(whole, torch.cat([x, x]) / math.sqrt(1 + s**2), t, rows)
        uncond, cond = (torch.cat([x, x]) - s * eps).chunk(2)
        image = uncond + 7.5 * (cond - uncond)
        beta = to / s * left / len(times) - (left - 1) / len(times) if relay else 0.0
        x = to / s * x + (1 - to / s + beta) * image - beta * low
        seen.append(x)
    decoded = whole.first_stage.decode(x / 0.13025)
    return {
        **stored,
        "mid.x_after_step": torch.stack(seen),
        "mid.network_t": torch.tensor(times)[:, None].expand(-1, 4).float().contiguous(),
        "out.latent": x,
        "out.image01": ((decoded + 1) / 2).clamp(0, 1),
    }


def network(whole: Any, x: Tensor, t: int, rows: list[Tensor]) -> Tensor:
    """The network's answer to a batch at one timestep."""
    from sat.conditioning.conditioner import Condition

    out: Tensor = whole.network(x, float(t), whole.network.prepare(Condition(*rows), (8, 12)))
    return out


def written(folder: Path, relay: bool) -> Path:
    """A golden file of a run."""
    with torch.inference_mode():
        tensors = run(relay) | {f"w.{name}": tensor for name, tensor in weights().items()}
    path = folder / f"e2e_{'relay' if relay else 'base'}.safetensors"
    metadata = {"config": json.dumps(config(relay)), "height": "64", "width": "96"}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("runs"), relay=False)


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("runs"), relay=True)


def changed(path: Path, folder: Path, drop: str = "", **factors: float) -> Path:
    """A copy without the tensor ``drop``, and with ``in_noise=1.1`` scaled."""
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    for name, factor in factors.items():
        tensors[name.replace("_", ".", 1)] *= factor
    save_file(tensors, folder / path.name, metadata)
    return folder / path.name


def test_whole_runs_are_reproduced(base: Path, relay: Path) -> None:
    for path in (base, relay):
        report = check_file(path, echo=False)
        assert report.passed, "\n".join(map(str, report.lines))
        assert {name for name in load_file(path) if name.startswith(("mid.", "out."))} <= report.names()


@pytest.mark.parametrize(("name", "factor"), [("in_noise", 1.01), ("out_image01", 1.01)])
def test_a_difference_in_a_base_run_is_found(base: Path, name: str, factor: float, tmp_path: Path) -> None:
    assert not check_file(changed(base, tmp_path, **{name: factor}), echo=False).passed


@pytest.mark.parametrize(
    ("name", "factor"), [("in_image", 0.9), ("in_posterior_noise", 0.5), ("mid_lr_latent", 1.001)]
)
def test_a_difference_in_a_relay_run_is_found(relay: Path, name: str, factor: float, tmp_path: Path) -> None:
    assert not check_file(changed(relay, tmp_path, **{name: factor}), echo=False).passed


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("in.image", "relay needs one input image (in.image, in.lr_image or in.low*, 32 x 48, 3 channels)"),
        ("in.posterior_noise", "expected one in.posterior_noise, found ['in.image', "),
        ("in.input_ids", "has no tensor 'in.input_ids'"),
    ],
)
def test_what_a_relay_run_lacks_is_said(
    relay: Path, drop: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(changed(relay, tmp_path, drop))]) == 2
    assert message in capsys.readouterr().out
