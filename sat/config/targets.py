"""What a ``target`` names: which names are allowed, what the class takes, and what it makes."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Union, get_args, get_origin

PACKAGES = ("bitsandbytes", "torchao")
"""What has optimizers of few bits, on PyPI under the names of the modules."""


class TargetError(ValueError):
    """A target that cannot be used, and why."""


@dataclass(frozen=True)
class Signature:
    """What a target takes: ``params`` from YAML (name -> annotation), ``runtime`` objects from the caller."""

    name: str
    params: Mapping[str, Any]
    required: tuple[str, ...]
    defaults: Mapping[str, Any]
    runtime: tuple[str, ...]


def hint(name: str, known: Iterable[str]) -> str:
    """``; did you mean '…'?`` when a known name is close, else nothing."""
    near = difflib.get_close_matches(name, [str(k) for k in known], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def load_name(name: str) -> Any:
    """The object that ``name`` (``package.module.object``) names, as written in this code, never in YAML."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def check_import(name: str) -> None:
    """Raise unless the module ``name`` of ``imports`` can be imported and is not Python's own."""
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names or root in sys.builtin_module_names:
        raise TargetError(
            f"{name!r} belongs to Python itself; `imports` is for modules with components of your own"
        )
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise TargetError(f"cannot import {name!r}: {error}; {_where_from(root)}") from error


def _where_from(package: str) -> str:
    """What to do about a package that is not there."""
    if package in PACKAGES:
        return f"install it with `pip install {package}`"
    return "is its folder on PYTHONPATH?"


def resolve(target: Any, imports: Collection[str] = ()) -> Any:
    """The class or function named by ``target``: of ``sat``, ``torch.optim`` or one of ``imports``."""
    if not isinstance(target, str):
        raise TargetError(f"expected a dotted name such as sat.package.module.Class, got {target!r}")
    module, _, name = target.rpartition(".")
    if not (module and all(part.isidentifier() for part in target.split("."))):
        raise TargetError(f"expected a dotted name such as sat.package.module.Class, got {target!r}")
    if target.startswith("sgm."):
        raise TargetError(
            f"{target!r} is a class of the official code; official files are translated only as a whole"
        )
    if not allowed(module, imports):
        raise TargetError(
            f"{target!r} is outside sat and torch.optim; "
            f"list its module in `imports` to allow it: imports: [{module}]"
        )
    return _import(target, tuple(imports))


@lru_cache(maxsize=512)
def _import(target: str, imports: tuple[str, ...]) -> Any:
    module, _, name = target.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise TargetError(f"no module {error.name!r}{_near_module(error.name)}") from error
        raise TargetError(f"cannot import {module!r}: {error}") from error
    except ImportError as error:
        raise TargetError(f"cannot import {module!r}: {error}") from error
    public = [n for n, v in vars(found).items() if inspect.isclass(v) or inspect.isfunction(v)]
    if name.startswith("_") or not hasattr(found, name):
        raise TargetError(f"module {module!r} has no {name!r}{hint(name, public)}")
    made = getattr(found, name)
    if not (inspect.isclass(made) or inspect.isfunction(made)):
        raise TargetError(f"{target!r} is not a class or function")
    if not allowed(made.__module__, imports):
        raise TargetError(
            f"{target!r} is defined in {made.__module__!r}, outside sat, torch.optim and `imports`"
        )
    return made


def allowed(module: str, imports: Collection[str]) -> bool:
    """Whether a target may live in ``module``."""
    return any(module == root or module.startswith(f"{root}.") for root in ("sat", "torch.optim", *imports))


def _near_module(name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    package = sys.modules.get(parent)
    if package is None or not hasattr(package, "__path__"):
        return ""
    import pkgutil

    near = difflib.get_close_matches(leaf, [m.name for m in pkgutil.iter_modules(package.__path__)], 1)
    return f"; did you mean {parent}.{near[0]}?" if near else ""


@lru_cache(maxsize=512)
def signature(made: Any) -> Signature:
    """What the class or function ``made`` takes; ``TargetError`` when its parameters cannot be checked."""
    parameters = inspect.signature(made).parameters
    for p in parameters.values():
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            stars = "**" if p.kind is p.VAR_KEYWORD else "*"
            raise TargetError(
                f"{made.__name__} takes {stars}{p.name}, whose names cannot be checked; "
                f"a configurable class lists its parameters"
            )
    runtime = _runtime(made, parameters)
    hints = _hints(made)
    taken = {n: p for n, p in parameters.items() if n not in runtime}
    return Signature(
        name=made.__name__,
        params={n: hints.get(n, Any) for n in taken},
        required=tuple(n for n, p in taken.items() if p.default is p.empty),
        defaults={n: p.default for n, p in taken.items() if p.default is not p.empty},
        runtime=runtime,
    )


def _runtime(made: Any, parameters: Mapping[str, inspect.Parameter]) -> tuple[str, ...]:
    """Parameters that only the caller gives: keyword-only ones; for torch's optimizers, what to optimise."""
    if made.__module__.startswith("torch.") or _optimises(made):
        return ("params",)
    return tuple(n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY)


def _optimises(made: Any) -> bool:
    """An optimizer of any package; one can only be loaded once torch is."""
    torch = sys.modules.get("torch.optim")
    return torch is not None and inspect.isclass(made) and issubclass(made, torch.Optimizer)


def _hints(made: Any) -> dict[str, Any]:
    """Annotations of the parameters of ``made``; one that cannot be evaluated is left out."""
    function = made.__init__ if inspect.isclass(made) else made
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return _hints_one_by_one(function)


def _hints_one_by_one(function: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        holder = types.SimpleNamespace(__annotations__={name: annotation}, __globals__=function.__globals__)
        try:
            found[name] = typing.get_type_hints(holder, globalns=function.__globals__)[name]
        except (NameError, TypeError, AttributeError):
            continue
    return found


@lru_cache(maxsize=64)
def field_hints(cls: type) -> dict[str, Any]:
    """Annotations of the fields of the dataclass ``cls``."""
    return typing.get_type_hints(cls, include_extras=True)


def produces(made: Any, wanted: Any) -> bool:
    """Does building ``made`` give what is annotated ``wanted``? A Protocol is met by having its members."""
    result = made if inspect.isclass(made) else _hints(made).get("return")
    arms = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    classes = [a for a in (get_origin(a) or a for a in arms) if inspect.isclass(a) and a is not type(None)]
    if Any in arms or not classes:
        return True
    if not inspect.isclass(result):
        return False
    return any(_is_a(result, w) for w in classes)


def _is_a(result: type, wanted: type) -> bool:
    if not getattr(wanted, "_is_protocol", False):
        return issubclass(result, wanted)
    ignored = {"__init__", "__subclasshook__"}
    members = {
        n for n, v in vars(wanted).items() if callable(v) and (n == "__call__" or not n.startswith("_"))
    } - ignored
    return all(callable(getattr(result, n, None)) and _defines(result, n) for n in members)


def _defines(result: type, name: str) -> bool:
    """Every class has ``type.__call__``; what counts is a method of its instances."""
    return any(name in vars(c) for c in result.__mro__)
