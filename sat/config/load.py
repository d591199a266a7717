"""An experiment from YAML files and overrides: OmegaConf composes them, pydantic checks the whole.

``load(["configs/plus.yaml", "configs/sft.yaml"], ["sampling.steps=30"])``
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf

from sat import compat
from sat.config.check import Checker, field_hints, hint, record_of
from sat.config.official import override_official, translate
from sat.config.schema import Experiment, plain
from sat.config.yaml_source import (
    DEFAULT,
    MOST_LEVELS,
    SHIPPED,
    ConfigError,
    Key,
    Mark,
    Marks,
    Override,
    Problem,
    Source,
    dotted,
    find,
    problem,
    read,
    read_override,
    where,
    write,
)
from sat.util.host import HOME

log = logging.getLogger(__name__)

FOLLOWED = "${}"
"""Stands for a reference that is not followed yet."""


@dataclass(frozen=True)
class Loaded:
    """A checked experiment, inputs that do not exist (yet), and notices of earlier words and vain keys."""

    experiment: Experiment
    missing: list[Problem]
    notices: list[str]


def load(bases: Sequence[str | Path], overrides: Sequence[Override] = ()) -> Experiment:
    """The checked experiment of files and overrides; :class:`ConfigError` lists all problems."""
    loaded = load_full(bases, overrides)
    for notice in loaded.notices:
        log.warning("%s", notice)
    return loaded.experiment


def load_full(  # noqa: C901 - one check after another
    bases: Sequence[str | Path], overrides: Sequence[Override] = (), *, samples: bool = True
) -> Loaded:
    """As :func:`load`, with the missing inputs and notices beside the experiment instead of in the log.

    Unless it ``samples``, weights that were distilled to few steps are taken as any others, in their own
    prediction.
    """
    if not bases:
        raise ConfigError.of("", "", "no config is named; give at least one: --base configs/tiny.yaml")
    sources, notices, ours = _read(bases, overrides)
    layers = _Layers(", ".join(map(str, bases)), notices)
    for source in sources:
        layers.lay(source)
        given = source.tree.get("sampling")
        layers.latest_prompt(given if isinstance(given, dict) else ())
    for given in ours:
        layers.override(given)
    layers.latest_prompt([key[-1] for key in layers.typed if key[:-1] == ("sampling",)])
    problems = layers.problems
    try:
        tree, dangling = resolve(layers.config, layers.marks)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    problems += dangling
    checker = Checker(layers.marks)
    checker.allow(tree.get("imports"))
    experiment = checker.experiment(tree)
    told = {problem.key for problem in problems}
    problems += [problem for problem in checker.problems if problem.key not in told]
    if not problems:
        experiment = _few_steps(experiment, layers, samples=samples)
    if not problems:
        from sat.config.constraints import constraints  # which imports torch

        problems += constraints(experiment, layers.marks)
    if not problems:
        from sat.config.record import differences

        began = experiment.train.init_from if experiment.train is not None else None
        for found in differences(experiment, began or experiment.checkpoint):
            problem = Problem(str(where(layers.marks, found.key)), dotted(found.key), found.what)
            if found.fatal:
                problems.append(problem)
            else:
                notices.append(str(problem))
    if problems:
        raise ConfigError(problems)
    return Loaded(experiment, checker.missing, list(dict.fromkeys(notices)))


def _few_steps(experiment: Experiment, layers: _Layers, *, samples: bool) -> Experiment:
    """``experiment`` sampled as its distilled weights are meant; what was typed for this call may not fit."""
    from sat.config.few_steps import FewStepError, settle_few_steps, settle_prediction

    if not samples:
        return settle_prediction(experiment)

    def typed(key: Key) -> bool:
        held = (mark for at, mark in layers.marks.items() if at[: len(key)] == key)
        return any(mark.folder is None and mark is not DEFAULT for mark in held)

    try:
        experiment, told = settle_few_steps(experiment, typed)
        layers.notices += told
    except FewStepError as error:
        layers.problems.append(problem(layers.marks, error.key, str(error)))
    return experiment


def dump(experiment: Experiment) -> str:
    """``experiment`` as YAML with every default written out; loading it gives an equal experiment."""
    return write(escape(plain(experiment)))


def read_base(base: str | Path) -> Source:
    """The YAML file ``base``, from the current folder or from the project's."""
    path = find(base)
    if path is not None and path.is_dir():
        raise ConfigError.of(
            "", str(base) or "''", "is a folder; --base wants config files, such as configs/tiny.yaml"
        )
    if path is None:
        home = SHIPPED if SHIPPED.is_dir() else HOME
        near = hint(str(base), (f"configs/{p.name}" for p in (home / "configs").glob("*.yaml")))
        raise ConfigError.of("", str(base), f"there is no such config{near}")
    if path.is_relative_to(SHIPPED):
        _tell_shipped(str(base), path)
    return read(path, str(base))


@functools.cache
def _tell_shipped(base: str, path: Path) -> None:
    """Say once that ``base`` was not found in any folder of the user's."""
    log.info("%s: not here, so the one that ships: %s", base, path)


def _read(
    bases: Sequence[str | Path], overrides: Sequence[Override]
) -> tuple[list[Source], list[str], list[Override]]:
    """The files in the keys of this project, notices about them, and the overrides that are left to do.

    Official files are translated; before that, overrides of official keys are laid over the last of them.
    """
    read_sources, problems = list[Source](), list[Problem]()
    for base in bases:
        try:
            read_sources.append(read_base(base))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    official = [source for source in read_sources if source.official]
    ours = [given for given in overrides if not (official and override_official(given, official[-1]))]
    sources, notices = list[Source](), list[str]()
    for theirs, group in itertools.groupby(read_sources, attrgetter("official")):
        if theirs:
            translated = translate(list(group))
            notices += translated.notices
            sources.append(translated.source)
        else:
            sources += group
    return sources, notices, ours


class _Layers:
    """Files and overrides laid over the defaults, one after the other.

    Mappings merge, all else replaces. Another ``target`` does not inherit the old one's ``params``; a section
    that is null begins with its defaults. Words of earlier versions are told in ``notices``.
    """

    def __init__(self, files: str, notices: list[str]) -> None:
        self.files = files
        self.notices = notices
        self.problems: list[Problem] = []
        self.marks: Marks = {(): DEFAULT}
        self.config: Any = OmegaConf.create(_defaults(Experiment), flags=FLAGS)
        self.typed: dict[Key, Key] = {}

    def lay(self, source: Source, *, literal: bool = False) -> None:
        """Lay ``source`` over what is there; a ``literal`` one holds no references."""
        tree, marks = copy.deepcopy(source.tree), dict(source.marks)
        for old, new in compat.KEYS.items():
            self._rename(tree, marks, tuple(old.split(".")), tuple(new.split(".")))
        self._prepare(self.config, tree, Experiment, (), marks)
        self.config.merge_with(wrap(tree, marks, self.problems, literal=literal))
        self.marks |= marks

    def override(self, given: Override) -> None:
        """Lay one override over what is there."""
        try:
            written, value, mark = read_override(given)
        except ConfigError as error:
            self.problems += error.problems
            return
        key, literal = written, not isinstance(given, str)
        for old, new in compat.KEYS.items():
            if f"{dotted(key)}.".startswith(f"{old}."):
                key = tuple((new + dotted(key)[len(old) :]).split("."))
                self.notices.append(f"override: {old} is now called {new}")
        if not self._settable(key):
            known = {dotted(k) for k in (*_keys(OmegaConf.to_container(self.config)), *self.marks)} - {""}
            what = f"{dotted(key)!r} names no key of {self.files}{hint(dotted(key), sorted(known))}"
            self.problems.append(Problem(str(mark), "", what))
            return
        spellings = {written, self.typed.setdefault(key, written)}
        if len(spellings) > 1:
            (earlier,) = spellings - {key}
            self.problems.append(Problem("override", dotted(earlier), _twice(dotted(key))))
        value = plain(value)
        marks = {(*key, *inner): Mark(str(mark)) for inner in _keys(value)} | {key: mark}
        node, split = self.config, len(key)
        for end, name in enumerate(key):
            if isinstance(node, ListConfig):  # replaced as a whole, so one item is changed in a copy
                items, split = copy.deepcopy(node), end
                wrapped = wrap(value, marks, self.problems, key, literal=literal)
                holder: Any = functools.reduce(_raw, key[end:-1], items)
                if key[-1] == "target" and _raw(holder, "target") != value:
                    holder["params"] = {}
                OmegaConf.update(items, dotted(key[end:]), wrapped, force_add=True)
                value = OmegaConf.to_container(items, resolve=False)
                break
            node = _raw(node, name)
        for name in reversed(key[:split]):
            value = {name: value}
        self.lay(Source(value, marks), literal=literal)

    def latest_prompt(self, given: Collection[str]) -> None:
        """Of ``prompt`` and ``prompt_file``, the one that a layer gives ends that of an earlier layer.

        A layer that gives both is left to the check.
        """
        section = _raw(self.config, "sampling")
        named = [n for n in ("prompt", "prompt_file") if n in given and _raw(section, n) is not None]
        if len(named) == 1:
            section["prompt" if named == ["prompt_file"] else "prompt_file"] = None

    def _prepare(self, old: Any, new: dict[str, Any], section: type | None, key: Key, marks: Marks) -> None:  # noqa: C901
        """Bring ``old`` (a mapping of the config, or None) and ``new`` at ``key`` into shapes that merge."""
        target, before = new.get("target"), _raw(old, "target")
        if isinstance(target, str) and (
            target in compat.NAMES or target.rpartition(".")[0] in compat.MODULES
        ):
            today = compat.target(target)
            meant = compat.MEANT.get(target, {})
            told = "".join(f", with {name} {value}" for name, value in meant.items())
            self.notices.append(f"{where(marks, (*key, 'target'))}: {target} is now called {today}{told}")
            if meant:
                new["params"] = {**meant, **(new.get("params") or {})}
            new["target"] = target = today
        if "target" in new and target != before and old is not None:
            old["params"] = {}
        if isinstance(params := new.get("params"), dict):
            words = compat.PARAMETERS.get(str(target or before), {})
            for word, today in words.items():
                self._rename(params, marks, (word,), (today,), (*key, "params"))
        hints = field_hints(section) if section else {}
        for name, value in new.items():
            for index, item in enumerate(value if isinstance(value, list) else ()):
                if isinstance(item, dict):
                    self._prepare(None, item, None, (*key, name, str(index)), marks)
            child, below = _raw(old, name), record_of(hints.get(name))
            mapping = isinstance(value, dict)
            kind = DictConfig if mapping else ListConfig if isinstance(value, list) else object
            if old is not None and (child == FOLLOWED or not isinstance(child, kind)):
                old[name] = _defaults(below) if below and child is None and mapping else None
                child = _raw(old, name)
            if mapping:
                self._prepare(child, value, below, (*key, name), marks)

    def _rename(self, tree: dict[str, Any], marks: Marks, old: Key, new: Key, above: Key = ()) -> None:
        """Move what ``tree`` has under the earlier key ``old`` to ``new``, with its places in ``marks``."""
        holder, there = _holder(tree, old), _holder(tree, new)
        if holder is None or old[-1] not in holder:
            return
        at, now = (*above, *old), (*above, *new)
        place, value = where(marks, at), holder.pop(old[-1])
        if there is not None and new[-1] in there:
            self.problems.append(Problem(str(place), dotted(at), _twice(dotted(now))))
            return
        for name in new[:-1]:
            tree = tree.setdefault(name, {})
        tree[new[-1]] = value
        for known in [k for k in marks if k[: len(at)] == at]:
            marks[now + known[len(at) :]] = marks.pop(known)
        self.notices.append(f"{place}: {dotted(at)} is now called {dotted(now)}")

    def _settable(self, key: Key) -> bool:
        """True if ``key`` is there, a field of a section, or a parameter of a component."""
        node: Any = self.config
        section: Any = Experiment
        free = False  # among the params of a component, whose signature decides later
        for name in key:
            if isinstance(node, ListConfig):
                if not (name.isdigit() and int(name) < len(node)):
                    return False
                node, section = _raw(node, name), None
                continue
            if node is not None and not isinstance(node, DictConfig):
                return False
            names = set(field_hints(section)) if section else set[str]()
            part = _raw(node, "target") is not None and name in ("target", "params")
            if not (free or part or name in names or _raw(node, name) is not None):
                return False
            free = free or (part and name == "params")
            section = record_of(field_hints(section).get(name)) if section else None
            node = _raw(node, name)
        return True


def _raw(node: Any, name: str) -> Any:
    """The value under ``name`` in a mapping or list of OmegaConf's, :data:`FOLLOWED` for a reference.

    Most of OmegaConf follows one, however far it expands: getting, ``in``, ``pop``, and merging over it.
    """
    if not isinstance(node, (DictConfig, ListConfig)):
        return None
    index: Any = name if isinstance(node, DictConfig) else int(name)
    return FOLLOWED if OmegaConf.is_interpolation(node, index) else node.get(index)


def _holder(tree: Any, key: Key) -> dict[str, Any] | None:
    """The mapping that would hold ``key``, if it is there."""
    for name in key[:-1]:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None


def _twice(now: str) -> str:
    return f"is now called {now}, which is given too: keep only that"


def _keys(tree: Any, above: Key = ()) -> Iterator[Key]:
    """Every key under ``tree``."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, child in items:
        yield (*above, str(name))
        yield from _keys(child, (*above, str(name)))


def _defaults(cls: type) -> dict[str, Any]:
    """The tree of the dataclass ``cls`` with nothing but its defaults; needed keys are absent."""
    made = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}
    return {name: plain(value) for name, value in made.items() if value is not MISSING}


# -- ``${section.key}`` in a value: the value of another key. No environment, no functions
#
# ``\${`` is a plain ``${``; before a ``${`` a backslash is written ``\\``. OmegaConf follows the references.
# Decided here: what it must not see (other interpolations, prompts), and how far references may expand.


PROMPTS: tuple[Key, ...] = (
    ("sampling", "prompt"),
    ("sampling", "negative_prompt"),
    ("train", "sample_prompts"),
)
"""Keys of text for the model: nothing in it is a reference."""

MOST_VALUES = 10_000
"""Values that one experiment's references may expand to; 100 characters of text count as one."""

_MOST_BITS = 4096

FLAGS = {"allow_objects": True}
"""Of OmegaConf's trees, which hold :class:`Text`."""

_REFERENCE = re.compile(r"(\\*)\$\{(?:([^{}$\\]*)(\}))?")
_NAME = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*", re.ASCII)


class Text:
    """A text that OmegaConf must not take for a reference (``${``) or a missing value (``???``)."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


def map_texts(tree: Any, change: Callable[[Any, Key], Any], key: Key = ()) -> Any:
    """A copy of ``tree`` with ``change(value, key)`` for every single value."""
    if isinstance(tree, dict):
        return {name: map_texts(child, change, (*key, name)) for name, child in tree.items()}
    if isinstance(tree, list):
        return [map_texts(child, change, (*key, str(index))) for index, child in enumerate(tree)]
    return change(tree, key)


def is_prompt(key: Key) -> bool:
    """True if ``key`` is, or lies in, text for the model."""
    return any(key[: len(prompt)] == prompt for prompt in PROMPTS)


def escape(tree: Any) -> Any:
    """``tree`` with every text written so that a config gives it back unchanged."""

    def change(value: Any, key: Key) -> Any:
        if not isinstance(value, str) or is_prompt(key):
            return value
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)

    return map_texts(tree, change)


def wrap(tree: Any, marks: Marks, problems: list[Problem], above: Key = (), *, literal: bool = False) -> Any:
    """``tree``, at the key ``above``, for OmegaConf: :class:`Text` where it must not look for references.

    That is in prompts, in ``literal`` trees, and where it would find anything but the name of a key.
    """

    def change(value: Any, key: Key) -> Any:
        if not isinstance(value, str) or ("${" not in value and value != "???"):
            return value
        if literal or is_prompt(key) or value == "???":
            return Text(value)
        for match in _REFERENCE.finditer(value):
            if len(match[1]) % 2 == 0 and not _NAME.fullmatch(match[2] or ""):
                said = "is not possible" if match[3] else "has no closing brace, or more than a name inside"
                what = (
                    f"{match[0][len(match[1]) :]} {said}: only ${{section.key}} is, and \\${{ for a plain ${{"
                )
                problems.append(problem(marks, key, what))
                return Text(value)
        return value

    return map_texts(tree, change, above)


def resolve(config: DictConfig, marks: Marks) -> tuple[dict[str, Any], list[Problem]]:  # noqa: C901 - two passes
    """The plain tree of ``config`` with its references followed; one that leads nowhere stays text.

    Raises when they expand too far: that is measured first, for no limit of OmegaConf's stops them.
    """
    tree: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    problems: list[Problem] = []
    measure, total = _Measure(tree), 0

    def follow(value: Any, key: Key) -> Any:
        nonlocal total
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            total += measure(value, (dotted(key),), len(key)).values
            if total > MOST_VALUES:
                raise _EndlessError(f"references expand to more than {MOST_VALUES} values")
        except _EndlessError as error:
            raise ConfigError([problem(marks, key, str(error))]) from None
        except _DanglingError as error:
            problems.append(problem(marks, key, str(error)))
            return Text(value)
        return value

    def plain(value: Any, key: Key) -> Any:
        value = str(value) if isinstance(value, Text) else value
        what = ""
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            what = f"a number of {value.bit_length()} bits, more than {_MOST_BITS}"
        elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            what = "text that is not valid UTF-8"
        elif isinstance(value, str) and "\0" in value:
            what = "text with a NUL character"
        if what:
            problems.append(problem(marks, key, what))
            return None
        return value

    sound = OmegaConf.create(map_texts(tree, follow), flags=FLAGS)
    return map_texts(OmegaConf.to_container(sound, resolve=True), plain), problems


class _DanglingError(Exception):
    """A reference that leads nowhere."""


class _EndlessError(Exception):
    """References that expand too far."""


class _Size(NamedTuple):
    """Size of a value with its references followed."""

    values: int
    levels: int
    single: bool  # no mapping or list


class _Measure:
    """Sizes of the values of ``tree`` with their references followed, found without expanding them."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.known: dict[str, _Size] = {}

    def __call__(self, node: Any, chain: tuple[str, ...], depth: int) -> _Size:
        """The size of ``node``, ``depth`` levels down; ``chain`` are the names that led to it."""
        if depth > MOST_LEVELS:
            raise _EndlessError(f"references go through more than {MOST_LEVELS} levels")
        single, inner = True, list[_Size]()
        if isinstance(node, (dict, list)):
            children = node.values() if isinstance(node, dict) else node
            single, inner = False, [self(child, chain, depth + 1) for child in children]
        elif isinstance(node, str):
            for match in _REFERENCE.finditer(node):
                if len(match[1]) % 2 == 0:
                    size = self._follow(match[2], chain, depth + 1)
                    single = size.single
                    if match[0] != node and not single:
                        what = f"${{{match[2]}}} is not a single value, so it cannot be part of a text"
                        raise _DanglingError(what)
                    inner.append(size)
        values = 1 + sum(size.values for size in inner)
        if isinstance(node, (str, Text)):
            values += len(str(node)) // 100
        levels = 1 + max((size.levels for size in inner), default=0)
        if values > MOST_VALUES or depth + levels > MOST_LEVELS:
            limit = f"{MOST_VALUES} values" if values > MOST_VALUES else f"{MOST_LEVELS} levels"
            raise _EndlessError(f"references expand to more than {limit}")
        return _Size(values, levels, single)

    def _follow(self, name: str, chain: tuple[str, ...], depth: int) -> _Size:
        if name in chain:
            raise _DanglingError(f"${{{name}}} refers to itself: {' -> '.join((*chain, name))}")
        if name not in self.known:
            node: Any = self.tree
            for part in name.split("."):
                if isinstance(node, dict) and part in node:
                    node = node[part]
                elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
                    node = node[int(part)]
                else:
                    raise _DanglingError(f"${{{name}}} names no key")
            self.known[name] = self(node, (*chain, name), depth)
        return self.known[name]
