"""Speed of a loaded model, put on from outside; the numbers stay what they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.kernels import attention as kernels
from sat.kernels import measured
from sat.kernels.attention import AttentionKernel
from sat.kernels.compile import CompiledBlocks, Recorded, compile_blocks, replayed
from sat.kernels.exp_attention import LARGEST_LOGIT
from sat.kernels.measured import FOLD_FROM
from sat.kernels.packed import by_sigmoid, pack, packs_any, takes_tanh
from sat.mixin import Mixin, wraps
from sat.mixins.adaln import AdaLN
from sat.mixins.cross_attention import CrossAttention
from sat.mixins.joint_attention import JointAttention
from sat.mixins.patch_embed import FinalLayer, PatchEmbed
from sat.mixins.qk_norm import QKNorm
from sat.mixins.rope import RoPE
from sat.mixins.sincos import SinCos2D
from sat.parallel.sequence import SequenceParallel
from sat.transformer import Context, Grid, Transformer, TransformerHooks
from sat.transformer.hooks import Prepare, Run
from sat.transformer.transformer import AffineLayerNorm, Block

if TYPE_CHECKING:
    from sat.engine import DiffusionEngine
    from sat.first_stage.model import AutoencoderKL


Auto = bool | Literal["auto"]
"""True, false, or whatever is faster."""
Pack = bool | Literal["auto", "packed_sigmoid", "plain_sigmoid"]
"""The same; with ``sigmoid``, GELU of packed or of plain products is taken by a sigmoid."""
Fold = bool | Literal["auto", "ragged"]
"""The same, and for few tokens a single pass of rows of different lengths, laid end to end."""
Convolutions = Literal["auto", "packed", "plain"]
"""Of a float32 autoencoder on a CPU: by packed weights, by torch, or whichever is faster."""


@dataclass(frozen=True)
class Speed:
    """Choices of docs/performance.md; the fields are those of the config's ``sampling``.

    ``auto`` is for :func:`measured_speed` to settle; as it stands it is what is usually faster.
    """

    attention: kernels.Backend = "auto"
    pack: Pack = "auto"
    fold: Fold = "auto"
    compile: bool = False
    graphs: bool = False
    convolutions: Convolutions = "auto"


def measured_speed(
    network: nn.Module, speed: Speed, cells: tuple[int, int], rows: int, *, trains: bool = False
) -> Speed:
    """``speed`` with what is ``auto`` settled for a network on the CPU (:mod:`sat.kernels.measured`).

    ``cells`` is the latent's (h, w), ``rows`` of it go through the network together. ``trains``: frozen
    weights are multiplied by both ways, and attention has a gradient.
    """
    every = transformers(network)
    if not every:
        return replace(speed, pack=bool(speed.pack), fold=bool(speed.fold))
    widest = max(every, key=_width)
    layer, bound = _layer(network, widest, cells, rows), largest_logit(widest)
    kernel, packed, folded = speed.attention, speed.pack, speed.fold
    if kernel == "auto":
        small = bound is not None and bound <= LARGEST_LOGIT
        kernel = "exp" if small and measured.attention(layer, trains=trains) == "exp" else "torch"
    if packed == "auto":
        packed = not speed.compile and packs_any(network) and measured.packs(layer, trains=trains)
        if not (trains or speed.compile) and takes_tanh(network) and measured.sigmoid(layer, packed=packed):
            packed = "packed_sigmoid" if packed else "plain_sigmoid"
    if folded == "auto":
        whole = packed in (True, "packed_sigmoid")
        folded = not trains and measured.folds(layer, packed=whole, kernel=kernel)
    return replace(speed, attention=kernel, pack=packed, fold=folded)


def measured_convolutions(first_stage: AutoencoderKL, cells: tuple[int, int]) -> Literal["packed", "plain"]:
    """Whichever is faster on the CPU for latents of ``cells`` (h, w)."""
    if first_stage.dtype != torch.float32:
        return "plain"
    side = max(cells) * first_stage.factor
    return measured.convolutions(measured.Maps(first_stage.widths, first_stage.groups, side))


def _layer(network: nn.Module, widest: Transformer, cells: tuple[int, int], rows: int) -> measured.Layer:
    """Sizes of a layer of ``widest``. In a UNet, whose maps shrink as they get wider, tokens are a guess."""
    mixins, block = widest.mixins.values(), cast(Block, widest.blocks[0])
    width, levels = _width(widest), len({_width(one) for one in transformers(network)})
    joint = any(isinstance(mixin, JointAttention) for mixin in mixins)
    patch = getattr(network, "patch", 1) * (1 if joint else 2**levels)
    return measured.Layer(
        width, widest.spec.mlp_dim or 4 * width, block.attn.head_dim, rows,
        (getattr(network, "text_len", 0) or 0) if joint else 0, max(1, cells[0] * cells[1] // patch**2),
        block.attn.dtype,
    )  # fmt: skip


def _width(transformer: Transformer) -> int:
    norm = cast(Block, transformer.blocks[0]).norm1
    return int(
        norm.normalized_shape[0] if isinstance(norm, nn.LayerNorm) else cast(Tensor, norm.weight).numel()
    )


def quicken(engine: DiffusionEngine, speed: Speed, device: torch.device | None = None) -> str:
    """Apply ``speed`` to a loaded engine, for inference alone; returns the choices in words for the log.

    The last thing to be put on an engine: after adapters and parallelism. ``device``: where the network runs,
    if it waits elsewhere (:mod:`sat.offload.block_swap`). Raises ``ValueError`` for the impossible.
    """
    place = device or next(engine.network.parameters()).device
    message = []
    # On a GPU group norm turns a map back, and every convolution turns it again.
    if engine.first_stage.dtype != torch.float32 and place.type == "cpu":
        channels_last(engine.first_stage)
    elif speed.convolutions == "packed" and place.type == "cpu":
        from sat.kernels.convolutions import convolvable, pack_convolutions

        if convolvable():
            message.append(f"{pack_convolutions(engine.first_stage)} layers of the autoencoder packed")
    return ", ".join([quicken_network(engine.network, speed, device), *message])


def quicken_network(network: nn.Module, speed: Speed, device: torch.device | None = None) -> str:
    """Apply ``speed`` to a network. Packed weights cannot be compiled: ``compile`` goes before ``pack``."""
    device = device or next(network.parameters()).device
    message = [f"attention: {use_kernel(network, speed.attention, device)}"]
    for module in network.modules():
        if isinstance(module, AffineLayerNorm) and module.weight.dtype == torch.float16:
            module.float()  # it takes a float32 residual stream, and would be cast at every step
    if speed.compile:
        message.append(f"{compiled(network)} blocks compiled, which the first step of a size waits for")
    elif device.type == "cpu":
        if speed.pack not in (False, "plain_sigmoid") and (count := pack(network)):
            message.append(f"{count} weights packed for oneDNN")
        if speed.pack in ("packed_sigmoid", "plain_sigmoid") and (count := by_sigmoid(network)):
            message.append(f"GELU of {count} layers by a sigmoid")
    if speed.graphs:
        whole = getattr(network, "transformer", None)
        if not isinstance(whole, Transformer):
            raise ValueError(
                f"sampling.graphs records a transformer's pass, and {type(network).__name__} is not one "
                f"transformer: set it to false"
            )
        replayed(whole, device)
        message.append("CUDA graphs")
    if speed.fold and device.type == "cpu":  # elsewhere two smaller passes were not measured
        fold(network, FOLD_FROM, ragged=speed.fold == "ragged")
    return ", ".join(message)


def channels_last(module: nn.Module) -> None:
    """Lay convolution weights out channels last, each in its own memory; the maps between them follow.

    New memory for all of them leaves as much behind in holes of the allocator: 0.6 GB while loading Plus.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4:
            plain = parameter.data
            turned = plain.contiguous(memory_format=torch.channels_last)
            if turned.data_ptr() != plain.data_ptr() and plain.is_contiguous():
                turned = plain.as_strided(turned.shape, turned.stride()).copy_(turned)
            parameter.data = turned


def compiled(network: nn.Module) -> int:
    """Compile the blocks of every transformer in ``network`` when they first run; returns their number."""
    count = 0
    for transformer in transformers(network):
        compile_blocks(transformer, alike=layers_alike(transformer))
        count += len(transformer.blocks)
    return count


def use_kernel(
    network: nn.Module, name: kernels.Backend, device: torch.device | None = None, section: str = "sampling"
) -> str:
    """Let every transformer in ``network`` attend with the kernel ``name``; returns the choice for the log.

    ``exp`` is for those with small logits alone, and a demand on one of them. ``device``: as in
    :func:`quicken`; ``section``: of the config, that errors name.
    """
    chosen, every = [], transformers(network)
    bounds = [largest_logit(transformer) for transformer in every]
    for transformer, bound in zip(every, bounds, strict=True):
        weight = next(transformer.parameters())
        attention = cast(Block, transformer.blocks[0]).attn
        own = "torch" if name == "exp" and bound is None and any(bounds) else name
        kernel, title = kernels.choose(
            own, device or weight.device, attention.dtype, bound, attention.head_dim, section
        )
        kernels.put_kernel(transformer, kernel)
        chosen.append(title)
    return ", ".join(dict.fromkeys(chosen)) or "none"


def transformers(network: nn.Module) -> list[Transformer]:
    """All transformers in ``network``: itself or one inside, or the many of a UNet."""
    return [module for module in network.modules() if isinstance(module, Transformer)]


def layers_alike(transformer: Transformer) -> bool:
    """True if no hook inside a block looks at the layer's number; modulations come from outside."""
    cross = transformer.resolved.owners["cross"]
    mixin = dict(transformer.mixins.items()).get(cross[-1])
    plain = cross == ("default",) or (len(cross) == 1 and type(mixin) is CrossAttention)
    return plain and plain_heads(transformer)


def largest_logit(transformer: Transformer) -> float | None:
    """The largest attention logit possible, or None where nothing bounds it.

    Layer norm without weights leaves q and k no longer than sqrt(d), and rotating keeps that: their product
    is at most d, times the scale. Anything else that touches q and k takes the promise away.
    """
    norm = dict(transformer.mixins.items()).get(transformer.resolved.owners["norm_qk"][-1])
    if not isinstance(norm, QKNorm) or not plain_heads(transformer):
        return None
    size = int(norm.norm.normalized_shape[0])
    return size * (transformer.spec.scale or 1 / math.sqrt(size))


def plain_heads(transformer: Transformer) -> bool:
    """True if q and k are at most normalised and rotated, and attention is that of all layers alike."""
    owners, mixins = transformer.resolved.owners, dict(transformer.mixins.items())

    def kinds(hook: str) -> list[type]:
        return [type(mixins.get(name)) for name in owners[hook]]

    return (
        kinds("norm_qk") in ([QKNorm], [type(None)])
        and kinds("rotate_qk") in ([RoPE], [type(None)])
        and {*kinds("attend")} <= {JointAttention, SequenceParallel, kernels.AttentionKernel, type(None)}
    )


# -- equal text tokens computed once: those of the unconditional half of guidance, which are all alike


NAME = "folding"


@dataclass(frozen=True)
class Folded(Context):
    """The context of a batch in two parts: rows of which one text token stands for all, then the others."""

    parts: tuple[Context, ...] = ()  # prepared, each of its rows


@dataclass(frozen=True)
class Ragged(Context):
    """The context of a batch, and of the same rows end to end: one row, with a single text token of some."""

    joined: Context | None = None


class Folding(Mixin):
    """Lets one text token stand for all in the first rows of a batch, where their text is one token repeated.

    In sampling of at least ``shortest`` tokens it takes two passes a step instead of one. A text token that
    stands for several is then a matter of :class:`sat.mixins.joint_attention.JointAttention`. Of fewer tokens
    ``ragged`` folds too, in one pass of all rows end to end.
    """

    host = TransformerHooks

    def __init__(self, transformer: Transformer, shortest: int, ragged: bool = False) -> None:
        super().__init__()
        self.shortest, self.ragged = shortest, ragged
        self._host = (transformer,)  # in a tuple: a module must not be registered inside itself

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        text, (transformer,) = ctx.text, self._host
        if text is None or ctx.text_repeat > 1 or torch.is_grad_enabled():
            return inner(ctx)
        length = text.shape[1]
        short = ctx.grid.h * ctx.grid.w + length < self.shortest
        if (short and not (self.ragged and joinable(transformer, ctx))) or not foldable(transformer, ctx):
            return inner(ctx)
        different = [*(text != text[:, :1]).flatten(1).any(1).tolist(), True]
        if not (count := different.index(True)):
            return inner(ctx)
        if short:
            ctx = inner(ctx)
            whole = replace(ctx, table=transformer.hooks.position(ctx), prepared=True)
            values = {field.name: getattr(whole, field.name) for field in fields(whole)}
            return Ragged(**values, joined=end_to_end(whole, count))
        early, late = (
            tuple(c.rows(part) for c in ctx.controls) for part in (slice(count), slice(count, None))
        )
        one = transformer.prepare(replace(ctx, text=text[:count, :1], text_repeat=length, controls=early))
        rest = []
        if count < len(text):
            rest.append(transformer.prepare(replace(ctx, text=text[count:], controls=late)))
        values = {field.name: getattr(ctx, field.name) for field in fields(ctx)}
        return Folded(**values | {"prepared": True}, parts=(one, *rest))

    @wraps("run")
    def run(self, inner: Run, ctx: Context) -> Tensor:
        if isinstance(ctx, Ragged) and ctx.joined is not None and ctx.emb is not None and len(ctx.emb) == 1:
            image = cast(Tensor, ctx.image)  # (B, C, h, w), as one of height B h
            tall = image.transpose(0, 1).flatten(1, 2)[None]
            out = inner(replace(ctx.joined, image=tall, emb=ctx.emb, modulation=ctx.modulation))[0]
            return out.view(out.shape[0], len(image), -1, out.shape[2]).transpose(0, 1)
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


def end_to_end(ctx: Context, count: int) -> Context:
    """A prepared context of B rows as that of one row: the text of all, then the images of all, stacked.

    Of the first ``count`` rows, whose T text tokens are equal, one token each stands for all: log T is added
    to its logits, as exp(x + log T) = T exp(x). Tokens of different rows do not see each other.
    """
    tokens, (length, image) = cast(Tensor, ctx.tokens), ctx.segments  # (B, T, D), N
    batch, device = len(tokens), tokens.device
    rows = torch.arange(batch, device=device)
    owner = torch.cat([rows[:count], rows[count:].repeat_interleave(length), rows.repeat_interleave(image)])
    text = torch.cat([tokens[:count, 0], tokens[count:].flatten(0, 1)])[None]  # (1, T', D)
    bias = torch.zeros(len(owner), len(owner), dtype=tokens.dtype, device=device)
    bias[:, :count] = math.log(length)
    bias.masked_fill_(owner[:, None] != owner, float("-inf"))
    table, rotary = ctx.table, ctx.rotary
    if table is not None:
        table = F.pad(table[:, length:].repeat(1, batch, 1), (0, 0, text.shape[1], 0))
    if rotary is not None:
        rotary = (rotary[0].repeat(batch, 1), rotary[1].repeat(batch, 1))
    return replace(
        ctx, tokens=text, segments=(text.shape[1], batch * image), grid=Grid(batch * ctx.grid.h, ctx.grid.w),
        bias=bias[None, None], table=table, rotary=rotary,
    )  # fmt: skip


ALIKE = (
    AdaLN, AttentionKernel, CompiledBlocks, FinalLayer, Folding, JointAttention, PatchEmbed, QKNorm, Recorded,
    RoPE, SequenceParallel, SinCos2D,
)  # fmt: skip
"""Mixins whose hooks do the same to equal text tokens, however many there are. A class of a user says it of
itself by ``text_alike = True``; a subclass says it anew, as it may change a hook."""


def joinable(transformer: Transformer, ctx: Context) -> bool:
    """True if every mixin works on one row that several were laid end to end in, without controls."""
    kinds = {type(mixin) for mixin in transformer.mixins.values()}
    return kinds <= set(ALIKE) - {SequenceParallel} and not ctx.controls and ctx.bias is None


def foldable(transformer: Transformer, ctx: Context) -> bool:
    """True if equal text tokens stay equal from layer to layer, and nothing else counts them.

    They get no mask, and every mixin that fills a hook treats them alike.
    """
    mixins = dict(transformer.mixins.items())
    owners = {name for chain in transformer.resolved.owners.values() for name in chain if name != "default"}
    kinds = [type(mixins[name]) if name in mixins else None for name in owners]
    alike = all(kind in ALIKE or (kind and vars(kind).get("text_alike", False)) for kind in kinds)
    return ctx.text_mask is None and alike


def fold(network: nn.Module, shortest: int | None = FOLD_FROM, *, ragged: bool = False) -> None:
    """Fold the text of a network that is one transformer with joint attention; ``shortest`` None ends it.

    ``ragged``: of fewer tokens too.

    To be put on after everything else that extends the transformer: each part is prepared by all of it.
    """
    transformer = getattr(network, "transformer", None)
    if not isinstance(transformer, Transformer):
        return
    if NAME in transformer.mixins:
        transformer.remove(NAME)
    joint = any(isinstance(mixin, JointAttention) for mixin in transformer.mixins.values())
    if shortest is not None and joint:
        transformer.extend(NAME, Folding(transformer, shortest, ragged))
