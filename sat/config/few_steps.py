"""Sampling that distilled weights bring with them, laid over a config: steps, sampler, guidance and levels.

An adapter says it in its header, a native folder in its manifest (:class:`sat.adapters.files.Distilled`).
Commands, :class:`sat.pipeline.Pipeline` and the page come through :func:`settle_few_steps`; afterwards
``sampling.trained_steps`` holds the numbers of steps that every later change is checked against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from sat.adapters.factors import AdapterError
from sat.adapters.files import Distilled, distilled
from sat.adapters.peers import checked
from sat.checkpoint.format import CheckpointError
from sat.checkpoint.formats import Native, detect
from sat.config.build import components
from sat.config.check import resolve, signature
from sat.config.schema import Component, Experiment, plain
from sat.config.yaml_source import Key
from sat.errors import UserError

SECTION = "distilled"
"""Key of a manifest's config that holds it."""
_GUIDANCE = "sat.diffusion.guidance."
_SAMPLERS = "sat.diffusion.samplers."
PRECONDITIONED = "sat.diffusion.prediction.Preconditioned"


class FewStepError(UserError, ValueError):
    """A setting that distilled weights do not allow; ``key`` is its place in the config."""

    def __init__(self, key: Key, what: str) -> None:
        super().__init__(what)
        self.key = key


class _Source(NamedTuple):
    """A file that says how it is sampled, and the key that names it in the config."""

    key: Key
    path: Path
    few: Distilled
    strength: float = 1.0


def settle_few_steps(
    experiment: Experiment, typed: Callable[[Key], bool] = lambda key: False
) -> tuple[Experiment, list[str]]:
    """``experiment`` sampled as its distilled weights are meant, and sentences that say so.

    ``typed`` tells the keys that a person has set for this call: these win where the weights allow it, and
    are refused (:class:`FewStepError`) where not. Two distilled sources contradict each other.
    """
    found = [*_of_adapters(experiment), *_of_folder(experiment)]
    if not found:
        return experiment, []
    (key, path, few, strength), *others = found
    if others:
        both = " and ".join(f"{one.path} ({one.few.method})" for one in (found[0], others[0]))
        what = f"{both} are both distilled to few steps, and each is meant for plain weights: leave one out"
        raise FewStepError(key, what)
    sampling, name = experiment.sampling, path.name if key[0] == "adapters" else str(path)
    allowed = sorted(few.steps)
    steps = sampling.steps if sampling.steps in allowed else few.steps[0]
    if steps != sampling.steps and typed(("sampling", "steps")):
        raise FewStepError(("sampling", "steps"), f"{sampling.steps}: {name} {_for(few)}")
    takes = experiment.model.params.get("guidance_dim") is not None
    if key[0] != "adapters" and isinstance(few.guidance, list) and not takes:
        what = f"null, and {name} takes guidance as an input: these are distilled weights: use a distilled"
        raise FewStepError(("model", "params", "guidance_dim"), f"{what} model's config")
    experiment = predicted(_levelled(experiment, few, name), few)
    sampler = sampling.sampler
    if not typed(("sampling", "sampler")):
        wanted = ("DDIM", "Euler") if few.method == "progressive" else ("Renoise",)  # Euler is DDIM's path
        if sampler.target not in (_SAMPLERS + one for one in wanted):
            sampler = Component(_SAMPLERS + wanted[0])
    guider = _guider(experiment, few, name, typed)
    made = replace(sampling, steps=steps, sampler=sampler, guider=guider, trained_steps=allowed)
    told = []
    if key[0] == "adapters" or replace(made, trained_steps=sampling.trained_steps) != sampling:
        learned = (
            f"guidance {few.guidance:g} is in its weights" if isinstance(few.guidance, float | int)
            else f"guidance {guider.params.get('scale', 5.0):g} is an input"
        )  # fmt: skip
        kind = sampler.target.rpartition(".")[2]
        count = f"{steps} step{'s' * (steps != 1)}"
        told.append(f"{name} {_for(few)}: {count} with {kind}, {learned}")
    if strength != 1:
        told.append(f"{name} is at strength {strength:g}: few steps were learned for strength 1")
    return replace(experiment, sampling=made), told


def settle_prediction(experiment: Experiment) -> Experiment:
    """``experiment`` with the prediction of its distilled weights, for a training over them."""
    for source in (*_of_adapters(experiment), *_of_folder(experiment)):
        experiment = predicted(experiment, source.few)
    return experiment


def predicted(experiment: Experiment, few: Distilled) -> Experiment:
    """``experiment`` with the prediction of ``few`` in place of its own."""
    diffusion = experiment.diffusion
    if few.prediction is None or diffusion.prediction.target == PRECONDITIONED:
        return experiment
    prediction = Component(**preconditioned(plain(diffusion.prediction), few.prediction))
    return replace(experiment, diffusion=replace(diffusion, prediction=prediction))


def preconditioned(base: Mapping[str, Any], to: str) -> dict[str, Any]:
    """The component of a student's own prediction over that of its ``base``."""
    return {"target": PRECONDITIONED, "params": {"base": base, "to": to}}


def prediction_of_weights(experiment: Experiment) -> dict[str, Any]:
    """The prediction in the config of the model's folder: without that of an adapter, which is beside it."""
    prediction = plain(experiment.diffusion.prediction)
    beside = any(source.few.prediction is not None for source in _of_adapters(experiment))
    return cast(
        "dict[str, Any]",
        prediction["params"]["base"] if beside and prediction["target"] == PRECONDITIONED else prediction,
    )


def _for(few: Distilled) -> str:
    *most, last = map(str, sorted(few.steps))
    counts = f"{', '.join(most)} or {last}" if most else last
    return f"was distilled ({few.method}) to {counts} step{'s' * (counts != '1')}"


def _of_adapters(experiment: Experiment) -> Iterator[_Source]:
    for i, item in enumerate(experiment.adapters.load):
        if item.strength and (few := few_steps_of(item.path)) is not None:
            yield _Source(("adapters", "load", str(i), "path"), item.path, few, item.strength)


def few_steps_of(adapter: Path) -> Distilled | None:
    """Sampling that the file ``adapter`` is for, if only few steps; a damaged one is told when it is read."""
    with suppress(CheckpointError, AdapterError, OSError):
        return distilled(adapter)
    return None


def _of_folder(experiment: Experiment) -> Iterator[_Source]:
    path = experiment.checkpoint.source("model")
    if path is None or not path.is_dir():
        return
    with suppress(CheckpointError):  # told when it is read
        found = detect(path)
        if isinstance(found, Native) and (said := found.config(path).get(SECTION)) is not None:
            key = ("checkpoint", "model" if path != experiment.checkpoint.path else "path")
            yield _Source(key, path, checked(Distilled, said, f"{path}: its manifest"))


def _guider(experiment: Experiment, few: Distilled, name: str, typed: Callable[[Key], bool]) -> Component:
    """None for a strength that is in the weights, an input for a pair; the config's own strength stays."""
    now, wanted = experiment.sampling.guider, "Unguided"
    key, scale = ("sampling", "guider", "params", "scale"), now.params.get("scale")
    if isinstance(few.guidance, list):
        wanted = "Embedded"
        low, high = few.guidance
        if scale is not None and not low <= scale <= high and typed(key):
            what = f"{scale:g}: {name} has learned strengths of {low:g} to {high:g}"
            raise FewStepError(key, what)
        params = {} if scale is None else {"scale": min(max(scale, low), high)}
        return now if now.target == _GUIDANCE + wanted else Component(_GUIDANCE + wanted, params)
    if scale is not None and scale != few.guidance and typed(key):
        what = f"{scale:g}: guidance {few.guidance:g} is in the weights of {name}: leave it out"
        raise FewStepError(key, what)
    return now if now.target == _GUIDANCE + wanted else Component(_GUIDANCE + wanted)


def _levelled(experiment: Experiment, few: Distilled, name: str) -> Experiment:
    """``experiment`` with the spacing of steps that visits the levels ``few`` was trained at."""
    schedule = experiment.diffusion.schedule
    spacings = get_args(signature(resolve(schedule.target, experiment.imports)).params.get("spacing", Any))
    for spacing in (None, *spacings):
        params = {**schedule.params, **({} if spacing is None else {"spacing": spacing})}
        other = replace(experiment.diffusion, schedule=replace(schedule, params=params))
        made = experiment if spacing is None else replace(experiment, diffusion=other)
        with suppress(ValueError):  # a spacing that the process does not take
            if all(_visits(made, int(steps), wanted) for steps, wanted in few.levels.items()):
                return made
    visited = few.levels.get(str(few.steps[0]))
    what = f"{name} was distilled at timesteps {visited}, which no spacing of this schedule visits"
    raise FewStepError(("diffusion", "schedule"), what)


def _visits(experiment: Experiment, steps: int, wanted: list[float]) -> bool:
    light = components(experiment)
    here = [float(level.timestep) for level in light.process.hooks.levels(light.schedule, steps)[:-1]]
    return len(here) == len(wanted) and all(abs(a - b) < 1 for a, b in zip(here, wanted, strict=True))
