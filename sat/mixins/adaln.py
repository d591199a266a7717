"""adaLN: shift, scale and gate of every branch from the time and size embedding, apart for text and image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sat.mixin import Mixin, replaces
from sat.transformer.context import Context, LayerModulation, Modulation
from sat.transformer.hooks import TransformerHooks


class AdaLN(Mixin):
    """(B, E) -> modulation of both branches of a layer, (B, 2, D) each.

    The 12 D outputs of a layer's projection are (shift, scale, gate) of attention and of the MLP for the
    *image*, then the same six for the *text*, although text comes first in the sequence. Source: official
    ``dit.py:284-297``.
    """

    host = TransformerHooks
    text_alike = True

    def __init__(self, dim: int, emb_dim: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, 12 * dim)) for _ in range(depth)
        )

    @replaces("modulate")
    def modulate(self, ctx: Context, layer: int) -> LayerModulation | None:
        assert ctx.emb is not None, "adaLN needs the time and size embedding"
        rows = self.layers[layer](ctx.emb)
        image_first: Tensor = rows.unflatten(1, (2, 6, -1))
        parts = torch.stack([image_first[:, 1], image_first[:, 0]], 1).unbind(
            2
        )  # six of (B, 2, D), text row first
        return Modulation(*parts[:3]), Modulation(*parts[3:])
