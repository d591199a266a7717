"""Checks the tree of an experiment by pydantic and makes typed sections of it; every problem in one go.

Strict: a quoted number is not a number, a bool is not an int, an int is fine for a float. Objects are written
as components (``target`` and ``params``), those of a dataclass also as its fields. First the names that a
``target`` may have and their parameters, then values, then the whole tree.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import inspect
import json
import operator
import pkgutil
import sys
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from sat.config.schema import (
    CheckpointConfig,
    Component,
    Experiment,
    Makes,
    MustExist,
    RuleError,
    Section,
    plain,
)
from sat.config.yaml_source import Key, Marks, Problem, dotted, find, problem, shown, where
from sat.data.formats import expand

_PARTS = ("model", "first_stage", "text")
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

    The caller alone gives keyword-only ones and, to an optimizer of any package, ``params``; to a scheduler
    of rates its ``optimizer``.
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
    if torch is not None and inspect.isclass(made) and issubclass(made, torch.lr_scheduler.LRScheduler):
        runtime = ("optimizer", "last_epoch")
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
    function = made
    if inspect.isclass(made):
        function = made.__new__ if "__new__" in vars(made) else made.__init__
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


# -- values and components: pydantic's checks, in this project's words


_SCALARS = (str, int, float, bool, type(None), Path)
_NO_TYPE = (Any, object, inspect.Parameter.empty)
_BARE = {list: list[Any], tuple: tuple[Any, ...], dict: dict[str, Any]}


class Fault(NamedTuple):
    """One thing wrong with a value, at ``key`` within it; ``rule`` and ``needs`` are a whole section's."""

    key: Key
    what: str  # empty: said already
    kind: Literal["type", "rule", "needs", "other"] = "other"


@dataclass(frozen=True)
class Context:
    """Modules that targets may lie in, and those that failed to import; whether components are built."""

    imports: Collection[str] = ()
    absent: Collection[str] = ()
    build: bool = False


def build(component: Component | Mapping[str, Any], *, imports: Collection[str] = (), **runtime: Any) -> Any:
    """The object that ``component`` names; ``runtime`` are the arguments that only the caller has."""
    tree = plain(component)
    params = tree.get("params") or {}
    made = resolve(tree["target"], imports)
    takes = signature(made)
    if strange := sorted(set(runtime) - {*takes.runtime, *takes.params}):
        raise TypeError(f"{takes.name} takes no {', '.join(strange)}")
    if both := sorted(set(runtime) & set(params)):
        raise TypeError(f"{takes.name}: {', '.join(both)} given both in the config and at run time")
    values = {}
    for name, given in params.items():
        annotation = takes.params.get(name, Any)
        value, faults = convert(annotation, given, Context(imports, build=True))
        if faults:
            raise TypeError(f"{takes.name}: {name}: {'; '.join(fault.what for fault in faults)}")
        if isinstance(value, list) and isinstance(takes.defaults.get(name), tuple):
            value = tuple(value)  # of a package without annotations
        values[name] = value
    return made(**values, **runtime)


def built(component: Component, imports: Collection[str] = ()) -> Any:
    """The object of a ``component`` without weights, made once: all who ask for it share it."""
    if (made := component.__dict__.get("_built")) is None:
        made = build(component, imports=imports)
        object.__setattr__(component, "_built", made)
    return made


def convert(annotation: Any, value: Any, context: Context) -> tuple[Any, list[Fault]]:
    """``value`` (a tree of YAML) as ``annotation`` asks, and what is wrong with it.

    Lists become tuples and texts paths. Components stay :class:`Component`, or are built as ``context`` says.
    """
    try:
        (made,) = _adapter(annotation).validate_json(json.dumps([value]), context=context)
    except ValidationError as error:
        return None, faults(error, annotation, value)
    return made, []


@functools.lru_cache(maxsize=1024)
def _adapter(annotation: Any) -> TypeAdapter[list[Any]]:
    """In a list, for pydantic takes no configuration beside a dataclass."""
    config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
    kind: Any = list[_written(annotation)]  # type: ignore[misc]
    return TypeAdapter(kind, config=config)


def _written(annotation: Any) -> Any:
    """``annotation`` for pydantic, with :class:`Makes` where YAML writes no plain value or has no type."""
    annotation = _BARE.get(annotation, annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _NO_TYPE:
        return Annotated[Any, Makes(Any)]
    if origin is Annotated and not any(isinstance(note, Makes) for note in arguments):
        return _written(arguments[0])
    if origin is Literal:
        return Annotated[annotation, BeforeValidator(functools.partial(_same_type, arguments))]
    if origin is Annotated or annotation in _SCALARS:
        return annotation
    if origin in (Union, types.UnionType):
        values = [a for a in arguments if not _is_object(a)]
        objects = [] if len(values) == len(arguments) else [Annotated[Any, Makes(annotation)]]
        return functools.reduce(operator.or_, [*map(_written, values), *objects])
    if origin in (Iterable, Collection):  # what YAML writes as a list; pydantic would make an iterator of it
        origin = Sequence
    if inspect.isclass(origin) and issubclass(origin, (Sequence, AbstractSet, Mapping)):
        kind: Any = origin
        return kind[tuple(a if a is ... else _written(a) for a in arguments)]
    if not is_dataclass(annotation) or annotation is Component:
        return Annotated[Any, Makes(annotation)]
    return annotation if issubclass(annotation, Section) else Annotated[annotation, Makes(annotation)]  # type: ignore[arg-type]


def _same_type(choices: Sequence[Any], value: Any) -> Any:
    """``value`` if it has the type of one of ``choices``: true and 1.0 are equal to 1, and another thing."""
    if type(value) not in map(type, choices):
        raise PydanticCustomError("choice", "of another type")
    return value


def _is_object(annotation: Any) -> bool:
    """A class that no YAML value is an instance of."""
    known = annotation in (*_SCALARS, *_NO_TYPE, *_BARE) or is_dataclass(annotation)
    return inspect.isclass(annotation) and not known and get_origin(annotation) is None


def object_schema(wanted: Any, source: Any, handler: Any) -> core_schema.CoreSchema:
    """pydantic's schema of components that make ``wanted``; a dataclass ``source`` also takes its fields."""
    made = core_schema.with_info_plain_validator_function(
        lambda value, info: _object(value, wanted, info.context)
    )
    if not is_dataclass(source) or source is Component:
        return made
    kinds = {"<component>": made, "<fields>": handler(source)}
    return core_schema.tagged_union_schema(
        kinds, lambda value: "<component>" if _is_component(value) else "<fields>"
    )


def _object(value: Any, wanted: Any, context: Context) -> Any:
    """The component, or its object, that ``value`` writes; without a type, those anywhere inside it."""
    section = isinstance(wanted, str)  # which takes nothing but a component
    if _is_component(value) or (section and isinstance(value, Mapping)):
        if context.build:
            return build(value, imports=context.imports)
        if found := list(_component_faults(value, load_name(wanted) if section else wanted, context)):
            _raise(found)
        return Component(value["target"], dict(value.get("params") or {}))
    if wanted is not Any:
        asked = "a component (`target` and `params`)" if section else show(wanted)
        _raise([Fault((), f"expected {asked}, got {shown(value)}")])
    made: Any = value
    found = list[Fault]()
    if isinstance(value, (dict, list)):
        made = copy.copy(value)
        items: Any = value.items() if isinstance(value, dict) else enumerate(value)
        for name, child in items:
            made[name], inner = convert(Any, child, context)
            found += [fault._replace(key=(str(name), *fault.key)) for fault in inner]
    if found:
        _raise(found)
    return made


def _component_faults(tree: Mapping[str, Any], makes: Any, context: Context) -> Iterator[Fault]:  # noqa: C901
    """Faults of ``tree`` as a component: its target may be named, makes ``makes`` and takes its params."""
    for name in tree:
        if name not in ("target", "params"):
            near = hint(name, ("target", "params"))
            yield Fault((name,), f"a component has only `target` and `params`{near}")
    params = {} if tree.get("params") is None else tree["params"]
    if not isinstance(params, Mapping):
        yield Fault(("params",), f"expected a mapping of parameters, got {shown(params)}")
        params = {}
    if "target" not in tree:
        missing = "is the file that names it missing in --base, before this one?"
        yield Fault((), f"a component needs `target`, got {shown(tree)}: {missing}")
        return
    try:
        made = resolve(tree["target"], context.imports)
        takes = signature(made)
    except TargetError as error:
        said = str(tree["target"]).startswith(tuple(f"{name}." for name in context.absent))
        yield Fault(("target",), "" if said else str(error))
        return
    if not produces(made, makes):
        yield Fault(("target",), f"expected {show(makes)}, got {tree['target']}")
    for name, value in params.items():
        at = ("params", name)
        if name in takes.runtime:
            yield Fault(at, f"{name!r} is given to {takes.name} at run time; it cannot come from a config")
        elif name not in takes.params:
            near, known = hint(name, takes.params), ", ".join(takes.params) or "none"
            yield Fault(at, f"{takes.name} has no parameter {name!r}{near} (it takes {known})")
        else:
            for fault in convert(takes.params[name], value, context)[1]:
                yield fault._replace(key=(*at, *fault.key))
    if needed := [f"`{n}`" for n in takes.required if n not in params]:
        yield Fault((), f"{takes.name} needs {', '.join(needed)}")


def _is_component(value: Any) -> bool:
    return isinstance(value, Mapping) and "target" in value


def _raise(found: Sequence[Fault]) -> NoReturn:
    """End a validator with several errors; pydantic adds the place of the value."""
    errors = [PydanticCustomError("fault", "{fault}", {"fault": fault}) for fault in found]
    raise ValidationError.from_exception_data("", [InitErrorDetails(type=e, input=None) for e in errors])


def faults(error: ValidationError, annotation: Any, value: Any) -> list[Fault]:
    """pydantic's errors in this project's words, one for each place; tried alternatives are one place."""
    out: list[Fault] = []
    for e in error.errors(include_url=False):
        wanted, node, owner, at = annotation, value, annotation, Key()
        for part in e["loc"][1:]:  # without the list of _adapter; some parts name alternatives of a union
            if isinstance(node, list) and part in range(len(node)) and len(_arms(wanted)) == 1:
                owner, wanted, node = wanted, inside(wanted, node, part), node[int(part)]
            elif isinstance(node, Mapping) and part in node:
                owner, wanted, node = wanted, inside(wanted, node, part), node[str(part)]
            else:
                continue
            at = (*at, str(part))
        kind, name, context = e["type"], str(e["loc"][-1]), e.get("ctx", {})
        cause = context.get("error")
        scalar = not isinstance(node, (Mapping, list)) and len(_arms(split(wanted)[0])) > 1
        if kind == "fault" and not scalar:  # else all alternatives together say what is expected
            fault: Fault = context["fault"]
            out.append(fault._replace(key=(*at, *fault.key)))
        elif kind == "missing" and isinstance(node, Mapping):
            out.append(Fault(at, f"needs `{name}`", "needs"))
        elif kind == "unexpected_keyword_argument":
            known = [f.name for f in fields(record_of(owner))]
            out.append(Fault(at, f"no such key{hint(name, known)} (there are {', '.join(known)})"))
        elif isinstance(cause, RuleError):
            out += [Fault((*at, field) if field else at, what, "rule") for field, what in cause.broken]
        elif isinstance(cause, Exception):
            out.append(Fault(at, str(cause), "rule"))
        else:
            what = f"expected {show(wanted)}, got {shown(node)}{_advice(wanted, node)}"
            out.append(Fault(at, what, "type"))
    deeper = {fault.key[:end] for fault in out for end in range(len(fault.key) + (fault.kind == "other"))}
    return list(dict.fromkeys(fault for fault in out if fault.kind != "type" or fault.key not in deeper))


def inside(annotation: Any, node: Any, part: str | int) -> Any:
    """The annotation of what lies under ``part`` of ``node``, which is annotated ``annotation``."""
    kind = Mapping if isinstance(node, Mapping) else Sequence
    record = record_of(annotation)
    if record is not None and kind is Mapping:
        return field_hints(record).get(str(part), Any)
    for arm in _arms(annotation):
        origin, arguments = get_origin(arm), get_args(arm)
        if inspect.isclass(origin) and issubclass(origin, kind):
            if origin is tuple and ... not in arguments:
                return arguments[min(int(part), len(arguments) - 1)]
            return arguments[-1 if kind is Mapping else 0]
    return Any


def record_of(annotation: Any) -> Any:
    """The dataclass that ``annotation``, such as ``X | None``, writes out as a mapping; None without one."""
    arms = _arms(split(annotation)[0])
    return next((a for a in arms if inspect.isclass(a) and is_dataclass(a) and a is not Component), None)


def _arms(annotation: Any) -> list[Any]:
    """Alternatives of a union, null not counted; of anything else, itself."""
    arms = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [arm for arm in arms if arm is not type(None)]


def fits(annotation: Any, value: Any) -> bool:
    """True if ``value`` of YAML is what ``annotation`` asks for."""
    return not convert(annotation, value, Context())[1]


def split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation without its notes, and the notes (also those inside ``Annotated[…] | None``)."""
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        return inner, tuple(notes)
    if get_origin(annotation) in (Union, types.UnionType):
        arms = [split(a) for a in get_args(annotation)]
        notes = [n for _, found in arms for n in found]
        return (functools.reduce(operator.or_, (a for a, _ in arms)) if notes else annotation), tuple(notes)
    return (Any if annotation is inspect.Parameter.empty else annotation), ()


def show(annotation: Any) -> str:
    """An annotation as a reader of YAML would put it."""
    annotation, _ = split(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(show, arguments))
    if annotation is type(None):
        return "null"
    if annotation is Component:
        return "a component (`target` and `params`)"
    if inspect.isclass(annotation) and is_dataclass(annotation):
        return f"a mapping of {', '.join(f.name for f in fields(annotation))}"
    if origin is None:
        return "path" if annotation is Path else getattr(annotation, "__name__", str(annotation))
    if not inspect.isclass(origin) or not issubclass(origin, (Mapping, Sequence, AbstractSet)):
        return str(annotation).replace("typing.", "")
    if issubclass(origin, Mapping):
        return f"a mapping of {show(arguments[-1])}"
    if origin is tuple and ... not in arguments:
        return f"a list of {len(arguments)}: {', '.join(map(show, arguments))}"
    return f"a list of {show(arguments[0])}"


def _advice(annotation: Any, value: Any) -> str:
    """A likely correction of a text, if there is one."""
    if not isinstance(value, str) or len(value) > 100:
        return ""
    choices = [a for arm in _arms(annotation) if get_origin(arm) is Literal for a in get_args(arm)]
    if near := hint(value, [c for c in choices if isinstance(c, str)]):
        return near
    try:
        number = json.loads(value)
    except ValueError:
        return ""
    return "; remove the quotes" if not isinstance(number, str) and fits(annotation, number) else ""


# -- the whole tree: problems with their lines, inputs that are read from disk


INVALID: Final = object()


class Checker:
    """Checks values; collects ``problems``, and in ``missing`` the inputs that do not exist (yet)."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self.context = Context()
        self.problems: list[Problem] = []
        self.missing: list[Problem] = []

    def report(self, key: Key, what: str) -> None:
        """Note one problem at ``key``."""
        self.problems.append(problem(self.marks, key, what))

    def allow(self, imports: Any) -> None:
        """Take ``imports``, the modules outside sat whose classes may be targets."""
        names, absent = list[str](), list[str]()
        for index, name in enumerate(imports if isinstance(imports, list) else []):
            try:
                if isinstance(name, str):
                    check_import(name)
                    names.append(name)
            except TargetError as error:
                self.report(("imports", str(index)), str(error))
                if error.__cause__ is not None:
                    names.append(name)
                    absent.append(name)
        self.context = Context(tuple(names), tuple(absent))

    def experiment(self, tree: Mapping[str, Any]) -> Any:
        """The typed experiment of ``tree``, or INVALID."""
        known, hints = {f.name: f for f in fields(Experiment)}, field_hints(Experiment)
        for name in tree:
            if name not in known:
                what = f"no such section{hint(name, known)} (there are {', '.join(known)})"
                if name == "cascade":
                    what = "sample, evaluate and web draw with cascades; name the config of one stage here"
                self.report((name,), what)
        values = {n: self.check(hints[n], tree[n], (n,)) for n in known if n in tree}
        for name, f in known.items():
            if name not in tree and f.default is MISSING and f.default_factory is MISSING:
                what = "this section is needed; put a model file such as configs/tiny.yaml first in --base"
                self.report((name,), what)
                values[name] = INVALID
        return INVALID if INVALID in values.values() else Experiment(**values)

    def check(self, annotation: Any, value: Any, key: Key = ()) -> Any:
        """``value`` as ``annotation`` asks, or INVALID.

        A bad value gives way to its field's default and the rest is checked again, so that the rules of its
        section are told in the same go.
        """
        value = copy.deepcopy(value)
        self._find_inputs(annotation, value, key)
        told, typed = dict[Fault, None](), dict[Key, Any]()
        while True:
            made, faults = convert(annotation, value, self.context)
            if not faults:
                return INVALID if told else made
            again, before = False, {fault.key for fault in told}
            for fault in faults:
                if fault.kind == "type" and self._take_text(value, fault, key, typed):
                    again = True
                    continue
                if fault.what and fault not in told and not (fault.kind == "rule" and fault.key in before):
                    self.report((*key, *fault.key), fault.what)
                told[fault] = None
                section = fault.key[:-1] if fault.kind == "rule" and fault.key else fault.key
                again |= _drop(annotation, value, section)
            if not again:
                return INVALID

    def _take_text(self, value: Any, fault: Fault, above: Key, tried: dict[Key, Any]) -> bool:
        """Text typed as an override stays text where text is wanted; True where there is one more try."""
        key = fault.key
        mark = self.marks.get((*above, *key))
        if mark is None or mark.raw is None or not key:
            return False
        if not mark.raw.strip() and fault.what.startswith("expected path"):
            return False  # empty, it would be the current folder
        node, name = value, key[-1]
        for part in key[:-1]:
            node = node[int(part)] if isinstance(node, list) else node[part]
        index = int(name) if isinstance(node, list) else name
        if key not in tried:
            tried[key], node[index] = node[index], mark.raw
        elif node[index] is mark.raw and tried[key] is not mark.raw:
            node[index] = tried[key]  # no text is wanted either
        else:
            return False
        return True

    def _find_inputs(self, annotation: Any, value: Any, key: Key) -> None:
        """Make the paths to read that exist absolute, in place; note the others as missing."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                self._find_inputs(inside(annotation, value, index), item, (*key, str(index)))
        record = record_of(annotation)
        if record is None or not isinstance(value, dict):
            return
        for name, wanted in field_hints(record).items():
            at, given = (*key, name), value.get(name)
            note = next((note for note in split(wanted)[1] if isinstance(note, MustExist)), None)
            if note is None:
                self._find_inputs(wanted, given, at)
            elif name == "path" and record is CheckpointConfig and all(map(value.get, _PARTS)):
                pass  # nothing is read from it: every part has a path of its own
            elif isinstance(given, str):
                value[name] = str(self._find(given, note, at))

    def _find(self, given: str, note: MustExist, key: Key) -> Path:
        mark = where(self.marks, key)
        if not given.strip():
            self.report(key, "the path is empty; name one, or null where there may be none")
            return Path(given)
        if (found := find(given, mark.folder)) is not None:
            return found
        if note.ranges and (first := expand(Path(given))[0]) != Path(given):
            if (found := find(first, mark.folder)) is not None:
                return found.with_name(Path(given).name)
            given = str(first)
        self.missing.append(Problem(str(mark), dotted(key), f"there is no {given!r}; {note.about(given)}"))
        return Path(given)


def _drop(annotation: Any, value: Any, key: Key) -> bool:
    """Leave what is at ``key`` to its field's default, in place; False where that would not fit the rest.

    Needed keys have none, and those of whole sections may break rules that nobody asked about.
    """
    if not key:
        return False
    name, *rest = key
    if isinstance(value, list):
        index = int(name)
        return _drop(inside(annotation, value, index), value[index], tuple(rest))
    record = record_of(annotation)
    if record is None or not isinstance(value, dict) or name not in value:
        return False
    field = next((f for f in fields(record) if f.name == name), None)
    if field is not None and _drop(field_hints(record)[name], value[name], tuple(rest)):
        return True
    if field is not None and field.default is MISSING:
        return False
    del value[name]
    return True
