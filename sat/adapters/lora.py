"""LoRA and DoRA layers around linears: attached to a built model, weighed at run time, and taken off again.

Letters: r rank, I inputs, O outputs of a linear. A fused linear (q, k, v in one) has P parts of O / P rows
each, and factors of its own for every part.

Sources: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from sat.plan import Plan, of_factors
from sat.transformer import Transformer


class AdapterError(ValueError):
    """An adapter that does not fit the model, or a file that holds none. One line a user can act on."""


@dataclass(frozen=True)
class Pair:
    """The low-rank change of one part: ``alpha`` / r * ``up`` @ ``down``."""

    down: Tensor  # (r, I)
    up: Tensor  # (O / P, r)
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What multiplies the product of the factors."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LayerFactors:
    """One linear's share of an adapter: a pair for each part, or None for a part that stays as it is.

    ``magnitude`` (O,), of DoRA: the norms that the rows of the changed weight are brought to.
    """

    parts: tuple[Pair | None, ...]
    magnitude: Tensor | None = None

    @property
    def inputs(self) -> int:
        """I."""
        return next(pair.down.shape[1] for pair in self.parts if pair is not None)

    @property
    def part_outputs(self) -> int:
        """O / P."""
        return next(pair.up.shape[0] for pair in self.parts if pair is not None)


Layers = Mapping[str, LayerFactors]
"""An adapter's layers by the linear's name in its model."""


def row_norms(weight: Tensor) -> Tensor:
    """(O,) Euclidean norms of the rows of ``weight`` (O, I), at least float32."""
    return _wide(weight).square().sum(1).sqrt()


def weight_change(weight: Tensor, factors: LayerFactors) -> Tensor:
    """(O, I) what an adapter at strength 1 adds to ``weight``, at least float32."""
    wide = _wide(weight)
    change = torch.zeros_like(wide)
    for rows, pair in zip(change.chunk(len(factors.parts)), factors.parts, strict=True):
        if pair is not None:
            rows += pair.scale * (pair.up.to(wide) @ pair.down.to(wide))
    if factors.magnitude is None:
        return change
    changed = wide + change
    norms = row_norms(changed).clamp_min(torch.finfo(wide.dtype).tiny)
    return (factors.magnitude.to(wide) / norms)[:, None] * changed - wide


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class LinearLike(Protocol):
    """What an adapter asks of the layer it wraps: nn.Linear, and later its sharded and quantised versions."""

    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int


class Factors(nn.Module):
    """One adapter's factors of one linear, as parameters. ``gain`` (O,) is DoRA's.

    The magnitude is kept as a relative change of the base weight's row norms, ``norm * (1 + gain)``: it
    starts at 0 and keeps its precision in bfloat16, where a norm itself would be rounded.
    """

    def __init__(self, layer: LayerFactors, weight: Tensor, dropout: float) -> None:
        super().__init__()
        self.parts = len(layer.parts)
        self.alphas = {str(i): pair.alpha for i, pair in enumerate(layer.parts) if pair is not None}
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        for i, pair in enumerate(layer.parts):
            if pair is not None:
                self.down[str(i)] = _linear(pair.down, weight)
                self.up[str(i)] = _linear(pair.up, weight)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.gain: nn.Parameter | None = None
        if layer.magnitude is not None:
            norms = row_norms(weight.detach())
            gain = layer.magnitude.to(norms) / norms.clamp_min(torch.finfo(norms.dtype).tiny) - 1
            self.gain = nn.Parameter(gain.to(weight.dtype))

    def scale(self, part: str) -> float:
        """alpha / r of a part."""
        return self.alphas[part] / cast(nn.Linear, self.down[part]).out_features

    def forward(self, x: Tensor, out: Tensor, base: LinearLike) -> Tensor:
        """What is added to the base layer's output ``out`` (…, O) of ``x`` (…, I)."""
        change = self._low_rank(self.dropout(x), out)
        if self.gain is None:
            return change
        ratio = self._ratio(base.weight).to(out.dtype)
        plain = out if base.bias is None else out - base.bias.to(out.dtype)
        return (ratio - 1) * plain + ratio * change

    def _low_rank(self, x: Tensor, out: Tensor) -> Tensor:
        width = out.shape[-1] // self.parts
        changes = []
        for i in map(str, range(self.parts)):
            if i in self.down:
                low = self.down[i](x.to(self.dtype))
                changes.append((self.up[i](low) * self.scale(i)).to(out.dtype))
            else:
                changes.append(out.new_zeros(*out.shape[:-1], width))
        return changes[0] if self.parts == 1 else torch.cat(changes, -1)

    def _ratio(self, weight: Tensor) -> Tensor:
        """(O,) wanted over present norm of the changed weight's rows; the present norm is held constant.

        |W + sBA|^2 = |W|^2 + 2s (W A') . B + s^2 (B A A') . B, row by row, without making BA.
        Source: arXiv:2402.09353, section 4.3 (the norm carries no gradient).
        """
        assert self.gain is not None, "only DoRA asks"
        with torch.no_grad():
            wide = _wide(weight)
            squares = wide.square().sum(1)
            norms = squares.sqrt()
            for i in self.down:
                rows = squares.chunk(self.parts)[int(i)]
                down = cast(Tensor, self.down[i].weight).to(wide)
                up = cast(Tensor, self.up[i].weight).to(wide)
                s = self.scale(i)
                crossed = ((wide.chunk(self.parts)[int(i)] @ down.T) * up).sum(1)
                rows += 2 * s * crossed + s**2 * ((up @ (down @ down.T)) * up).sum(1)
            present = squares.clamp_min(torch.finfo(wide.dtype).tiny).sqrt()
        return norms / present * (1 + self.gain.to(wide.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return next(self.down.parameters()).dtype

    def layer(self, weight: Tensor, value: Callable[[nn.Parameter], Tensor]) -> LayerFactors:
        """These factors as data; ``value`` gives a parameter's tensor (itself, or its average)."""
        pairs: list[Pair | None] = []
        for i in map(str, range(self.parts)):
            if i not in self.down:
                pairs.append(None)
                continue
            down, up = (cast(nn.Parameter, side[i].weight) for side in (self.down, self.up))
            pairs.append(Pair(value(down), value(up), self.alphas[i]))
        if self.gain is None:
            return LayerFactors(tuple(pairs))
        gain = value(self.gain)
        norms = row_norms(weight.detach()).to(gain.device)
        return LayerFactors(tuple(pairs), norms * (1 + gain.to(norms.dtype)))


def _linear(value: Tensor, like: Tensor) -> nn.Linear:
    """A bias-free linear that holds ``value``, on the device and in the type of ``like``."""
    with torch.device("meta"):
        made = nn.Linear(value.shape[1], value.shape[0], bias=False)
    made.weight = nn.Parameter(value.detach().to(device=like.device, dtype=like.dtype, copy=True))
    return made


class Adapted(nn.Module):
    """A linear and any number of adapters: base(x) + sum of strength * change(x).

    It shows the base's ``weight``, ``bias`` and sizes, which the model around it reads.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.factors = nn.ModuleDict()
        self.strengths: dict[str, float] = {}

    @property
    def linear(self) -> LinearLike:
        """The wrapped layer, as what it is."""
        return cast(LinearLike, self.base)

    @property
    def weight(self) -> Tensor:
        """The base's."""
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

    def add(self, name: str, layer: LayerFactors, dropout: float, strength: float) -> None:
        """Add the adapter ``name``."""
        self.factors[name] = Factors(layer, self.weight, dropout)
        self.strengths[name] = strength

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        out: Tensor = self.base(x)
        plain = out
        for name, factors in self.factors.items():
            if strength := self.strengths[name]:
                change = factors(x, plain, self.linear)
                out = out + (change if strength == 1 else strength * change)
        return out

    def merged(self) -> nn.Module:
        """The base with every adapter folded into its weight, at its strength."""
        weight = self.weight
        total = _wide(weight.detach())
        total = total + sum(
            strength * weight_change(weight.detach(), layer)
            for strength, layer in ((self.strengths[n], self.layer(n)) for n in self.factors)
        )
        with torch.no_grad():
            weight.copy_(total)
        return self.base

    def layer(self, name: str, value: Callable[[nn.Parameter], Tensor] = torch.Tensor.detach) -> LayerFactors:
        """The factors of the adapter ``name``."""
        factors = self.factors[name]
        assert isinstance(factors, Factors), "add puts nothing else there"
        return factors.layer(self.weight, value)


# -- attaching and removing


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can be attached: a plain linear, or one that has adapters already."""
    return type(module) is nn.Linear or isinstance(module, Adapted)


def attach(
    model: nn.Module, name: str, layers: Layers, *, dropout: float = 0.0, strength: float = 1.0
) -> None:
    """Add the adapter ``name`` to the linears of ``model`` that ``layers`` names.

    What does not fit is refused before anything is changed.
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
    for module in model.modules():
        if isinstance(module, Transformer) and dropout:
            module.draws = True


def check(model: nn.Module, layers: Layers) -> None:
    """Refuse an adapter whose ``layers`` are not those of ``model``; the model may be on the meta device."""
    for path, layer in layers.items():
        _check(model, path, layer)


def _check(model: nn.Module, path: str, layer: LayerFactors) -> None:
    kind = type(model).__name__
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise AdapterError(f"{kind} has no layer {path!r}: the adapter is of another model") from None
    if not is_linear(module):
        raise AdapterError(f"{path!r} of {kind} is a {type(module).__name__}, an adapter needs a linear")
    base = cast(LinearLike, module)
    there, here = (layer.inputs, layer.part_outputs * len(layer.parts)), (base.in_features, base.out_features)
    if there != here:
        raise AdapterError(
            f"{path!r}: the adapter is for {there[0]} inputs and {there[1]} outputs, {kind} has "
            f"{here[0]} and {here[1]}: it is of another model, or of another size of this one"
        )
    for pair in layer.parts:
        if pair is not None and pair.up.shape[1] != pair.rank:
            raise AdapterError(f"{path!r}: rank {pair.rank} of lora_A, {pair.up.shape[1]} of lora_B")


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """(name, layer) of every linear with adapters."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            yield path, module


def names(model: nn.Module) -> list[str]:
    """The adapters that ``model`` has, each once, in the order they came."""
    return list(dict.fromkeys(name for _, module in adapted(model) for name in module.factors))


def set_strength(model: nn.Module, name: str, strength: float) -> None:
    """How much the adapter ``name`` counts from now on: 0 not at all, 1 as trained."""
    if name not in (known := names(model)):
        raise AdapterError(f"there is no adapter {name!r}; there are {', '.join(known) or 'none'}")
    for _, module in adapted(model):
        if name in module.factors:
            module.strengths[name] = strength


def merge(model: nn.Module) -> None:
    """Fold every adapter into the weights it changes, at its strength, and take it off."""
    for path, module in adapted(model):
        _put(model, path, module.merged())


def detach(model: nn.Module, name: str) -> None:
    """Take the adapter ``name`` off; the model is as if it had never been there."""
    for path, module in adapted(model):
        if name in module.factors:
            del module.factors[name], module.strengths[name]
        if not module.factors:
            _put(model, path, module.base)


def extract(
    model: nn.Module, name: str, value: Callable[[nn.Parameter], Tensor] = torch.Tensor.detach
) -> dict[str, LayerFactors]:
    """The adapter ``name`` as data; ``value`` gives a parameter's tensor."""
    return {path: module.layer(name, value) for path, module in adapted(model) if name in module.factors}


def fresh(linear: LinearLike, ranks: tuple[int, ...], alphas: tuple[float, ...], seed: str) -> LayerFactors:
    """Factors that change nothing yet: random ``down``, zero ``up``. ``seed`` is any text.

    ``down`` is uniform in +-1 / sqrt(I). Source: arXiv:2106.09685, section 4.1.
    """
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=4).digest(), "little")
    generator = torch.Generator().manual_seed(number)
    bound = 1 / math.sqrt(linear.in_features)
    rows = linear.out_features // len(ranks)
    pairs = [
        Pair(
            bound * (2 * torch.rand(rank, linear.in_features, generator=generator) - 1),
            torch.zeros(rows, rank),
            alpha,
        )
        for rank, alpha in zip(ranks, alphas, strict=True)
    ]
    return LayerFactors(tuple(pairs))


def with_magnitude(layer: LayerFactors, weight: Tensor) -> LayerFactors:
    """``layer`` as DoRA that changes nothing yet: the rows of ``weight`` keep their norms."""
    return replace(layer, magnitude=row_norms(weight.detach()))


def sharding(model: nn.Module, plan: Plan) -> Plan:
    """``plan`` for ``model`` with its adapters: exact names of base layers and of the factors that are split.

    What is applied to a model without adapters is applied to one with them by this plan; see
    :func:`sat.plan.of_factors`. DoRA's ``gain`` is not in it.
    """
    out = {}
    for path, module in model.named_modules():
        style = next((style for pattern, style in plan.items() if fnmatchcase(path, pattern)), None)
        if style is None:
            continue
        if not isinstance(module, Adapted):
            out[path] = style
            continue
        out[f"{path}.base"] = style
        down, up = of_factors(style)
        for name, factors in module.factors.items():
            assert isinstance(factors, Factors), "add puts nothing else there"
            for side, kind in (("down", down), ("up", up)):
                if kind is not None:
                    out.update({f"{path}.factors.{name}.{side}.{part}": kind for part in factors.down})
    return out
