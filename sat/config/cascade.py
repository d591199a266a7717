"""A cascade: several models one after the other, each enlarging the pictures of the one before.

    cascade:
      keep: false                       # keep the pictures of the stages before the last, in OUT/stages/NAME
      stages:
        - {name: base, base: [configs/base.yaml]}
        - {name: relay, base: [configs/relay.yaml], set: {sampling.steps: 6}}

Files laid over it go to every stage. So do overrides, except those of one picture's making (size, steps,
guidance, sampler, adapters), which go to the first; ``cascade.NAME.section.key=value`` goes to one stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat.config.check import INVALID, Checker
from sat.config.load import Loaded, load_full, read_base
from sat.config.schema import Broken, Experiment, Section
from sat.config.targets import hint
from sat.config.yaml_source import ConfigError, Override, Problem, Source
from sat.config.yaml_source import write as write_yaml

if TYPE_CHECKING:
    from sat.diffusion.process import Process, ProcessInput

FIRST_ONLY = (
    "sampling.height",
    "sampling.width",
    "sampling.steps",
    "sampling.guider",
    "sampling.sampler",
    "sampling.latents",
    "sampling.input_dir",
    "sampling.tile",
    "adapters",
)
"""Keys, and what is under them, that an override without a stage's name sets for the first stage alone."""


@dataclass(frozen=True)
class StageConfig(Section):
    """One stage: its config files, and keys to set over them."""

    section = "cascade.stages"
    name: str
    base: list[str]
    set: dict[str, Any] = field(default_factory=dict)

    def _rules(self) -> Broken:
        if not self.name.isidentifier():
            yield "name", f"expected letters, digits and _, got {self.name!r}"
        if not self.base:
            yield "base", "expected at least one config file"


@dataclass(frozen=True)
class CascadeConfig(Section):
    """The stages in order; ``keep``: whether the pictures between them stay."""

    section = "cascade"
    stages: list[StageConfig]
    keep: bool = False

    def _rules(self) -> Broken:
        names = [stage.name for stage in self.stages]
        if len(names) < 2:
            yield "stages", f"expected at least two stages, got {len(names)}"
        if len(set(names)) < len(names):
            yield "stages", f"expected different names, got {', '.join(names)}"


@dataclass(frozen=True)
class Stage:
    """A loaded stage of a run; ``name`` is empty for a run of one model."""

    name: str
    loaded: Loaded

    @property
    def experiment(self) -> Experiment:
        """Its checked config."""
        return self.loaded.experiment


@dataclass(frozen=True)
class Cascade:
    """What a run draws: one stage, or several of which each enlarges the pictures of the one before."""

    stages: list[Stage]
    keep: bool = False


def load_cascade(bases: Sequence[str | Path], overrides: Sequence[Override] = ()) -> Cascade:
    """The stages that the files describe; :class:`ConfigError` lists all problems of the first bad stage."""
    sources = [read_base(base) for base in bases]
    cascades = [i for i, source in enumerate(sources) if "cascade" in source.tree]
    if not cascades:
        return Cascade([Stage("", load_full(bases, overrides))])
    if cascades != [0]:
        raise ConfigError(
            [
                Problem(
                    "",
                    "cascade",
                    "one cascade file comes first in --base; other files are laid over its stages",
                )
            ]
        )
    own, general = _own(overrides)
    config = _checked(sources[0], own.pop("keep", None))
    names = [stage.name for stage in config.stages]
    if strange := sorted(set(own) - set(names)):
        what = f"no stage or setting of this name{hint(strange[0], [*names, 'keep'])}"
        raise ConfigError([Problem("override", f"cascade.{strange[0]}", what)])
    stages: list[Stage] = []
    for stage in config.stages:
        settings: list[Override] = [(key, value) for key, value in stage.set.items()]
        settings += [item for item in general if not stages or not _first_only(item)]
        settings += own.get(stage.name, [])
        files: list[str | Path] = [*stage.base, *bases[1:]]
        stages.append(Stage(stage.name, _enlarging(files, settings, stages[-1] if stages else None)))
    return Cascade(stages, config.keep)


def dump_cascade(stages: Mapping[str, Path], keep: bool) -> str:
    """A cascade file of stages whose whole configs lie in the given files."""
    listed = [{"name": name, "base": [str(path)]} for name, path in stages.items()]
    return write_yaml({"cascade": {"keep": keep, "stages": listed}})


def process_input(experiment: Experiment) -> ProcessInput | None:
    """The picture that the experiment's process needs; None for a model that draws from noise alone."""
    from sat.config.component import build

    process: Process = build(experiment.diffusion.process, imports=experiment.imports)
    return process.input


def _enlarging(files: list[str | Path], settings: list[Override], before: Stage | None) -> Loaded:
    """A loaded stage; one that follows another draws that one's size, enlarged."""
    loaded = load_full(files, settings)
    if before is None:
        return loaded
    wanted = process_input(loaded.experiment)
    if wanted is None:
        raise ConfigError(
            [
                Problem(
                    str(files[0]),
                    "diffusion.process",
                    "a later stage of a cascade needs a relay, this has none",
                )
            ]
        )
    was = before.experiment.sampling
    height, width = wanted.factor * was.height, wanted.factor * was.width
    sampling = loaded.experiment.sampling
    if (sampling.height, sampling.width) != (height, width):
        loaded = load_full(files, [*settings, ("sampling.height", height), ("sampling.width", width)])
    return loaded


def _own(overrides: Sequence[Override]) -> tuple[dict[str, list[Override]], list[Override]]:
    """Overrides of ``cascade.…`` by the name that follows, without it, and all others."""
    own: dict[str, list[Override]] = {}
    general: list[Override] = []
    for item in overrides:
        key, value = item.split("=", 1) if isinstance(item, str) else item
        if not key.startswith("cascade."):
            general.append(item)
            continue
        name, _, rest = key.removeprefix("cascade.").partition(".")
        own.setdefault(name, []).append(f"{rest}={value}" if isinstance(item, str) else (rest, value))
    return own, general


def _first_only(item: Override) -> bool:
    key = item.partition("=")[0].strip() if isinstance(item, str) else item[0]
    return any(key == name or key.startswith(f"{name}.") for name in FIRST_ONLY)


def _checked(source: Source, keep: list[Override] | None) -> CascadeConfig:
    """The checked cascade section; nothing else may be in its file."""
    checker = Checker(source.marks)
    config = checker.check(CascadeConfig, source.tree["cascade"], ("cascade",))
    problems = list(checker.problems)
    if strange := [key for key in source.tree if key != "cascade"]:
        problems.append(
            Problem(
                str(source.marks.get((strange[0],), "")),
                strange[0],
                "a cascade file holds only `cascade`; lay other sections over it in a file of their own",
            )
        )
    if problems or config is INVALID:
        raise ConfigError(problems)
    assert isinstance(config, CascadeConfig), "the check made one"
    if keep is None:
        return config
    given = keep[-1]
    value = given.partition("=")[2] if isinstance(given, str) else given[1]
    if str(value).lower() not in ("true", "false"):
        raise ConfigError([Problem("override", "cascade.keep", f"expected true or false, got {value!r}")])
    return replace(config, keep=str(value).lower() == "true")
