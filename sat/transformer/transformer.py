"""A transformer whose every variable part is a named hook: no parallelism, no task code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sat.kernels import attention as kernels
from sat.mixin import Mixin, Resolved, resolve
from sat.transformer.block import Block, BlockSpec
from sat.transformer.context import Context, LayerModulation, Modulation
from sat.transformer.hooks import TransformerHooks


class RunBlock(Protocol):
    """How a block is called: (B, L, D) -> (B, L, D)."""

    def __call__(
        self,
        block: nn.Module,
        x: Tensor,
        ctx: Context,
        layer: int,
        hooks: TransformerHooks,
        modulation: LayerModulation | None,
    ) -> Tensor: ...


def call_block(
    block: nn.Module,
    x: Tensor,
    ctx: Context,
    layer: int,
    hooks: TransformerHooks,
    modulation: LayerModulation | None,
) -> Tensor:
    """``block`` as it is."""
    out: Tensor = block(x, ctx, layer, hooks, modulation)
    return out


class Transformer(nn.Module):
    """``depth`` blocks of width ``dim`` between an ``embed`` and a ``final`` hook.

    ``print(transformer.resolved)`` shows who owns each hook. ``checkpointing`` recomputes each block in the
    backward pass instead of keeping its activations; ``draws``: a block draws random numbers (dropout), which
    recomputing must repeat. ``kernel`` computes the default attention, ``run_block`` calls a block (or one
    compiled for all layers), ``replay`` stands for the whole pass (a recorded one); see ``fast.py``.
    """

    def __init__(
        self, dim: int, heads: int, depth: int, mixins: Mapping[str, Mixin], spec: BlockSpec | None = None
    ) -> None:
        super().__init__()
        spec = spec or BlockSpec()
        if min(dim, heads, depth) < 1:
            raise ValueError(f"dim {dim}, heads {heads} and depth {depth} must all be at least 1")
        if spec.head_dim is None and dim % heads:
            raise ValueError(f"dim {dim} is not divisible by heads {heads}")
        self.spec = spec
        self.checkpointing = self.draws = False
        self.kernel: kernels.Kernel = kernels.attend
        self.run_block: RunBlock = call_block
        self.replay: Callable[[Context], Tensor] | None = None
        self.blocks = nn.ModuleList(Block(dim, heads, spec) for _ in range(depth))
        self.mixins = nn.ModuleDict(mixins)
        self.resolved: Resolved[TransformerHooks] = resolve(self._defaults(), mixins)

    @property
    def hooks(self) -> TransformerHooks:
        """The resolved extension points."""
        return self.resolved.hooks

    def extend(self, name: str, mixin: Mixin) -> None:
        """Add ``mixin`` to a built transformer, around those it has: what is applied from outside does so."""
        if name in self.mixins:
            raise ValueError(f"the transformer has a mixin {name!r} already")
        self.mixins[name] = mixin
        self.resolved = resolve(self._defaults(), cast("Mapping[str, Mixin]", dict(self.mixins.items())))

    def prepare(self, ctx: Context) -> Context:
        """``ctx`` with everything filled in that depends on the text and the size but not on the step."""
        ctx = self.hooks.prepare(ctx)
        return replace(ctx, table=self.hooks.position(ctx), prepared=True)

    def modulations(self, emb: Tensor, text_len: int) -> list[tuple[LayerModulation, ...]]:
        """Modulations of all layers for the rows of ``emb`` (S, E), one list entry per row (a row is a step).

        One matrix product a layer for all steps of a run, instead of one a layer and step.
        """
        ctx = Context(emb=emb, text_len=text_len)
        per_layer = [self.hooks.modulate(ctx, layer) for layer in range(len(self.blocks))]
        known = [m for m in per_layer if m is not None]
        if len(known) != len(per_layer):
            return []
        return [tuple((_row(a, s), _row(b, s)) for a, b in known) for s in range(emb.shape[0])]

    def forward(self, ctx: Context) -> Tensor:
        if not ctx.prepared:
            ctx = self.prepare(ctx)
        return self.run(ctx) if self.replay is None else self.replay(ctx)

    def run(self, ctx: Context) -> Tensor:
        """The pass itself, for a prepared context."""
        x = self.hooks.embed(ctx)
        if ctx.table is not None:
            x = x + ctx.table
        if x.dtype == torch.float16:
            x = x.float()
        layer = self.hooks.layer
        if self.checkpointing and torch.is_grad_enabled():
            layer = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=self.draws)
        for i in range(len(self.blocks)):
            x = layer(x, ctx, i)
        return self.hooks.final(x, ctx)

    # Bound methods, not lambdas: a deep copy rebinds a bound method, a closure would keep the original's
    # blocks.
    def _defaults(self) -> TransformerHooks:
        return TransformerHooks(
            prepare=self._prepare,
            embed=self._embed,
            position=self._position,
            modulate=self._modulate,
            norm_qk=self._same,
            rotate_qk=self._same,
            attend=self._attend,
            cross=self._cross,
            layer=self._layer,
            final=self._final,
        )

    def _prepare(self, ctx: Context) -> Context:
        return ctx

    def _embed(self, ctx: Context) -> Tensor:
        raise NotImplementedError(
            "no mixin provides the 'embed' hook: a transformer needs one (see sat/mixins)"
        )

    def _position(self, ctx: Context) -> Tensor | None:
        return None

    def _modulate(self, ctx: Context, layer: int) -> LayerModulation | None:
        return None

    def _same(self, q: Tensor, k: Tensor, ctx: Context, layer: int) -> tuple[Tensor, Tensor]:
        return q, k

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        if ctx.text_repeat > 1:
            k, v = (kernels.repeated(x, ctx.text_len, ctx.text_repeat) for x in (k, v))
        mask = None if ctx.text_mask is None else kernels.key_mask(ctx.text_mask, k.shape[2])
        return self.kernel(q, k, v, bias=ctx.bias, mask=mask, scale=self.spec.scale)

    def _cross(self, x: Tensor, ctx: Context, layer: int) -> Tensor | None:
        return None

    def _layer(self, x: Tensor, ctx: Context, layer: int) -> Tensor:
        modulation = ctx.modulation[layer] if ctx.modulation is not None else self.hooks.modulate(ctx, layer)
        return self.run_block(self.blocks[layer], x, ctx, layer, self.hooks, modulation)

    def _final(self, x: Tensor, ctx: Context) -> Tensor:
        return x


def _row(m: Modulation, step: int) -> Modulation:
    """The modulation of one row of a stack, (1, 2, D), as views."""
    return Modulation(m.shift[step : step + 1], m.scale[step : step + 1], m.gate[step : step + 1])
