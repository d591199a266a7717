"""Token ids become tokens: the input of a text encoder."""

from __future__ import annotations

from torch import Tensor, nn

from sat.mixin import Mixin, replaces
from sat.transformer.context import Context
from sat.transformer.hooks import TransformerHooks


class TokenEmbed(Mixin):
    """Looks ``ctx.ids`` (B, T) up in a (vocab, D) table -> (B, T, D)."""

    host = TransformerHooks

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, dim)

    @replaces("embed")
    def embed(self, ctx: Context) -> Tensor:
        """(B, T, D) tokens of the context's ids."""
        if ctx.ids is None:
            raise ValueError("a text encoder needs token ids: the context has no `ids`")
        tokens: Tensor = self.table(ctx.ids)
        return tokens
