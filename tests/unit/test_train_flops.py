"""Model FLOP use: what is counted, what is recomputed only, and the peaks that are known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sat.data.batch import collate
from sat.train.log import Meter, peak_flops
from tests.training import CONFIG, _sample


def counted(*, recompute: bool, times: int = 1) -> Meter:
    """A meter after ``times`` forward and backward passes of two linears on the batch."""
    meter = Meter(peak=1e3)
    layers = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    batch = collate([_sample(place) for place in range(3)])
    assert batch.latent_moments is not None
    for _ in range(times):
        with meter.micro(batch):
            x = batch.latent_moments.flatten(1).requires_grad_()
            y = checkpoint(layers, x, use_reentrant=False) if recompute else layers(x)
            y.sum().backward()
    return meter


FORWARD = 2 * 3 * (8 * 16 + 16 * 4)
"""Two for each multiplication and addition."""


@pytest.mark.parametrize("recompute", (False, True))
def test_a_pass_is_three_products_a_weight_and_what_is_recomputed_is_not_counted(recompute: bool) -> None:
    assert counted(recompute=recompute).take(seconds=2.0) == pytest.approx(3 * FORWARD / 2.0 / 1e3)


def test_a_known_shape_is_not_counted_again_but_summed() -> None:
    meter = counted(recompute=False, times=4)
    assert meter.take(1.0) == pytest.approx(4 * 3 * FORWARD / 1e3)
    assert meter.take(1.0) == 0


@pytest.mark.parametrize(("name", "values", "peak"), [
    ("NVIDIA H100 80GB HBM3", {"dtype": "bf16", "zero": 1}, 989e12),
    ("NVIDIA A100-SXM4-80GB", {"autocast": "bf16"}, 312e12),
    ("NVIDIA L40", {"autocast": "bf16"}, 181e12),
    ("NVIDIA H100 80GB HBM3", {}, None),  # float32 products depend on what else is set
    ("an unknown one", {"autocast": "bf16"}, None),
    ("", {"peak_tflops": 0.5}, 0.5e12),
    ("", {"autocast": "bf16"}, None),  # a CPU
])  # fmt: skip
def test_peaks_are_known_or_given_and_never_guessed(
    name: str, values: dict[str, Any], peak: float | None
) -> None:
    runtime: Any = SimpleNamespace(device_name=name)
    assert peak_flops(replace(CONFIG, **values), runtime) == peak


def test_counting_changes_nothing() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    plain = torch.autograd.grad(layer(x).sum(), layer.weight)[0]
    with Meter(1.0).micro(collate([_sample(0)])):
        watched = torch.autograd.grad(layer(x).sum(), layer.weight)[0]
    assert torch.equal(plain, watched)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0), ("NVIDIA GeForce RTX 4090", 165.2), ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA RTX A1000", None), ("", None),
    ],
)  # fmt: skip
def test_a_devices_peak_is_found_by_whole_words(name: str, peak: float | None) -> None:
    found = peak_flops(replace(CONFIG, dtype="bf16", zero=1), SimpleNamespace(device_name=name))
    assert found == (None if peak is None else peak * 1e12)
