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

from sat.config.check import INVALID, Checker
from sat.config.interpolate import escape, interpolate
from sat.config.merge import PROMPTS, Override, latest_prompt, merge, override, start
from sat.config.official import is_official, override_official, translate
from sat.config.schema import Experiment, plain
from sat.config.targets import hint
from sat.config.yaml_source import HOME, ConfigError, Marks, Problem, Source, find, read, write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A checked experiment, the inputs that do not exist (yet), and what an official file asks in vain."""

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
        raise ConfigError(
            [Problem("", "", "no config is named; give at least one: --base configs/tiny.yaml")]
        )
    tree, marks, notices, overrides = _merge_files(bases, overrides)
    problems: list[Problem] = []
    for given in overrides:
        try:
            override(given, tree, marks, ", ".join(map(str, bases)))
        except ConfigError as error:
            problems += error.problems
    named = {given.partition("=")[0].strip() if isinstance(given, str) else given[0] for given in overrides}
    if isinstance(section := tree.get("sampling"), dict):
        latest_prompt(tree, {n: section[n] for n in PROMPTS if f"sampling.{n}" in named})
    tree, unresolved = interpolate(tree, marks)
    problems += unresolved
    checker = Checker(marks)
    checker.allow(tree.get("imports"))
    experiment = checker.section(Experiment, tree, ())
    dangling = {problem.key for problem in unresolved}
    problems += [problem for problem in checker.problems if problem.key not in dangling]
    if not problems and experiment is not INVALID:
        from sat.config.constraints import constraints  # which imports torch

        problems += constraints(experiment, marks)
    if problems:
        raise ConfigError(problems)
    return Loaded(experiment, checker.missing, notices)


def dump(experiment: Experiment) -> str:
    """``experiment`` as YAML with every default written out; loading it gives an equal experiment."""
    return write(escape(plain(experiment)))


def _merge_files(
    bases: Sequence[str | Path], overrides: Sequence[Override]
) -> tuple[dict[str, Any], Marks, list[str], list[Override]]:
    """The files laid over the defaults, left to right, and the overrides that are left to do.

    Official files are translated first; before that, overrides of official keys are laid over the last.
    """
    tree, marks = start()
    notices: list[str] = []
    sources: list[Source] = []
    problems: list[Problem] = []
    for base in bases:
        try:
            sources.append(read_base(base))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    official = [source for source in sources if is_official(source.tree)]
    ours = [given for given in overrides if not (official and override_official(given, official[-1]))]
    for theirs, group in itertools.groupby(sources, lambda source: is_official(source.tree)):
        if theirs:
            translated = translate(list(group))
            notices += translated.notices
            group = iter([translated.source])
        for source in group:
            merge(tree, marks, source)
            latest_prompt(tree, source.tree.get("sampling"))
    return tree, marks, notices, ours


def read_base(base: str | Path) -> Source:
    """The YAML file ``base``, from the current folder or from the project's."""
    path = find(base)
    if path is None or not path.is_file():
        near = hint(str(base), (f"configs/{p.name}" for p in (HOME / "configs").glob("*.yaml")))
        raise ConfigError([Problem("", str(base), f"there is no such config{near}")])
    return read(path, str(base))
