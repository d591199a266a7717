"""YAML files with the line of every key, overrides, and the lookup of files."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from sat.errors import UserError
from sat.util.host import HOME, read_bounded
from sat.util.log import one_line

SHIPPED = HOME / "cogview3" / "_data"
"""Configs, small weights and sample data of an installed package; a checkout has them at its top."""

_SIGNS = ("pyproject.toml", ".git")


def find(path: str | Path, folder: Path | None = None) -> Path | None:
    """The existing file or folder that ``path`` names, absolute; None when there is none.

    A relative path is looked up from the current folder, then from the project that ``folder`` (the YAML
    file's) belongs to, then from this one, then among what an installed package ships.
    """
    path = Path(path).expanduser()
    roots = [Path.cwd(), *([project(folder)] if folder else []), HOME, SHIPPED]
    # ``os.path`` takes a name too long for the file system for one that is not there
    return next((root / path for root in roots if os.path.exists(root / path)), None)


def project(folder: Path) -> Path:
    """The nearest folder at or above ``folder`` that looks like the top of a project, else ``folder``."""
    return next((p for p in (folder, *folder.parents) if any((p / s).exists() for s in _SIGNS)), folder)


# -- YAML as experiments use it: read with the line of every key, written so that it reads back the same
#
# Scalars follow YAML 1.2: ``1e-4`` is a number, ``yes``, ``on`` and ``12:30`` are text. A key given twice is
# an error. No tag builds a Python object.


Key = tuple[str, ...]
"""Names from the top of the tree to a value; list items are named by their index."""

MOST_LEVELS = 64
"""Of mappings and lists in one another."""
_MOST_KEYS = 20_000
_MOST_DIGITS = 1000
_MOST_BYTES = 4 << 20
_MOST_TOLD = 100
_TAG = "tag:yaml.org,2002:"


def dotted(key: Key) -> str:
    """``key`` as it is written in an override and in messages: ``sampling.guider.params.scale``."""
    return ".".join(key)


@dataclass(frozen=True)
class Mark:
    """Place where a value was written: a line in a file of ``folder``, or the text ``raw`` of an override."""

    label: str
    folder: Path | None = None
    raw: str | None = None

    def __str__(self) -> str:
        return self.label


Marks = dict[Key, Mark]
DEFAULT = Mark("config")


def where(marks: Marks, key: Key) -> Mark:
    """The place of ``key``, or of the nearest written value above it, or of the first below it."""
    for end in range(len(key), 0, -1):
        if (found := marks.get(key[:end])) is not None and found is not DEFAULT:
            return found
    inside = (mark for other, mark in marks.items() if other[: len(key)] == key and mark is not DEFAULT)
    return next(inside, DEFAULT)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an experiment. ``key`` may be empty when the whole file is meant."""

    where: str
    key: str
    what: str

    def __str__(self) -> str:
        return one_line(": ".join(part for part in (self.where, self.key, self.what) if part))


def problem(marks: Marks, key: Key, what: str) -> Problem:
    """The problem ``what`` with the place of ``key``."""
    return Problem(str(where(marks, key)), dotted(key), what)


class ConfigError(UserError, ValueError):
    """An experiment that cannot be run; the message has one line per problem."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = list(dict.fromkeys(problems))
        lines = [str(p) for p in self.problems[:_MOST_TOLD]]
        if len(self.problems) > _MOST_TOLD:
            lines.append(f"and {len(self.problems) - _MOST_TOLD} more")
        head = [f"{len(self.problems)} problems:"] if len(lines) > 1 else []
        super().__init__("\n".join([*head, *lines]))

    @classmethod
    def of(cls, where: str, key: str, what: str) -> ConfigError:
        """The error of one problem."""
        return cls([Problem(where, key, what)])


class Source(NamedTuple):
    """One YAML file: its tree of mappings, lists and scalars, and the place of each key."""

    tree: dict[str, Any]
    marks: Marks

    @property
    def official(self) -> bool:
        """True if the file looks like a config of the official code rather than one of ours."""
        model = self.tree.get("model")
        configs = isinstance(model, Mapping) and any(str(key).endswith("_config") for key in model)
        return configs or ("args" in self.tree and set(self.tree) <= {"args", "model", "data", "deepspeed"})


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2, nested no deeper than :data:`MOST_LEVELS`."""

    level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; a text of thousands of brackets ends here, not at the interpreter's limit."""
        self.level += 1
        if self.level > MOST_LEVELS:
            what = f"nested deeper than {MOST_LEVELS} levels"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        self.level -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes exactly when :class:`_Loader` would read it as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out."""
        return True


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Line breaks and invisible characters go in double quotes, escaped: other styles fold them."""
    style = '"' if re.search("[\x00-\x1f\x7f-\xa0\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _text)
_Loader.add_constructor(
    f"{_TAG}int", lambda _, node: int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)
)
_Loader.add_constructor(
    f"{_TAG}float", lambda _, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
)


def read(path: Path, label: str | None = None) -> Source:
    """The tree of the YAML file ``path``; ``label`` is how messages name it."""
    label = label or str(path)
    try:
        text = read_bounded(path, _MOST_BYTES).decode("utf-8")
    except OSError as error:
        raise ConfigError.of(label, "", f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError.of(label, "", f"is not UTF-8 text: {error}") from error
    tree, marks = parse(text, label)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError.of(f"{label}:1", "", f"expected sections, got {shown(tree)}")
    folder = path.parent.resolve()
    return Source(tree, {key: replace(mark, folder=folder) for key, mark in marks.items()})


def parse(text: str, label: str) -> tuple[Any, Marks]:
    """The value written in ``text`` and the line of every key in it."""
    try:
        loader = _Loader(text)
        try:
            node, walk = loader.get_single_node(), _Walk(label)
            if node is None:
                return None, walk.marks
            walk(node, (), ())
            return loader.construct_document(node), walk.marks
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{label}:{mark.line + 1}" if mark else label
        raise ConfigError.of(line, "", f"not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = f"{label}:{text.count(chr(10), 0, error.position) + 1}"
        what = f"not valid YAML: character {error.character:#x}: {error.reason}"
        raise ConfigError.of(line, "", what) from error


class _Walk:
    """Records the line of everything under a node; refuses what has no sensible reading, or no end."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.marks: Marks = {}
        self.values = 0

    def __call__(self, node: yaml.Node, key: Key, above: tuple[int, ...]) -> None:  # noqa: C901
        """Walk ``node``, which is at ``key``; ``above`` are the nodes that hold it."""
        self.values += 1
        if id(node) in above:
            self.refuse(node, key, "an alias that contains itself")
        if self.values > _MOST_KEYS:
            self.refuse(node, key, f"more than {_MOST_KEYS} keys after aliases are written out")
        if len(key) > MOST_LEVELS:
            self.refuse(node, key, f"nested deeper than {MOST_LEVELS} levels after aliases are written out")
        self.check_tag(node, key)
        self.marks.setdefault(key, Mark(self.line(node)))
        inside = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for name, child in node.value:
                if name.tag != f"{_TAG}merge":
                    self.check_tag(name, key)
                    if not isinstance(name, yaml.ScalarNode):
                        self.refuse(name, key, "a key must be a single word")
                    name.tag = f"{_TAG}str"
                    self.marks[key + (name.value,)] = Mark(self.line(name))
                if name.value in names:
                    self.refuse(name, (*key, name.value), "given twice in this file")
                names.add(name.value)
                self(child, (*key, name.value), inside)
        elif isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                self(child, (*key, str(index)), inside)

    def line(self, node: yaml.Node) -> str:
        """File and line of ``node``."""
        return f"{self.label}:{node.start_mark.line + 1}"

    def refuse(self, node: yaml.Node, key: Key, what: str) -> NoReturn:
        """Raise with the line of ``node``."""
        raise ConfigError.of(self.line(node), dotted(key), what)

    def check_tag(self, node: yaml.Node, key: Key) -> None:
        """Refuse tags that make objects, and numbers and other scalars that are none."""
        tag = node.tag.removeprefix(_TAG)
        if tag in ("map", "seq", "str"):
            return
        if tag not in _SCALARS or tag == "merge":
            self.refuse(node, key, f"tag {node.tag!r} is not possible here: plain values only")
        text = node.value if isinstance(node, yaml.ScalarNode) else ""
        patterns = [_SCALARS[name][0] for name in {tag, "int" if tag == "float" else tag}]
        if not any(re.fullmatch(pattern, text) for pattern in patterns):
            self.refuse(node, key, f"tag {node.tag!r} is not that of {shown(node.value)}")
        if len(text) > _MOST_DIGITS:
            self.refuse(node, key, f"a number of {len(text)} characters; at most {_MOST_DIGITS} are possible")


Override = str | tuple[str, Any]
"""``"section.key=value"`` with a YAML value, or ``("section.key", value)`` with the value itself."""


def read_override(given: Override) -> tuple[Key, Any, Mark]:
    """The key, value and place of ``given``; text that is no YAML, or holds a ``#``, is taken as it is."""
    if not isinstance(given, str):
        name, value = given
        return tuple(name.strip().split(".")), value, Mark(getattr(given, "label", "override"))
    name, equals, text = given.partition("=")
    if not equals:
        raise ConfigError.of("override", "", f"{given!r} is not of the form section.key=value")
    value = text
    with contextlib.suppress(ConfigError):
        value, _ = parse(text, "override")
    if "#" in text and (value is None or isinstance(value, str)) and text.strip()[:1] not in "\"'":
        value = text
    return tuple(name.strip().split(".")), value, Mark("override", raw=text)


def write(tree: Mapping[str, Any]) -> str:
    """``tree`` as YAML text that :func:`parse` reads back equal."""
    text: str = yaml.dump(
        tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )
    return text


def shown(value: Any) -> str:
    """``value`` in a message, with its type; long ones are cut."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"a mapping with {list(value)[:6]}" if value else "an empty mapping"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
