"""The transformer's extension points: the complete list, one Protocol each.

Dropout, residual additions and biases belong to the block, never to a hook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sat.transformer.context import Context, LayerModulation


class Prepare(Protocol):
    """-> the context with what no step changes filled in (text tokens, rotary tables, biases); wrap it."""

    def __call__(self, ctx: Context) -> Context: ...


class Run(Protocol):
    """One pass: a prepared context -> the network's output."""

    def __call__(self, ctx: Context) -> Tensor: ...


class Embed(Protocol):
    """-> (B, L, D) tokens. Required: it has no default."""

    def __call__(self, ctx: Context) -> Tensor: ...


class Position(Protocol):
    """-> (1, L, D) added to the tokens, or None; asked once per image, not once per step."""

    def __call__(self, ctx: Context) -> Tensor | None: ...


class Modulate(Protocol):
    """-> modulation of the attention and of the MLP branch of ``layer``, or None for plain pre-norm."""

    def __call__(self, ctx: Context, layer: int) -> LayerModulation | None: ...


class QK(Protocol):
    """Acts on q and k, (B, H, L, d) each, after the split into heads and before attention."""

    def __call__(self, q: Tensor, k: Tensor, ctx: Context, layer: int) -> tuple[Tensor, Tensor]: ...


class Attend(Protocol):
    """q, k, v (B, H, L, d) each -> (B, H, L, d)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor: ...


class Cross(Protocol):
    """-> (B, L, D) added between a block's attention and its MLP, or None for nothing."""

    def __call__(self, x: Tensor, ctx: Context, layer: int) -> Tensor | None: ...


class Layer(Protocol):
    """One whole block, (B, L, D) -> (B, L, D)."""

    def __call__(self, x: Tensor, ctx: Context, layer: int) -> Tensor: ...


class Final(Protocol):
    """(B, L, D) -> the network's output."""

    def __call__(self, x: Tensor, ctx: Context) -> Tensor: ...


@dataclass(frozen=True)
class TransformerHooks:
    """One callable per extension point."""

    prepare: Prepare
    run: Run
    embed: Embed
    position: Position
    modulate: Modulate
    norm_qk: QK
    rotate_qk: QK
    attend: Attend
    cross: Cross
    layer: Layer
    final: Final
