"""Splitting a built model over tensor ranks by its plan; no model imports this."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from sat.parallel.linear import ColumnEmbedding, ColumnLinear, GatheredLinear, RowLinear
from sat.parallel.mesh import Axis
from sat.sharding import Column, Plan, Row, style_of


def apply_plan(model: nn.Module, plan: Plan, tensor: Axis) -> nn.Module:
    """Put layers split over ``tensor`` in the place of those of ``model`` that ``plan`` names.

    Of a model on the meta device, only shapes change, and a checkpoint is then read share by share
    (:func:`sat.checkpoint.load`); of one with values, each layer keeps its rank's share. What the plan does
    not name stays whole on every rank. Raises where a pattern matches nothing or a size does not divide; only
    a layer whose outputs are gathered may be missing, as nothing around it is split with it.
    """
    if tensor.size == 1:
        return model
    check_plan(model, plan, tensor.size)
    for path, style in [(path, style) for path, _, style in _planned(model, plan)]:  # whole layers may go
        parent, _, leaf = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, split(owner.get_submodule(leaf), style, tensor))
    return model


def split(layer: nn.Module, style: Column | Row, tensor: Axis) -> nn.Module:
    """This rank's share of one linear or embedding."""
    if isinstance(layer, nn.Embedding):
        assert isinstance(style, Column), "checked before"
        return ColumnEmbedding(layer, style, tensor)
    assert isinstance(layer, nn.Linear), "checked before"
    if isinstance(style, Row):
        return RowLinear(layer, style, tensor)
    kind = GatheredLinear if style.gather else ColumnLinear
    return kind(layer, style, tensor)


def check_plan(model: nn.Module, plan: Plan, size: int) -> None:
    """Refuse a plan that is not of ``model``, and a number of tensor ranks that does not divide its sizes."""
    kind = type(model).__name__
    if not plan:
        raise ValueError(
            f"{kind} has no plan that says how it is split over tensor ranks (plan.py beside it)"
        )
    found = [(path, *_pieces(model, path, layer, style)) for path, layer, style in _planned(model, plan)]
    names = [path for path, _, _ in found]
    needed = [pattern for pattern, style in plan.items() if not _gathers(style)]
    unused = [pattern for pattern in needed if not any(style_of({pattern: Row()}, name) for name in names)]
    if unused:
        raise ValueError(f"plan patterns match no module of {kind}: {', '.join(unused)}")
    bad = [(path, count, what) for path, count, what in found if count % size]
    if bad:
        path, count, what = bad[0]
        common = math.gcd(*(count for _, count, _ in found))
        fits = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise ValueError(
            f"{kind} cannot be split over {size} tensor ranks: the {count} {what} of {path} do not divide; "
            f"possible are {', '.join(fits)}"
        )


def _planned(model: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, Column | Row]]:
    """(name, layer, style) of what ``plan`` names in ``model``."""
    for path, layer in model.named_modules():
        style = style_of(plan, path)
        if style is None:
            continue
        if type(layer) is nn.Embedding and (isinstance(style, Row) or _gathers(style)):
            raise ValueError(
                f"the plan of {path}, an embedding, must be Column without gather: it is split by its outputs"
            )
        if type(layer) not in (nn.Linear, nn.Embedding):
            raise ValueError(
                f"the plan names {path}, a {type(layer).__name__}: only linears and embeddings are split"
            )
        yield path, layer, style


def _gathers(style: Column | Row) -> bool:
    return isinstance(style, Column) and style.gather


def _pieces(model: nn.Module, path: str, layer: nn.Module, style: Column | Row) -> tuple[int, str]:
    """Into how many pieces a layer may be cut at most, and what a piece is called."""
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
