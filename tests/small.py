"""Small models and inputs that tests share: never square, no two sizes equal, nothing left at zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sat.conditioning.conditioner import Condition
from sat.mixin import Mixin
from sat.models.cogview3_plus import CogView3Plus
from sat.models.cogview4 import CogView4


def fill(module: nn.Module, std: float = 0.3, seed: int = 0) -> None:
    """Noise into every parameter: zero-initialised layers hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def plus(mixins: Mapping[str, Mixin] | None = None, *, double_norm: bool = True) -> CogView3Plus:
    """Width 32, 4 heads of 8, 2 layers, 4 latent channels, patches of 2, 7 tokens of 16, size vector 48."""
    model = CogView3Plus(
        dim=32, heads=4, depth=2, channels=4, patch=2, text_dim=16, text_len=7, emb_dim=24, size_dim=48,
        table_size=(9, 11), double_norm=double_norm, mixins=mixins,
    )  # fmt: skip
    fill(model)
    return model.eval()


def cogview4() -> CogView4:
    """The same sizes with rotary positions, for text of any length."""
    model = CogView4(
        dim=32, heads=4, depth=2, channels=4, text_dim=16, emb_dim=24, size_dim=48, rope_size=(16, 16)
    )
    fill(model)
    return model.eval()


def condition(batch: int = 2, *, dtype: torch.dtype = torch.float32, one_size: bool = False) -> Condition:
    """Text (batch, 7, 16) and size vectors (batch, 48)."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(batch, 7, 16, generator=generator, dtype=torch.float64).to(dtype)
    vector = torch.randn(1 if one_size else batch, 48, generator=generator, dtype=torch.float64).to(dtype)
    return Condition(text, vector.expand(batch, -1))
