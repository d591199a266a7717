"""Checks the tree of an experiment and makes typed sections of it; every problem is found in one go."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Final

from sat.config.component import Context, Fault, convert, inside, record_of, split
from sat.config.schema import Experiment, MustExist
from sat.config.targets import TargetError, check_import, field_hints, hint
from sat.config.yaml_source import Key, Marks, Problem, dotted, find, problem, where
from sat.data.formats import expand

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
                if isinstance(error.__cause__, ImportError):
                    names.append(name)
                    absent.append(name)
        self.context = Context(tuple(names), tuple(absent))

    def experiment(self, tree: Mapping[str, Any]) -> Any:
        """The typed experiment of ``tree``, or INVALID."""
        known, hints = {f.name: f for f in fields(Experiment)}, field_hints(Experiment)
        for name in tree:
            if name not in known:
                near = hint(name, known)
                self.report((name,), f"no such section{near} (there are {', '.join(known)})")
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
                if fault.kind == "type" and self._take_text(value, fault.key, key, typed):
                    again = True
                    continue
                if fault.what and fault not in told and not (fault.kind == "rule" and fault.key in before):
                    self.report((*key, *fault.key), fault.what)
                told[fault] = None
                section = fault.key[:-1] if fault.kind == "rule" and fault.key else fault.key
                again |= _drop(annotation, value, section)
            if not again:
                return INVALID

    def _take_text(self, value: Any, key: Key, above: Key, tried: dict[Key, Any]) -> bool:
        """Text typed as an override stays text where text is wanted; True where there is one more try."""
        mark = self.marks.get((*above, *key))
        if mark is None or mark.raw is None or not key:
            return False
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
            elif isinstance(given, str):
                value[name] = str(self._find(given, note, at))

    def _find(self, given: str, note: MustExist, key: Key) -> Path:
        mark = where(self.marks, key)
        if (found := find(given, mark.folder)) is not None:
            return found
        if note.ranges and (first := expand(Path(given))[0]) != Path(given):
            if (found := find(first, mark.folder)) is not None:
                return found.with_name(Path(given).name)
            given = str(first)
        self.missing.append(Problem(str(mark), dotted(key), f"there is no {given!r}; {note.advice}"))
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
