"""A convolutional feature map as tokens, one a cell, and back onto the map."""

from __future__ import annotations

from torch import Tensor, nn

from sat.mixin import Mixin, replaces
from sat.transformer.context import Context
from sat.transformer.hooks import TransformerHooks

EPS = 1e-6
"""Of the group norm in front of a transformer; the UNet's other norms use 1e-5.

Source: official ``attention.py``.
"""


class FeatureMap(Mixin):
    """``ctx.image`` (B, C, h, w), normalised and projected, as tokens (B, h w, D); back, added to the map."""

    host = TransformerHooks

    def __init__(self, channels: int, dim: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.enter = nn.Linear(channels, dim)
        self.leave = nn.Linear(dim, channels)

    @replaces("embed")
    def embed(self, ctx: Context) -> Tensor:
        assert ctx.image is not None, "the caller gives the map"
        out: Tensor = self.enter(self.norm(ctx.image).flatten(2).transpose(1, 2))
        return out

    @replaces("final")
    def final(self, x: Tensor, ctx: Context) -> Tensor:
        assert ctx.image is not None, "the caller gives the map"
        cells = self.leave(x.to(self.leave.weight.dtype)).transpose(1, 2)
        out: Tensor = cells.reshape(ctx.image.shape) + ctx.image
        return out
