"""RoPE: 2-D rotary position embedding over the patch grid, image tokens only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sat.mixin import Mixin, replaces, wraps
from sat.transformer.hooks import Context, Grid, Prepare, TransformerHooks


def rotary_angles(
    grid: Grid, head_dim: int, *, base: Grid, theta: float = 10000.0, device: torch.device | None = None
) -> Tensor:
    """(N, d) float32 angles: the first half of the pairs turns with the row, the second with the column.

    They are made on ``device``: a copy to it would wait for what runs there, at each training step.
    Positions are scaled to the ``base`` grid (``row * base.h / grid.h``, rounded down), so that every size
    spans the positions seen in training. The angle of pair k is shared by channels k and k + d / 2. Source:
    CogView4 as published in diffusers (checked in ``tests/parity/test_cogview3_plus.py``).
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary embedding needs a head size that is a multiple of 4, got {head_dim}")
    half = head_dim // 2
    freqs = theta ** (-torch.arange(0, half, 2, dtype=torch.float32, device=device)[: half // 2] / half)
    rows = torch.arange(grid.h, device=device) * base.h // grid.h
    columns = torch.arange(grid.w, device=device) * base.w // grid.w
    by_row = torch.outer(rows.float(), freqs)[:, None].expand(-1, grid.w, -1)
    by_column = torch.outer(columns.float(), freqs)[None].expand(grid.h, -1, -1)
    angles = torch.cat([by_row, by_column], 2).reshape(grid.h * grid.w, half)
    return torch.cat([angles, angles], 1)


class RoPE(Mixin):
    """Rotates q and k of the image tokens, the last N of the sequence; those before are left as they are.

    ``height`` and ``width`` are the patch grid that every size is scaled to. Angles are float32.
    Source: RoFormer, arXiv:2104.09864, in two dimensions as in CogView4.
    """

    host = TransformerHooks

    def __init__(self, head_dim: int, height: int, width: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = Grid(height, width)
        self.theta = theta

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        ctx = inner(ctx)
        assert ctx.tokens is not None, "rotary embedding follows the patch embedding"
        angles = rotary_angles(  # (N, d)
            ctx.grid, self.head_dim, base=self.base, theta=self.theta, device=ctx.tokens.device
        )
        return replace(ctx, rotary=(angles.cos(), angles.sin()))

    @replaces("rotate_qk")
    def rotate_qk(self, q: Tensor, k: Tensor, ctx: Context, layer: int) -> tuple[Tensor, Tensor]:
        assert ctx.rotary is not None, "rotary tables are made in prepare"
        return _rotate(q, *ctx.rotary), _rotate(k, *ctx.rotary)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, L, d) with the last N tokens turned in float32: (a, b) -> (a cos - b sin, b cos + a sin).

    a and b are channels i and i + d / 2; ``cos`` and ``sin`` are (N, d).
    """
    rest, image = torch.split(x, [x.shape[2] - len(cos), len(cos)], 2)
    wide = image if image.dtype == torch.float64 else image.float()
    a, b = wide.chunk(2, -1)
    turned = wide * cos.to(wide.dtype) + torch.cat([-b, a], -1) * sin.to(wide.dtype)
    return torch.cat([rest, turned.to(x.dtype)], 2)
