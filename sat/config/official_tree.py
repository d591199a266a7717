"""An official config while it is being read: which keys were used, what they became, what was refused."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from sat.config.official_keys import FIXED, INSTEAD, NOTHING
from sat.config.yaml_source import ConfigError, Key, Marks, Problem, Where, dotted, shown, where


class Official:
    """An official tree being read: remembers the keys used, collects the native tree and the problems."""

    def __init__(self, tree: Mapping[str, Any], marks: Marks) -> None:
        self.tree = tree
        self.marks = marks
        self.used: set[str] = set()
        self.out: dict[str, Any] = {}
        self.out_marks: Marks = {}
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def subtree(self, key: str) -> Any:
        """What is at ``key``, without counting as used; None when absent."""
        node: Any = self.tree
        for part in key.split("."):
            if isinstance(node, list):
                node = node[int(part)] if int(part) < len(node) else None
            elif isinstance(node, Mapping):
                node = node.get(part)
            else:
                return None
        return node

    def take(self, key: str, default: Any = None) -> Any:
        """The value at ``key``, counted as used."""
        self.used.add(key)
        found = self.subtree(key)
        return default if found is None else found

    def put(self, native: str, value: Any, key: str) -> None:
        """Write ``value`` at the dotted ``native`` key; messages about it point to the official ``key``."""
        path: Key = tuple(native.split("."))
        node = self.out
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
        mark = where(self.marks, tuple(key.split(".")))
        for end in range(1, len(path) + 1):
            self.out_marks.setdefault(path[:end], mark)
        self.out_marks[path] = mark

    def move(self, key: str, native: str) -> None:
        """Translate ``key`` to ``native`` unchanged, when it is there."""
        value = self.take(key)
        if value is not None:
            self.put(native, value, key)

    def choose(self, key: str, choices: Mapping[str, str], what: str) -> str:
        """Our target for the official class named at ``key.target``."""
        target = str(self.take(f"{key}.target"))
        name = target.rpartition(".")[2]
        if name not in choices:
            self.refuse(
                f"{key}.target", f"{what} {target} is not supported yet (supported: {', '.join(choices)})"
            )
        return choices.get(name, "")

    def place(self, key: str) -> Where:
        """Where the official ``key`` was written."""
        return where(self.marks, tuple(key.split(".")))

    def refuse(self, key: str, what: str) -> None:
        """Note why the official config cannot be translated."""
        self.problems.append(Problem(str(where(self.marks, tuple(key.split(".")))), key, what))

    def finish(self) -> None:
        """Check the fixed keys; raise when anything was refused."""
        for key in self._leaves():
            if any(fnmatch.fnmatch(key, p) and self.subtree(key) == value for p, value in NOTHING.items()):
                self.used.add(key)
            for pattern, value in FIXED.items():
                if fnmatch.fnmatch(key, pattern):
                    self.used.add(key)
                    if self.subtree(key) != value:
                        self.refuse(key, f"only {value!r} is supported, got {shown(self.subtree(key))}")
        if self.problems:
            raise ConfigError(self.problems)

    def notices(self) -> list[str]:
        """One line for each group of keys that is not honoured, by what happens instead."""
        groups: dict[str, list[str]] = {}
        for key in self._leaves():
            if not any(key == used or key.startswith(f"{used}.") for used in self.used):
                why = next((w for p, w in INSTEAD.items() if fnmatch.fnmatch(key, p)), "without effect here")
                groups.setdefault(why, []).append(key)
        lines = [f"{self._file()}: not honoured: {', '.join(keys)} ({why})" for why, keys in groups.items()]
        return [*self.notes, *lines]

    def _file(self) -> str:
        return str(self.marks.get((), Where("official config"))).rpartition(":")[0] or "official config"

    def _leaves(self) -> list[str]:
        found: list[str] = []

        def walk(node: Any, key: Key) -> None:
            if isinstance(node, Mapping):
                for name, child in node.items():
                    walk(child, (*key, str(name)))
            elif isinstance(node, list) and any(isinstance(child, Mapping) for child in node):
                for index, child in enumerate(node):
                    walk(child, (*key, str(index)))
            elif node is not None:
                found.append(dotted(key))

        walk(self.tree, ())
        return found

    def same(self, key: str, as_key: str) -> None:
        """Two official keys that are one parameter here."""
        value, other = self.take(key), self.subtree(as_key)
        if None not in (value, other) and value != other:
            self.refuse(key, f"expected {other!r} as in {as_key}, got {shown(value)}")
