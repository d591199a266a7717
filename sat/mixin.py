"""Named, typed extension points, and the table that says which mixin owns each of them.

A *host* lists its extension points as a frozen dataclass of callables (``TransformerHooks``,
``ProcessHooks``). A *mixin* fills some of them with methods marked ``@replaces("attend")`` or
``@wraps("layer")``. :func:`resolve` turns the host's defaults and its mixins into one hooks instance, once,
at construction; after that a hook call is a plain attribute call.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, cast, get_type_hints

from torch import nn

H = TypeVar("H")
F = TypeVar("F", bound=Callable[..., Any])
Kind = Literal["replaces", "wraps"]


class HookError(TypeError):
    """A mixin names a hook that its host does not have, or fills it with the wrong parameters."""


class HookConflictError(ValueError):
    """Two mixins replace the same hook."""


class Declared(NamedTuple):
    """The hook that a mixin method fills, and how."""

    hook: str
    kind: Kind


def replaces(name: str) -> Callable[[F], F]:
    """Mark a mixin method as the only implementation of hook ``name``."""
    return _mark(name, "replaces")


def wraps(name: str) -> Callable[[F], F]:
    """Mark a mixin method as a layer around hook ``name``; its first parameter is ``inner``."""
    return _mark(name, "wraps")


def _mark(name: str, kind: Kind) -> Callable[[F], F]:
    def mark(method: F) -> F:
        method._hook = Declared(name, kind)  # type: ignore[attr-defined]
        return method

    return mark


class Mixin(nn.Module):
    """Parameters plus hook implementations; see :func:`replaces` and :func:`wraps`.

    A mixin never sees its host: what it needs comes at construction and, per call, in the hook's arguments.
    It keeps no state between calls.
    """

    host: ClassVar[type]
    """The hooks dataclass this mixin plugs into."""
    declared: ClassVar[Mapping[str, Declared]]
    """Method name -> the hook it fills."""

    def __init_subclass__(cls, **kw: Any) -> None:
        super().__init_subclass__(**kw)
        found: dict[str, Declared] = {}
        for base in reversed(cls.__mro__):
            for method, member in vars(base).items():
                if hasattr(member, "_hook"):
                    found[method] = member._hook
        cls.declared = found
        known = {f.name for f in fields(cls.host)} if found else set()
        for method, (hook, kind) in found.items():
            if hook not in known:
                near = difflib.get_close_matches(hook, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise HookError(
                    f"{cls.__name__}.{method}: {cls.host.__name__} has no hook {hook!r}{hint} "
                    f"(it has {sorted(known)})"
                )
            want = list(inspect.signature(get_type_hints(cls.host)[hook].__call__).parameters)[1:]
            got = list(inspect.signature(getattr(cls, method)).parameters)[1:]
            want = ["inner", *want] if kind == "wraps" else want
            if got != want:
                raise HookError(
                    f"{cls.__name__}.{method} {kind} {hook!r} with parameters {got}; it must take {want}"
                )


@dataclass(frozen=True)
class Resolved(Generic[H]):
    """The callables to use and, for each hook, its owners, outermost first. ``print`` shows the owners."""

    hooks: H
    owners: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        width = max(map(len, self.owners))
        return "\n".join(f"{hook:<{width}}  {' -> '.join(chain)}" for hook, chain in self.owners.items())


def resolve(defaults: H, mixins: Mapping[str, Mixin]) -> Resolved[H]:
    """``defaults`` filled from ``mixins``: replacements first, then wrappers in order, the last outermost.

    Raises :class:`HookError` for a mixin of another host and :class:`HookConflictError` for two owners.
    """
    host = type(defaults)
    impl: dict[str, Callable[..., Any]] = {f.name: getattr(defaults, f.name) for f in fields(defaults)}  # type: ignore[arg-type]
    owners: dict[str, tuple[str, ...]] = {name: ("default",) for name in impl}
    taken: dict[str, str] = {}
    todo = []
    for name, mixin in mixins.items():
        if mixin.host is not host:
            raise HookError(
                f"mixin {name!r} ({type(mixin).__name__}) plugs into {mixin.host.__name__}, "
                f"not into {host.__name__}"
            )
        todo += [(kind, hook, name, getattr(mixin, m)) for m, (hook, kind) in type(mixin).declared.items()]
    for kind, hook, name, fn in todo:
        if kind == "replaces":
            if hook in taken:
                raise HookConflictError(
                    f"mixins {taken[hook]!r} and {name!r} both replace hook {hook!r}: "
                    "keep one, or make one of them wrap it"
                )
            taken[hook], impl[hook], owners[hook] = name, fn, (name,)
    for kind, hook, name, fn in todo:
        if kind == "wraps":
            impl[hook] = functools.partial(fn, impl[hook])
            owners[hook] = (name, *owners[hook])
    return Resolved(host(**impl), owners)


class Host(nn.Module, Generic[H]):
    """A network with extension points: its own mixins, and those put on the built one from outside.

    A subclass gives the defaults of its hooks, as bound methods: a deep copy rebinds those, where a closure
    would keep the original's parts. ``print(host.resolved)`` shows who owns each hook.
    """

    resolved: Resolved[H]
    mixins: nn.ModuleDict

    def extend(self, name: str, mixin: Mixin) -> None:
        """Add ``mixin`` around those there are."""
        if name in self.mixins:
            raise ValueError(f"the {type(self).__name__.lower()} has a mixin {name!r} already")
        self.mixins[name] = mixin
        self._resolve()

    def remove(self, name: str) -> None:
        """Take a mixin off again."""
        del self.mixins[name]
        self._resolve()

    def _resolve(self) -> None:
        mixins = cast("Mapping[str, Mixin]", dict(self.mixins.items()))
        self.resolved = resolve(self._defaults(), mixins)

    def _defaults(self) -> H:
        raise NotImplementedError
