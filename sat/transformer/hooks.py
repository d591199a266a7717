"""Extension points of the transformer, one Protocol each, and the typed values they exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from torch import Tensor

from sat.control_input import ControlInput, Controls


class Grid(NamedTuple):
    """Height and width of an image in patches (not pixels, not latent cells)."""

    h: int
    w: int


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of one branch, (B or 1, S, D) each: a row for each of the S segments.

    Never expanded to (B, L, D): each row is applied to its slice of the sequence. ``plus_one``: ``scale`` has
    had 1 added already.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor
    plus_one: bool = False


LayerModulation = tuple[Modulation, Modulation]
"""Of the attention branch and of the MLP branch."""


@dataclass(frozen=True)
class Context:
    """Values that hooks may read besides the hidden states; built once per forward, never written to.

    The first group is input, which only mixins read. The second is all that the transformer itself reads.
    The third passes between mixins. :meth:`Transformer.prepare` fills in what no denoising step changes, so
    that a sampling loop computes it once per image.
    """

    emb: Tensor | None = None  # (B or 1, E) time and size; in ``prepare`` of timestep 0, beside controls
    text: Tensor | None = None  # (B, T, C_text) encoder output
    text_mask: Tensor | None = None  # (B, T) true = real token; None = attend to all
    text_repeat: int = 1  # number of equal tokens that each text token stands for
    image: Tensor | None = None  # (B, C, h, w) noisy latent
    ids: Tensor | None = None  # (B, T) token ids, for text encoders
    grid: Grid = Grid(0, 0)  # patches
    controls: Controls = ()  # pictures of trained controls, those that act alone

    segments: tuple[int, ...] = ()  # lengths that add up to L, one for each row of a modulation; () = one
    table: Tensor | None = None  # (1, L, D) added to the embedded tokens
    bias: Tensor | None = None  # (1, H, L, L) added to the attention logits
    key_mask: Tensor | None = None  # (B, 1, 1, L) true where a key may be attended; None = everywhere
    modulation: Tensor | None = None  # (depth, 6, 1, S, D), this step's: shift, 1 + scale, gate, twice
    prepared: bool = False  # true once the fields that no step changes are filled

    tokens: Tensor | None = None  # (B, T, D) projected text
    rotary: tuple[Tensor, Tensor] | None = None  # cos and sin, (N, d) each, float32
    text_kv: tuple[tuple[Tensor, Tensor], ...] | None = None  # (B, H, T, d) keys and values of each layer

    def controlled(self, name: str, make: Callable[[ControlInput], object]) -> Context:
        """The same with what ``make`` gives as ``made`` of the inputs of control ``name``."""
        return replace(
            self, controls=tuple(replace(c, made=make(c)) if c.name == name else c for c in self.controls)
        )


# -- the transformer's extension points: the complete list, one Protocol each
#
# Dropout, residual additions and biases belong to the block, never to a hook.


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
