"""adaLN: shift, scale and gate of every branch from time and size, separate for text and image."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn

from sat.mixin import Mixin, replaces
from sat.transformer.hooks import Context, LayerModulation, Modulation, TransformerHooks


class AdaLN(Mixin):
    """(B, E) -> modulation of both branches of a layer, (B, 2, D) each: row 0 for text, row 1 for the image.

    The 12 D outputs of a layer's projection are (shift, scale, gate) of attention and of the MLP for the
    *image*, then the same six for the *text*, although text comes first in the sequence (official
    ``dit.py:284-297``). ``by_part``: image and text side by side for each of the six, as CogView4 has them.
    """

    host = TransformerHooks

    def __init__(self, dim: int, emb_dim: int, depth: int, by_part: bool = False) -> None:
        super().__init__()
        self._order = "(part stream d)" if by_part else "(stream part d)"
        self.layers = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, 12 * dim)) for _ in range(depth)
        )

    @replaces("modulate")
    def modulate(self, ctx: Context, layer: int) -> LayerModulation | None:
        assert ctx.emb is not None, "adaLN needs the time and size embedding"
        out = self.layers[layer](ctx.emb)  # (B, 12 D)
        image, text = rearrange(out, f"b {self._order} -> stream part b d", stream=2, part=6)
        parts = torch.stack([text, image], 2)  # (6, B, 2, D)
        return Modulation(*parts[:3]), Modulation(*parts[3:])
