"""LoRA, DoRA and LoKr of linears, LoRA of convolutions: attached, weighted at run time, and taken off.

Letters: r rank, I inputs, O outputs of a linear. A fused linear (q, k, v in one) has P parts of O / P rows
each, and factors of its own for every part.

Sources: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353; LoKr, and factors of a convolution (LoCon: ``down``
a convolution into r channels as the layer's own is, ``up`` one of 1 x 1), arXiv:2309.14859, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.adapters.factors import (
    AdapterError,
    Kron,
    LayerFactors,
    Layers,
    LinearLike,
    Pair,
    finite_cast,
    row_norms,
    shape,
    weight_change,
    widened,
)
from sat.kernels.packed import FrozenLinear, LowRank, PackedLinear
from sat.kernels.packed import adapted as adapted_product
from sat.kernels.quantize import QuantizedLinear
from sat.parallel.launch import Axis
from sat.parallel.tensor import (
    RowLinear,
    ShareOfDropout,
    SplitLinear,
    copy_to_ranks,
    gather_from_ranks,
    joined,
    reduce_from_ranks,
    shard_on,
    split,
    summed,
    whole_weight,
)
from sat.sharding import Column, Cut, Row, Shard, of_factors
from sat.transformer.transformer import dtype_of


class Factors(nn.Module):
    """One adapter's factors of one layer, as parameters. ``gain`` (O,) is DoRA's.

    The magnitude is kept as a relative change of the base weight's row norms, ``norm * (1 + gain)``: it
    starts at 0 and keeps its precision in bfloat16, where a norm itself would be rounded.

    ``layer`` is whole; of a base that is split over tensor ranks the factors are split as it is
    (:func:`sat.sharding.of_factors`), and so is the gain of a column. Where the base gathers its outputs,
    each rank finds the change of its share of them, and the changes are gathered.
    """

    def __init__(self, layer: LayerFactors, base: nn.Module, dropout: float) -> None:
        super().__init__()
        weight = cast(LinearLike, base).weight
        self.parts = len(layer.parts)
        self.scales = {str(i): pair.scale for i, pair in enumerate(layer.parts) if pair is not None}
        self.alphas = {str(i): pair.alpha for i, pair in enumerate(layer.parts) if pair is not None}
        self.down, self.up, self.kron = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        split_by = base.style if isinstance(base, SplitLinear) else None
        for i, pair in enumerate(layer.parts):
            if pair is not None and pair.kron is not None:
                tensor = base.tensor if isinstance(base, SplitLinear) else None
                self.kron[str(i)] = KronFactors(pair.kron, pair.scale, weight, split_by, tensor)
            elif pair is not None:
                self.down[str(i)], self.up[str(i)] = _products(pair, base)
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.tensor: Axis | None = None
        self.style: Column | Row | None = None
        if isinstance(base, SplitLinear):
            self._split(base.style, base.tensor, dropout)
        self.gain: nn.Parameter | None = None
        if layer.magnitude is not None:
            norms, shard = base_norms(base), self._gain_shard()
            gain = layer.magnitude.to(norms) / norms.clamp_min(torch.finfo(norms.dtype).tiny) - 1
            gain = gain if shard is None else shard.take(gain).clone()
            self.gain = nn.Parameter(gain.to(weight.dtype))

    def _split(self, style: Column | Row, tensor: Axis, dropout: float) -> None:
        """Keep this rank's share of the factors of a base that is split by ``style``."""
        self.style, self.tensor = style, tensor
        for side, kind in zip((self.down, self.up), of_factors(style), strict=True):
            if kind is not None:
                for part in side:
                    side[part] = split(side[part], kind, tensor)
        if dropout and isinstance(style, Row):
            self.dropout = ShareOfDropout(dropout, tensor)

    def _gain_shard(self) -> Shard | None:
        """This rank's share of a vector over the outputs; None: it has all of it."""
        if self.tensor is None or not isinstance(self.style, Column):
            return None
        return shard_on(self.tensor, Cut(0, self.style.parts))

    def shards(self) -> Mapping[str, Shard]:
        """This rank's share of the gain; the factors tell theirs themselves."""
        shard = self._gain_shard()
        return {} if shard is None or self.gain is None else {"gain": shard}

    def _summed(self, x: Tensor) -> Tensor:
        """``x``, a sum over the inputs, of which each rank has a part if the base is split over them."""
        return summed(x, self.tensor) if self.tensor is not None and isinstance(self.style, Row) else x

    @property
    def bare(self) -> bool:
        """True if the change is the factors' product with the input alone: no gain, no dropout, no share."""
        plain = self.gain is None and self.tensor is None and not self.kron
        return plain and isinstance(self.dropout, nn.Identity)

    def pairs(self) -> list[LowRank]:
        """The factors of each part that has some."""
        return [
            LowRank(int(i), _weight(self.down[i]), _weight(self.up[i]), self.scales[i]) for i in self.down
        ]

    def forward(self, x: Tensor, out: Tensor, base: LinearLike) -> Tensor:
        """Change of the base's output ``out`` (…, O) for the input ``x`` (…, I); or of maps (B, O, h, w)."""
        if not isinstance(self.style, Column) or not self.style.gather or self.tensor is None:
            return self._change(x, out, base)
        own = shard_on(self.tensor, Cut(out.dim() - 1, self.parts)).take(out)
        return gather_from_ranks(self._change(x, own, base), self.parts, self.tensor)

    def _change(self, x: Tensor, out: Tensor, base: LinearLike) -> Tensor:
        """The same, of this rank's outputs if the base is split over them."""
        x = self.dropout(x).to(self.dtype)
        changes = []
        for i in map(str, range(self.parts)):
            if i in self.down:
                changes.append((self.up[i](self.down[i](x)) * self.scales[i]).to(out.dtype))
            elif i in self.kron:
                changes.append(self.kron[i](x).to(out.dtype))
            else:
                changes.append(out.new_zeros(*out.shape[:-1], out.shape[-1] // self.parts))
        change = changes[0] if self.parts == 1 else torch.cat(changes, -1)  # (…, O): s B A x
        if self.gain is None:
            return change
        ratio = self._ratio(base.weight).to(out.dtype)
        plain = out if base.bias is None else out - base.bias.to(out.dtype)
        return (ratio - 1) * plain + ratio * change

    def _ratio(self, weight: Tensor) -> Tensor:
        """Ratio (O,) of wanted to present norm of the changed rows; the present norm is held constant.

        |W + sBA|^2 = |W|^2 + 2s (W A') . B + s^2 (B A A') . B, row by row, without making BA.
        Source: arXiv:2402.09353, section 4.3 (the norm carries no gradient).
        """
        assert self.gain is not None, "only DoRA asks"
        with torch.no_grad():
            wide = widened(weight)
            squares = self._summed(wide.square().sum(1))
            norms = squares.sqrt()
            for i in self.down:
                rows = squares.chunk(self.parts)[int(i)]
                down = cast(Tensor, self.down[i].weight).to(wide)
                up = cast(Tensor, self.up[i].weight).to(wide)
                s = self.scales[i]
                crossed = (self._summed(wide.chunk(self.parts)[int(i)] @ down.T) * up).sum(1)
                rows += 2 * s * crossed + s**2 * ((up @ self._summed(down @ down.T)) * up).sum(1)
            present = squares.clamp_min(torch.finfo(wide.dtype).tiny).sqrt()
        return norms / present * (1 + self.gain.to(wide.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return next(self.parameters()).dtype

    def layer(self, base: nn.Module, value: Value | None = None) -> LayerFactors:
        """These factors as data, whole; ``value`` gives a parameter's whole tensor, also of ``base``.

        Without it they are gathered: of a ``base`` that is split every tensor rank calls it.
        """
        pairs: list[Pair | None] = []
        for i in map(str, range(self.parts)):
            if i in self.kron:
                pairs.append(cast(KronFactors, self.kron[i]).pair(value))
                continue
            if i not in self.down:
                pairs.append(None)
                continue
            down, up = (
                whole_weight(m) if value is None else value(_weight(m)) for m in (self.down[i], self.up[i])
            )
            pairs.append(Pair(down, up.flatten(1), self.alphas[i]))
        if self.gain is None:
            return LayerFactors(tuple(pairs))
        shard = self._gain_shard()
        if value is not None:
            gain = value(self.gain)
        elif shard is None or self.tensor is None:
            gain = self.gain.detach()
        else:
            gain = joined(self.gain.detach(), shard.cut, self.tensor)
        weight = cast(nn.Parameter, cast(LinearLike, base).weight)
        norms = (base_norms(base) if value is None else row_norms(value(weight))).to(gain.device)
        return LayerFactors(tuple(pairs), norms * (1 + gain.to(norms.dtype)))


class KronFactors(nn.Module):
    """LoKr's factors of one part: x -> ``scale`` (w1 (x) a b) x, without making the product.

    On tensor ranks each has its rows of w1 under a column, its columns under a row; a and b are whole.
    """

    def __init__(
        self, kron: Kron, scale: float, like: Tensor, style: Column | Row | None, tensor: Axis | None
    ) -> None:
        super().__init__()
        self.scale, self.rank, self.style, self.tensor = scale, kron.rank, style, tensor
        side = kron.w1.shape[int(isinstance(style, Row))]
        if tensor is not None and side % tensor.size:
            raise AdapterError(
                f"LoKr: w1 of {tuple(kron.w1.shape)} is not split over {tensor.size} tensor ranks: choose "
                f"adapters.lora.lokr as a multiple of {tensor.size} that divides the layers' sizes"
            )

        def parameter(value: Tensor) -> nn.Parameter:
            fitting = finite_cast(value.detach(), like.dtype, "a layer")
            return nn.Parameter(fitting.to(device=like.device, copy=True))

        shard = self.shards().get("w1")
        self.w1 = parameter(kron.w1 if shard is None else shard.take(kron.w1).contiguous())
        self.a = parameter(kron.a)
        self.b = None if kron.b is None else parameter(kron.b)

    def shards(self) -> Mapping[str, Shard]:
        """This rank's share of w1."""
        if self.tensor is None or self.style is None:
            return {}
        return {"w1": shard_on(self.tensor, Cut(int(isinstance(self.style, Row))))}

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O), of this rank's inputs or outputs."""
        a: Tensor = self.a
        b: Tensor | None = self.b
        if self.tensor is not None and isinstance(self.style, Row):  # each has a part of their gradients
            a, b = copy_to_ranks(a, self.tensor), None if b is None else copy_to_ranks(b, self.tensor)
        x = x.reshape(*x.shape[:-1], self.w1.shape[1], -1)  # (…, i1, i2)
        x = F.linear(x if b is None else F.linear(x, b), a)  # (…, i1, o2)
        if self.tensor is not None and isinstance(self.style, Column):
            x = copy_to_ranks(x, self.tensor)
        out = (self.w1 @ x).flatten(-2) * self.scale  # (…, o1, o2) -> (…, O)
        if self.tensor is not None and isinstance(self.style, Row):
            out = reduce_from_ranks(out, self.tensor)
        return out

    def pair(self, value: Value | None) -> Pair:
        """The factors as data, whole; see :meth:`Factors.layer`."""
        if value is not None:
            return Kron(
                value(self.w1), value(self.a), None if self.b is None else value(self.b), self.rank
            ).pair(self.scale)
        w1, shard = self.w1.detach(), self.shards().get("w1")
        if shard is not None and self.tensor is not None:
            w1 = joined(w1, shard.cut, self.tensor)
        b = None if self.b is None else self.b.detach()
        return Kron(w1, self.a.detach(), b, self.rank).pair(self.scale)


Value = Callable[[nn.Parameter], Tensor]
"""Gives the whole tensor of a parameter: its own, or its average."""


def base_norms(base: nn.Module) -> Tensor:
    """Norms (O,) of the rows of a linear's weight; of one that is split every tensor rank calls it."""
    weight = cast(LinearLike, base).weight.detach()
    if isinstance(base, RowLinear):
        return summed(widened(weight).square().sum(1), base.tensor).sqrt()
    if isinstance(base, SplitLinear):
        return joined(row_norms(weight), Cut(0, base.cuts["weight"].parts), base.tensor)
    return row_norms(weight)


def _weight(linear: nn.Module) -> nn.Parameter:
    weight = linear.weight
    assert isinstance(weight, nn.Parameter), "the factors are linears or convolutions"
    return weight


def _products(pair: Pair, base: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Layers without bias that hold ``down`` and ``up``, on the device and in the type of ``base``'s weight.

    Of a convolution, ``down`` strides and pads as it does: (B, I, h, w) -> (B, r, h', w') -> (B, O, h', w').
    """
    like = cast(LinearLike, base).weight
    (rank, inputs), outputs = pair.down.shape[:2], pair.up.shape[0]
    down: nn.Linear | nn.Conv2d
    up: nn.Linear | nn.Conv2d
    with torch.device("meta"):
        if isinstance(base, nn.Conv2d):
            how: Any = base.kernel_size, base.stride, base.padding, base.dilation, 1, False, base.padding_mode
            down = nn.Conv2d(inputs, rank, *how)
            up = nn.Conv2d(rank, outputs, 1, bias=False)
        else:
            down, up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
    for layer, value in ((down, pair.down), (up, pair.up)):
        factor = finite_cast(value.detach(), like.dtype, "a layer").to(device=like.device, copy=True)
        layer.weight = nn.Parameter(factor.view(layer.weight.shape))
    return down, up


class Adapted(nn.Module):
    """A linear or a convolution and any number of adapters: base(x) + sum of strength * change(x).

    It shows the base's ``weight``, ``bias`` and sizes, which the model around it reads.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.factors = nn.ModuleDict()
        self.strengths: dict[str, float] = {}

    @property
    def linear(self) -> LinearLike:
        """The wrapped layer."""
        return cast(LinearLike, self.base)

    @property
    def dtype(self) -> torch.dtype:
        """Type that the base computes in."""
        return dtype_of(self.base)

    @property
    def weight(self) -> Tensor:
        """The base's; dequantised at each access if it is quantised."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.linear.bias

    @property
    def in_features(self) -> int:
        """I."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.linear.out_features

    @property
    def out_channels(self) -> int:
        """O of a convolution."""
        return cast(nn.Conv2d, self.base).out_channels

    def add(self, name: str, layer: LayerFactors, dropout: float, strength: float) -> None:
        """Add the adapter ``name``."""
        self.factors[_slot(name)] = Factors(layer, self.base, dropout)
        self.strengths[name] = strength

    def remove(self, name: str) -> None:
        """Take the adapter ``name`` away."""
        del self.factors[_slot(name)], self.strengths[name]

    def named(self, name: str) -> Factors:
        """The factors of the adapter ``name``."""
        factors = self.factors[_slot(name)]
        assert isinstance(factors, Factors), "add puts nothing else there"
        return factors

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O), or maps (B, I, h, w) -> (B, O, h', w')."""
        acting = [(name, strength) for name, strength in self.strengths.items() if strength]
        if isinstance(self.base, FrozenLinear) and torch.is_grad_enabled() and len(acting) == 1:
            ((name, strength),) = acting
            factors = self.named(name)
            if strength == 1 and factors.bare and x.dtype == factors.dtype == self.base.dtype:
                return adapted_product(x, self.base, factors.parts, factors.pairs())  # in one pass
        out: Tensor = self.base(x)
        plain = out
        for name, strength in acting:
            change = self.named(name)(x, plain, self.linear)
            out = out + (change if strength == 1 else strength * change)
        return out

    def merged(self) -> nn.Module:
        """The base, made plain if it is not, with every adapter in its weight, at its strength."""
        packed = isinstance(self.base, (QuantizedLinear, PackedLinear))
        base = cast(QuantizedLinear, self.base).plain() if packed else self.base
        whole = whole_weight(base)
        total = widened(whole)
        total = total + sum(
            strength * weight_change(whole, layer)
            for strength, layer in ((s, self.layer(name)) for name, s in self.strengths.items())
        )
        if isinstance(self.base, SplitLinear):
            total = self.base.shards()["weight"].take(total)
        own = cast(LinearLike, base).weight
        with torch.no_grad():
            own.copy_(finite_cast(total, own.dtype, "a weight"))
        return base

    def layer(self, name: str, value: Value | None = None) -> LayerFactors:
        """The factors of the adapter ``name`` as data; see :meth:`Factors.layer`."""
        return self.named(name).layer(self.base, value)


def _slot(name: str) -> str:
    """The key of an adapter among modules, which may not be called as one of their methods (``half``)."""
    return f"{name}_" if hasattr(nn.ModuleDict, name) else name


# -- attaching and removing


_KINDS = (Adapted, SplitLinear, QuantizedLinear, PackedLinear)


def takes_factors(module: nn.Module) -> bool:
    """True if an adapter can be attached: to a linear of any kind, a convolution, or an adapted one."""
    plain = type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)
    return plain or isinstance(module, _KINDS)


def attach(
    model: nn.Module, name: str, layers: Layers, *, dropout: float = 0.0, strength: float = 1.0
) -> None:
    """Add the adapter ``name`` to the layers of ``model`` that ``layers`` names.

    An adapter that does not fit is refused before anything is changed.
    """
    if not name or "." in name:
        raise AdapterError(f"an adapter's name is letters and digits without a dot, got {name!r}")
    if name in names(model):
        raise AdapterError(f"the model has an adapter {name!r} already")
    check(model, layers)
    for path, layer in layers.items():
        module = model.get_submodule(path)
        if not isinstance(module, Adapted):
            module = Adapted(module).train(module.training)
            _put(model, path, module)
        module.add(name, layer, dropout, strength)
        module.train(module.training)


def check(model: nn.Module, layers: Layers) -> None:
    """Refuse an adapter whose ``layers`` are not those of ``model``; the model may be on the meta device."""
    kind = type(model).__name__
    for path, layer in layers.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise AdapterError(f"{kind} has no layer {path!r}: the adapter is of another model") from None
        if not takes_factors(module):
            what = "an adapter needs a linear or a convolution"
            raise AdapterError(f"{path!r} of {kind} is a {type(module).__name__}, {what}")
        outputs, inputs, *kernel = shape(module)
        theirs, ours = (layer.inputs, layer.part_outputs * len(layer.parts)), (inputs, outputs)
        if theirs != ours:
            raise AdapterError(
                f"{path!r}: the adapter is for {theirs[0]} inputs and {theirs[1]} outputs, {kind} has "
                f"{ours[0]} and {ours[1]}: it is of another model, or of another size of this one"
            )
        for what, there in (("DoRA", layer.magnitude is not None), ("LoKr", layer.kron)):
            if kernel and there:
                raise AdapterError(f"{path!r} is a convolution, which takes LoRA factors alone, no {what}")
        if layer.kernel != (tuple(kernel) or (1, 1)):
            is_, has = ("x".join(map(str, size)) for size in (layer.kernel, kernel or (1, 1)))
            raise AdapterError(
                f"{path!r}: is a LoRA of a convolution of {is_}, {kind} has one of {has} there"
            )
        for pair in layer.parts:
            if pair is not None and pair.up.shape[1] != pair.rank:
                raise AdapterError(f"{path!r}: rank {pair.rank} of lora_A, {pair.up.shape[1]} of lora_B")


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every layer with adapters, as (name, layer)."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            yield path, module


def names(model: nn.Module) -> list[str]:
    """The adapters of ``model``, each once, in the order of attaching."""
    return list(dict.fromkeys(name for _, module in adapted(model) for name in module.strengths))


def set_strength(model: nn.Module, name: str, strength: float) -> None:
    """Set the strength of the adapter ``name``: 0 none, 1 as trained."""
    if not math.isfinite(strength):
        raise AdapterError(f"the strength of {name!r} is {strength}, expected a number")
    if name not in (known := names(model)):
        raise AdapterError(f"there is no adapter {name!r}; there are {', '.join(known) or 'none'}")
    for _, module in adapted(model):
        if name in module.strengths:
            module.strengths[name] = strength


@contextmanager
def strengths(model: nn.Module, values: Mapping[str, float]) -> Iterator[None]:
    """``model`` with other strengths of the adapters named in ``values``, for the block."""
    layers = [module for _, module in adapted(model)]
    kept = [dict(module.strengths) for module in layers]
    for module in layers:
        module.strengths.update({name: value for name, value in values.items() if name in module.strengths})
    try:
        yield
    finally:
        for module, before in zip(layers, kept, strict=True):
            module.strengths.update(before)


def merge(model: nn.Module) -> None:
    """Fold every adapter into the weights it changes, at its strength, and take it off."""
    for path, module in adapted(model):
        _put(model, path, module.merged())


def detach(model: nn.Module, name: str) -> None:
    """Take the adapter ``name`` off; the model is as if it had never been there."""
    for path, module in adapted(model):
        if name in module.strengths:
            module.remove(name)
        if not module.strengths:
            _put(model, path, module.base)


def extract(model: nn.Module, name: str, value: Value | None = None) -> dict[str, LayerFactors]:
    """The adapter ``name`` as data, whole; ``value`` gives a parameter's whole tensor.

    Without it they are gathered: over tensor ranks every one of them calls it.
    """
    return {path: module.layer(name, value) for path, module in adapted(model) if name in module.strengths}
