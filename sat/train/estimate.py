"""Memory of a training run on each rank, estimated before anything is loaded, and settings that fit a budget.

Weights and activations are measured (:mod:`sat.train.measure`). The optimizer side is DeepSpeed's arithmetic
(0.19, ``runtime/zero/stage_1_and_2.py``), written out below. All numbers are bytes unless a name says
otherwise. P are the trained parameters of a rank, N the ranks that share out their optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sat.config.check import resolve
from sat.config.schema import Experiment, LoraConfig, OffloadConfig
from sat.data.loader import AHEAD
from sat.train.data import spare_parts
from sat.train.measure import (
    PACKED,
    Measured,
    OptimizerState,
    Weights,
    measure,
    on_host,
    optimizer_state,
    sections,
)

BUCKET = 500_000_000
"""Elements of the buffer that DeepSpeed gathers gradients in (``reduce_bucket_size``)."""
LIVE = 1_000_000_000
"""Elements that ZeRO 3 may have gathered at a time (``stage3_max_live_parameters``)."""
SUBGROUP = 1_000_000_000
"""Elements that ZeRO 3 steps together at most (``sub_group_size``)."""
FULL = 4
"""Bytes of a float32."""
PROCESS = 420_000_000
"""Bytes of a CPU run's process with its libraries alone (measured with torch 2.13 and DeepSpeed 0.19)."""
GAPS = 0.06
"""Share of what is in use that glibc leaves free between tensors on a CPU: 1 to 11 % in 15 trainings."""
MOST_RANKS = 64
"""Ranks that the search for settings goes up to."""
LORA = LoraConfig(targets=["attention", "mlp"])
"""Adapter of configs/lora.yaml."""


@dataclass(frozen=True)
class Phase:
    """Peak memory in a part of a step, beside the memory that is always held."""

    name: str
    extra: int


@dataclass(frozen=True)
class Estimate:
    """Memory of one rank of ``ranks``; ``tensor`` of them share the weights."""

    measured: Measured
    state: OptimizerState
    ranks: int
    zero: int
    accumulate: int
    batch_size: int
    averages: int
    host: bool  # on the CPU: unwritten memory takes none; batches and checkpoints are there too
    waiting: int  # batches that are read ahead
    offload: OffloadConfig = OffloadConfig()
    tensor: int = 1

    @property
    def sharing(self) -> int:
        """Ranks with the same weights, which share out their optimizer state: N."""
        return self.ranks // self.tensor

    @property
    def gradient(self) -> int:
        """Bytes of one element of a gradient: those of its weight."""
        weights = self.measured.weights
        return max(1, round(weights.trained / max(1, weights.trained_elements)))

    @property
    def share(self) -> int:
        """Elements with optimizer state on this rank: P / N, at ZeRO 0 all."""
        elements = self.measured.weights.trained_elements
        return elements if self.zero == 0 else -(-elements // self.sharing)

    @property
    def weights(self) -> Weights:
        """Weights of this rank; at ZeRO 3 its share, and those that may be gathered at a time."""
        whole = self.measured.weights
        if self.zero < 3:
            return whole
        network = whole.trained + whole.frozen.get("network", 0)
        gathered = min(network, LIVE * self.gradient)
        kept = {name: size for name, size in whole.frozen.items() if name != PACKED}
        frozen = {k: v // self.sharing if k == "network" else v for k, v in kept.items()}
        return Weights(whole.trained // self.sharing + gathered, whole.trained_elements, frozen)

    @property
    def masters(self) -> int:
        """Float32 copies of the weights; at ZeRO 0 the weights are float32 themselves."""
        return 0 if self.zero == 0 else FULL * self.share

    @property
    def optimizer(self) -> int:
        """State of the optimizer."""
        return int(self.state.kept * self.share)

    @property
    def average(self) -> int:
        """Moving averages of the weights, float32."""
        return FULL * self.share * self.averages

    @property
    def gradients(self) -> int:
        """Gradients after a backward pass."""
        elements = self.measured.weights.trained_elements if self.zero < 2 else self.share
        return self.gradient * elements

    @property
    def bucket(self) -> int:
        """DeepSpeed's gradient buffer: whole on a GPU, on a CPU only as far as it is written."""
        if self.zero == 0:
            return 0
        elements = min(BUCKET, self.measured.weights.trained_elements) if self.host else BUCKET
        return self.gradient * elements

    @property
    def loading(self) -> int:
        """Samples of the batch, and batches read ahead; with a GPU they are not in its memory."""
        return self.measured.batch * (1 + self.waiting) if self.host else 0

    @property
    def process(self) -> int:
        """The process with its libraries, which are in the memory that is estimated only on a CPU."""
        return PROCESS if self.host else 0

    @property
    def optimizer_offloaded(self) -> bool:
        """True if the optimizer steps outside the device's memory."""
        return self.offload.optimizer and self.zero > 0 and not self.host

    @property
    def offloaded_weights(self) -> int:
        """Weights in the CPU's memory, while the device is a GPU."""
        if not self.offload.parameters or self.zero < 3 or self.host:
            return 0
        return self.measured.weights.trained // self.sharing

    @property
    def offloaded(self) -> int:
        """Everything that offloading keeps in the CPU's memory, while the device is a GPU."""
        optimizer = self.masters + self.optimizer + self.average + FULL * self.share  # and its gradients
        return (optimizer if self.optimizer_offloaded else 0) + self.offloaded_weights

    @property
    def locked(self) -> int:
        """Page-locked host memory beyond ``offloaded``: DeepSpeed's second buffers, and torch's rounding.

        Torch rounds every buffer up to a power of two. Source: DeepSpeed 0.19, ``stage_1_and_2.py`` and
        ``stage3.py``.
        """
        if not self.offloaded:
            return 0
        values, buffers = 0, list[int]()
        if self.optimizer_offloaded and self.zero < 3:  # masters, gradients, updated weights
            values = 2 * FULL * self.share
            buffers = [FULL * self.share, FULL * self.share, self.gradient * self.share]
        elif self.optimizer_offloaded:  # gradients in one piece, and by the groups that are stepped together
            values, full = FULL * self.share, self.share // SUBGROUP
            buffers = [FULL * n for n in (self.share, *[SUBGROUP] * full, self.share - full * SUBGROUP)]
        buffers.append(self.offloaded_weights)
        return sum(1 << (n - 1).bit_length() for n in buffers if n) - values - self.offloaded_weights

    @property
    def lasting(self) -> int:
        """Memory held throughout."""
        weights = self.weights.total - self.offloaded_weights + self.process
        if self.optimizer_offloaded:
            return weights + self.loading
        kept = FULL * self.share if self.offload.optimizer and self.zero else 0  # gradients of the optimizer
        return weights + self.masters + self.optimizer + self.average + self.loading + kept

    @property
    def phases(self) -> list[Phase]:
        """Parts of a step that may be the largest."""
        elements, trace = self.measured.weights.trained_elements, self.measured.trace
        own, bucket, earlier = self.gradient * self.share, self.bucket, self.accumulate > 1

        # Activations and the gradients so far, those of earlier micro-batches included.
        if self.zero < 2:  # every gradient stays; the bucket is filled when all are there
            backward = trace.peak(0 if earlier else self.gradient) + (self.gradients if earlier else 0)
            backward += 0 if self.host else bucket
        elif self.host:  # the bucket fills as they come
            backward = trace.peak(self.gradient) + (self.gradients if earlier else 0)
        else:  # gradients of this pass, and the sum over those before
            backward = trace.peak() + self.gradients * (2 if earlier else 1) + bucket

        # Gradients are gathered, brought to float32 and applied; activations are gone.
        passing = int(self.state.passing * self.share)
        wide = 0 if self.gradient == FULL else FULL * self.share
        applied = 2 * own + wide + passing  # the share, its flat copy, and that in float32
        if self.optimizer_offloaded:
            step = bucket
        elif self.zero == 0:
            together = FULL * min(BUCKET, self.share) if self.sharing > 1 else 0
            step = self.gradients + max(passing, together)
        elif self.zero == 1:
            begun = self.gradients + (0 if self.host else bucket)
            first = self.gradient * max(0, elements - BUCKET) + bucket + own
            step = max(begun, first, applied)
        else:
            step = max(bucket + own * (2 if earlier else 1), applied)
        found = [Phase("forward and backward", backward), Phase("optimizer step", step)]

        # Whole float32 weights on rank 0, and once more as the bytes of a file.
        if self.host:
            saving = (0 if self.zero == 0 else FULL * elements) + FULL * elements * self.averages
            found.append(Phase("saving", saving))
            if self.measured.drawn:  # instead of what lasts; the process is there all the time
                found.append(Phase("drawing weights", self.measured.drawn + self.process - self.lasting))
        return found

    def peak(self, phase: Phase) -> int:
        """Memory in ``phase``: on the CPU with the gaps between tensors."""
        used = self.lasting + phase.extra
        return used + (int(GAPS * (used - self.process)) if self.host else 0)

    @property
    def total(self) -> int:
        """Peak memory."""
        return max(self.peak(phase) for phase in self.phases)


class Estimator:
    """Estimates of one experiment and of changes to it. Each micro-batch is measured once."""

    def __init__(self) -> None:
        self._measured: dict[str, Measured] = {}
        self._states: dict[str, OptimizerState] = {}

    def estimate(self, experiment: Experiment, ranks: int, zero: int | None = None) -> Estimate:
        """Memory of ``experiment`` on ``ranks`` ranks, at its own ZeRO stage or at another."""
        train, data = sections(experiment)
        batch = repr((
            experiment.model, experiment.diffusion, experiment.adapters, train.objective, train.batch_size,
            train.dtype, train.autocast, train.activation_checkpointing, data.height, data.width,
            train.pack, train.compile, data.buckets, bool(data.cache), bool(data.cache_views),
            train.sample_every is None, experiment.memory.quantize, experiment.parallel.tensor,
            experiment.parallel.sequence,
        ))  # fmt: skip
        if batch not in self._measured:
            self._measured[batch] = measure(experiment)
        optimizer = repr((train.optimizer, train.weight_decay))
        if optimizer not in self._states:
            self._states[optimizer] = optimizer_state(train, tuple(experiment.imports))
        return Estimate(
            self._measured[batch], self._states[optimizer], ranks, train.zero if zero is None else zero,
            train.accumulate, train.batch_size, len(train.decays), on_host(experiment),
            AHEAD if data.workers else 0, train.offload, experiment.parallel.tensor,
        )  # fmt: skip


# -- settings that bring a training into a memory budget: each is estimated, none guessed


@dataclass(frozen=True)
class Change:
    """A change of settings; ``setting`` is what to write on the command line."""

    setting: str
    apply: Callable[[Experiment], Experiment]


@dataclass(frozen=True)
class Outcome:
    """Memory of a rank after some changes."""

    changes: tuple[Change, ...]
    ranks: int
    total: int

    def __str__(self) -> str:
        return " ".join(change.setting for change in self.changes)


@dataclass(frozen=True)
class SettingsSearch:
    """``alone``: each change by itself. ``found``: the least that fits, or None; ``best``: all of them."""

    budget: int
    now: Outcome
    alone: tuple[Outcome, ...]
    found: Outcome | None
    best: Outcome


def find_settings(estimator: Estimator, experiment: Experiment, ranks: int, budget: int) -> SettingsSearch:
    """Changes that make ``experiment`` fit ``budget`` bytes a rank; those that cost least come first."""

    def outcome(changes: Sequence[Change], ranks: int = ranks) -> Outcome:
        changed = _changed(experiment, changes)
        return Outcome(tuple(changes), ranks, estimator.estimate(changed, ranks).total)

    best = now = outcome(())
    if now.total <= budget:
        return SettingsSearch(budget, now, (), now, now)
    offered = list(_changes(experiment, ranks))
    alone = tuple(outcome([change]) for change in offered)
    for change in offered:  # each replaces an earlier value of the same key
        key = change.setting.partition("=")[0]
        tried = outcome([*(c for c in best.changes if c.setting.partition("=")[0] != key), change])
        if tried.total < best.total:
            best = tried
        if best.total <= budget:
            break

    found = None
    if best.total <= budget:  # without the changes that turn out not to be needed, the dearest first
        found = best
        for change in reversed(best.changes):
            fewer = outcome([one for one in found.changes if one is not change])
            found = fewer if fewer.total <= budget else found
        return SettingsSearch(budget, now, alone, found, best)

    # With twice as many ranks, and twice again.
    if sections(experiment)[0].backend == "plain":
        return SettingsSearch(budget, now, alone, found, best)
    sharing = [_ZERO_2] if sections(_changed(experiment, best.changes))[0].zero < 2 else []
    while found is None and (ranks := 2 * ranks) <= MOST_RANKS:
        tried = outcome([*best.changes, *sharing], ranks)
        found = tried if tried.total <= budget else None
    return SettingsSearch(budget, now, alone, found, best)


def _changed(experiment: Experiment, changes: Sequence[Change]) -> Experiment:
    for change in changes:
        experiment = change.apply(experiment)
    return experiment


def _train(**values: object) -> Callable[[Experiment], Experiment]:
    def apply(experiment: Experiment) -> Experiment:
        train, _ = sections(experiment)
        return replace(experiment, train=replace(train, **values))  # type: ignore[arg-type]

    return apply


_ZERO_2 = Change("train.zero=2", _train(zero=2))

zero3_offload = _train(zero=3, offload=OffloadConfig(optimizer=True, parameters=True))
"""Lays configs/zero3_offload.yaml over an experiment."""


def _changes(experiment: Experiment, ranks: int) -> Iterator[Change]:
    """Changes that this experiment has not made yet."""
    train, data = sections(experiment)

    def cached(experiment: Experiment) -> Experiment:
        return replace(experiment, data=replace(sections(experiment)[1], cache=Path("CACHE")))

    if data.cache is None and spare_parts(experiment, replace(train, sample_every=None)):
        yield Change("data.cache=CACHE", cached)
        if train.sample_every is not None:  # the first stage goes too
            unsampled = _train(sample_every=None)
            yield Change("data.cache=CACHE train.sample_every=null", lambda e: unsampled(cached(e)))
    shares = train.backend != "plain"
    if train.zero < 2 and shares:
        yield _ZERO_2
    if not train.activation_checkpointing:
        yield Change("train.activation_checkpointing=true", _train(activation_checkpointing=True))
    batch, accumulate = train.batch_size, train.accumulate
    while batch % 2 == 0:
        batch, accumulate = batch // 2, 2 * accumulate
        setting = f"train.batch_size={batch} train.accumulate={accumulate}"
        yield Change(setting, _train(batch_size=batch, accumulate=accumulate))
    if train.zero < 3 and ranks > 1:
        yield Change("train.zero=3", _train(zero=3))
    whole = not (train.offload.optimizer and train.offload.parameters)
    if whole and shares and not on_host(experiment):
        yield Change("configs/zero3_offload.yaml laid over it", zero3_offload)
    needs = resolve(train.objective.target, experiment.imports).needs(train.objective.params)
    if experiment.adapters.lora is None and "model" in needs:
        setting = "LoRA (configs/lora.yaml laid over it)"
        yield Change(setting, lambda e: replace(e, adapters=replace(e.adapters, lora=LORA)))
