"""The stages of a sampling run: where each draws and keeps its records, and what it enlarges."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sat.config.cascade import Cascade, dump_cascade, process_input
from sat.config.schema import Experiment
from sat.parallel.launch import Runtime
from sat.pipeline import input_folder
from sat.sampling.inputs import InputFolder
from sat.sampling.output import STAGES, folder_name
from sat.sampling.prompts import Prompt
from sat.util.files import write_text

OUTPUT = Path("outputs")
"""Where pictures go when ``output.dir`` is null."""


@dataclass(frozen=True)
class Place:
    """One stage of a run: its config, where its pictures go, and where its records do."""

    experiment: Experiment
    pictures: Path
    records: Path

    @classmethod
    def alone(cls, experiment: Experiment) -> Place:
        """Of a run of one model."""
        root = experiment.output.dir or OUTPUT
        return cls(experiment, root, root)


def places(cascade: Cascade) -> list[Place]:
    """Where each stage draws: the last into the output folder, those before into OUT/stages/NAME."""
    if len(cascade.stages) == 1:
        return [Place.alone(cascade.stages[0].experiment)]
    root = cascade.stages[-1].experiment.output.dir or OUTPUT
    places: list[Place] = []
    for stage in cascade.stages:
        experiment, records = stage.experiment, root / STAGES / stage.name
        if places:
            sampling = replace(experiment.sampling, input_dir=places[-1].pictures)
            experiment = replace(experiment, sampling=sampling)
        is_last = stage is cascade.stages[-1]
        places.append(Place(experiment, root if is_last else records, records))
    return places


def finish(cascade: Cascade, places: Sequence[Place], mine: Sequence[Prompt], runtime: Runtime) -> None:
    """Write the cascade that repeats the run, and drop this rank's pictures between the stages."""
    root = places[-1].pictures
    if runtime.is_main:
        files = {place.records.name: place.records / "resolved.yaml" for place in places}
        write_text(root / "resolved.yaml", dump_cascade(files, cascade.keep))
    if cascade.keep:
        return
    for place in places[:-1]:
        for prompt in mine:
            shutil.rmtree(place.pictures / folder_name(prompt), ignore_errors=True)


def inputs_of(experiment: Experiment) -> InputFolder | None:
    """The pictures that the experiment's process needs; None for a model that draws from noise alone."""
    return input_folder(experiment.sampling, process_input(experiment))
