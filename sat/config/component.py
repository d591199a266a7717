"""Objects from the components of a checked experiment."""

from __future__ import annotations

import inspect
import types
from collections.abc import Collection, Mapping
from typing import Any, Union, get_args, get_origin

from sat.config.check import INVALID, fit, is_plain, split
from sat.config.schema import Component
from sat.config.targets import resolve, signature


def build(component: Component | Mapping[str, Any], *, imports: Collection[str] = (), **runtime: Any) -> Any:
    """The object that ``component`` names; ``runtime`` are the arguments that only the caller has."""
    target, params = _parts(component)
    made = resolve(target, imports)
    takes = signature(made)
    if strange := sorted(set(runtime) - {*takes.runtime, *takes.params}):
        raise TypeError(f"{takes.name} takes no {', '.join(strange)}")
    if both := sorted(set(runtime) & set(params)):
        raise TypeError(f"{takes.name}: {', '.join(both)} given both in the config and at run time")
    values = {n: _argument(takes.params.get(n, Any), v, imports) for n, v in params.items()}
    for name, value in values.items():
        if isinstance(value, list) and isinstance(takes.defaults.get(name), tuple):
            values[name] = tuple(value)  # of a package without annotations
    return made(**values, **runtime)


def _parts(component: Component | Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(component, Component):
        return component.target, component.params
    return component["target"], component.get("params") or {}


def _argument(wanted: Any, value: Any, imports: Collection[str]) -> Any:
    """``value`` of YAML as an argument: components built, lists turned into tuples where asked for."""
    wanted, _ = split(wanted)
    if isinstance(value, Component) or (isinstance(value, Mapping) and "target" in value):
        return build(value, imports=imports)
    if is_plain(wanted):
        made = fit(wanted, value)
        if made is INVALID:
            raise TypeError(f"expected {wanted}, got {value!r}")
        return made
    arms = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    inner = next((a for a in arms if a is not type(None)), Any)
    arguments = get_args(inner) or (Any,)
    if isinstance(value, Mapping):
        if inspect.isclass(inner) and hasattr(inner, "__dataclass_fields__"):
            return build_record(inner, value, imports)
        return {n: _argument(arguments[-1], v, imports) for n, v in value.items()}
    if isinstance(value, list):
        items = [_argument(arguments[0], v, imports) for v in value]
        return tuple(items) if get_origin(inner) is tuple else items
    return value


def build_record(cls: type, value: Mapping[str, Any], imports: Collection[str]) -> Any:
    """An instance of the dataclass ``cls`` from a mapping of its fields."""
    takes = signature(cls)
    return cls(**{n: _argument(takes.params.get(n, Any), v, imports) for n, v in value.items()})
