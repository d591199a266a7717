"""Which naming a set of tensors is in, found by trying: the rule list that fills most of the module wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from torch import nn

from sat.checkpoint.format import ENGINE_PREFIXES, OWN_PREFIXES, LazyStateDict, Part, Prefixed, TensorInfo
from sat.checkpoint.rules import KeyMap, Mapped, read_map, write_map
from sat.keys import LAYOUTS, Computed, Rename, Rules

NATIVE = "NATIVE"
_OWN: Rules = [Rename("**", "**")]


@dataclass(frozen=True)
class Fit:
    """How the tensors of a file fill a module. Names are ours unless said."""

    layout: str
    view: LazyStateDict  # the tensors that have a place, under our names
    missing: list[str]
    computed: list[str]  # absent by design of the layout
    unexpected: list[str]  # names in the file
    ignored: list[str]  # names in the file: of other parts, or dropped by a rule
    rules: Rules

    def their_name(self, name: str) -> str:
        """``name`` and what the file should call it."""
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


def fit(
    theirs: LazyStateDict, expected: Mapping[str, TensorInfo], layouts: Mapping[str, Rules], part: Part
) -> Fit:
    """The best fit of ``theirs`` to the ``expected`` tensors, over all layouts and engine prefixes."""
    prefixes = [""] + [
        prefix
        for prefix in (ENGINE_PREFIXES[part], OWN_PREFIXES[part])
        if any(name.startswith(prefix) for name in theirs)
    ]
    distinct = {id(rules): (layout, rules) for layout, rules in layouts.items()}  # aliases are tried once
    tried = [
        _try(theirs, prefix, expected, layout, rules)
        for prefix in prefixes
        for layout, rules in distinct.values()
    ]
    return max(tried, key=lambda found: len(found.view))


def _try(
    theirs: LazyStateDict, prefix: str, expected: Mapping[str, TensorInfo], layout: str, rules: Rules
) -> Fit:
    own = Prefixed(theirs, prefix) if prefix else theirs
    found = read_map(list(own), rules)
    placed = {name: source for name, source in found.sources.items() if name in expected}
    stray = [name for ours, source in found.sources.items() if ours not in expected for name in source.names]
    others = [name for name in theirs if not name.startswith(prefix)] if prefix else []
    known = (*ENGINE_PREFIXES.values(), *OWN_PREFIXES.values())
    of_others = [name for name in others if name.startswith(known)]
    absent = [name for name in expected if name not in placed]
    free = _may_be_absent(absent, rules)
    return Fit(
        layout=layout,
        view=Mapped(own, KeyMap(placed), write=False),
        missing=[name for name in absent if name not in free],
        computed=[name for name in absent if name in free],
        unexpected=[
            *(prefix + name for name in (*found.unmatched, *stray)),
            *(name for name in others if name not in set(of_others)),
        ],
        ignored=[*(prefix + name for name in found.ignored), *of_others],
        rules=rules,
    )


def _may_be_absent(names: list[str], rules: Rules) -> set[str]:
    """Those of our ``names`` that the layout does not store, or need not."""
    optional = [
        rule for rule in rules if isinstance(rule, Computed) or isinstance(rule, Rename) and rule.optional
    ]
    found = write_map(names, optional)
    return set(names) - set(found.unmatched)
