"""The official position embedding of CogView3-Plus: a fixed 2-D sine-cosine table."""

from __future__ import annotations

import torch
from torch import Tensor

from sat.mixin import Mixin, replaces
from sat.transformer.hooks import Context, TransformerHooks


def sincos_table(height: int, width: int, dim: int) -> Tensor:
    """(height, width, dim) float32: the first half of the channels encodes the *column*, the second the row.

    Each half is [sin | cos] at frequencies 10000^(-k / (dim / 4)). Source: official ``dit.py:95-113``, where
    the width comes first.
    """
    if dim % 4:
        raise ValueError(f"a sine-cosine position table needs a width that is a multiple of 4, got {dim}")
    quarter = dim // 4
    freqs = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(n: int) -> Tensor:
        angles = torch.outer(torch.arange(n, dtype=torch.float64), freqs)
        return torch.cat([angles.sin(), angles.cos()], 1)

    columns = axis(width)[None].expand(height, -1, -1)
    rows = axis(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], 2).float()


class SinCos2D(Mixin):
    """Adds the top-left (grid.h, grid.w) corner of a (height, width, D) table to the image tokens.

    The table is a buffer that checkpoints carry (the official file holds one; it is used when it is there).
    ``height`` and ``width`` count patches; a larger grid is refused.
    """

    host = TransformerHooks
    table: Tensor

    def __init__(self, dim: int, height: int, width: int) -> None:
        super().__init__()
        self.size = (height, width)
        # On the meta device nothing is computed: arithmetic there first imports sympy, for seconds.
        empty = torch.get_default_device().type == "meta"
        self.register_buffer(
            "table", torch.empty(height, width, dim) if empty else sincos_table(height, width, dim)
        )

    def computed(self) -> dict[str, Tensor]:
        """Values of the buffers a checkpoint may leave out, by local name."""
        return {"table": sincos_table(*self.size, self.table.shape[2])}

    @replaces("position")
    def position(self, ctx: Context) -> Tensor | None:
        h, w = ctx.grid
        if h > self.size[0] or w > self.size[1]:
            raise ValueError(
                f"{h} x {w} patches do not fit the {self.size[0]} x {self.size[1]} position table"
            )
        like = self.table if ctx.tokens is None else ctx.tokens
        return self.table[:h, :w].to(like.dtype).reshape(1, h * w, -1)  # (1, N, D); cast first, one copy
