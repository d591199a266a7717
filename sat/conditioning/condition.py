"""Conditions of one batch of images: encoded text, and the size vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from sat.embeddings import sinusoid


@dataclass(frozen=True)
class Condition:
    """Encoded text and size vector of B images."""

    text: Tensor  # (B, T, C_text)
    vector: Tensor  # (B, V)
    text_mask: Tensor | None = None  # (B, T) true = real token; None = all attended, as officially
    guidance: Tensor | None = None  # (B,) guidance strength as an input, for distilled networks

    def __len__(self) -> int:
        return self.text.shape[0]

    def null(self) -> Condition:
        """The unconditional counterpart: text zeros, sizes kept (official ``force_uc_zero_embeddings``)."""
        return replace(self, text=torch.zeros_like(self.text))

    def dropped(self, drop: Tensor) -> Condition:
        """Text of the rows where ``drop`` (B,) is true replaced by zeros."""
        return replace(self, text=self.text.masked_fill(drop[:, None, None], 0))

    def rows(self, index: slice) -> Condition:
        """A part of the batch."""
        mask = None if self.text_mask is None else self.text_mask[index]
        guidance = None if self.guidance is None else self.guidance[index]
        return Condition(self.text[index], self.vector[index], mask, guidance)

    def guided(self, strength: float | Tensor) -> Condition:
        """The same with a guidance strength as an input: one for all, or (B,)."""
        device = self.text.device
        rows = torch.as_tensor(strength, dtype=torch.float32, device=device).expand(len(self))
        return replace(self, guidance=rows)

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Batches one after the other; a mask or guidance strength has either every part or none."""
        masks = [p.text_mask for p in parts if p.text_mask is not None]
        strengths = [p.guidance for p in parts if p.guidance is not None]
        for what, found in (("text mask", masks), ("guidance strength", strengths)):
            if found and len(found) != len(parts):
                raise ValueError(f"either every condition has a {what} or none has")
        return Condition(
            torch.cat([p.text for p in parts]),
            torch.cat([p.vector for p in parts]),
            torch.cat(masks) if masks else None,
            torch.cat(strengths) if strengths else None,
        )


# -- size conditions: a picture's original size, its crop, and its size as trained on


class Sizes(NamedTuple):
    """Size conditions of B images in pixels, each (B, 2): (height, width), (top, left), (height, width)."""

    original: Tensor
    crop: Tensor
    target: Tensor

    @classmethod
    def uncropped(cls, height: int, width: int, batch: int) -> Sizes:
        """Sizes of the official sampler: original = target = the requested size, nothing cut off."""
        size = torch.tensor([[height, width]]).expand(batch, 2)
        return cls(size, torch.zeros_like(size), size)


class SizeConditioner(nn.Module):
    """Sizes -> (B, 6 * dim) float32: a sinusoid of ``dim`` channels for each of six numbers, no parameters.

    In the order original height and width, crop top and left, target height and width.
    Source: official ``encoders/modules.py:995-1003``.
    """

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"the size embedding's dim is {dim}, expected at least 1")
        self.dim = dim

    @property
    def width(self) -> int:
        """Channels of the size vector, V."""
        return 6 * self.dim

    def forward(self, original: Tensor, crop: Tensor, target: Tensor) -> Tensor:
        """(B, 6 * dim) float32 of three (B, 2) tensors of pixels."""
        for name, pair in (("original", original), ("crop", crop), ("target", target)):
            if pair.shape != (original.shape[0], 2):
                raise ValueError(
                    f"{name} sizes have shape {tuple(pair.shape)}, expected ({original.shape[0]}, 2)"
                )
        numbers = torch.cat([original, crop, target], 1)  # (B, 6)
        waves = sinusoid(numbers.flatten(), self.dim)  # (6 B, dim)
        return rearrange(waves, "(b n) d -> b (n d)", n=6)
