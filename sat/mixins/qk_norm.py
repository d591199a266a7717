"""Layer norm of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from sat.mixin import Mixin, replaces
from sat.transformer.hooks import Context, TransformerHooks
from sat.transformer.transformer import LayerNorm


class QKNorm(Mixin):
    """Normalises q and k over each head's ``head_dim`` channels, without parameters; text and image alike."""

    host = TransformerHooks

    def __init__(self, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = LayerNorm(head_dim, eps)

    @replaces("norm_qk")
    def norm_qk(self, q: Tensor, k: Tensor, ctx: Context, layer: int) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():  # together they would be kept for the backward pass once more
            return self.norm(q), self.norm(k)
        q, k = self.norm(torch.stack([q, k]))
        return q, k
