"""What one batch of images is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Encoded text and size vector of B images."""

    text: Tensor  # (B, T, C_text)
    vector: Tensor  # (B, V)
    text_mask: Tensor | None = None  # (B, T) true = real token; None = all attended, as officially

    def __len__(self) -> int:
        return self.text.shape[0]

    def null(self) -> Condition:
        """The unconditional counterpart: text zeros, sizes kept (official ``force_uc_zero_embeddings``)."""
        return Condition(torch.zeros_like(self.text), self.vector, self.text_mask)

    def dropped(self, drop: Tensor) -> Condition:
        """Text of the rows where ``drop`` (B,) is true replaced by zeros."""
        return Condition(self.text.masked_fill(drop[:, None, None], 0), self.vector, self.text_mask)

    def rows(self, index: slice) -> Condition:
        """A part of the batch."""
        mask = None if self.text_mask is None else self.text_mask[index]
        return Condition(self.text[index], self.vector[index], mask)

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Batches one after the other; a mask is kept only if every part has one."""
        masks = [p.text_mask for p in parts if p.text_mask is not None]
        if masks and len(masks) != len(parts):
            raise ValueError("either every condition has a text mask or none has")
        return Condition(
            torch.cat([p.text for p in parts]),
            torch.cat([p.vector for p in parts]),
            torch.cat(masks) if masks else None,
        )
