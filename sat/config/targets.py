"""Names that a ``target`` may have, the parameters of a class, and the kind of object it makes."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import sys
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Union, get_args, get_origin

PACKAGES = ("bitsandbytes", "torchao")
"""Packages with optimizers of few bits, on PyPI under the names of the modules."""


class TargetError(ValueError):
    """A target that cannot be used, and why."""


@dataclass(frozen=True)
class Signature:
    """Parameters of a target: ``params`` from YAML (name -> annotation), ``runtime`` ones from the caller."""

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
    if not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(f"expected the dotted name of a module such as my_package.parts, got {name!r}")
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names or root in sys.builtin_module_names:
        what = "belongs to Python itself; `imports` is for modules with components of your own"
        raise TargetError(f"{name!r} {what}")
    try:
        importlib.import_module(name)
    except ImportError as error:
        on_pypi = root in PACKAGES
        advice = f"install it with `pip install {root}`" if on_pypi else "is its folder on PYTHONPATH?"
        raise TargetError(f"cannot import {name!r}: {error}; {advice}") from error
    except (Exception, SystemExit) as error:  # its code runs
        raise TargetError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error


def resolve(target: Any, imports: Collection[str] = ()) -> Any:
    """The class or function named by ``target``: of ``sat``, ``torch.optim`` or one of ``imports``."""
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise TargetError(f"expected a dotted name such as sat.package.module.Class, got {target!r}")
    module = ".".join(parts[:-1])
    if parts[0] == "sgm":
        what = "is a class of the official code; official files are translated only as a whole"
        raise TargetError(f"{target!r} {what}")
    if not allowed(module, imports):
        what = "is outside sat and torch.optim; list its module in `imports` to allow it"
        raise TargetError(f"{target!r} {what}: imports: [{module}]")
    return _import(target, tuple(imports))


def allowed(module: str, imports: Collection[str]) -> bool:
    """True if a target may live in ``module``."""
    return any(module == root or module.startswith(f"{root}.") for root in ("sat", "torch.optim", *imports))


@lru_cache(maxsize=512)
def _import(target: str, imports: tuple[str, ...]) -> Any:
    module, _, name = target.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if not missing or not module.startswith(missing):
            raise TargetError(f"cannot import {module!r}: {error}") from error
        parent, _, leaf = missing.rpartition(".")
        paths = getattr(sys.modules.get(parent), "__path__", ())
        near = difflib.get_close_matches(leaf, [m.name for m in pkgutil.iter_modules(paths)], 1)
        advice = f"; did you mean {parent}.{near[0]}?" if near else ""
        raise TargetError(f"no module {missing!r}{advice}") from error
    except (Exception, SystemExit) as error:
        raise TargetError(f"cannot import {module!r}: {type(error).__name__}: {error}") from error
    made = getattr(found, name, None)
    if name.startswith("_") or not hasattr(found, name):
        public = [n for n, v in vars(found).items() if inspect.isclass(v) or inspect.isfunction(v)]
        raise TargetError(f"module {module!r} has no {name!r}{hint(name, public)}")
    if not (inspect.isclass(made) or inspect.isfunction(made)):
        raise TargetError(f"{target!r} is not a class or function")
    if not allowed(made.__module__, imports):
        what = f"is defined in {made.__module__!r}, outside sat, torch.optim and `imports`"
        raise TargetError(f"{target!r} {what}")
    return made


@lru_cache(maxsize=512)
def signature(made: Any) -> Signature:
    """Parameters of the class or function ``made``; ``TargetError`` when they cannot be checked.

    The caller alone gives keyword-only ones and, to an optimizer of any package, ``params``.
    """
    parameters = inspect.signature(made).parameters
    for p in parameters.values():
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            stars = "**" if p.kind is p.VAR_KEYWORD else "*"
            what = "whose names cannot be checked; a configurable class lists its parameters"
            raise TargetError(f"{made.__name__} takes {stars}{p.name}, {what}")
    torch = sys.modules.get("torch.optim")  # without it no optimizer is there
    optimizer = torch is not None and inspect.isclass(made) and issubclass(made, torch.Optimizer)
    runtime = tuple(n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY)
    if optimizer or made.__module__.startswith("torch."):
        runtime = ("params",)
    hints = _hints(made)
    taken = {n: p for n, p in parameters.items() if n not in runtime}
    return Signature(
        name=made.__name__,
        params={n: hints.get(n, Any) for n in taken},
        required=tuple(n for n, p in taken.items() if p.default is p.empty),
        defaults={n: p.default for n, p in taken.items() if p.default is not p.empty},
        runtime=runtime,
    )


def _hints(made: Any) -> dict[str, Any]:
    """Annotations of the parameters of ``made``; one that cannot be evaluated is left out."""
    function = made.__init__ if inspect.isclass(made) else made
    found: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        holder = types.SimpleNamespace(__annotations__={name: annotation}, __globals__=function.__globals__)
        try:
            hints = typing.get_type_hints(holder, globalns=function.__globals__, include_extras=True)
        except (NameError, TypeError, AttributeError):
            continue
        found |= hints
    return found


@lru_cache(maxsize=64)
def field_hints(cls: type) -> dict[str, Any]:
    """Annotations of the fields of the dataclass ``cls``."""
    return typing.get_type_hints(cls, include_extras=True)


def produces(made: Any, wanted: Any) -> bool:
    """True if building ``made`` gives what ``wanted`` annotates; a Protocol is met by having its members."""
    result = made if inspect.isclass(made) else _hints(made).get("return")
    arms = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    classes = [a for a in (get_origin(a) or a for a in arms) if inspect.isclass(a) and a is not type(None)]
    if Any in arms or not classes:
        return True
    return inspect.isclass(result) and any(_is_a(result, cls) for cls in classes)


def _is_a(result: type, wanted: type) -> bool:
    if not getattr(wanted, "_is_protocol", False):
        return issubclass(result, wanted)
    own = [n for n, v in vars(wanted).items() if callable(v) and (n == "__call__" or not n.startswith("_"))]
    # Every class has ``type.__call__``: a member counts where a class defines it.
    return all(callable(getattr(result, n, None)) and any(n in vars(c) for c in result.__mro__) for n in own)
