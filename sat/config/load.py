"""An experiment from YAML files and overrides: merged left to right, then checked whole.

``load(["configs/plus.yaml", "configs/sft.yaml"], ["sampling.steps=30"])``
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat.config.between import between
from sat.config.check import BAD, Checker
from sat.config.interpolate import escape, interpolate
from sat.config.merge import Override, lay, override, start
from sat.config.official import is_official, translate
from sat.config.paths import HOME, find
from sat.config.schema import Experiment, plain
from sat.config.source import ConfigError, Marks, Problem, Source, read, write
from sat.config.targets import hint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A checked experiment. ``missing`` lists inputs that do not exist; ``notices`` what an official file asked in vain."""

    experiment: Experiment
    missing: list[Problem]
    notices: list[str]


def load(bases: Sequence[str | Path], overrides: Sequence[Override] = ()) -> Experiment:
    """The checked experiment of YAML files ``bases`` and ``overrides``; :class:`ConfigError` lists all problems."""
    loaded = load_full(bases, overrides)
    for notice in loaded.notices:
        log.warning("%s", notice)
    return loaded.experiment


def load_full(bases: Sequence[str | Path], overrides: Sequence[Override] = ()) -> Loaded:
    """As :func:`load`, with the missing inputs and notices beside the experiment instead of in the log."""
    if not bases:
        raise ConfigError(
            [Problem("", "", "no config is named; give at least one: --base configs/tiny.yaml")]
        )
    tree, marks, notices = _merge_files(bases)
    problems: list[Problem] = []
    for given in overrides:
        try:
            override(given, tree, marks, ", ".join(map(str, bases)))
        except ConfigError as error:
            problems += error.problems
    tree, unresolved = interpolate(tree, marks)
    checker = Checker(marks)
    checker.allow(tree.get("imports"))
    experiment = checker.section(Experiment, tree, ())
    problems += unresolved + checker.problems
    if not problems and experiment is not BAD:
        problems += between(experiment, marks)
    if problems:
        raise ConfigError(problems)
    return Loaded(experiment, checker.missing, notices)


def dump(experiment: Experiment) -> str:
    """``experiment`` as YAML with every default written out; loading it gives an equal experiment."""
    return write(escape(plain(experiment)))


def _merge_files(bases: Sequence[str | Path]) -> tuple[dict[str, Any], Marks, list[str]]:
    """The files laid over the defaults, left to right; official ones are translated first."""
    tree, marks = start()
    notices: list[str] = []
    sources = [_read(base) for base in bases]
    for theirs, group in itertools.groupby(sources, lambda source: is_official(source.tree)):
        if theirs:
            translated = translate(list(group))
            notices += translated.notices
            lay(tree, marks, translated.source)
        else:
            for source in group:
                lay(tree, marks, source)
    return tree, marks, notices


def _read(base: str | Path) -> Source:
    """The YAML file ``base``, from the current folder or from the project's."""
    path = find(base)
    if path is None or not path.is_file():
        near = hint(str(base), (f"configs/{p.name}" for p in (HOME / "configs").glob("*.yaml")))
        raise ConfigError([Problem("", str(base), f"there is no such config{near}")])
    return read(path, str(base))
