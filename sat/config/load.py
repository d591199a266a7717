"""An experiment from YAML files and overrides: OmegaConf composes them, pydantic checks the whole.

``load(["configs/plus.yaml", "configs/sft.yaml"], ["sampling.steps=30"])``
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from sat import compat
from sat.config.check import Checker, record_of
from sat.config.official import is_official, override_official, translate
from sat.config.references import FLAGS, escape, resolve, wrap
from sat.config.schema import Experiment, plain
from sat.config.targets import field_hints, hint
from sat.config.yaml_source import (
    DEFAULT,
    HOME,
    ConfigError,
    Key,
    Mark,
    Marks,
    Override,
    Problem,
    Source,
    dotted,
    find,
    read,
    read_override,
    where,
    write,
)

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


def load_full(bases: Sequence[str | Path], overrides: Sequence[Override] = ()) -> Loaded:
    """As :func:`load`, with the missing inputs and notices beside the experiment instead of in the log."""
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
        from sat.config.constraints import constraints  # which imports torch

        problems += constraints(experiment, layers.marks)
    if problems:
        raise ConfigError(problems)
    return Loaded(experiment, checker.missing, list(dict.fromkeys(notices)))


def dump(experiment: Experiment) -> str:
    """``experiment`` as YAML with every default written out; loading it gives an equal experiment."""
    return write(escape(plain(experiment)))


def read_base(base: str | Path) -> Source:
    """The YAML file ``base``, from the current folder or from the project's."""
    path = find(base)
    if path is None or path.is_dir():
        near = hint(str(base), (f"configs/{p.name}" for p in (HOME / "configs").glob("*.yaml")))
        raise ConfigError.of("", str(base), f"there is no such config{near}")
    return read(path, str(base))


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
    official = [source for source in read_sources if is_official(source.tree)]
    ours = [given for given in overrides if not (official and override_official(given, official[-1]))]
    sources, notices = list[Source](), list[str]()
    for theirs, group in itertools.groupby(read_sources, lambda source: is_official(source.tree)):
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
            self.problems.append(Problem("override", "", what))
            return
        spellings = {written, self.typed.setdefault(key, written)}
        if len(spellings) > 1:
            (earlier,) = spellings - {key}
            self.problems.append(Problem("override", dotted(earlier), _twice(dotted(key))))
        value = plain(value)
        marks = {(*key, *inner): Mark("override") for inner in _keys(value)} | {key: mark}
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
        if isinstance(target, str) and (today := compat.target(target)) != target:
            self.notices.append(f"{where(marks, (*key, 'target'))}: {target} is now called {today}")
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
