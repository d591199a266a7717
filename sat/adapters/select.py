"""Linears of a model that get an adapter: groups and patterns become names, parts and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import nn

from sat.adapters.factors import AdapterError, LinearLike
from sat.adapters.groups import GROUPS, hint, patterns
from sat.adapters.lora import adapted, is_linear
from sat.sharding import Column, family_sharding, style_of

Parts = Mapping[str, nn.Module]
"""The adaptable parts of an engine: ``model`` and ``text``. A layer's full name is ``part.name``."""


@dataclass(frozen=True)
class Linear:
    """A linear that could have an adapter."""

    parts: int
    inputs: int
    outputs: int


def linears(module: nn.Module) -> dict[str, Linear]:
    """The linears of one part by name, and of how many fused projections each consists."""
    plan = family_sharding(type(module))
    inside = tuple(f"{name}." for name, _ in adapted(module))
    found = {}
    for name, child in module.named_modules():
        if not is_linear(child) or name.startswith(inside):
            continue
        style = style_of(plan, name)
        base = cast(LinearLike, child)
        parts = style.parts if isinstance(style, Column) else 1
        found[name] = Linear(parts, base.in_features, base.out_features)
    return found


def choose(
    parts: Parts, targets: Sequence[str], rank: int, ranks: Mapping[str, int]
) -> dict[str, tuple[Linear, int]]:
    """Full name -> the linear and its rank, for every layer that ``targets`` name.

    ``ranks`` are groups or patterns with a rank of their own; the last that matches a layer decides.
    """
    known = {
        f"{part}.{name}": layer for part, module in parts.items() for name, layer in linears(module).items()
    }
    what = " and ".join(type(module).__name__ for module in parts.values())
    chosen: dict[str, tuple[Linear, int]] = {}
    for target in targets:
        hits = _hits(target, known)
        if not hits:
            near = "" if target in GROUPS else hint(target, [*_there(known), *known])
            raise AdapterError(
                f"{target!r} matches no layer of {what}{near} "
                f"(groups with layers: {', '.join(_there(known))})"
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


def _hits(target: str, known: Mapping[str, Linear]) -> list[str]:
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns(target))]


def _there(known: Mapping[str, Linear]) -> list[str]:
    """The groups that this model has."""
    return [group for group in GROUPS if _hits(group, known)]
