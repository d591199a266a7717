"""The head of a text encoder: one last norm."""

from __future__ import annotations

from torch import Tensor

from sat.mixin import Mixin, replaces
from sat.transformer.block import RMSNorm
from sat.transformer.context import Context
from sat.transformer.hooks import TransformerHooks


class FinalNorm(Mixin):
    """RMS norm of every token, (B, L, D) -> (B, L, D) in the type of the weights."""

    host = TransformerHooks

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps)

    @replaces("final")
    def final(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, L, D), normalised."""
        out: Tensor = self.norm(x)
        return out
