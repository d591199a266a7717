"""Applying key rules: names and shapes first, tensors one at a time when asked for.

:func:`read_map` and :func:`write_map` turn a rule list (:mod:`sat.keys`) and a set of names into a
:class:`KeyMap`; :class:`Mapped` is then a view of a state dict under the other names. Views stack: native ->
SAT is one view, SAT -> diffusers is two, and no tensor is read before the last one is asked for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from sat.checkpoint.format import (
    ENGINE_PREFIXES,
    OWN_PREFIXES,
    CheckpointError,
    LazyStateDict,
    Part,
    Prefixed,
    TensorInfo,
    View,
    listing,
)
from sat.keys import (
    LAYOUTS,
    Beyond,
    Computed,
    ConvToLinear,
    Drop,
    Flatten,
    Fuse,
    HeadsFirst,
    LinearToConv,
    Rename,
    Rule,
    Rules,
    Split,
    SwapHalves,
    Tie,
)

_TOKEN = re.compile(r"\{~?\}|\*\*|\*")
_GROUP = {"{}": r"(\d+)", "{~}": r"(\d+)", "*": r"([^.]+)", "**": r"(.+)"}


class KeyMappingError(CheckpointError):
    """Names that no rule, or more than one rule, maps."""


@dataclass(frozen=True)
class Source:
    """Origin of a mapped tensor: the names it is made of, the rule, and its part of a fusion."""

    names: tuple[str, ...]
    rule: Rule
    part: int | None = None


@dataclass(frozen=True)
class KeyMap:
    """Names mapped by rules."""

    sources: dict[str, Source] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)  # names no rule knows
    ignored: list[str] = field(default_factory=list)  # names a Drop or Computed rule leaves out, with intent
    incomplete: list[str] = field(default_factory=list)  # members of a fusion that are not there


def read_map(names: Collection[str], rules: Rules) -> KeyMap:
    """Map their ``names`` to ours. Every name is consumed once, or listed as unmatched or ignored."""
    found = KeyMap()
    used: dict[str, Rule] = {}
    names = list(names)
    for rule in rules:
        if isinstance(rule, Computed | Beyond):
            continue
        if isinstance(rule, Drop):
            dropped = [name for name in names if _match(rule.theirs, name) is not None]
            _use(used, dropped, rule)
            found.ignored.extend(dropped)
        elif isinstance(rule, Split):
            _cut(found, used, rule, names, rule.theirs, rule.ours)
        else:
            _join(found, used, rule, names, _several(rule.theirs), rule.ours)
    found.unmatched.extend(name for name in names if name not in used)
    return found


def write_map(names: Collection[str], rules: Rules) -> KeyMap:
    """Map our ``names`` to theirs: the inverse of :func:`read_map`."""
    found = KeyMap()
    used: dict[str, Rule] = {}
    names = list(names)
    for rule in rules:
        if isinstance(rule, Drop | Beyond):
            continue
        if isinstance(rule, Computed):
            ours = [name for name in names if _match(rule.ours, name) is not None]
            _use(used, ours, rule)
            found.ignored.extend(ours)
        elif isinstance(rule, Split):
            _join(found, used, rule, names, rule.ours, rule.theirs)
        else:
            several = _several(rule.theirs)
            _cut(found, used, rule, names, rule.ours, several if isinstance(rule, Fuse) else several[:1])
    found.unmatched.extend(name for name in names if name not in used)
    return found


def _join(
    found: KeyMap, used: dict[str, Rule], rule: Rule, names: list[str], many: Sequence[str], one: str
) -> None:
    """Names that match the patterns ``many`` make one name each; a part that is missing makes none."""
    present = set(names)
    groups = {g: None for pattern in many for name in names if (g := _match(pattern, name)) is not None}
    for group in groups:
        members = tuple(_fill(pattern, group) for pattern in many)
        there = tuple(name for name in members if name in present)
        _use(used, there, rule)
        if isinstance(rule, Fuse | Split) and len(there) < len(members):
            found.incomplete.extend(name for name in members if name not in present)
            continue
        _put(found.sources, _fill(one, _turn(group, many[0], one, names, many[0])), Source(there, rule))


def _cut(
    found: KeyMap, used: dict[str, Rule], rule: Rule, names: list[str], one: str, many: Sequence[str]
) -> None:
    """Names that match the pattern ``one`` make a name for each of ``many``, of which there may be one."""
    hits = [(name, group) for name in names if (group := _match(one, name)) is not None]
    _use(used, [name for name, _ in hits], rule)
    for name, group in hits:
        turned = _turn(group, many[0], one, names, one)
        for index, pattern in enumerate(many):
            part = index if isinstance(rule, Fuse | Split) else None
            _put(found.sources, _fill(pattern, turned), Source((name,), rule, part))


class Mapped(View):
    """``inner`` under the names of a :class:`KeyMap`. ``write`` true: ours -> theirs, else theirs -> ours."""

    def __init__(self, inner: LazyStateDict, key_map: KeyMap, *, write: bool) -> None:
        super().__init__(inner)
        self._sources, self._write = key_map.sources, write
        self._squeezes: type[Rule] = LinearToConv if write else ConvToLinear
        self._unsqueezes: type[Rule] = ConvToLinear if write else LinearToConv

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype after the rule, without reading."""
        source = self._sources[key]
        infos = [self.inner.info(name) for name in source.names]
        return TensorInfo(self._shape(source, [info.shape for info in infos], key), infos[0].dtype)

    def _shape(self, source: Source, shapes: list[tuple[int, ...]], key: str) -> tuple[int, ...]:
        first, rule = shapes[0], source.rule
        if isinstance(rule, Fuse | Split | Tie) and any(shape != first for shape in shapes):
            names = ", ".join(source.names)
            raise CheckpointError(f"{names}: shapes {shapes} should be equal to make {key!r}")
        if isinstance(rule, Fuse | Split):
            count = len(_pieces(rule))
            cuts = source.part is not None
            if not first or (cuts and first[0] % count):
                raise CheckpointError(
                    f"{source.names[0]}: shape {list(first)} does not split into {count} equal parts"
                )
            return (first[0] // count if cuts else first[0] * count, *first[1:])
        if isinstance(rule, SwapHalves) and (not first or first[0] % 2):
            raise CheckpointError(f"{source.names[0]}: shape {list(first)} has no two halves")
        if isinstance(rule, HeadsFirst) and (not first or first[0] % (3 * rule.head_dim)):
            raise CheckpointError(
                f"{source.names[0]}: shape {list(first)} is not q, k and v of heads of {rule.head_dim}"
            )
        if isinstance(rule, Flatten) and not self._write and first:
            return (first[0], math.prod(first[1:]))
        if isinstance(rule, self._squeezes) and len(first) == 4 and first[2:] == (1, 1):
            return first[:2]
        if isinstance(rule, self._unsqueezes) and len(first) == 2:
            return (*first, 1, 1)
        return first

    def __getitem__(self, key: str) -> Tensor:
        source = self._sources[key]
        first, *others = tensors = [self.inner[name] for name in source.names]
        rule = source.rule
        if isinstance(rule, Fuse | Split):
            return torch.cat(tensors) if source.part is None else first.chunk(len(_pieces(rule)))[source.part]
        if isinstance(rule, Tie) and any(not torch.equal(first, other) for other in others):
            names = " and ".join(repr(name) for name in source.names)
            raise CheckpointError(f"{names} should hold the same tensor, but their values differ")
        if isinstance(rule, SwapHalves):
            return torch.cat(first.chunk(2)[::-1])
        if isinstance(rule, HeadsFirst):
            parts = (3, -1) if self._write else (-1, 3)
            return first.view(*parts, rule.head_dim, *first.shape[1:]).transpose(0, 1).flatten(0, 2)
        if isinstance(rule, Flatten) and not self._write:
            return first.flatten(1)
        if isinstance(rule, self._squeezes) and first.dim() == 4 and first.shape[2:] == (1, 1):
            return first[:, :, 0, 0]
        if isinstance(rule, self._unsqueezes) and first.dim() == 2:
            return first[:, :, None, None]
        return first

    def release(self, key: str) -> None:
        """Pass the hint on."""
        for name in self._sources[key].names:
            self.inner.release(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def as_ours(theirs: LazyStateDict, rules: Rules) -> Mapped:
    """A view of ``theirs`` under our names; a name that no rule knows is an error."""
    return Mapped(theirs, _complete(read_map(list(theirs), rules), theirs.source), write=False)


def as_theirs(ours: LazyStateDict, rules: Rules) -> Mapped:
    """A view of ``ours`` under their names; a name that no rule knows is an error."""
    return Mapped(ours, _complete(write_map(list(ours), rules), ours.source), write=True)


def _complete(key_map: KeyMap, source: str) -> KeyMap:
    if key_map.unmatched:
        raise KeyMappingError(
            f"{source}: {len(key_map.unmatched)} names match no rule: {listing(key_map.unmatched)}"
        )
    if key_map.incomplete:
        raise KeyMappingError(
            f"{source}: {len(key_map.incomplete)} names missing: {listing(key_map.incomplete)}"
        )
    return key_map


# -- patterns


@lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern[str]:
    out, end = "", 0
    for token in _TOKEN.finditer(pattern):
        out += re.escape(pattern[end : token.start()]) + _GROUP[token.group()]
        end = token.end()
    return re.compile(out + re.escape(pattern[end:]))


def _match(pattern: str, name: str) -> tuple[str, ...] | None:
    found = _regex(pattern).fullmatch(name)
    return None if found is None else found.groups()


def _fill(pattern: str, groups: Sequence[str]) -> str:
    rest = iter(groups)
    return _TOKEN.sub(lambda _: next(rest), pattern)


def _turn(
    groups: tuple[str, ...], theirs: str, ours: str, names: Sequence[str], pattern: str
) -> tuple[str, ...]:
    """``groups`` with each ``{~}`` index counted from the end; ``names`` are of the ``pattern`` side."""
    tokens = list(zip(_TOKEN.findall(theirs), _TOKEN.findall(ours), strict=True))
    if not any("{~}" in pair for pair in tokens):
        return groups
    turned = list(groups)
    for index, pair in enumerate(tokens):
        if "{~}" in pair:
            turned[index] = str(_count(pattern, index, tuple(names)) - 1 - int(groups[index]))
    return tuple(turned)


@lru_cache(maxsize=256)
def _count(pattern: str, index: int, names: tuple[str, ...]) -> int:
    """Number of values of the ``index``-th placeholder in the names that share the pattern in front of it."""
    token = list(_TOKEN.finditer(pattern))[index]
    head = re.compile(_regex(pattern[: token.start()]).pattern + r"(\d+)(?:\.|$)")
    return 1 + max((int(found.groups()[-1]) for name in names if (found := head.match(name))), default=-1)


def _several(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _pieces(rule: Fuse | Split) -> Sequence[str]:
    """The patterns of the side with several tensors."""
    return rule.theirs if isinstance(rule, Fuse) else rule.ours


def _use(used: dict[str, Rule], names: Collection[str], rule: Rule) -> None:
    for name in names:
        if used.setdefault(name, rule) is not rule:
            raise KeyMappingError(f"{name!r} matches two rules: {used[name]} and {rule}")


def _put(sources: dict[str, Source], name: str, source: Source) -> None:
    if name in sources:
        raise KeyMappingError(f"{name!r} comes from both {sources[name].names} and {source.names}")
    sources[name] = source


# -- the layout that a set of tensors is in, found by trying: the rule list that fills most of the module wins


NATIVE = "NATIVE"
_OWN: Rules = [Rename("**", "**")]


@dataclass(frozen=True)
class Matched:
    """The tensors of a file matched to those of a module. Names are ours unless said."""

    layout: str
    view: LazyStateDict  # the tensors that have a place, under our names
    missing: list[str]
    computed: list[str]  # absent by design of the layout
    unexpected: list[str]  # names in the file
    ignored: list[str]  # names in the file: of other parts, or dropped by a rule
    rules: Rules

    def their_name(self, name: str) -> str:
        """``name``, and the name that the file should have for it."""
        theirs = list(write_map([name], self.rules).sources)
        return name if self.layout == NATIVE or not theirs else f"{name} (there: {', '.join(theirs)})"


def family_rules(kind: type[nn.Module]) -> dict[str, Rules]:
    """The rule lists of a model class by layout: of ``keys.py`` beside its module, and its own names."""
    package = kind.__module__.rpartition(".")[0]
    found: dict[str, Rules] = {NATIVE: _OWN}
    if package and find_spec(f"{package}.keys") is not None:
        lists = import_module(f"{package}.keys")
        for layout in LAYOUTS:
            rules = getattr(lists, layout, None)
            if rules is not None:
                found[layout] = rules
    return found


def best_layout(
    theirs: LazyStateDict, expected: Mapping[str, TensorInfo], layouts: Mapping[str, Rules], part: Part
) -> Matched:
    """The match of ``theirs`` to the ``expected`` tensors that fills most, over all layouts and prefixes."""
    known = (*ENGINE_PREFIXES.values(), *OWN_PREFIXES.values())
    prefixes = [ENGINE_PREFIXES[part], OWN_PREFIXES[part]]
    prefixes = ["", *(prefix for prefix in prefixes if any(name.startswith(prefix) for name in theirs))]
    distinct = {id(rules): (layout, rules) for layout, rules in layouts.items()}  # aliases are tried once
    tried: list[Matched] = []
    for prefix in prefixes:
        inside = Prefixed(theirs, prefix) if prefix else theirs
        outside = [name for name in theirs if not name.startswith(prefix)]
        of_others = [name for name in outside if name.startswith(known)]
        for layout, rules in distinct.values():
            found = read_map(list(inside), rules)
            placed = {name: source for name, source in found.sources.items() if name in expected}
            beyond = [rule.ours for rule in rules if isinstance(rule, Beyond)]
            spare, others = list[Source](), list[Source]()
            for name, source in found.sources.items():
                if name not in expected:
                    past = any(_match(pattern, name) is not None for pattern in beyond)
                    (spare if past else others).append(source)
            absent = [name for name in expected if name not in placed]
            optional = [r for r in rules if isinstance(r, Computed) or (isinstance(r, Rename) and r.optional)]
            needed = set(write_map(absent, optional).unmatched)  # the layout need not store the rest
            tried.append(
                Matched(
                    layout=layout,
                    view=Mapped(inside, KeyMap(placed), write=False),
                    missing=[name for name in absent if name in needed],
                    computed=[name for name in absent if name not in needed],
                    unexpected=[
                        *(prefix + name for name in found.unmatched),
                        *(prefix + name for source in others for name in source.names),
                        *(name for name in outside if name not in set(of_others)),
                    ],
                    ignored=[
                        *(prefix + name for name in found.ignored),
                        *(prefix + name for source in spare for name in source.names),
                        *of_others,
                    ],
                    rules=rules,
                )
            )
    return max(tried, key=lambda matched: len(matched.view))
