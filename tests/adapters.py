"""Adapters on small models, for tests: random factors, nothing left at zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from sat.adapters.factors import LayerFactors, LinearLike, Pair, initial_factors, row_norms
from sat.adapters.files import Adapter, AdapterInfo
from sat.adapters.lora import attach
from sat.adapters.names import choose
from sat.conditioning.conditioner import Condition
from sat.models.cogview3_unet import CogView3UNet
from sat.models.t5 import T5Encoder
from tests.small import fill

RANK, ALPHA = 4, 6.0
"""Of MLPs the rank is 2 and alpha 5: no two alike, so that a scale that is forgotten shows."""
EVERYTHING = ("attention", "mlp", "adaln")


def unet() -> CogView3UNet:
    """Two levels, transformers in the lower one with cross-attention to 7 tokens of 16."""
    model = CogView3UNet(
        channels=4, width=16, multipliers=[1, 2], blocks=1, attention=[2], depths=[1, 1], head_dim=8,
        text_dim=16, text_len=7, size_dim=48, groups=4,
    )  # fmt: skip
    fill(model, std=0.1)
    return model.eval()


def t5() -> T5Encoder:
    """Two layers of width 24."""
    model = T5Encoder(dim=24, heads=3, head_dim=8, mlp_dim=40, depth=2, vocab=50, buckets=8, max_distance=16)
    fill(model, std=0.2)
    return model.eval()


def output(model: nn.Module, text_dim: int = 16) -> Tensor:
    """What the network makes of fixed inputs, in the type of its weights."""
    dtype = next(model.parameters()).dtype
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if isinstance(model, T5Encoder):
            return cast(Tensor, model(torch.randint(0, 50, (2, 9), generator=g)))
        text = torch.randn(2, 7, text_dim, generator=g).to(dtype)
        cond = Condition(text, torch.randn(2, 48, generator=g).to(dtype))
        x = torch.randn(2, 4, 12, 20, generator=g).to(dtype)
        return cast(Tensor, model(x, torch.tensor([5.0, 900.0]), model.prepare(cond, (12, 20))))  # type: ignore[operator]


def start(
    model: nn.Module,
    targets: Sequence[str] = EVERYTHING,
    *,
    part: str = "model",
    dora: bool = False,
    lokr: int | None = None,
) -> dict[str, LayerFactors]:
    """Fresh layers of ``model`` by name: they change nothing yet."""
    chosen = choose({part: model}, targets, RANK, {})
    layers = {}
    for full, (linear, rank) in chosen.items():
        name = full.removeprefix(f"{part}.")
        rank, alpha = (2, 5.0) if ".mlp." in name else (rank, ALPHA)
        base = cast(LinearLike, model.get_submodule(name))
        norms = row_norms(base.weight.detach()) if dora else None
        layers[name] = initial_factors(base, [rank] * linear.parts, [alpha] * linear.parts, name, norms, lokr)
    return layers


def noisy(layers: dict[str, LayerFactors], std: float = 0.1, seed: int = 0) -> dict[str, LayerFactors]:
    """The same with random ``up`` and magnitudes: as if trained."""
    g = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return (std * torch.randn(like.shape, generator=g, dtype=torch.float64)).to(like.dtype)

    return {
        name: LayerFactors(
            tuple(
                p and replace(p.kron, w1=p.kron.w1 + noise(p.kron.w1)).pair(p.scale)
                if p is not None and p.kron is not None
                else p and Pair(p.down, p.up + noise(p.up), p.alpha)
                for p in layer.parts
            ),
            None if layer.magnitude is None else layer.magnitude * (1 + noise(layer.magnitude)),
        )
        for name, layer in layers.items()
    }


def about(dora: bool = False) -> AdapterInfo:
    return AdapterInfo(RANK, ALPHA, EVERYTHING, dora)


def adapter(layers: dict[str, LayerFactors], part: str = "model") -> Adapter:
    """``layers`` as a read adapter."""
    dora = any(layer.magnitude is not None for layer in layers.values())
    return Adapter({f"{part}.{name}": layer for name, layer in layers.items()}, about(dora), "native", "test")


def trained(
    model: nn.Module,
    targets: Sequence[str] = EVERYTHING,
    *,
    part: str = "model",
    dora: bool = False,
    lokr: int | None = None,
) -> dict[str, LayerFactors]:
    """Random layers, attached to ``model`` under the name ``style``."""
    layers = noisy(start(model, targets, part=part, dora=dora))
    attach(model, "style", layers)
    return layers
