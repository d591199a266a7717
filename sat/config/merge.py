"""Laying one config over another: mappings merge, the rest replaces, another ``target`` drops old params."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin

from sat.config.interpolate import escape
from sat.config.schema import Component, Experiment, plain
from sat.config.targets import field_hints, hint
from sat.config.yaml_source import DEFAULT, ConfigError, Key, Marks, Problem, Source, Where, dotted, parse

Override = str | tuple[str, Any]
"""``"section.key=value"`` with a YAML value, or ``("section.key", value)`` with the value itself."""

PROMPTS = frozenset({"prompt", "prompt_file"})


def defaults(cls: type) -> dict[str, Any]:
    """The tree of the dataclass ``cls`` with nothing but its defaults; needed keys are absent."""
    tree: dict[str, Any] = {}
    for f in fields(cls):
        if f.default is not MISSING:
            tree[f.name] = plain(f.default)
        elif f.default_factory is not MISSING:
            tree[f.name] = plain(f.default_factory())
    return tree


def section_at(key: Key) -> type | None:
    """The dataclass of the section at ``key``, or None where there is no section."""
    cls: type = Experiment
    for name in key:
        hints = field_hints(cls)
        found = next(_sections(hints[name]), None) if name in hints else None
        if found is None:
            return None
        cls = found
    return cls


def _sections(annotation: Any) -> Iterator[type]:
    """The dataclasses that an annotation such as ``X | None`` names."""
    if inspect.isclass(annotation) and is_dataclass(annotation) and annotation is not Component:
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from _sections(get_args(annotation)[0])
    elif get_origin(annotation) is not list:
        for argument in get_args(annotation):
            yield from _sections(argument)


def start() -> tuple[dict[str, Any], Marks]:
    """What every experiment begins with: the defaults of all sections."""
    return defaults(Experiment), {(): DEFAULT}


def merge(tree: dict[str, Any], marks: Marks, source: Source) -> None:
    """Lay ``source`` over ``tree`` in place, and the places of its keys over ``marks``."""
    _merge_mapping(tree, source.tree, (), marks, source.marks)


def _merge_mapping(
    tree: dict[str, Any], new: Mapping[str, Any], key: Key, marks: Marks, theirs: Marks
) -> None:
    for name, value in new.items():
        at = (*key, name)
        old = tree.get(name)
        if old is None and isinstance(value, dict) and (cls := section_at(at)) is not None:
            old = tree[name] = defaults(cls)
        if isinstance(old, dict) and isinstance(value, dict) and not _other_target(old, value):
            marks[at] = theirs.get(at, marks.get(at, DEFAULT))
            _merge_mapping(old, value, at, marks, theirs)
            continue
        tree[name] = copy.deepcopy(value)
        for known in [k for k in marks if k[: len(at)] == at]:
            del marks[known]
        marks.update({k: mark for k, mark in theirs.items() if k[: len(at)] == at})


def plain_merge(old: Any, new: Any) -> Any:
    """``new`` over ``old``, mappings merged, all else replaced: how the official code composes its files."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return copy.deepcopy(new)
    return {**old, **{name: plain_merge(old.get(name), value) for name, value in new.items()}}


def latest_prompt(tree: dict[str, Any], sampling: Any) -> None:
    """A layer that gives one of ``prompt`` and ``prompt_file`` drops the other, given by an earlier layer.

    ``sampling`` is what the layer says of that section. A layer that gives both is left to the check.
    """
    given = {n for n in PROMPTS if isinstance(sampling, Mapping) and sampling.get(n) is not None}
    if len(given) == 1 and isinstance(tree.get("sampling"), dict):
        tree["sampling"][next(iter(PROMPTS - given))] = None


def _other_target(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "target" in new and new["target"] != old.get("target")


def override(given: Override, tree: dict[str, Any], marks: Marks, files: str) -> None:
    """Set what ``given`` says in ``tree``, in place; ``files`` names the configs in messages."""
    key, value, mark = read_override(given)
    parent = _parent(key, tree)
    if parent is None:
        known = [dotted(k) for k in (*_keys(tree), *((name,) for name in defaults(Experiment)))]
        raise ConfigError(
            [Problem("override", "", f"{dotted(key)!r} names no key of {files}{hint(dotted(key), known)}")]
        )
    theirs = dict.fromkeys([key, *((*key, *inner) for inner in _keys(value))], mark)
    if key[-1] == "target" and isinstance(parent, dict) and parent.get("target") != value:
        parent.pop("params", None)
    if isinstance(parent, list):
        index = int(key[-1])
        slot = {key[-1]: parent[index]}
        _merge_mapping(slot, {key[-1]: value}, key[:-1], marks, theirs)
        parent[index] = slot[key[-1]]
    else:
        _merge_mapping(parent, {key[-1]: value}, key[:-1], marks, theirs)


def read_override(given: Override) -> tuple[Key, Any, Where]:
    """The key, value and place of ``given``."""
    if not isinstance(given, str):
        name, value = given
        return tuple(name.strip().split(".")), escape(plain(value)), Where("override")
    name, equals, text = given.partition("=")
    if not equals:
        raise ConfigError([Problem("override", "", f"{given!r} is not of the form section.key=value")])
    return tuple(name.strip().split(".")), _value(text), Where("override", raw=text)


def _value(text: str) -> Any:
    """The YAML value of an override; text that is no YAML, or holds a ``#``, is taken as it is."""
    try:
        value, _ = parse(text, "override")
    except ConfigError:
        return text
    return (
        text
        if "#" in text and (value is None or isinstance(value, str)) and text.strip()[:1] not in "\"'"
        else value
    )


def _parent(key: Key, tree: dict[str, Any]) -> dict[str, Any] | list[Any] | None:
    """The mapping or list that an override of ``key`` changes, made where a section or a parameter lacks it.

    None when ``key`` is neither there, nor a field of a section, nor a parameter of a component.
    """
    node: Any = tree
    free = False  # inside the params of a component, whose signature decides later
    for end, name in enumerate(key):
        last, at = end == len(key) - 1, key[:end]
        if isinstance(node, list):
            if not (name.isdigit() and int(name) < len(node)):
                return None
            if last:
                return node
            node = node[int(name)]
            continue
        if not isinstance(node, dict):
            return None
        cls = section_at(at)
        in_component = "target" in node and name in ("target", "params")
        if not (free or name in node or in_component or (cls and name in {f.name for f in fields(cls)})):
            return None
        free = free or (in_component and name == "params")
        if last:
            return node
        if node.get(name) is None:
            inner = section_at((*at, name))
            if inner is None and not free:
                return None
            node[name] = defaults(inner) if inner else {}
        node = node[name]
    return None


def _keys(tree: Any, above: Key = ()) -> Iterator[Key]:
    """Every key under ``tree``."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, child in items:
        yield (*above, str(name))
        yield from _keys(child, (*above, str(name)))
