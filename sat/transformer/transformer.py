"""A transformer whose every variable part is a named hook: no parallelism, no task code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from sat.mixin import Mixin, Resolved, resolve
from sat.transformer.block import Block, BlockSpec, attend
from sat.transformer.hooks import Context, LayerModulation, Modulation, TransformerHooks


class Transformer(nn.Module):
    """``depth`` blocks of width ``dim`` over one sequence, between an ``embed`` and a ``final`` hook.

    The sequence may consist of segments (``ctx.segments``), each with a row of its own in a modulation; what
    they mean is the mixins' business. ``print(transformer.resolved)`` shows who owns each hook. Parallelism,
    kernels and recomputed activations are mixins too, added to a built transformer by :meth:`extend`.
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
        self.blocks = nn.ModuleList(Block(dim, heads, spec) for _ in range(depth))
        self.mixins = nn.ModuleDict(mixins)
        self._resolve()

    def extend(self, name: str, mixin: Mixin) -> None:
        """Add ``mixin`` to a built transformer, around those it has."""
        if name in self.mixins:
            raise ValueError(f"the transformer has a mixin {name!r} already")
        self.mixins[name] = mixin
        self._resolve()

    def remove(self, name: str) -> None:
        """Take a mixin off again."""
        del self.mixins[name]
        self._resolve()

    def _resolve(self) -> None:
        mixins = cast("Mapping[str, Mixin]", dict(self.mixins.items()))
        self.resolved: Resolved[TransformerHooks] = resolve(self._defaults(), mixins)
        self.hooks = self.resolved.hooks

    def prepare(self, ctx: Context) -> Context:
        """``ctx`` with everything filled in that depends on the text and the size but not on the step.

        A hook that has prepared the whole context itself says so by ``ctx.prepared``.
        """
        ctx = self.hooks.prepare(ctx)
        return ctx if ctx.prepared else replace(ctx, table=self.hooks.position(ctx), prepared=True)

    def modulations(self, emb: Tensor) -> Tensor | None:
        """Modulations for the rows of ``emb`` (steps, E), each as ``ctx.modulation``; None without any.

        One matrix product a layer for all steps of a run, instead of one a layer and step.
        """
        every: Tensor | None = None
        for layer in range(len(self.blocks)):
            if (branches := self.hooks.modulate(Context(emb=emb), layer)) is None:
                return None
            parts = torch.stack([x for m in branches for x in (m.shift, 1 + m.scale, m.gate)], 1)
            if every is None:
                every = parts.new_empty(len(emb), len(self.blocks), 6, 1, *parts.shape[2:])
            every[:, layer, :, 0] = parts  # (steps, 6, S, D)
        return every

    def modulation(self, ctx: Context, layer: int) -> LayerModulation | None:
        """Modulation of one layer: of the step, where all steps' were computed before, else computed now."""
        if ctx.modulation is None:
            return self.hooks.modulate(ctx, layer)
        a, b, c, d, e, f = ctx.modulation[layer].unbind()  # (1, S, D) each
        return Modulation(a, b, c, True), Modulation(d, e, f, True)

    def forward(self, ctx: Context) -> Tensor:
        return self.hooks.run(ctx if ctx.prepared else self.prepare(ctx))

    # Bound methods, not lambdas: a deep copy rebinds a bound method, a closure would keep the original's
    # blocks.
    def _defaults(self) -> TransformerHooks:
        return TransformerHooks(
            prepare=self._prepare,
            run=self._run,
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

    def _run(self, ctx: Context) -> Tensor:
        x = self.hooks.embed(ctx)  # (B, L, D)
        if ctx.table is not None:
            x = x + ctx.table
        if x.dtype == torch.float16:
            x = x.float()
        for layer in range(len(self.blocks)):
            x = self.hooks.layer(x, ctx, layer)
        return self.hooks.final(x, ctx)

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
        return attend(q, k, v, bias=ctx.bias, mask=ctx.key_mask, scale=self.spec.scale)

    def _cross(self, x: Tensor, ctx: Context, layer: int) -> Tensor | None:
        return None

    def _layer(self, x: Tensor, ctx: Context, layer: int) -> Tensor:
        out: Tensor = self.blocks[layer](x, ctx, layer, self.hooks, self.modulation(ctx, layer))
        return out

    def _final(self, x: Tensor, ctx: Context) -> Tensor:
        return x
