"""Loss files of the kinds that no stored file covers, from the formulas of arXiv:2403.05121, section 3.3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.golden.check import check_file

DATA = Path(__file__).parent / "data"


def written(folder: Path, blend: str | None, offset: float, kind: str = "l2") -> Path:
    """A loss file over the official toy network: relay with ``blend``, or the plain eps loss with None."""
    source = DATA / "loss_relay_linear.safetensors"
    stored = {name: t for name, t in load_file(source).items() if name.startswith("in.")}
    with safe_open(source, "pt") as opened:
        metadata = {**opened.metadata(), "offset_noise_level": json.dumps(offset), "type": kind}
    table = load_file(DATA / "tables_discretization.safetensors")["out.denoiser_table.eps_legacy"].double()
    index, x0, low = stored["in.rng0.randint"], stored["in.input"].double(), stored["in.lr_input"].double()
    sigma = table[index][:, None, None, None]
    t = index.double()[:, None, None, None]
    if blend is None:
        share = torch.zeros_like(t)
        del stored["in.lr_input"], metadata["blurring_schedule"]
    elif blend == "exp":
        arc = torch.sin((t + 1) / 500 * torch.pi / 2)
        share = torch.expm1(-(arc**4)) / torch.expm1(torch.tensor(-1.0).double())
    else:
        share = sigma / table[500]
    noise = (
        stored["in.rng2.randn_like"].double() + offset * stored["in.rng3.randn"].double()[:, None, None, None]
    )
    noised = x0 + share * (low - x0) + sigma * noise
    add = 0.7 * stored["in.cond.crossattn"].mean((1, 2)) + 0.2 * stored["in.cond.vector"].mean(1)
    out = torch.tanh(0.9 * noised / (1 + sigma**2).sqrt() + 0.5 * t / 1000 + add[:, None, None, None])
    image = noised - sigma * out
    stored |= {
        "mid.noised_input": noised.float(),
        "mid.model_output": image.float(),
        "out.loss_per_sample": (((image - x0).abs() ** (1 if kind == "l1" else 2)) / sigma**2)
        .mean((1, 2, 3))
        .float(),
    }
    if blend:
        metadata["blurring_schedule"] = blend
    path = folder / f"loss_{f'relay_{blend}_patched' if blend else 'standard_eps_offset'}.safetensors"
    save_file(stored, path, metadata)
    return path


@pytest.mark.parametrize(
    ("blend", "offset", "kind"),
    [("exp", 0.0, "l2"), ("exp", 0.05, "l2"), ("sigma", 0.05, "l1"), (None, 0.1, "l2"), (None, 0.0, "l1")],
)
def test_other_losses_are_checked_by_their_formula(
    blend: str | None, offset: float, kind: str, tmp_path: Path
) -> None:
    report = check_file(written(tmp_path, blend, offset, kind), echo=False)
    assert report.passed, "\n".join(map(str, report.lines))
    assert "out.loss_per_sample" in report.names()


def test_a_file_of_another_type_fails(tmp_path: Path) -> None:
    path = written(tmp_path, None, 0.0, "l1")
    with safe_open(path, "pt") as opened:
        metadata = {**opened.metadata(), "type": "l2"}
    save_file(load_file(path), path, metadata)
    assert not check_file(path, echo=False).passed
