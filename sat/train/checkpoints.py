"""Checkpoints of a run: save, resume, and export weights for sampling."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sat.adapters.files import Distilled
from sat.adapters.tokens import WordExport, WordTable, WordTokenizer, table_of
from sat.checkpoint.format import DTYPES, PARTS, CheckpointError, InMemory, Part
from sat.checkpoint.formats import detect, digest
from sat.checkpoint.save import Options, save_native
from sat.checkpoint.verify import Written
from sat.config.few_steps import SECTION, predicted
from sat.config.load import load_full
from sat.config.schema import CheckpointConfig, Experiment, plain
from sat.diffusion.distillation import few_levels
from sat.engine import DiffusionEngine
from sat.errors import UserError
from sat.parallel.collectives import agree, barrier, from_main, gather
from sat.parallel.heartbeat import current
from sat.train import shards
from sat.train.backend import Backend
from sat.train.lora import AdapterExport
from sat.train.objectives import Objective
from sat.train.optim import Ema
from sat.train.resume import NATIVE, Progress, RunFolder, Saved
from sat.util.host import write_text
from sat.util.log import clock

log = logging.getLogger(__name__)

STATE = "state"  # the folder of what only resuming needs
BEST = "best"  # a link in RUN/checkpoints to the checkpoint of the lowest held-out loss


class HeldOut:
    """Losses on held-out pictures by step, kept in ``RUN/validation.json``; the same on every rank."""

    def __init__(self, root: Path) -> None:
        self.path = root / "validation.json"
        self.losses: dict[int, float] = {}

    @property
    def best(self) -> int | None:
        """The first step of the lowest loss."""
        finite = {step: loss for step, loss in self.losses.items() if math.isfinite(loss)}
        return min(finite, key=finite.__getitem__, default=None)

    @property
    def since(self) -> int:
        """Number of validations after the best."""
        return sum(step > (self.best or 0) for step in self.losses)

    def add(self, step: int, loss: float, *, write: bool) -> bool:
        """Keep the loss of ``step``; true if none before was as low."""
        self.losses[step] = loss
        if write:
            write_text(self.path, json.dumps({str(at): one for at, one in self.losses.items()}) + "\n")
        return self.best == step

    def resume(self, step: int, *, main: bool) -> None:
        """Go on with the losses up to ``step``; every rank calls it."""
        text = None
        if main and self.path.is_file():
            text = self.path.read_text()
        kept = json.loads(from_main(text) or "{}")
        self.losses = {int(at): float(loss) for at, loss in kept.items() if int(at) <= step}


class Export(Protocol):
    """Writes trained weights as a checkpoint that can be sampled from."""

    def __call__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """``weights``: full tensors on the CPU by their name in the objective, trained ones float32.

        Rank 0 only, perhaps in another thread.
        """
        ...

    def frozen(self) -> Mapping[str, Tensor]:
        """Parameters to write that are not trained, by their name in the objective."""
        ...


@dataclass
class _Writing:
    """A checkpoint in the middle of being written."""

    path: Path
    progress: Progress
    keep_last: int
    began: float
    future: Future[dict[str, Written]]


class Checkpoints:
    """Writes ``RUN/checkpoints/step_…`` and reads it back; every rank calls every method.

    A checkpoint holds every rank's share of the state, averages included, and with ``export`` a native
    checkpoint of the averaged (else the current) weights, of further decays by :func:`averaged`. ``last`` is
    the newest whole one of this run.
    """

    def __init__(self, folder: RunFolder, engine: Backend, ema: Ema | None, export: Export | None) -> None:
        self.folder, self.engine, self.ema, self.export = folder, engine, ema, export
        self.held_out = HeldOut(folder.root)
        self.last: Path | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: _Writing | None = None

    @property
    def busy(self) -> bool:
        """True while this rank writes a checkpoint."""
        return self._writing is not None and not self._writing.future.done()

    def save(self, progress: Progress, keep_last: int, *, background: bool = False) -> None:
        """Write the checkpoint of ``progress.step``, make it whole, and delete old ones.

        In the ``background`` only a copy is made now; :meth:`settle` makes it whole once it is written.
        """
        self.settle()
        with current().long(f"step {progress.step}: writing a checkpoint"):
            self._begin(progress, keep_last, background=background)
        if not background:
            self.settle()

    def _begin(self, progress: Progress, keep_last: int, *, background: bool) -> None:  # noqa: C901 - in order
        """Write the files of a checkpoint, or in the ``background`` copy what they hold."""
        began, runtime, path = time.perf_counter(), self.engine.runtime, self.folder.path(progress.step)
        if runtime.is_main:
            (self.folder.begin(progress.step) / STATE).mkdir()
        barrier(runtime.device)
        if unseen := [rank for rank, seen in enumerate(gather(path.is_dir())) if not seen]:
            raise RuntimeError(
                f"rank {unseen[0]} does not see {path}: all ranks must share the run folder's storage"
            )

        share = shards.collect(self.engine, self.ema, cut=progress.cut)
        # To export: averages or masters, and frozen ones; on rank 0's CPU.
        exports: dict[str, dict[str, Tensor]] = {}
        if self.export is not None:
            sources = {NATIVE: self.engine.masters()}
            if self.ema is not None:
                sources = {averaged(d, n): self.ema.gather(n) for n, d in enumerate(self.ema.decays)}
            for folder, trained in {**sources, "": self.engine.gathered(self.export.frozen())}.items():
                exports[folder] = {}
                for name, value in trained:
                    whole = self.engine.joined(name, value)
                    if runtime.is_main:
                        exports[folder][name] = whole.detach().to("cpu", copy=True)
        if background:
            share = share.detached()

        def write() -> dict[str, Written]:
            files = share.write(path / STATE, self.engine.shard_name)
            if runtime.is_main and self.export is not None:
                frozen = exports.pop("")
                for folder, weights in exports.items():
                    self.export(path / folder, {**weights, **frozen})
            return files

        future: Future[dict[str, Written]] = Future()
        if background:
            future = self._pool.submit(write)
        else:
            try:
                future.set_result(write())
            except Exception as error:  # noqa: BLE001 - raised again by settle, after all ranks have agreed
                future.set_exception(error)
        self._writing = _Writing(path, progress, keep_last, began, future)

    def settle(self) -> None:
        """Wait for files that are being written, and make their checkpoint whole."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        with current().long(f"step {writing.progress.step}: waiting for a checkpoint"):
            self._settle(writing)

    def _settle(self, writing: _Writing) -> None:
        error, runtime = writing.future.exception(), self.engine.runtime
        if any(agree([error is not None])):
            if error is not None:
                raise error
            raise RuntimeError(f"another rank could not write its part of {writing.path}")
        written: dict[str, Written] = {}
        for files in gather(writing.future.result()):
            written |= {f"{STATE}/{name}": file for name, file in files.items()}
        if runtime.is_main:
            self.folder.commit(writing.path, writing.progress, written)
            best, every = self.best, self.engine.config.keep_every
            if best == writing.progress.step:
                self._link(writing.path)
            self.folder.prune(
                writing.keep_last, lambda step: step == best or (every is not None and step % every == 0)
            )
            log.info("saved %s in %s", writing.path, clock(time.perf_counter() - writing.began))
        barrier(runtime.device)
        self.last = writing.path

    @property
    def best(self) -> int | None:
        """The step of the lowest held-out loss, if its checkpoint is kept."""
        return self.held_out.best if self.engine.config.keep_best else None

    def _link(self, path: Path) -> None:
        """Let ``RUN/checkpoints/best`` lead to ``path``."""
        link, partial = self.folder.checkpoints / BEST, self.folder.checkpoints / f".{BEST}.tmp"
        try:
            partial.unlink(missing_ok=True)
            partial.symlink_to(path.name)
            partial.replace(link)
        except OSError as error:  # some file systems have no links
            log.warning("%s: no link can be made (%s): %s is the best checkpoint", link, error, path)

    def load(self, saved: Saved, now: Progress) -> Progress:
        """Read ``saved`` and return its counters; ``now`` is the layout of this run."""
        progress = saved.progress()
        saved.verify(self.engine.runtime.rank, self.engine.runtime.world, gather)
        for change in progress.check(now, saved.path):
            log.info("going on with other %s", change)
        absent = shards.restore(self.engine, self.ema, saved.path / STATE, cut=progress.cut)
        if self.ema is not None and absent:
            decays = ", ".join(f"{self.ema.decays[place]:g}" for place in absent)
            log.warning(
                "%s holds no average of decay %s: it starts from the weights there", saved.path, decays
            )
            self.ema.restart(absent)
        if (scheduler := self.engine.scheduler) is not None:
            kept = saved.path / STATE / "scheduler_000_00000.pt"
            scheduler.load(torch.load(kept, weights_only=True) if kept.exists() else None, progress.step)
        self.last = saved.path
        self.held_out.resume(progress.step, main=self.engine.runtime.is_main)
        return progress


def averaged(decay: float, place: int) -> str:
    """Folder of the exported average of ``decay``, which is at ``place`` of ``train.ema``."""
    return f"{NATIVE}_{decay:g}" if place else NATIVE


# -- exports: the trained parts as a native folder, or the adapter


def exporter(
    experiment: Experiment, weights: CheckpointConfig, engine: DiffusionEngine, objective: Objective
) -> Export:
    """Export of the trained parts as a native checkpoint folder, for sampling or another training.

    With LoRA, of the adapter alone, which names the model and the ``weights`` it belongs to; of a control
    that learns, of that alone.
    """
    assert experiment.train is not None, "only a training exports"
    dtype, lora = DTYPES[experiment.train.dtype], experiment.adapters.lora
    control = experiment.adapters.control
    alone: list[Export] = []
    if control is not None and control.train:
        from sat.train.control import export
        from sat.train.objectives.diffusion import DiffusionObjective

        assert isinstance(objective, DiffusionObjective), "only these train a control"
        source = weights.source("model")
        alone.append(export(experiment, objective, None if source is None else digest(source), dtype))
    inner: Export | None = None
    if lora is not None:
        paths = {"model": weights.source("model"), "text": weights.source("text")}
        base = {"model": plain(experiment.model), "text": plain(experiment.conditioning.text)}
        digests = {part: None if path is None else digest(path) for part, path in paths.items()}
        inner = AdapterExport(
            objective, lora, base, digests, dtype, _distilled(experiment, engine, objective)
        )
    if experiment.adapters.tokens:
        table, tokenizer = table_of(engine.conditioner.text)[1], engine.conditioner.tokenizer
        assert isinstance(table, WordTable) and isinstance(tokenizer, WordTokenizer), "words were added"
        words = {one.word: tokenizer.words[one.word] for one in experiment.adapters.tokens}
        inner = WordExport(objective, words, table, inner)
    made = [one for one in (inner, *alone) if one is not None]
    if made:
        return made[0] if len(made) == 1 else Exports(made)
    described = ("model", "diffusion", "conditioning", "first_stage")
    sections = {name: plain(getattr(experiment, name)) for name in described}
    if (distilled := _distilled(experiment, engine, objective)) is not None:
        sections[SECTION] = distilled.model_dump(exclude_none=True)
        sections["diffusion"] = plain(predicted(experiment, distilled).diffusion)
    vocabulary = engine.conditioner.tokenizer
    return ModelExport(objective, sections, None if vocabulary is None else vocabulary.path, dtype)


def _distilled(experiment: Experiment, engine: DiffusionEngine, objective: Objective) -> Distilled | None:
    """Sampling that the trained weights alone are for; the config's number of steps is the usual one."""
    if (few := objective.few_steps()) is None:
        return None
    usual, process, schedule = experiment.sampling.steps, engine.process, engine.schedule
    visited = process.hooks.levels if few.method == "progressive" else partial(few_levels, process)
    steps = sorted(few.steps, key=lambda count: (count != usual, count))
    levels = {str(n): [float(at.timestep) for at in visited(schedule, n)[:-1]] for n in steps}
    guidance = few.guidance if isinstance(few.guidance, float | int) else list(few.guidance)
    return Distilled(
        method=few.method, steps=steps, levels=levels, guidance=guidance, prediction=few.prediction
    )


@dataclass(frozen=True)
class Exports:
    """Several exports into one folder: a LoRA and a control that learn together."""

    all: Sequence[Export]

    def frozen(self) -> dict[str, Tensor]:
        """Parameters that some of them writes untrained."""
        return {name: value for one in self.all for name, value in one.frozen().items()}

    def __call__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write each."""
        for one in self.all:
            one(folder, weights)


@dataclass(frozen=True)
class ModelExport:
    """Writes the parts that ``objective`` trains; see :class:`sat.train.checkpoints.Export`.

    ``sections`` of the config describe them; ``tokenizer`` is copied beside them.
    """

    objective: Objective
    sections: Mapping[str, Any]
    tokenizer: Path | None
    dtype: torch.dtype

    def frozen(self) -> dict[str, Tensor]:
        """Parameters of the parts that do not learn."""
        inside = {id(p) for module in self.objective.parts().values() for p in module.parameters()}
        inside -= {id(tensor) for tensor in self._beside()}
        return {
            name: p
            for name, p in self.objective.named_parameters()
            if id(p) in inside and not p.requires_grad
        }

    def _beside(self) -> list[Tensor]:
        """Tensors of a control that is on the network while this learns, and no part of it."""
        control = getattr(self.objective, "control", None)
        return [] if control is None else [*control.module.parameters(), *control.module.buffers()]

    def __call__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a native folder of ``weights`` and the parts' buffers."""
        names = {id(parameter): name for name, parameter in self.objective.named_parameters()}
        beside = {id(tensor) for tensor in self._beside()}
        parts: dict[Any, InMemory] = {}
        for part, module in self.objective.parts().items():
            tensors = {
                key: weights[names[id(value)]] if id(value) in names else value.detach().cpu()
                for key, value in module.state_dict(keep_vars=True).items()
                if id(value) not in beside
            }
            exact = [name for name, value in module.named_buffers() if id(value) not in beside]
            parts[part] = InMemory(tensors, exact=exact)
        save_native(folder, parts, self.sections, options=Options(dtype=self.dtype), tokenizer=self.tokenizer)


class AverageError(UserError, ValueError):
    """Average that a training did not keep."""


class Outcome(NamedTuple):
    """Model of a run: ``trained`` is its newest checkpoint, ``parts`` the paths of the other parts.

    A part without a path was drawn at random and not trained.
    """

    trained: Path
    parts: dict[Part, Path | None]
    tokenizer: Path | None


def is_run(folder: Path) -> bool:
    """True if ``folder`` is the run folder of a training."""
    return (folder / "resolved.yaml").is_file() and (folder / "checkpoints").is_dir()


def outcome(run: Path, decay: float | None = None) -> Outcome:
    """Model that the training in ``run`` has come to, untrained parts included.

    ``decay`` picks one of several averages (``train.ema``); None: the first.
    """
    saved = RunFolder(run).saved()
    if not saved:
        raise CheckpointError(f"{run}: this training has no whole checkpoint yet")
    native = saved[-1].path / NATIVE
    experiment = load_full([run / "resolved.yaml"]).experiment
    if decay is not None:
        decays = [] if experiment.train is None else experiment.train.decays
        if decay not in decays:
            raise AverageError(
                f"{run} has no average of decay {decay:g}; train.ema is {', '.join(map(str, decays)) or None}"
            )
        native = saved[-1].path / averaged(decay, decays.index(decay))
    began = experiment.train.init_from if experiment.train is not None else None
    weights, held = began or experiment.checkpoint, detect(native).parts(native)
    others = {part: weights.source(part) for part in PARTS if part not in held}
    return Outcome(native, others, experiment.conditioning.tokenizer)
