"""Equal text tokens computed once: those of the unconditional half of guidance, which are all alike."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor, nn

from sat.kernels.attention import AttentionKernel
from sat.kernels.compile import CompiledBlocks, Recorded
from sat.mixin import Mixin, wraps
from sat.mixins.adaln import AdaLN
from sat.mixins.heads import FinalLayer
from sat.mixins.joint_attention import JointAttention
from sat.mixins.patch_embed import PatchEmbed
from sat.mixins.qk_norm import QKNorm
from sat.mixins.rope import RoPE
from sat.mixins.sincos import SinCos2D
from sat.parallel.sequence import SequenceParallel
from sat.transformer import Context, Transformer, TransformerHooks
from sat.transformer.hooks import Prepare, Run

FOLD_FROM = 512
"""Tokens from which two passes without the repeated ones are faster than one with them (on two cores)."""

NAME = "folding"


@dataclass(frozen=True)
class Folded(Context):
    """The context of a batch in two parts: rows of which one text token stands for all, then the others."""

    parts: tuple[Context, ...] = ()  # prepared, each of its rows


class Folding(Mixin):
    """Lets one text token stand for all in the first rows of a batch, where their text is one token repeated.

    In sampling of at least ``shortest`` tokens; it takes two passes a step instead of one. A text token that
    stands for several is a matter of :class:`sat.mixins.joint_attention.JointAttention`.
    """

    host = TransformerHooks

    def __init__(self, transformer: Transformer, shortest: int) -> None:
        super().__init__()
        self.shortest = shortest
        self._host = (transformer,)  # in a tuple: a module must not be registered inside itself

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        text, (transformer,) = ctx.text, self._host
        if text is None or ctx.text_repeat > 1 or torch.is_grad_enabled():
            return inner(ctx)
        length = text.shape[1]
        if ctx.grid.h * ctx.grid.w + length < self.shortest or not foldable(transformer, ctx):
            return inner(ctx)
        different = [*(text != text[:, :1]).flatten(1).any(1).tolist(), True]
        if not (count := different.index(True)):
            return inner(ctx)
        one = transformer.prepare(replace(ctx, text=text[:count, :1], text_repeat=length))
        rest = [transformer.prepare(replace(ctx, text=text[count:]))] if count < len(text) else []
        values = {field.name: getattr(ctx, field.name) for field in fields(ctx)}
        return Folded(**values | {"prepared": True}, parts=(one, *rest))

    @wraps("run")
    def run(self, inner: Run, ctx: Context) -> Tensor:
        if not isinstance(ctx, Folded):
            return inner(ctx)
        assert ctx.image is not None and ctx.emb is not None, "the network gives the latent and the step"
        rows = [len(cast(Tensor, part.text)) for part in ctx.parts]
        emb = [ctx.emb] * len(rows) if len(ctx.emb) == 1 else torch.split(ctx.emb, rows)
        outs = [
            inner(replace(part, image=image, emb=own, modulation=ctx.modulation))
            for part, image, own in zip(ctx.parts, torch.split(ctx.image, rows), emb, strict=True)
        ]
        return torch.cat(outs)


ALIKE = (
    AdaLN, AttentionKernel, CompiledBlocks, FinalLayer, Folding, JointAttention, PatchEmbed, QKNorm, Recorded,
    RoPE, SequenceParallel, SinCos2D,
)  # fmt: skip
"""Mixins whose hooks do the same to equal text tokens, however many there are. A class of a user says it of
itself by ``text_alike = True``; a subclass says it anew, as it may change a hook."""


def foldable(transformer: Transformer, ctx: Context) -> bool:
    """True if equal text tokens stay equal from layer to layer, and nothing else counts them.

    They get no mask, and every mixin that fills a hook treats them alike.
    """
    mixins = dict(transformer.mixins.items())
    owners = {name for chain in transformer.resolved.owners.values() for name in chain if name != "default"}
    kinds = [type(mixins[name]) if name in mixins else None for name in owners]
    alike = all(kind in ALIKE or (kind and vars(kind).get("text_alike", False)) for kind in kinds)
    return ctx.text_mask is None and alike


def fold(network: nn.Module, shortest: int | None = FOLD_FROM) -> None:
    """Fold the text of a network that is one transformer with joint attention; ``shortest`` None ends it.

    To be put on after everything else that extends the transformer: each part is prepared by all of it.
    """
    transformer = getattr(network, "transformer", None)
    if not isinstance(transformer, Transformer):
        return
    if NAME in transformer.mixins:
        transformer.remove(NAME)
    joint = any(isinstance(mixin, JointAttention) for mixin in transformer.mixins.values())
    if shortest is not None and joint:
        transformer.extend(NAME, Folding(transformer, shortest))
