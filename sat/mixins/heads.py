"""The head of a network: the way from tokens back to latents."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from sat.mixin import Mixin, replaces
from sat.transformer.hooks import Context, TransformerHooks
from sat.transformer.transformer import LayerNorm


class FinalLayer(Mixin):
    """Image tokens (B, N, D) -> (B, C, h, w): modulated norm, projection, and patches back in their places.

    ``double_norm`` normalises twice (eps 1e-5, then 1e-6) as the original does through its transformer's own
    final norm; diffusers normalises once, with ``eps``. Both norms have no parameters. The adaLN rows are
    (shift, scale). Source: official ``dit.py:217``, reference notes on eps in ``docs/parity.md``.
    """

    host = TransformerHooks

    def __init__(
        self, dim: int, emb_dim: int, patch: int, channels: int, double_norm: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.patch = patch
        self.first_norm = LayerNorm(dim, 1e-5) if double_norm else nn.Identity()
        self.norm = LayerNorm(dim, eps)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, 2 * dim))
        self.linear = nn.Linear(dim, channels * patch**2)

    @replaces("final")
    def final(self, x: Tensor, ctx: Context) -> Tensor:
        shift, scale = self.adaln(ctx.emb)[:, None].chunk(2, -1)  # (B or 1, 1, D)
        x = self.norm(self.first_norm(x))
        x = torch.addcmul(shift.to(x.dtype), x, 1 + scale.to(x.dtype))  # x * (1 + scale) + shift
        x = self.linear(x.to(self.linear.weight.dtype))  # (B, N, C patch^2)
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=ctx.grid.h, p=self.patch, q=self.patch)
