"""The typed values that hooks exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Grid(NamedTuple):
    """Height and width of an image in patches (not pixels, not latent cells)."""

    h: int
    w: int


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of one branch, (B or 1, 2, D) each: row 0 for text, row 1 for image tokens.

    Never expanded to (B, L, D): rows are applied to slices of the sequence.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor


LayerModulation = tuple[Modulation, Modulation]
"""Of the attention branch and of the MLP branch."""


@dataclass(frozen=True)
class Context:
    """What hooks may read besides the hidden states; built once per forward, never written to.

    The first group is input. The second is filled by :meth:`Transformer.prepare` with what no denoising step
    changes, so that a sampling loop computes it once per image.
    """

    emb: Tensor | None = None  # (B or 1, E) time and size
    text: Tensor | None = None  # (B, T, C_text) encoder output
    image: Tensor | None = None  # (B, C, h, w) noisy latent
    ids: Tensor | None = None  # (B, T) token ids, for text encoders
    grid: Grid = Grid(0, 0)  # patches
    text_len: int = 0  # T
    text_mask: Tensor | None = None  # (B, T) true = real token; None = attend to all
    text_repeat: int = 1  # how many equal tokens each text token stands for

    tokens: Tensor | None = None  # (B, T, D) projected text
    table: Tensor | None = None  # (1, L, D) added to the embedded tokens
    rotary: tuple[Tensor, Tensor] | None = None  # cos and sin, (N, d) each, float32
    bias: Tensor | None = None  # (1, H, L, L) added to the attention logits
    modulation: tuple[LayerModulation, ...] | None = None  # of this step, one entry a layer
    text_kv: tuple[tuple[Tensor, Tensor], ...] | None = None  # (B, H, T, d) keys and values of each layer
    prepared: bool = False  # true once the fields above are filled
