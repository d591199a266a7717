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
    """Shift, scale and gate of one branch, (B or 1, S, D) each: a row for each of the S segments.

    Never expanded to (B, L, D): each row is applied to its slice of the sequence.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor


LayerModulation = tuple[Modulation, Modulation]
"""Of the attention branch and of the MLP branch."""


@dataclass(frozen=True)
class Context:
    """Values that hooks may read besides the hidden states; built once per forward, never written to.

    The first group is input, which only mixins read. The second is all that the transformer itself reads.
    The third passes between mixins. :meth:`Transformer.prepare` fills in what no denoising step changes, so
    that a sampling loop computes it once per image.
    """

    emb: Tensor | None = None  # (B or 1, E) time and size
    text: Tensor | None = None  # (B, T, C_text) encoder output
    text_mask: Tensor | None = None  # (B, T) true = real token; None = attend to all
    text_repeat: int = 1  # number of equal tokens that each text token stands for
    image: Tensor | None = None  # (B, C, h, w) noisy latent
    ids: Tensor | None = None  # (B, T) token ids, for text encoders
    grid: Grid = Grid(0, 0)  # patches

    segments: tuple[int, ...] = ()  # lengths that add up to L, one for each row of a modulation; () = one
    table: Tensor | None = None  # (1, L, D) added to the embedded tokens
    bias: Tensor | None = None  # (1, H, L, L) added to the attention logits
    key_mask: Tensor | None = None  # (B, 1, 1, L) true where a key may be attended; None = everywhere
    modulation: tuple[LayerModulation, ...] | None = None  # of this step, one entry a layer
    prepared: bool = False  # true once the fields that no step changes are filled

    tokens: Tensor | None = None  # (B, T, D) projected text
    rotary: tuple[Tensor, Tensor] | None = None  # cos and sin, (N, d) each, float32
    text_kv: tuple[tuple[Tensor, Tensor], ...] | None = None  # (B, H, T, d) keys and values of each layer
