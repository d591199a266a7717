"""Tensor parallelism: linears split over ranks, put into a built model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sat.parallel.launch import Axis
from sat.sharding import Column, Cut, Row, Shard, Sharding, cuts, style_of


def shard_on(tensor: Axis, cut: Cut) -> Shard:
    """Share of this rank of ``tensor``."""
    return Shard(cut, tensor.rank, tensor.size)


def summed(x: Tensor, tensor: Axis) -> Tensor:
    """``x`` summed over the ranks of ``tensor``, in place where it can be; without a gradient."""
    x = x.contiguous()
    if tensor.size > 1:
        dist.all_reduce(x, group=tensor.group)
    return x


def joined(share: Tensor, cut: Cut, tensor: Axis) -> Tensor:
    """Whole tensor from every rank's ``share``; a collective."""
    if tensor.size == 1:
        return share
    parts = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(tensor.size)]
    dist.all_gather(parts, share.detach().contiguous(), group=tensor.group)
    return cut.join(parts)


class _CopyToTensorRanks(torch.autograd.Function):
    """Identity forward; gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        ctx.tensor = tensor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same tensor to others.
        return summed(gradient.clone(memory_format=torch.contiguous_format), ctx.tensor), None


class _ReduceFromTensorRanks(torch.autograd.Function):
    """Sum over the ranks, in place; identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=tensor.group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherFromTensorRanks(torch.autograd.Function):
    """Join the shares of all ranks; backward, each rank takes its share of the gradient."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, cut: Cut, tensor: Axis) -> Tensor:
        ctx.shard = shard_on(tensor, cut)
        return joined(share, cut, tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.shard.take(gradient), None, None


def copy_to_ranks(x: Tensor, tensor: Axis) -> Tensor:
    """Input ``x``, equal on all ranks, of a split layer."""
    if not (torch.is_grad_enabled() and x.requires_grad) or tensor.size == 1:
        return x
    out: Tensor = _CopyToTensorRanks.apply(x, tensor)  # type: ignore[no-untyped-call]
    return out


def reduce_from_ranks(x: Tensor, tensor: Axis) -> Tensor:
    """Sum of all ranks' ``x``, which is consumed."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return summed(x, tensor)
    if tensor.size == 1:
        return x
    out: Tensor = _ReduceFromTensorRanks.apply(x.contiguous(), tensor)  # type: ignore[no-untyped-call]
    return out


def gather_from_ranks(share: Tensor, parts: int, tensor: Axis) -> Tensor:
    """(…, O / ranks) -> (…, O) on every rank: outputs of ``parts`` fused projections."""
    cut = Cut(share.dim() - 1, parts)
    if not (torch.is_grad_enabled() and share.requires_grad):
        return joined(share, cut, tensor)
    out: Tensor = _GatherFromTensorRanks.apply(share, cut, tensor)  # type: ignore[no-untyped-call]
    return out


class SplitLinear(nn.Linear):
    """Linear with a share of the weight and bias of ``whole``, cut as ``self.cuts`` says."""

    def __init__(self, whole: nn.Linear, style: Column | Row, tensor: Axis) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.style, self.tensor = style, tensor
        self.training = whole.training
        self.cuts = {name: cut for name, cut in cuts(style).items() if getattr(whole, name) is not None}
        self.weight = _share(whole.weight, self.shards().get("weight"))
        self.bias = None if whole.bias is None else _share(whole.bias, self.shards().get("bias"))

    def shards(self) -> Mapping[str, Shard]:
        """Shares of the weight and, for a column, of the bias."""
        return {name: shard_on(self.tensor, cut) for name, cut in self.cuts.items()}

    def reset_parameters(self) -> None:
        """Draw the whole linear from the same random numbers on each rank, and keep this rank's share."""
        made = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device=self.weight.device
        )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                whole = getattr(made, name)
                shard = self.shards().get(name)
                parameter.copy_(whole if shard is None else shard.take(whole))

    def extra_repr(self) -> str:
        """Sizes of the whole layer, and this rank's place."""
        return f"{super().extra_repr()}, {self.style}, rank {self.tensor.rank} of {self.tensor.size}"


class ColumnLinear(SplitLinear):
    """(…, I) on every rank -> this rank's share (…, O / ranks) of the outputs."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102 - the class says it
        return F.linear(copy_to_ranks(x, self.tensor), self.weight, self.bias)


class GatheredLinear(SplitLinear):
    """(…, I) -> (…, O) on every rank; each rank has the weights of its share of the outputs."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102 - the class says it
        share = F.linear(copy_to_ranks(x, self.tensor), self.weight, self.bias)
        return gather_from_ranks(share, self.cuts["weight"].parts, self.tensor)


class RowLinear(SplitLinear):
    """This rank's share (…, I / ranks) of the inputs -> (…, O) on every rank.

    The sum over the ranks has the type of the product, the bias is added once, after it.
    """

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102 - the class says it
        out = reduce_from_ranks(F.linear(x, self.weight), self.tensor)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class ColumnEmbedding(nn.Embedding):
    """Indices -> this rank's share of the embedding's columns."""

    def __init__(self, whole: nn.Embedding, style: Column, tensor: Axis) -> None:
        nn.Module.__init__(self)
        if whole.padding_idx is not None or whole.max_norm is not None or whole.sparse:
            raise ValueError("an embedding with padding_idx, max_norm or sparse gradients cannot be split")
        self.num_embeddings, self.embedding_dim = whole.num_embeddings, whole.embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, whole.scale_grad_by_freq, False
        self.style, self.tensor = style, tensor
        self.training = whole.training
        self.cut = cuts(style, nn.Embedding)["weight"]
        self.weight = _share(whole.weight, self.shards()["weight"])

    def shards(self) -> Mapping[str, Shard]:
        """Share of the table."""
        return {"weight": shard_on(self.tensor, self.cut)}

    def reset_parameters(self) -> None:
        """Draw the whole table from the same random numbers on each rank, and keep this rank's share."""
        made = nn.Embedding(self.num_embeddings, self.embedding_dim, device=self.weight.device)
        with torch.no_grad():
            self.weight.copy_(self.shards()["weight"].take(made.weight))


def _share(whole: Tensor, shard: Shard | None) -> nn.Parameter:
    """Share of a parameter, copied so that the whole one can be freed."""
    assert isinstance(whole, nn.Parameter), "of a linear or an embedding"
    if shard is None:
        return whole
    value = shard.take(whole.detach()).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(value, requires_grad=whole.requires_grad)


def whole_weight(layer: nn.Module) -> Tensor:
    """Whole weight of a linear, without a gradient; a collective where the layer is split."""
    weight = layer.weight
    assert isinstance(weight, Tensor), "of a linear"
    if isinstance(layer, SplitLinear):
        return joined(weight.detach(), layer.cuts["weight"], layer.tensor)
    return weight.detach()


class ShareOfDropout(nn.Module):
    """Dropout of a share of the last dimension.

    The mask is drawn for the whole dimension, and this rank takes its share of it: together the ranks' masks
    are the one that a single process draws.
    """

    def __init__(self, p: float, tensor: Axis) -> None:
        super().__init__()
        self.p, self.tensor = p, tensor

    def forward(self, x: Tensor) -> Tensor:
        """(…, I / ranks) -> (…, I / ranks)."""
        if not self.training or not self.p:
            return x
        whole = x.new_ones(*x.shape[:-1], x.shape[-1] * self.tensor.size)
        return x * shard_on(self.tensor, Cut(x.dim() - 1)).take(F.dropout(whole, self.p))


# -- splitting a built model over tensor ranks by its sharding; no model imports this


def apply_sharding(model: nn.Module, sharding: Sharding, tensor: Axis) -> nn.Module:
    """Replace the layers of ``model`` that ``sharding`` names by layers split over ``tensor``.

    Of a model on the meta device, only shapes change, and a checkpoint is then read share by share
    (:func:`sat.checkpoint.load`); of one with values, each layer keeps its rank's share. Layers that
    ``sharding`` does not name stay whole on every rank. Raises where a pattern matches nothing or a size does
    not divide; only a layer with gathered outputs may be missing, as nothing around it is split with it.
    """
    if tensor.size == 1:
        return model
    check_sharding(model, sharding, tensor.size)
    for path, style in [(path, style) for path, _, style in _named(model, sharding)]:  # whole layers may go
        parent, _, leaf = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, split(owner.get_submodule(leaf), style, tensor))
    return model


def split(layer: nn.Module, style: Column | Row, tensor: Axis) -> nn.Module:
    """Layer with this rank's share of one linear or embedding."""
    if isinstance(layer, nn.Embedding):
        assert isinstance(style, Column), "checked before"
        return ColumnEmbedding(layer, style, tensor)
    assert isinstance(layer, nn.Linear), "checked before"
    if isinstance(style, Row):
        return RowLinear(layer, style, tensor)
    kind = GatheredLinear if style.gather else ColumnLinear
    return kind(layer, style, tensor)


def check_sharding(model: nn.Module, sharding: Sharding, size: int) -> None:
    """Refuse a sharding of another model, and a number of tensor ranks that does not divide the sizes."""
    kind = type(model).__name__
    if not sharding:
        raise ValueError(f"{kind} cannot be split over tensor ranks: keys.py beside it declares no SHARDING")
    found = [(path, *_pieces(model, path, layer, style)) for path, layer, style in _named(model, sharding)]
    names = [path for path, _, _ in found]
    needed = [pattern for pattern, style in sharding.items() if not _gathers(style)]
    unused = [pattern for pattern in needed if not any(style_of({pattern: Row()}, name) for name in names)]
    if unused:
        raise ValueError(f"sharding patterns match no module of {kind}: {', '.join(unused)}")
    bad = [(path, count, what) for path, count, what in found if count % size]
    if bad:
        path, count, what = bad[0]
        common = math.gcd(*(count for _, count, _ in found))
        fits = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise ValueError(
            f"{kind} cannot be split over {size} tensor ranks: the {count} {what} of {path} do not divide; "
            f"possible are {', '.join(fits)}"
        )


def _named(model: nn.Module, sharding: Sharding) -> Iterator[tuple[str, nn.Module, Column | Row]]:
    """(name, layer, style) of the layers that ``sharding`` names."""
    for path, layer in model.named_modules():
        style = style_of(sharding, path)
        if style is None:
            continue
        if type(layer) is nn.Embedding and (isinstance(style, Row) or _gathers(style)):
            raise ValueError(
                f"the sharding of {path}, an embedding, must be Column without gather: "
                f"it is split by its outputs"
            )
        if type(layer) not in (nn.Linear, nn.Embedding):
            raise ValueError(
                f"the sharding names {path}, a {type(layer).__name__}: only linears and embeddings are split"
            )
        yield path, layer, style


def _gathers(style: Column | Row) -> bool:
    return isinstance(style, Column) and style.gather


def _pieces(model: nn.Module, path: str, layer: nn.Module, style: Column | Row) -> tuple[int, str]:
    """Largest number of pieces that a layer may be cut into, and the name of a piece."""
    owner = model.get_submodule(path.rpartition(".")[0])
    unit = 1 if style.unit is None else int(getattr(owner, style.unit))
    if isinstance(style, Row):
        assert isinstance(layer, nn.Linear), "an embedding is refused before"
        total = layer.in_features
    else:
        outputs = layer.embedding_dim if isinstance(layer, nn.Embedding) else layer.out_features
        assert isinstance(outputs, int), "a linear's or an embedding's"
        total = outputs // style.parts
    if isinstance(layer, nn.Embedding):
        return total, "columns"
    if style.unit is not None:
        return total // unit, "heads"
    return total, "inputs" if isinstance(style, Row) else "outputs"
