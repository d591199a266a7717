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
from typing import Any

from sat.config.build import components
from sat.config.check import Checker, hint
from sat.config.load import Loaded, load_full, read_base
from sat.config.schema import Broken, Section
from sat.config.yaml_source import ConfigError, Override, Source
from sat.config.yaml_source import write as write_yaml

FIRST_ONLY = (
    *(
        f"sampling.{key}"
        for key in (
            "height", "width", "steps", "guider", "sampler", "latents", "input_dir", "tile", "controls",
            "init_image", "mask", "strength_map", "strength", "strength_by", "fit", "outpaint", "inpaint",
            "regions",
        )
    ),
    "adapters",
)  # fmt: skip
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
class Stage(Loaded):
    """A loaded stage of a run; ``name`` is empty for a run of one model."""

    name: str = ""


@dataclass(frozen=True)
class Cascade:
    """Stages of a run: one, or several, each enlarging the pictures of the one before."""

    stages: list[Stage]
    keep: bool = False


def load_cascade(bases: Sequence[str | Path], overrides: Sequence[Override] = ()) -> Cascade:
    """The stages that the files describe; :class:`ConfigError` lists all problems of the first bad stage."""
    sources = [read_base(base) for base in bases]
    cascades = [i for i, source in enumerate(sources) if "cascade" in source.tree]
    if not cascades:
        return Cascade([Stage(**vars(load_full(bases, overrides)))])
    if cascades != [0]:
        what = "one cascade file comes first in --base; other files are laid over its stages"
        raise ConfigError.of("", "cascade", what)
    own: dict[str, list[Override]] = {}  # overrides of ``cascade.NAME.…`` by name, without it
    general: list[Override] = []
    for item in overrides:
        key, value = item.split("=", 1) if isinstance(item, str) else item
        if key.startswith("cascade."):
            name, _, rest = key.removeprefix("cascade.").partition(".")
            own.setdefault(name, []).append(f"{rest}={value}" if isinstance(item, str) else (rest, value))
        else:
            general.append(item)
    config = _checked(sources[0], own.pop("keep", []))
    names = [stage.name for stage in config.stages]
    if strange := sorted(set(own) - set(names)):
        what = f"no stage or setting of this name{hint(strange[0], [*names, 'keep'])}"
        raise ConfigError.of("override", f"cascade.{strange[0]}", what)
    stages: list[Stage] = []
    for stage in config.stages:
        settings: list[Override] = list(stage.set.items())
        settings += [item for item in general if not stages or not _first_only(item)]
        settings += own.get(stage.name, [])
        files: list[str | Path] = [*stage.base, *bases[1:]]
        loaded = load_full(files, settings)
        if stages:  # draws the size of the stage before, enlarged
            wanted = components(loaded.experiment).process.input
            if wanted is None:
                what = "a later stage of a cascade needs a relay, this has none"
                raise ConfigError.of(str(files[0]), "diffusion.process", what)
            before, sampling = stages[-1].experiment.sampling, loaded.experiment.sampling
            height, width = wanted.factor * before.height, wanted.factor * before.width
            if (sampling.height, sampling.width) != (height, width):
                settings += [("sampling.height", height), ("sampling.width", width)]
                loaded = load_full(files, settings)
        stages.append(Stage(**vars(loaded), name=stage.name))
    return Cascade(stages, config.keep)


def dump_cascade(stages: Mapping[str, Path], keep: bool) -> str:
    """A cascade file of stages whose whole configs lie in the given files."""
    listed = [{"name": name, "base": [str(path)]} for name, path in stages.items()]
    return write_yaml({"cascade": {"keep": keep, "stages": listed}})


def _first_only(item: Override) -> bool:
    key = item.partition("=")[0].strip() if isinstance(item, str) else item[0]
    return any(key == name or key.startswith(f"{name}.") for name in FIRST_ONLY)


def _checked(source: Source, keep: Sequence[Override]) -> CascadeConfig:
    """The checked cascade section; nothing else may be in its file. The last of ``keep`` wins over it."""
    checker = Checker(source.marks)
    config = checker.check(CascadeConfig, source.tree["cascade"], ("cascade",))
    if strange := [key for key in source.tree if key != "cascade"]:
        what = "a cascade file holds only `cascade`; lay other sections over it in a file of their own"
        checker.report((strange[0],), what)
    if checker.problems:
        raise ConfigError(checker.problems)
    assert isinstance(config, CascadeConfig), "the check made one"
    for given in keep[-1:]:
        value = given.partition("=")[2] if isinstance(given, str) else given[1]
        if str(value).lower() not in ("true", "false"):
            raise ConfigError.of("override", "cascade.keep", f"expected true or false, got {value!r}")
        config = replace(config, keep=str(value).lower() == "true")
    return config
