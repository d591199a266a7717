"""Names of the layers that an adapter changes: by group or pattern, and as other programs have them.

A rule list of weights (``keys.py``) says where each factor goes in another program. Rules act on the rows of
a weight, so they act on ``up``, which has those rows, and on DoRA's magnitude, and leave ``down`` alone.
Where one of their linears is several of ours, the factors are put together without loss: its rank is then
the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sat.adapters.factors import AdapterError, LayerFactors, Pair, shape
from sat.adapters.groups import GROUPS, hint, patterns
from sat.adapters.lora import adapted, takes_factors
from sat.checkpoint.rules import Source, family_rules, write_map
from sat.keys import Split, SwapHalves
from sat.sharding import Column, family_sharding, style_of

Parts = Mapping[str, nn.Module]
"""The adaptable parts of an engine: ``model`` and ``text``. A layer's full name is ``part.name``."""


@dataclass(frozen=True)
class Layer:
    """A linear, or a convolution with a ``kernel`` of so many points, that could have an adapter."""

    parts: int
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()


def adaptable(module: nn.Module) -> dict[str, Layer]:
    """The linears and convolutions of one part by name, each with its number of fused projections."""
    sharding = family_sharding(type(module))
    inside = tuple(f"{name}." for name, _ in adapted(module))
    found = {}
    for name, child in module.named_modules():
        if not takes_factors(child) or name.startswith(inside):
            continue
        style = style_of(sharding, name)
        outputs, inputs, *kernel = shape(child)
        found[name] = Layer(style.parts if isinstance(style, Column) else 1, inputs, outputs, tuple(kernel))
    return found


def choose(
    parts: Parts, targets: Sequence[str], rank: int, ranks: Mapping[str, int]
) -> dict[str, tuple[Layer, int]]:
    """Full name -> the layer and its rank, for every one that ``targets`` name.

    A pattern that names linears means these alone, one that names none means convolutions.

    ``ranks`` are groups or patterns with a rank of their own; the last that matches a layer decides.
    """
    known = {
        f"{part}.{name}": layer for part, module in parts.items() for name, layer in adaptable(module).items()
    }
    what = " and ".join(type(module).__name__ for module in parts.values())
    groups = [group for group in GROUPS if _hits(group, known)]  # that this model has
    chosen: dict[str, tuple[Layer, int]] = {}
    for target in targets:
        hits = _hits(target, known)
        hits = [name for name in hits if not known[name].kernel] or hits
        if not hits:
            near = "" if target in GROUPS else hint(target, [*groups, *known])
            raise AdapterError(
                f"{target!r} matches no layer of {what}{near} (groups with layers: {', '.join(groups)})"
            )
        chosen |= {name: (known[name], rank) for name in hits}
    for target, other in ranks.items():
        hits = [name for name in _hits(target, known) if name in chosen]
        if not hits:
            raise AdapterError(
                f"ranks: {target!r} matches no targeted layer{hint(target, [*targets, *chosen])}"
            )
        chosen |= {name: (known[name], other) for name in hits}
    order = [name for name in known if name in chosen]
    return {name: chosen[name] for name in order}


def _hits(target: str, known: Mapping[str, Layer]) -> list[str]:
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns(target))]


# -- other programs' names


WEIGHT = ".weight"


@dataclass(frozen=True)
class Unfused:
    """The factors of one unfused linear, as other programs keep them."""

    pair: Pair
    magnitude: Tensor | None = None  # (O,)


@dataclass(frozen=True)
class Layout:
    """One program's names of a part's linears: their name -> origin of its rows, by our names."""

    name: str  # DIFFUSERS, HF, SAT
    places: Mapping[str, Source]
    parts: Mapping[str, int]  # our name -> number of fused parts


def layouts(module: nn.Module) -> list[Layout]:
    """The layouts of ``module`` that are not our own, the one other programs use first."""
    rules = family_rules(type(module))
    fused = {name: layer.parts for name, layer in adaptable(module).items()}
    found = []
    for layout in ("DIFFUSERS", "HF", "SAT"):
        if layout in rules:
            places = {}
            for theirs, source in write_map([name + WEIGHT for name in fused], rules[layout]).sources.items():
                ours = tuple(name.removesuffix(WEIGHT) for name in source.names)
                places[theirs.removesuffix(WEIGHT)] = Source(ours, source.rule, source.part)
            found.append(Layout(layout, places, fused))
    return found


def to_theirs(layers: Mapping[str, LayerFactors], layout: Layout) -> dict[str, Unfused]:
    """``layers`` under the names of ``layout``."""
    out: dict[str, Unfused] = {}
    one: Unfused | None
    written: set[str] = set()
    for theirs, source in layout.places.items():
        mine = [layers[name] for name in source.names if name in layers]
        if not mine:
            continue
        written.update(source.names)
        if isinstance(source.rule, Split):
            one = _stacked([layers.get(name) for name in source.names], theirs)
        elif source.part is not None:
            one = _part(mine[0], source.part)
        elif len(mine[0].parts) > 1:
            raise AdapterError(f"{source.names[0]!r} is fused, {layout.name} names it {theirs!r} whole")
        else:
            one = _part(mine[0], 0)
            if one is not None and isinstance(source.rule, SwapHalves):
                one = _swapped(one)
        if one is not None:
            out[theirs] = one
    if left := [name for name in layers if name not in written]:
        raise AdapterError(f"{layout.name} names have no place for the adapter's layer {left[0]!r}")
    return out


def to_ours(unfused: Mapping[str, Unfused], layout: Layout) -> dict[str, LayerFactors]:
    """``unfused``, whose names are all in ``layout``, as our layers."""
    pairs: dict[str, dict[int, Unfused]] = {}
    for theirs, one in unfused.items():
        source = layout.places[theirs]
        if isinstance(source.rule, Split):
            for index, name in enumerate(source.names):
                pairs.setdefault(name, {})[0] = _rows(one, index, len(source.names), theirs)
        else:
            swapped = _swapped(one) if isinstance(source.rule, SwapHalves) else one
            pairs.setdefault(source.names[0], {})[source.part or 0] = swapped
    return {name: _layer(found, layout.parts[name], name) for name, found in pairs.items()}


def _layer(found: Mapping[int, Unfused], parts: int, name: str) -> LayerFactors:
    pairs = tuple(found[i].pair if i in found else None for i in range(parts))
    magnitudes = [found[i].magnitude if i in found else None for i in range(parts)]
    known = [m for m in magnitudes if m is not None]
    if known and len(known) < parts:
        raise AdapterError(f"{name!r}: DoRA of some of its {parts} fused parts only, which is not supported")
    return LayerFactors(pairs, torch.cat(known) if known else None)


def _part(layer: LayerFactors, part: int) -> Unfused | None:
    pair = layer.parts[part]
    if pair is None:
        return None
    return Unfused(pair, None if layer.magnitude is None else layer.magnitude.chunk(len(layer.parts))[part])


def _swapped(one: Unfused) -> Unfused:
    """The halves of the rows swapped."""
    first, second = one.pair.up.chunk(2)
    magnitude = None if one.magnitude is None else torch.cat(one.magnitude.chunk(2)[::-1])
    return Unfused(Pair(one.pair.down, torch.cat([second, first]), one.pair.alpha), magnitude)


def _rows(one: Unfused, index: int, count: int, theirs: str) -> Unfused:
    """One of ``count`` equal shares of the rows; ``down`` is the same for all."""
    up = one.pair.up
    if up.shape[0] % count:
        raise AdapterError(f"{theirs!r}: lora_B of {up.shape[0]} rows does not split into {count}")
    magnitude = None if one.magnitude is None else one.magnitude.chunk(count)[index]
    return Unfused(Pair(one.pair.down, up.chunk(count)[index], one.pair.alpha), magnitude)


def _stacked(layers: list[LayerFactors | None], theirs: str) -> Unfused:
    """Several of ours, one after the other on the rows, as one: the factors become blocks of larger ones."""
    there = [layer for layer in layers if layer is not None]
    rows, inputs = there[0].part_outputs, there[0].inputs
    magnitudes = [layer.magnitude for layer in there if layer.magnitude is not None]
    if magnitudes and len(magnitudes) < len(layers):
        raise AdapterError(f"{theirs!r}: DoRA of some of the layers it is made of cannot be written")
    downs, ups = [], []
    for place, layer in enumerate(layers):
        pair = None if layer is None else layer.parts[0]
        if pair is None:
            continue
        up = pair.up.new_zeros(rows * len(layers), pair.rank)
        up[place * rows : (place + 1) * rows] = pair.scale * pair.up
        downs.append(pair.down)
        ups.append(up)
    down = torch.cat(downs)
    assert down.shape[1] == inputs, "layers that are one of theirs read the same"
    pair = Pair(down, torch.cat(ups, 1), float(down.shape[0]))  # scales are in ``up``
    return Unfused(pair, torch.cat(magnitudes) if magnitudes else None)
