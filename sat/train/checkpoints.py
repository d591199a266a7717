"""Saving and restoring the state of a run: weights, optimizer, averages and counters."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from sat.parallel.collectives import barrier, gather
from sat.train.deepspeed import STATE, TrainEngine
from sat.train.ema import Ema, masters
from sat.train.log import clock
from sat.train.resume import Progress, RunFolder, Saved

log = logging.getLogger(__name__)

EMA_FILE = "ema.safetensors"
NATIVE = "native"


class Export(Protocol):
    """Writes trained weights as a checkpoint that can be sampled from."""

    def __call__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """``weights``: full float32 tensors on the CPU by their name in the objective. Rank 0 only."""
        ...


class Checkpoints:
    """Writes ``RUN/checkpoints/step_…`` and reads it back; every rank calls every method.

    A checkpoint holds the engine's own files, the averages whole and in float32, and with ``export`` a native
    checkpoint of the averaged (else the current) weights.
    """

    def __init__(
        self, folder: RunFolder, engine: TrainEngine, ema: Ema | None, export: Export | None
    ) -> None:
        self.folder, self.engine, self.ema, self.export = folder, engine, ema, export

    def save(self, progress: Progress, keep_last: int) -> None:
        """Write the checkpoint of ``progress.step``, make it whole, and delete old ones."""
        began = time.perf_counter()
        runtime = self.engine.runtime
        path = self.folder.path(progress.step)
        if runtime.is_main:
            self.folder.begin(progress.step)
        barrier(runtime.device)
        if unseen := [rank for rank, seen in enumerate(gather(path.is_dir())) if not seen]:
            raise RuntimeError(
                f"rank {unseen[0]} does not see {path}: all ranks must share the run folder's storage"
            )
        self.engine.save(path)
        weights = self._whole_weights()
        if runtime.is_main:
            if self.ema is not None:
                save_file(weights, path / STATE / EMA_FILE)
            if self.export is not None:
                self.export(path / NATIVE, weights)
        barrier(runtime.device)
        if runtime.is_main:
            self.folder.commit(path, progress)
            self.folder.prune(keep_last)
            log.info("saved %s in %s", path, clock(time.perf_counter() - began))
        barrier(runtime.device)

    def load(self, saved: Saved, now: Progress) -> Progress:
        """Read ``saved`` and return its counters; ``now`` says how this run is laid out."""
        progress = saved.progress()
        progress.check(now, saved.path)
        self.engine.load(saved.path)
        if self.ema is not None:
            file = saved.path / STATE / EMA_FILE
            if file.is_file():
                self.ema.load(load_file(file))
            else:
                log.warning("%s holds no averaged weights: the average starts from its weights", saved.path)
                self.ema.restart()
        return progress

    def _whole_weights(self) -> dict[str, Tensor]:
        """The averaged (else the current) weights, float32 on the CPU; on ranks other than 0 none."""
        kept: dict[str, Tensor] = {}
        for name, value in self.ema.gather() if self.ema is not None else masters(self.engine):
            if self.engine.runtime.is_main:
                kept[name] = value.detach().cpu().contiguous()
        return kept
