"""Training loop: the same for every objective, precision, ZeRO stage and number of ranks."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sat.config.schema import TrainConfig, plain
from sat.data.batch import Batch
from sat.diffusion.draws import Draws, GeneratorDraws, PictureDraws, keyed
from sat.parallel.collectives import agree, barrier, mean
from sat.parallel.heartbeat import current
from sat.train.backend import Backend
from sat.train.checkpoints import Checkpoints, Export
from sat.train.log import Averages, Meter, Record, line, peak_flops
from sat.train.optim import Ema, autocast, prolonged, rate, rest, set_rate
from sat.train.resume import Layout, Progress, ResumeError, RunFolder, Saved
from sat.train.shards import cuttable
from sat.util.ending import ending
from sat.util.log import progress

if TYPE_CHECKING:
    from sat.train.profile import Trace

log = logging.getLogger(__name__)

VALIDATION = -1
"""Step for which validation draws its noise: the same noise every time."""
_ECHO = 2.0
"""Seconds in which a repeated signal is ignored: torchrun sends on what a terminal has sent already."""


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Source(Protocol):
    """Endless batches of this rank."""

    @property
    def epoch(self) -> float:
        """Number of times that the data has been seen."""
        ...

    def batches(self, prepare: Callable[[int, Batch], Batch]) -> Iterator[Batch]:
        """Batches from the current position on, each after ``prepare`` with its number from 0 on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch given out."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        ...


@dataclass
class Extras:
    """Optional work beside training.

    ``draw`` samples the fixed prompts into a folder, on every rank. ``tokens`` counts those of a batch.
    ``validation`` are the same held-out batches each time.
    """

    export: Export | None = None
    draw: Callable[[Path], None] | None = None
    tokens: Callable[[Batch], int] | None = None
    validation: Sequence[Batch] = ()
    record: Record | None = None


RULES: dict[int, Callable[[int, int, int, int, int], Draws]] = {
    1: GeneratorDraws.of_micro_batch,
    2: PictureDraws,
}
"""Rules of random numbers by the number that checkpoints hold, each of (seed, step, place, count, total).

A run goes on by the rule that it began with; new ones take the last.
"""


def step_generator(seed: int, step: int, place: int) -> torch.Generator:
    """A CPU generator for the micro-batch at ``place`` of a step, for what ``Objective.draws`` leaves out.

    Also seeds torch's global generators, for modules that draw from them. Nothing random is carried from step
    to step, so a resumed run needs no generator state.
    """
    torch.manual_seed(mixed := keyed(seed, step, place))
    return torch.Generator().manual_seed(mixed)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event set by SIGINT, SIGTERM or SIGUSR1, so that the step can end and the state be saved.

    A later second signal acts as before; the old handlers return after the block. SIGUSR1 is the signal that
    SLURM is mostly told to send before a job's time is over. Outside the main thread no signal arrives, so
    the event stays clear.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    first = 0.0
    old: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not event.is_set():
            event.set()
            first = time.monotonic()
            os.write(2, b"\nstopping after this step (once more to stop at once)\n")
        elif time.monotonic() - first > _ECHO:
            signal.signal(number, old[signal.Signals(number)])
            os.kill(os.getpid(), number)

    for wanted in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        old[wanted] = signal.signal(wanted, handle)
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@dataclass
class _Window:
    """Sums since the last row of the log."""

    averages: Averages = field(default_factory=Averages)
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0
    images: int = 0
    tokens: int = 0


class Trainer:
    """Runs an objective to ``config.steps`` optimizer steps: checkpoints, log, samples, validation."""

    def __init__(
        self, engine: Backend, source: Source, folder: RunFolder, extras: Extras | None = None
    ) -> None:
        self.engine, self.source, self.folder = engine, source, folder
        self.runtime = engine.runtime
        self.config: TrainConfig = engine.config
        self.extras = extras or Extras()
        self.ema = Ema(engine, self.config.decays) if self.config.decays else None
        self.checkpoints = Checkpoints(folder, engine, self.ema, self.extras.export)
        peak = peak_flops(self.config, self.runtime)
        self.meter = None if peak is None else Meter(peak)
        self.step = self.skipped = self.images = 0
        self.done = False  # at the last step, or before it by train.patience
        self.cycles = [self.config.steps]  # where the rate's schedules end
        self.seconds = 0.0
        self.rule = max(RULES)  # of random numbers
        self._bad_steps = 0  # in a row
        self._rate = 0.0  # of the last step
        self._saved_step = -1
        self._window = _Window()
        self._trace: Trace | None = None
        if self.config.profile is not None:
            from sat.train.profile import Trace as Made

            place, device = folder.root / "profile", self.runtime.device.type
            self._trace = Made(place, self.config.profile, self.runtime.rank, accelerator=device != "cpu")

    def fit(self) -> None:  # noqa: C901 - the loop, in order
        """Train until the last step, a stop signal, ``max_minutes`` or divergence; saves before returning."""
        config = self.config
        began, before = time.perf_counter(), self.seconds
        self.engine.objective.train()
        batches = self.batches()
        self._window = _Window()
        began_at, remaining = self.step, config.steps - self.step
        if remaining < 1:
            fixed = config.schedule == "constant" or self.engine.scheduler is not None
            then = "" if fixed else f" (train.prolong says what the {config.schedule} then does)"
            log.info("step %d of %d is done: raise train.steps to go on%s", self.step, config.steps, then)
        ending.sealed, watch = 0.0, current()

        def due(every: int | None, *, at_end: bool = True) -> bool:
            return bool(every) and (self.step % (every or 1) == 0 or (at_end and self.step == config.steps))

        with stop_signals() as stop, progress(remaining, rank=self.runtime.rank, lines=False) as bar:
            self.done = self._impatient()
            while self.step < config.steps and not self.done:
                try:
                    with nullcontext() if self._trace is None else self._trace.around():
                        self.train_step(batches)
                except DivergedError as error:
                    self.checkpoints.settle()
                    last = self.checkpoints.last
                    left = "there is no checkpoint" if last is None else f"the last good checkpoint is {last}"
                    raise DivergedError(f"{error}; {left}") from error
                watch.ready()  # a first step is over: what is compiled has been
                ending.step = self.step
                passed = time.perf_counter() - began
                self.seconds = before + passed
                bar.update()
                if due(config.log_every):
                    bar.set_postfix_str(f"loss {self._log():.4g}")

                paused = time.perf_counter()  # this work does not count as training speed
                if self.extras.validation and due(config.validate_every):
                    self.validate()
                    self.done = self._impatient()
                    if self.checkpoints.best == self.step:
                        self.save(background=config.background_save)
                if self.extras.draw is not None and due(config.sample_every):
                    self.sample()
                if due(config.save_every, at_end=False):
                    self.save(background=config.background_save)
                self._window.started += time.perf_counter() - paused

                # All ranks stop when one got a signal, or the minutes of this run are over. A checkpoint
                # that all ranks have written meanwhile is made whole.
                limit = config.max_minutes
                late = limit is not None and passed >= 60 * limit
                flags = [stop.is_set(), late, self.checkpoints.busy]
                stopped, late, writing = agree(flags)
                if not writing:
                    self.checkpoints.settle()
                if stopped or late:
                    why = (
                        "asked to stop" if stopped else f"the {limit:g} minutes of train.max_minutes are over"
                    )
                    log.info("%s: saving at step %d of %d", why, self.step, config.steps)
                    ending.reason = f"{why}: saved at step {self.step} of {config.steps}, --resume goes on"
                    break
            self.save()
            if self._bad_steps > 1 or (self._bad_steps and self._bad_steps == config.steps - began_at):
                raise DivergedError(
                    f"the last {self._bad_steps} steps to step {self.step} were skipped, loss or gradient "
                    f"not finite: the weights are those of step {self.step - self._bad_steps}; lower "
                    f"train.lr ({config.lr:g}), set train.clip, or use train.dtype fp32"
                )
            if (best := self.checkpoints.best) is not None:
                loss = self.checkpoints.held_out.losses[best]
                log.info("lowest held-out loss %.4g: %s", loss, self.folder.path(best))
            ending.step = self.step
            self.done = self.done or self.step >= config.steps
            ending.seal()  # all is saved: a late signal changes nothing

    def batches(self) -> Iterator[Batch]:
        """Endless batches from this step on, with their random numbers."""
        begun, accumulate = self.step, self.config.accumulate

        def prepare(number: int, batch: Batch) -> Batch:
            step, micro = divmod(number, accumulate)
            draws = self._draws(batch, begun + step, micro, accumulate)
            return replace(batch, draws=self.engine.objective.draws(batch, draws))

        return self.source.batches(prepare)

    def _draws(self, batch: Batch, step: int, micro: int, micros: int) -> Draws:
        """Random numbers of this rank's batch ``micro`` among ``micros``, by the run's rule."""
        size, ranks = len(batch), self.engine.mesh.data_ranks
        place = (micro * ranks + self.engine.mesh.data_rank) * size
        return RULES[self.rule](self.config.seed, step, place, size, size * ranks * micros)

    def _generator(self, batch: Batch, step: int, micro: int) -> torch.Generator:
        """Generator of this rank's batch ``micro``, by the run's rule."""
        place = micro * self.engine.mesh.data_ranks + self.engine.mesh.data_rank
        return step_generator(self.config.seed, step, place if self.rule == 1 else place * len(batch))

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: ``accumulate`` micro-batches, clip, apply, average.

        A step with a loss or gradient that is not finite is skipped. ``max_bad_steps`` of them in a row raise
        :class:`DivergedError`, apart from fp16's search for a loss scale.
        """
        engine, config, mesh, device = self.engine, self.config, self.engine.mesh, self.runtime.device
        window, losses, watch = self._window, [], current()
        scheduler = engine.scheduler
        self._rate = rate(self.step, config, self.cycles) if scheduler is None else scheduler.rate
        if scheduler is None:
            set_rate(engine.optimizer, self._rate)
        watch.mark(f"step {self.step + 1}: begin", place=self.step * 10**6)
        engine.objective.step = self.step
        rest(engine.inner, engine.objective.resting())
        for micro in range(config.accumulate):
            began = time.perf_counter()
            watch.mark(f"step {self.step + 1}: read a batch")
            batch = next(batches)
            window.waited += time.perf_counter() - began
            with nullcontext() if self.meter is None else self.meter.micro(batch):
                moved, generator = batch.to(device), self._generator(batch, self.step, micro)
                watch.mark(f"step {self.step + 1}: forward pass")
                with autocast(config, device.type):
                    values = engine.forward(moved, generator)
                watch.mark(f"step {self.step + 1}: backward pass")
                engine.backward(values["loss"], last=micro == config.accumulate - 1)
            window.averages.add(values)
            losses.append(values["loss"].detach())
            if self.extras.tokens is not None:
                window.tokens += self.extras.tokens(batch) * mesh.data_ranks
            window.images += len(batch) * mesh.data_ranks
            self.images += len(batch) * mesh.data_ranks
        watch.mark(f"step {self.step + 1}: optimizer")
        if config.group_norms:
            window.averages.add(engine.group_norms())
        result = engine.step()
        if scheduler is not None:
            scheduler.step()
        watch.mark(f"step {self.step + 1}: end")
        self.step += 1
        window.steps += 1
        norm, turn = torch.as_tensor(result.norm, device=device), engine.objective.turn()
        window.averages.add({"grad_norm": norm, **({f"grad_norm_{turn}": norm} if turn else {})})
        if result.applied:
            self._bad_steps = 0
            if self.ema is not None:
                self.ema.update(self.step)
            return

        self.skipped += 1
        loss = torch.stack(losses)
        bad_loss = not bool(torch.isfinite(loss).all())
        if not any(agree([config.dtype != "fp16" or bad_loss])):
            log.info("step %d: fp16 overflow, loss scale now %g", self.step, engine.loss_scale)
            return
        self._bad_steps += 1
        log.warning(
            "step %d skipped, not finite: loss %g (this rank's), gradient norm %g; %d in a row",
            self.step, loss.mean().item(), float(result.norm), self._bad_steps,
        )  # fmt: skip
        if self._bad_steps >= config.max_bad_steps:
            raise DivergedError(
                f"loss or gradient was not finite in {self._bad_steps} steps in a row up to step {self.step} "
                f"(train.max_bad_steps): lower train.lr ({config.lr:g}), set train.clip, or use "
                f"train.dtype fp32"
            )

    # -- now and then

    def _log(self) -> float:
        """Write one row for the window: means, rate, speed, memory; its loss."""
        self.runtime.synchronize()
        window, self._window = self._window, _Window()
        passed = max(time.perf_counter() - window.started, 1e-9)
        means = window.averages.take()
        share = torch.tensor([window.waited / passed], device=self.runtime.device)
        row: dict[str, float] = {"step": self.step, "loss": means.pop("loss", float("nan")), **means}
        row["lr"] = self._rate
        if self.config.dtype == "fp16":
            row["loss_scale"] = self.engine.loss_scale
        row |= {
            "images_per_second": window.images / passed,
            "seconds_per_step": passed / window.steps,
            **({} if self.extras.tokens is None else {"tokens_per_second": window.tokens / passed}),
            **({} if self.meter is None else {"mfu": self.meter.take(passed)}),
            "data_wait": mean(share).item(),
            "memory_gb": self.runtime.peak_memory(),
            **({} if (held := self.runtime.reserved_memory()) is None else {"memory_reserved_gb": held}),
            "skipped": self.skipped,
            "images": self.images,
            "epoch": self.source.epoch,
            "seconds": self.seconds,
        }
        self._write(row)
        return row["loss"]

    def _write(self, row: Mapping[str, float]) -> None:
        """Write ``row`` to the record and the log, on rank 0."""
        if self.runtime.is_main:
            if self.extras.record is not None:
                self.extras.record.write(row)
            log.info("%s", line(row, self.config.steps))

    def validate(self) -> dict[str, float]:
        """Means of the objective's ``evaluate`` over the held-out batches, with the averaged weights if kept.

        The noise is the same each time.
        """
        objective, runtime, held = self.engine.objective, self.runtime, self.extras.validation
        averages = Averages()
        with self._averaged():
            objective.eval()
            try:
                with torch.no_grad(), autocast(self.config, runtime.device.type):
                    for index, batch in enumerate(held):
                        current().mark(f"step {self.step}: validation, batch {index}")
                        draws = self._draws(batch, VALIDATION, index, len(held))
                        drawn = replace(batch, draws=objective.held_out_draws(batch, draws))
                        moved = (drawn.pinned() if runtime.pins else drawn).to(runtime.device)
                        generator = self._generator(batch, VALIDATION, index)
                        averages.add(objective.evaluate(moved, generator))
            finally:
                objective.train()
            scores = {f"validation/{name}": value for name, value in averages.take().items()}
        self._write({"step": self.step, **scores})
        loss = scores.get("validation/loss", float("nan"))
        self.checkpoints.held_out.add(self.step, loss, write=self.runtime.is_main)
        return scores

    def _impatient(self) -> bool:
        """True once ``train.patience`` validations in a row had no lower held-out loss, which is told."""
        held_out, patience = self.checkpoints.held_out, self.config.patience
        if patience is None or held_out.since < patience:
            return False
        log.info(
            "the held-out loss has not fallen for %d validations (train.patience): training ends at step %d "
            "of %d", held_out.since, self.step, self.config.steps,
        )  # fmt: skip
        return True

    def sample(self) -> None:
        """Draw the fixed prompts into ``RUN/samples/step_…``, with the averaged weights if they are kept."""
        if self.extras.draw is None:
            raise ValueError("this run has no prompts to draw (train.sample_prompts)")
        objective = self.engine.objective
        with self._averaged():
            objective.eval()
            self.extras.draw(self.folder.root / "samples" / f"step_{self.step:08d}")
            objective.train()
        barrier(self.runtime.device)
        if self.extras.record is not None:
            self.extras.record.pictures(self.step, self.folder.root / "samples" / f"step_{self.step:08d}")

    def _averaged(self) -> AbstractContextManager[None]:
        """The averaged weights in place of the current ones, if they are kept."""
        return self.ema.swapped() if self.ema is not None else self.engine.unsharded()

    # -- checkpoints

    def _progress(self) -> Progress:
        """Counters of this moment."""
        mesh, config = self.engine.mesh, self.config
        layout = Layout(
            self.runtime.world, mesh.data_ranks, mesh.tensor.size, config.zero,
            config.batch_size, config.accumulate,
        )  # fmt: skip
        cut = not any(agree([not cuttable(self.engine)]))
        return Progress(
            self.step, self.skipped, self.images, self.seconds, self.source.state_dict(), layout,
            config.dtype, cut, self.engine.whole_shapes, config.steps, self.cycles, plain(config.groups),
            self.rule,
        )  # fmt: skip

    def save(self, *, background: bool = False) -> None:
        """Write a checkpoint of this step, unless it is there already; every rank calls it.

        In the ``background`` the files are written while training goes on; before the next ones, and at the
        end, they are waited for.
        """
        if self.step != self._saved_step:
            self.checkpoints.save(self._progress(), self.config.keep_last, background=background)
            self._saved_step = self.step
        if not background:
            self.checkpoints.settle()

    def resume(self, saved: Saved) -> None:
        """Go on exactly from ``saved``; every rank calls it, before ``fit``."""
        state = self.checkpoints.load(saved, self._progress())
        if state.draws not in RULES:
            raise ResumeError(
                f"{saved.path} draws its random numbers by rule {state.draws}, this version knows "
                f"{' and '.join(map(str, RULES))}: resume it with the version that wrote it"
            )
        if state.draws != self.rule:
            log.info(
                "%s drew its random numbers by micro-batch, as older versions did: the run goes on so",
                saved.path,
            )  # fmt: skip
        self.rule = state.draws
        self.source.load_state_dict(state.loader)
        self.step, self.skipped, self.images = state.step, state.skipped, state.images
        self.seconds, self._saved_step = state.seconds, state.step
        self.cycles, changed = prolonged(self.config, state.step, state.steps, state.cycles)
        if changed:
            log.warning("%s", changed)
        log.info("resumed from %s at step %d of %d", saved.path, self.step, self.config.steps)
