"""An adapter's layers under other names: a rule list of weights (``keys.py``) says where each factor goes.

Rules act on the rows of a weight, so they act on ``up`` (whose rows those are) and on DoRA's magnitude, and
leave ``down`` alone. Where one of their linears is several of ours, the factors are put together without
loss: its rank is then the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sat.adapters.factors import AdapterError, LayerFactors, Pair
from sat.adapters.select import linears
from sat.checkpoint.rules import Source, family_rules, write_map
from sat.keys import Rules, Split, SwapHalves

WEIGHT = ".weight"


@dataclass(frozen=True)
class Flat:
    """The factors of one unfused linear, as other programs keep them."""

    pair: Pair
    magnitude: Tensor | None = None  # (O,)


@dataclass(frozen=True)
class Layout:
    """How one naming calls the linears of a part: their name -> where its rows come from, by our names."""

    name: str  # DIFFUSERS, HF, SAT
    places: Mapping[str, Source]
    parts: Mapping[str, int]  # our name -> number of fused parts


def layouts(module: nn.Module) -> list[Layout]:
    """The namings of ``module`` that are not our own, the one other programs use first."""
    rules = family_rules(type(module))
    fused = {name: linear.parts for name, linear in linears(module).items()}
    return [
        Layout(name, _places(fused, rules[name]), fused)
        for name in ("DIFFUSERS", "HF", "SAT")
        if name in rules
    ]


def _places(names: Mapping[str, int], rules: Rules) -> dict[str, Source]:
    found = write_map([name + WEIGHT for name in names], rules)
    return {
        theirs.removesuffix(WEIGHT): Source(
            tuple(name.removesuffix(WEIGHT) for name in source.names), source.rule, source.part
        )
        for theirs, source in found.sources.items()
    }


def to_theirs(layers: Mapping[str, LayerFactors], layout: Layout) -> dict[str, Flat]:
    """``layers`` under the names of ``layout``."""
    out: dict[str, Flat] = {}
    flat: Flat | None
    written: set[str] = set()
    for theirs, source in layout.places.items():
        mine = [layers[name] for name in source.names if name in layers]
        if not mine:
            continue
        written.update(source.names)
        if isinstance(source.rule, Split):
            flat = _stacked([layers.get(name) for name in source.names], theirs)
        elif source.part is not None:
            flat = _part(mine[0], source.part)
        elif len(mine[0].parts) > 1:
            raise AdapterError(f"{source.names[0]!r} is fused, {layout.name} names it {theirs!r} whole")
        else:
            flat = _part(mine[0], 0)
            if flat is not None and isinstance(source.rule, SwapHalves):
                flat = _turned(flat)
        if flat is not None:
            out[theirs] = flat
    if left := [name for name in layers if name not in written]:
        raise AdapterError(f"{layout.name} names have no place for the adapter's layer {left[0]!r}")
    return out


def to_ours(flats: Mapping[str, Flat], layout: Layout) -> dict[str, LayerFactors]:
    """``flats``, whose names are all in ``layout``, as our layers."""
    pairs: dict[str, dict[int, Flat]] = {}
    for theirs, flat in flats.items():
        source = layout.places[theirs]
        if isinstance(source.rule, Split):
            for index, name in enumerate(source.names):
                pairs.setdefault(name, {})[0] = _rows(flat, index, len(source.names), theirs)
        else:
            turned = _turned(flat) if isinstance(source.rule, SwapHalves) else flat
            pairs.setdefault(source.names[0], {})[source.part or 0] = turned
    return {name: _layer(found, layout.parts[name], name) for name, found in pairs.items()}


def _layer(found: Mapping[int, Flat], parts: int, name: str) -> LayerFactors:
    pairs = tuple(found[i].pair if i in found else None for i in range(parts))
    magnitudes = [found[i].magnitude if i in found else None for i in range(parts)]
    known = [m for m in magnitudes if m is not None]
    if known and len(known) < parts:
        raise AdapterError(f"{name!r}: DoRA of some of its {parts} fused parts only, which is not supported")
    return LayerFactors(pairs, torch.cat(known) if known else None)


def _part(layer: LayerFactors, part: int) -> Flat | None:
    pair = layer.parts[part]
    if pair is None:
        return None
    return Flat(pair, None if layer.magnitude is None else layer.magnitude.chunk(len(layer.parts))[part])


def _turned(flat: Flat) -> Flat:
    """The halves of the rows swapped."""
    first, second = flat.pair.up.chunk(2)
    magnitude = None if flat.magnitude is None else torch.cat(flat.magnitude.chunk(2)[::-1])
    return Flat(Pair(flat.pair.down, torch.cat([second, first]), flat.pair.alpha), magnitude)


def _rows(flat: Flat, index: int, count: int, theirs: str) -> Flat:
    """One of ``count`` equal shares of the rows; ``down`` is the same for all."""
    up = flat.pair.up
    if up.shape[0] % count:
        raise AdapterError(f"{theirs!r}: lora_B of {up.shape[0]} rows does not split into {count}")
    magnitude = None if flat.magnitude is None else flat.magnitude.chunk(count)[index]
    return Flat(Pair(flat.pair.down, up.chunk(count)[index], flat.pair.alpha), magnitude)


def _stacked(layers: list[LayerFactors | None], theirs: str) -> Flat:
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
    return Flat(pair, torch.cat(magnitudes) if magnitudes else None)
