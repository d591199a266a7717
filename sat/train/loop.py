"""The training loop: the same for every objective, precision, ZeRO stage and number of ranks."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat.config.schema import TrainConfig
from sat.data.batch import Batch
from sat.parallel.collectives import agree, barrier, gather, mean
from sat.parallel.launch import Runtime
from sat.train.deepspeed import STATE, StepResult, TrainEngine
from sat.train.ema import Ema, masters
from sat.train.log import Averages, Record, clock, line
from sat.train.optim import rate, set_rate
from sat.train.resume import Progress, RunFolder, Saved
from sat.util.progress import progress

log = logging.getLogger(__name__)

EMA_FILE = "ema.safetensors"


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Source(Protocol):
    """Where batches come from, without end."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches of this rank from the current position on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch given out."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        ...


class Export(Protocol):
    """Writes trained weights as a checkpoint that can be sampled from."""

    def __call__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """``weights``: full float32 tensors on the CPU by their name in the objective. Rank 0 only."""
        ...


class Draw(Protocol):
    """Samples the fixed prompts into a folder, sharing them over the ranks; every rank calls it."""

    def __call__(self, folder: Path) -> None: ...


@dataclass
class Extras:
    """What a run may do besides training. ``validation``: the same held-out batches each time."""

    export: Export | None = None
    draw: Draw | None = None
    validation: Sequence[Batch] = ()
    record: Record | None = None


@dataclass
class _Window:
    """What happened since the last row of the log."""

    averages: Averages = field(default_factory=Averages)
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0
    images: int = 0


class Trainer:
    """Runs an objective to ``config.steps`` optimizer steps, with checkpoints, log, samples and validation."""

    def __init__(
        self,
        engine: TrainEngine,
        source: Source,
        folder: RunFolder,
        runtime: Runtime,
        extras: Extras | None = None,
    ) -> None:
        self.engine, self.source, self.folder, self.runtime = engine, source, folder, runtime
        self.config: TrainConfig = engine.config
        self.extras = extras or Extras()
        self.ema = Ema(engine, self.config.ema) if self.config.ema is not None else None
        self.step = self.skipped = self.images = 0
        self.seconds = 0.0
        self._streak = 0
        self._saved_step = -1
        self._window = _Window()

    # ------------------------------------------------------------------ running

    def fit(self) -> None:
        """Train until the last step, a stop signal, ``max_minutes`` or divergence; saves before it returns."""
        began, before = time.perf_counter(), self.seconds
        limit = None if self.config.max_minutes is None else began + 60 * self.config.max_minutes
        self.engine.objective.train()
        batches = iter(self.source)
        self._window = _Window()
        remaining = self.config.steps - self.step
        with _stop_signals() as stop, progress(remaining, rank=self.runtime.rank) as bar:
            while self.step < self.config.steps:
                self._train_step(batches)
                self.seconds = before + time.perf_counter() - began
                bar.advance()
                self._periodic()
                late = limit is not None and time.perf_counter() >= limit
                stopping, out_of_time = agree([stop.is_set(), late], self.runtime.device)
                if stopping or out_of_time:
                    why = "stop signal" if stopping else f"train.max_minutes {self.config.max_minutes:g} are over"
                    log.info("%s: saving at step %d of %d", why, self.step, self.config.steps)
                    break
            self.save()

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: ``accumulate`` micro-batches, clip, apply, average."""
        set_rate(self.engine.optimizer, rate(self.step, self.config))
        window, count = self._window, self.config.accumulate
        losses = []
        for micro in range(count):
            began = time.perf_counter()
            batch = next(batches)
            window.waited += time.perf_counter() - began
            values = self._forward(batch.to(self.runtime.device), micro)
            self.engine.backward(values["loss"], last=micro == count - 1)
            window.averages.add(values)
            losses.append(values["loss"].detach())
            window.images += len(batch) * self.runtime.world
        result = self.engine.step()
        if result.applied:
            self._streak = 0
            if self.ema is not None:
                self.ema.update(self.step)
        else:
            self._skip(result, torch.stack(losses))
        window.averages.add({"grad_norm": torch.as_tensor(result.norm, device=self.runtime.device)})
        window.steps += 1
        self.images += len(batch) * self.runtime.world * count
        self.step += 1

    def _forward(self, batch: Batch, micro: int) -> Mapping[str, Tensor]:
        """The objective's scalars. Its randomness depends on seed, step and the micro-batch's place among all."""
        place = micro * self.runtime.world + self.runtime.rank
        generator = step_generator(self.config.seed, self.step, place)
        with computing(self.config, self.runtime):
            values: Mapping[str, Tensor] = self.engine.engine(batch, generator)
        return values

    def _skip(self, result: StepResult, losses: Tensor) -> None:
        """Count a step that was not applied; a streak of them that is no search for the fp16 scale ends the run."""
        self.skipped += 1
        finite = bool(torch.isfinite(losses).all())
        searching = not any(agree([self.config.dtype != "fp16" or not finite], self.runtime.device))
        if searching:
            log.info("step %d: fp16 overflow, loss scale now %g", self.step, self.engine.loss_scale)
            return
        self._streak += 1
        log.warning(
            "step %d skipped: loss or gradient is not finite (loss here %s, gradient norm %s); %d in a row",
            self.step, losses.mean().item(), float(result.norm), self._streak,
        )  # fmt: skip
        if self._streak >= self.config.max_bad_steps:
            raise DivergedError(
                f"{self._streak} steps in a row up to step {self.step} had a loss or gradient that is not finite "
                f"(train.max_bad_steps {self.config.max_bad_steps}): lower train.lr ({self.config.lr:g}), set "
                f"train.clip, or use train.dtype fp32; the last checkpoint is untouched"
            )

    # ------------------------------------------------------------------ now and then

    def _periodic(self) -> None:
        """Log, validate, sample and save when their step has come."""
        config, step = self.config, self.step
        done = step == config.steps
        if step % config.log_every == 0 or done:
            self._log()
        if config.validate_every and (step % config.validate_every == 0 or done) and self.extras.validation:
            self._outside_window(self.validate)
        if config.sample_every and (step % config.sample_every == 0 or done) and self.extras.draw:
            self._outside_window(self.sample)
        if step % config.save_every == 0:
            self._outside_window(self.save)

    def _outside_window(self, work: Any) -> None:  # noqa: ANN401 - a method without arguments
        """Do ``work`` without counting its time as training speed."""
        began = time.perf_counter()
        work()
        self._window.started += time.perf_counter() - began

    def _log(self) -> None:
        """One row for the window: means, rate, speed, memory."""
        self.runtime.synchronize()
        window, self._window = self._window, _Window()
        passed = time.perf_counter() - window.started
        share = mean(torch.tensor([window.waited / max(passed, 1e-9)], device=self.runtime.device)).item()
        row: dict[str, float] = {"step": self.step, **window.averages.take()}
        row["lr"] = rate(self.step - 1, self.config)
        if self.config.dtype == "fp16":
            row["loss_scale"] = self.engine.loss_scale
        row |= {
            "images_per_second": window.images / max(passed, 1e-9),
            "seconds_per_step": passed / window.steps,
            "data_wait": share,
            "memory_gb": self.runtime.peak_memory(),
            "skipped": self.skipped,
            "images": self.images,
            "seconds": self.seconds,
        }
        self._write(row)

    def _write(self, row: Mapping[str, float]) -> None:
        """To the record and the log, on rank 0."""
        if self.runtime.is_main:
            if self.extras.record is not None:
                self.extras.record.write(row)
            log.info("%s", line(row, self.config.steps))

    def validate(self) -> dict[str, float]:
        """Means over the held-out batches, with the averaged weights if there are any; the same noise each time."""
        averages = Averages()
        objective = self.engine.objective
        with self._smooth(), torch.no_grad(), computing(self.config, self.runtime):
            objective.eval()
            for index, batch in enumerate(self.extras.validation):
                place = index * self.runtime.world + self.runtime.rank
                generator = step_generator(self.config.seed, 2**31, place)
                averages.add(objective.evaluate(batch.to(self.runtime.device), generator))
            objective.train()
        row = {f"validation/{name}": value for name, value in averages.take().items()}
        self._write({"step": self.step, **row})
        return row

    def sample(self) -> None:
        """Draw the fixed prompts with the averaged weights into ``RUN/samples/step_…``."""
        if self.extras.draw is None:
            raise ValueError("this run has no prompts to draw (train.sample_prompts)")
        objective = self.engine.objective
        with self._smooth(), torch.no_grad():
            objective.eval()
            self.extras.draw(self.folder.root / "samples" / f"step_{self.step:08d}")
            objective.train()
        barrier(self.runtime.device)

    def _smooth(self) -> AbstractContextManager[None]:
        """The averaged weights in place of the current ones, if they are kept."""
        return self.ema.swapped() if self.ema is not None else nullcontext()

    # ------------------------------------------------------------------ checkpoints

    def _progress(self) -> Progress:
        """The counters of this moment."""
        return Progress(
            step=self.step, skipped=self.skipped, images=self.images, seconds=self.seconds,
            loader=self.source.state_dict(), world=self.runtime.world, zero=self.config.zero,
            dtype=self.config.dtype,
            parameters={name: list(p.shape) for name, p in self.engine.parameters.items()},
        )  # fmt: skip

    def save(self) -> None:
        """Write a checkpoint of this step, unless it is there already; every rank calls it."""
        if self.step == self._saved_step:
            return
        began = time.perf_counter()
        path = self.folder.checkpoints / f"step_{self.step:08d}"
        if self.runtime.is_main:
            self.folder.begin(self.step)
        barrier(self.runtime.device)
        self.engine.save(path)
        weights = self._collect()
        if self.runtime.is_main:
            if self.ema is not None:
                save_file(weights, path / STATE / EMA_FILE)
            if self.extras.export is not None:
                self.extras.export(path / "native", weights)
        failures = [text for text in gather(None if path.is_dir() else f"rank {self.runtime.rank} does not see {path}") if text]
        if failures:
            raise RuntimeError(f"{failures[0]}: the run folder must be on storage that all ranks share")
        if self.runtime.is_main:
            self.folder.commit(path, self._progress())
            self.folder.prune(self.config.keep_last)
            log.info("saved %s in %s", path, clock(time.perf_counter() - began))
        barrier(self.runtime.device)
        self._saved_step = self.step

    def _collect(self) -> dict[str, Tensor]:
        """The averaged (else the current) weights, float32 on the CPU: all of them on rank 0, none elsewhere."""
        values = self.ema.gather() if self.ema is not None else masters(self.engine)
        kept: dict[str, Tensor] = {}
        for name, value in values:
            if self.runtime.is_main:
                kept[name] = value.detach().cpu().contiguous()
        return kept

    def resume(self, saved: Saved) -> None:
        """Go on exactly from ``saved``; every rank calls it, before ``fit``."""
        state = saved.progress()
        state.check(self._progress(), saved.path)
        self.engine.load(saved.path)
        if self.ema is not None:
            file = saved.path / STATE / EMA_FILE
            if file.is_file():
                self.ema.load(load_file(file))
            else:
                log.warning("%s holds no averaged weights: the average starts anew from its weights", saved.path)
                self.ema = Ema(self.engine, self.ema.decay)
        self.source.load_state_dict(state.loader)
        self.step, self.skipped, self.images, self.seconds = state.step, state.skipped, state.images, state.seconds
        self._saved_step = state.step
        log.info("resumed from %s at step %d of %d", saved.path, self.step, self.config.steps)


def computing(config: TrainConfig, runtime: Runtime) -> AbstractContextManager[Any]:
    """bf16 computation with float32 weights, if ``train.autocast`` asks for it."""
    if config.autocast is None:
        return nullcontext()
    return torch.autocast(runtime.device.type, torch.bfloat16)


def step_generator(seed: int, step: int, place: int) -> torch.Generator:
    """A CPU generator for one micro-batch; also seeds torch's global one, for modules that draw from it.

    Nothing random is carried from step to step, so a resumed run needs no generator state.
    """
    digest = hashlib.blake2b(f"{seed} {step} {place}".encode(), digest_size=4).digest()
    mixed = int.from_bytes(digest, "little")  # 32 bits: torch's CPU generator looks at no more
    torch.manual_seed(mixed)
    return torch.Generator().manual_seed(mixed)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event set by SIGINT or SIGTERM; a later second one acts as usual. Old handlers return after.

    Signals within two seconds of the first are ignored: torchrun sends on what a terminal has sent already.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    old: dict[int, Any] = {}
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not event.is_set():
            event.set()
            first = time.monotonic()
            os.write(2, b"\nstopping after this step (once more to stop at once)\n")
        elif time.monotonic() - first > 2:
            signal.signal(number, old[number])
            os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
