"""Scores on held-out data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sat.data.batch import Batch
from sat.train.deepspeed import TrainEngine
from sat.train.log import Averages
from sat.train.step import VALIDATION, computing, step_generator


@torch.no_grad()
def validate(engine: TrainEngine, batches: Sequence[Batch]) -> dict[str, float]:
    """Means of the objective's ``evaluate`` over ``batches`` of every rank, with the same noise each time."""
    averages = Averages()
    objective, mesh = engine.objective, engine.mesh
    objective.eval()
    try:
        with computing(engine.config, engine.runtime):
            for index, batch in enumerate(batches):
                place = index * mesh.data_ranks + mesh.data_rank
                generator = step_generator(engine.config.seed, VALIDATION, place)
                averages.add(objective.evaluate(batch.to(engine.runtime.device), generator))
    finally:
        objective.train()
    return {f"validation/{name}": value for name, value in averages.take().items()}
