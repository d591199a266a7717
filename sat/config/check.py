"""Checks a merged tree against the schema and the signatures of the classes it names; makes typed sections.

Every problem is found in one go. Plain values are checked by pydantic, strictly: a quoted number is not a
number, a bool is not an int, an int is fine where a float is asked for.
"""

from __future__ import annotations

import functools
import inspect
import json
import operator
import types
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sat.config.schema import Component, Makes, MustExist, RuleError
from sat.config.targets import (
    Signature,
    TargetError,
    check_import,
    field_hints,
    hint,
    load_name,
    produces,
    resolve,
    signature,
)
from sat.config.yaml_source import Key, Marks, Problem, dotted, find, shown, where
from sat.data.formats import expand

INVALID: Final = object()
_PLAIN = (str, int, float, bool, type(None), Path, object)


class Checker:
    """Walks a tree once; collects ``problems``, and in ``missing`` the inputs that do not exist (yet)."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self.imports: list[str] = []
        self._absent: list[str] = []  # of those asked for
        self.problems: list[Problem] = []
        self.missing: list[Problem] = []

    def allow(self, imports: Any) -> None:
        """Take ``imports``, the modules outside sat whose classes may be targets."""
        for index, name in enumerate(imports if isinstance(imports, list) else []):
            try:
                if isinstance(name, str):
                    check_import(name)
                    self.imports.append(name)
            except TargetError as error:
                self.report(("imports", str(index)), str(error))
                if isinstance(error.__cause__, ImportError):
                    self._absent.append(name)

    def report(self, key: Key, what: str) -> None:
        """Note one problem at ``key``."""
        self.problems.append(Problem(str(where(self.marks, key)), dotted(key), what))

    def section(self, cls: type, tree: Mapping[str, Any], key: Key) -> Any:
        """An instance of the dataclass ``cls`` from ``tree``, or INVALID."""
        hints = field_hints(cls)
        known = {f.name: f for f in fields(cls)}
        for name in tree:
            if name not in known:
                kind = "section" if not key else "key"
                self.report((*key, name), f"no such {kind}{hint(name, known)} (there are {', '.join(known)})")
        values: dict[str, Any] = {}
        bad: list[str] = []
        for name, f in known.items():
            if name in tree:
                made = self.value(hints[name], tree[name], (*key, name))
                if made is INVALID:
                    bad.append(name)
                else:
                    values[name] = made
            elif f.default is MISSING and f.default_factory is MISSING:
                bad.append(name)
                self.report(key or (name,), _needs(name, key))
        return self._make(cls, values, bad, key)

    def _make(self, cls: type, values: dict[str, Any], bad: list[str], key: Key) -> Any:
        """The section; a bad field is left to its default, so that the others' rules are still checked."""
        known = {f.name: f for f in fields(cls)}
        plain_default = [known[n].default is not MISSING for n in bad]
        if not all(plain_default):  # needed keys, and whole sections, whose defaults would not fit the rest
            return INVALID
        try:
            made = cls(**values)
        except RuleError as error:
            for name, what in error.broken:
                if name not in bad:
                    self.report((*key, name) if name else key, what)
            return INVALID
        except ValueError as error:
            self.report(key, str(error))
            return INVALID
        return INVALID if bad else made

    def value(self, wanted: Any, value: Any, key: Key) -> Any:
        """``value`` as the annotation ``wanted`` asks, or INVALID; components stay as written."""
        wanted, notes = split(wanted)
        for note in notes:
            if isinstance(note, MustExist) and isinstance(value, str):
                return self._input(value, note, key)
            if isinstance(note, Makes):
                return self._optional(wanted, value, key, load_name(note.name))
        if _is_component(value) or wanted is Component:
            return self._optional(wanted, value, key, Any)
        if get_origin(wanted) in (Union, types.UnionType):
            return self._union(wanted, value, key)
        return self._single(wanted, value, key)

    def _single(self, wanted: Any, value: Any, key: Key) -> Any:
        """As :meth:`value`, for an annotation without alternatives."""
        origin, arguments = get_origin(wanted) or wanted, get_args(wanted)
        if inspect.isclass(origin) and is_dataclass(origin):
            if isinstance(value, Mapping):
                return self.section(origin, value, key)
        elif isinstance(value, dict) and _subclass(origin, Mapping):
            inner = arguments[1] if len(arguments) == 2 else Any
            return self._all({n: self.value(inner, v, (*key, n)) for n, v in value.items()})
        elif (
            isinstance(value, list)
            and origin is tuple
            and len(arguments) == len(value)
            and ... not in arguments
        ):
            parts = [
                self.value(a, v, (*key, str(i)))
                for i, (a, v) in enumerate(zip(arguments, value, strict=True))
            ]
            return INVALID if INVALID in parts else tuple(parts)
        elif isinstance(value, list) and _subclass(origin, (Sequence, AbstractSet)) and not is_plain(wanted):
            inner = arguments[0] if arguments else Any
            return self._all([self.value(inner, v, (*key, str(i))) for i, v in enumerate(value)])
        elif wanted is Any:
            self._inside(value, key)
            return value
        elif is_plain(wanted):
            return self._leaf(wanted, value, key)
        self.report(key, f"expected {show(wanted)}, got {shown(value)}")
        return INVALID

    def _all(self, made: Any) -> Any:
        """``made``, or INVALID when any item is."""
        return (
            INVALID
            if any(v is INVALID for v in (made.values() if isinstance(made, dict) else made))
            else made
        )

    def _inside(self, value: Any, key: Key) -> None:
        """Check the components inside a value whose type is not annotated."""
        if _is_component(value):
            self.component(value, key, Any)
        elif isinstance(value, dict):
            for name, child in value.items():
                self._inside(child, (*key, name))
        elif isinstance(value, list):
            for index, child in enumerate(value):
                self._inside(child, (*key, str(index)))

    def _union(self, wanted: Any, value: Any, key: Key) -> Any:
        """The first alternative that fits; the problems of the only structured one when none does."""
        arms = [a for a in get_args(wanted) if a is not type(None)]
        if value is None and len(arms) < len(get_args(wanted)):
            return None
        if all(is_plain(a) for a in arms):
            return self._leaf(wanted, value, key)
        tried: list[list[Problem]] = []
        for arm in arms:
            before, self.problems = self.problems, []
            made = self.value(arm, value, key)
            found, self.problems = self.problems, before
            if not found:
                return made
            tried.append(found)
        structured = [t for a, t in zip(arms, tried, strict=True) if not is_plain(a)]
        if len(arms) == 1 or (len(structured) == 1 and isinstance(value, (dict, list))):
            self.problems += structured[0] if structured else tried[0]
        else:
            self.report(key, f"expected {show(wanted)}, got {shown(value)}")
        return INVALID

    def _leaf(self, wanted: Any, value: Any, key: Key) -> Any:
        """A plain value, checked by pydantic; text typed as an override stays text where text is wanted."""
        made = fit(wanted, value)
        mark = where(self.marks, key)
        if made is INVALID and mark.raw is not None and key in self.marks:
            made = fit(wanted, mark.raw)
        if made is INVALID:
            self.report(key, f"expected {show(wanted)}, got {shown(value)}{_advice(wanted, value)}")
        return made

    def _input(self, value: str, note: MustExist, key: Key) -> Path:
        """A path to read: found and made absolute, or as written and noted as missing."""
        mark = where(self.marks, key)
        if (found := find(value, mark.folder)) is not None:
            return found
        if note.ranges and (first := expand(Path(value))[0]) != Path(value):
            if (found := find(first, mark.folder)) is not None:
                return found.with_name(Path(value).name)
            value = str(first)
        self.missing.append(Problem(str(mark), dotted(key), f"there is no {value!r}; {note.advice}"))
        return Path(value)

    def _optional(self, wanted: Any, value: Any, key: Key, makes: Any) -> Any:
        """A component where one is asked for: ``wanted`` is Component, a class, or alternatives of them."""
        arms = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
        if value is None and type(None) in arms:
            return None
        if not isinstance(value, Mapping):
            self.report(key, f"expected a component (`target` and `params`), got {shown(value)}")
            return INVALID
        if Component not in arms:
            return self.component(value, key, _either(arms))
        return self.component(value, key, makes)

    def component(self, tree: Mapping[str, Any], key: Key, makes: Any) -> Any:
        """The component written at ``key``; ``makes`` is the annotation of what it must build."""
        before = len(self.problems)
        for name in tree:
            if name not in ("target", "params"):
                near = hint(name, ("target", "params"))
                self.report((*key, name), f"a component has only `target` and `params`{near}")
        params = {} if tree.get("params") is None else tree["params"]
        if not isinstance(params, Mapping):
            self.report((*key, "params"), f"expected a mapping of parameters, got {shown(params)}")
            params = {}
        if "target" not in tree:
            self.report(key, f"a component needs `target`, got {shown(tree)}")
            return INVALID
        try:
            made = resolve(tree["target"], self.imports)
            takes = signature(made)
        except TargetError as error:
            if not str(tree["target"]).startswith(tuple(f"{name}." for name in self._absent)):  # told already
                self.report((*key, "target"), str(error))
            return INVALID
        if not produces(made, makes):
            self.report(
                key if (*key, "target") not in self.marks else (*key, "target"),
                _wrong_kind(makes, tree["target"]),
            )
        params = self._params(takes, params, key)
        return INVALID if len(self.problems) > before else Component(tree["target"], params)

    def _params(self, takes: Signature, params: Mapping[str, Any], key: Key) -> dict[str, Any]:
        """Check ``params`` against a signature; gives them as written, with override texts settled."""
        for name, value in params.items():
            at = (*key, "params", name)
            if name in takes.runtime:
                self.report(
                    at, f"{name!r} is given to {takes.name} at run time; it cannot come from a config"
                )
            elif name not in takes.params:
                known = ", ".join(takes.params) or "none"
                self.report(
                    at, f"{takes.name} has no parameter {name!r}{hint(name, takes.params)} (it takes {known})"
                )
            else:
                self.value(takes.params[name], value, at)
        if needed := [n for n in takes.required if n not in params]:
            self.report(key, f"{takes.name} needs {', '.join(f'`{n}`' for n in needed)}")
        return {
            name: self._settle(takes, name, value, (*key, "params", name)) for name, value in params.items()
        }

    def _settle(self, takes: Signature, name: str, value: Any, at: Key) -> Any:
        """An override such as ``…params.name=12`` for a text parameter is the text ``12``."""
        mark = self.marks.get(at)
        if mark is None or mark.raw is None or name not in takes.params or isinstance(value, (dict, list)):
            return value
        wanted, _ = split(takes.params[name])
        return value if not is_plain(wanted) or fit(wanted, value) is not INVALID else mark.raw


def fit(wanted: Any, value: Any) -> Any:
    """``value`` of YAML as the plain annotation ``wanted``, or INVALID; lists become tuples, texts paths."""
    if isinstance(value, Path):
        value = str(value)
    try:
        return _adapter(wanted).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError):
        return INVALID


@functools.lru_cache(maxsize=1024)
def _adapter(wanted: Any) -> TypeAdapter[Any]:
    return TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True))


def split(wanted: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation without its notes, and the notes (also those inside ``Annotated[…] | None``)."""
    if get_origin(wanted) is Annotated:
        inner, *notes = get_args(wanted)
        return inner, tuple(notes)
    if get_origin(wanted) in (Union, types.UnionType):
        arms = [split(a) for a in get_args(wanted)]
        notes = [n for _, found in arms for n in found]
        return (_either(a for a, _ in arms), tuple(notes)) if notes else (wanted, ())
    return (Any if wanted is inspect.Parameter.empty else wanted), ()


def _either(arms: Iterable[Any]) -> Any:
    """The annotation ``A | B | …`` of its alternatives."""
    return functools.reduce(operator.or_, arms)


def is_plain(wanted: Any) -> bool:
    """Whether ``wanted`` is made of scalars, choices and lists of them only."""
    wanted, _ = split(wanted)
    origin = get_origin(wanted)
    if origin is Literal or wanted is ...:
        return True
    if origin is None:
        return wanted in _PLAIN and wanted is not object
    if origin in (Union, types.UnionType) or _subclass(origin, (Sequence, AbstractSet)):
        return all(is_plain(a) for a in get_args(wanted))
    return False


def _subclass(origin: Any, parents: type | tuple[type, ...]) -> bool:
    return inspect.isclass(origin) and origin is not str and issubclass(origin, parents)


def _is_component(value: Any) -> bool:
    return isinstance(value, Mapping) and "target" in value


def show(wanted: Any) -> str:
    """An annotation as a reader of YAML would put it."""
    wanted, _ = split(wanted)
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return f"one of {', '.join(repr(a) for a in arguments)}"
    if origin in (Union, types.UnionType):
        return " or ".join(show(a) for a in arguments)
    if wanted is type(None):
        return "null"
    if inspect.isclass(wanted) and is_dataclass(wanted):
        return f"a mapping of {', '.join(f.name for f in fields(wanted))}"
    if origin is None:
        return "path" if wanted is Path else getattr(wanted, "__name__", str(wanted))
    if _subclass(origin, Mapping):
        return f"a mapping of {show(arguments[-1])}" if arguments else "a mapping"
    if origin is tuple and ... not in arguments:
        return f"a list of {len(arguments)}: {', '.join(map(show, arguments))}"
    if _subclass(origin, (Sequence, AbstractSet)):
        return f"a list of {show(arguments[0])}" if arguments else "a list"
    return str(wanted).replace("typing.", "")


def _wrong_kind(makes: Any, target: str) -> str:
    return f"expected {show(makes)}, got {target}"


def _needs(name: str, key: Key) -> str:
    if key:
        return f"needs `{name}`"
    return "this section is needed; put a model file such as configs/tiny.yaml first in --base"


def _advice(wanted: Any, value: Any) -> str:
    """What to try, where it is plain."""
    if not isinstance(value, str):
        return ""
    choices = [
        a for part in (wanted, *get_args(wanted)) if get_origin(part) is Literal for a in get_args(part)
    ]
    if near := hint(value, [c for c in choices if isinstance(c, str)]):
        return near
    try:
        number: Any = json.loads(value)
    except ValueError:
        return ""
    return "; remove the quotes" if not isinstance(number, str) and fit(wanted, number) is not INVALID else ""
