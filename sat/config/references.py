r"""``${section.key}`` in a value: the value of another key. No environment, no functions.

``\${`` is a plain ``${``; before a ``${`` a backslash is written ``\\``. OmegaConf follows the references.
Decided here: what it must not see (other interpolations, prompts), and how far references may expand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from sat.config.yaml_source import MOST_LEVELS, ConfigError, Key, Marks, Problem, dotted, problem

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


def resolve(config: DictConfig, marks: Marks) -> tuple[dict[str, Any], list[Problem]]:
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
