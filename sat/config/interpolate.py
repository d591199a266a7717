r"""``${section.key}`` in a YAML value: the value of another key. No environment, no functions.

``\${`` is a plain ``${``; before a ``${`` a backslash is written ``\\``.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from sat.config.yaml_source import Key, Marks, Problem, dotted, where

_REFERENCE = re.compile(r"(\\*)\$\{(?:([^{}$\\]*)(\}))?")


class _Failed(Exception):
    """Why a reference cannot be followed."""


def escape(value: Any) -> Any:
    """``value`` (a tree) with every text written so that :func:`interpolate` gives it back unchanged."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    if isinstance(value, dict):
        return {k: escape(v) for k, v in value.items()}
    return [escape(v) for v in value] if isinstance(value, list) else value


def interpolate(tree: dict[str, Any], marks: Marks) -> tuple[dict[str, Any], list[Problem]]:
    """A copy of ``tree`` with every reference replaced, and what could not be."""
    problems: list[Problem] = []

    def walk(value: Any, key: Key) -> Any:
        if isinstance(value, dict):
            return {name: walk(child, (*key, name)) for name, child in value.items()}
        if isinstance(value, list):
            return [walk(child, (*key, str(index))) for index, child in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            try:
                return _resolve(value, tree, (dotted(key),))
            except _Failed as error:
                problems.append(Problem(str(where(marks, key)), dotted(key), str(error)))
        return value

    return {name: walk(child, (name,)) for name, child in tree.items()}, problems


def _resolve(text: str, tree: dict[str, Any], chain: tuple[str, ...]) -> Any:
    """``text`` with its references replaced; a text that is one reference takes the value with its type."""
    whole = _REFERENCE.fullmatch(text)
    if whole and not whole[1] and whole[3]:
        return _follow(whole[2], tree, chain)

    def put(match: re.Match[str]) -> str:
        slashes = "\\" * (len(match[1]) // 2)
        if len(match[1]) % 2:
            return slashes + match[0][len(match[1]) :]
        if not match[3]:
            raise _Failed(f"{match[0]!r} has no closing brace; write \\${{ for a plain ${{")
        found = _follow(match[2], tree, chain)
        if isinstance(found, (dict, list)):
            raise _Failed(f"${{{match[2]}}} is not a single value, so it cannot be part of a text")
        return slashes + str(found)

    return _REFERENCE.sub(put, text)


def _follow(name: str, tree: dict[str, Any], chain: tuple[str, ...]) -> Any:
    """The value of the key ``name``, its own references replaced."""
    if not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", name):
        raise _Failed(f"${{{name}}} is not possible: only ${{section.key}} is, and \\${{ for a plain ${{")
    if name in chain:
        raise _Failed(f"${{{name}}} refers to itself: {' -> '.join((*chain, name))}")
    node: Any = tree
    for part in name.split("."):
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            raise _Failed(f"${{{name}}} names no key")
    return _copy(node, tree, (*chain, name))


def _copy(node: Any, tree: dict[str, Any], chain: tuple[str, ...]) -> Any:
    if isinstance(node, dict):
        return {k: _copy(v, tree, chain) for k, v in node.items()}
    if isinstance(node, list):
        return [_copy(v, tree, chain) for v in node]
    if isinstance(node, str) and "${" in node:
        return _resolve(node, tree, chain)
    return copy.copy(node)
