"""Which changes bring a training into a memory budget: each is estimated, none guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sat.config.schema import Experiment, LoraConfig, OffloadConfig
from sat.config.targets import resolve
from sat.train.data import spare_parts
from sat.train.estimate import Estimator, on_host, sections

MOST_RANKS = 64
LORA = LoraConfig(targets=["attention", "mlp"])
"""As configs/lora.yaml has it."""


@dataclass(frozen=True)
class Change:
    """``says`` is what to write on the command line."""

    says: str
    apply: Callable[[Experiment], Experiment]


@dataclass(frozen=True)
class Outcome:
    """The memory of a rank after some changes."""

    changes: tuple[Change, ...]
    ranks: int
    total: int

    @property
    def says(self) -> str:
        """All changes as they are written."""
        return " ".join(change.says for change in self.changes)


@dataclass(frozen=True)
class SettingsSearch:
    """``alone``: each change by itself. ``found``: the least that fits, or None; ``best``: all of them."""

    budget: int
    now: Outcome
    alone: tuple[Outcome, ...]
    found: Outcome | None
    best: Outcome


def find_settings(estimator: Estimator, experiment: Experiment, ranks: int, budget: int) -> SettingsSearch:
    """What makes ``experiment`` fit ``budget`` bytes a rank. Those that cost least come first."""

    def outcome(changes: Sequence[Change], on: int = ranks) -> Outcome:
        changed = experiment
        for change in changes:
            changed = change.apply(changed)
        return Outcome(tuple(changes), on, estimator.estimate(changed, on).total)

    now = outcome(())
    if now.total <= budget:
        return SettingsSearch(budget, now, (), now, now)
    offered = list(_changes(experiment, ranks))
    alone = tuple(outcome([change]) for change in offered)
    taken: list[Change] = []
    best = now
    for change in offered:
        tried = outcome([*_but_same_key(taken, change), change])
        if tried.total < best.total:
            taken, best = list(tried.changes), tried
        if best.total <= budget:
            return SettingsSearch(budget, now, alone, _pruned(best, outcome, budget), best)
    return SettingsSearch(budget, now, alone, _more_ranks(experiment, taken, outcome, ranks, budget), best)


def _pruned(enough: Outcome, outcome: Callable[[Sequence[Change]], Outcome], budget: int) -> Outcome:
    """Without the changes that turn out not to be needed, the dearest first."""
    for change in reversed(enough.changes):
        fewer = outcome([one for one in enough.changes if one is not change])
        if fewer.total <= budget:
            enough = fewer
    return enough


def _more_ranks(
    experiment: Experiment,
    taken: Sequence[Change],
    outcome: Callable[[Sequence[Change], int], Outcome],
    ranks: int,
    budget: int,
) -> Outcome | None:
    """With twice as many ranks, and twice again."""
    changed = experiment
    for change in taken:
        changed = change.apply(changed)
    zero = [_ZERO] if sections(changed)[0].zero < 2 else []
    while (ranks := 2 * ranks) <= MOST_RANKS:
        if (tried := outcome([*taken, *zero], ranks)).total <= budget:
            return tried
    return None


def _changes(experiment: Experiment, ranks: int) -> Iterator[Change]:
    """The changes that this experiment has not made yet."""
    train, data = sections(experiment)
    if data.cache is None and spare_parts(experiment, replace(train, sample_every=None)):
        yield Change("data.cache=CACHE", _cached)
        if train.sample_every is not None:  # the first stage goes too
            yield Change("data.cache=CACHE train.sample_every=null", _unsampled)
    if train.zero < 2:
        yield _ZERO
    if not train.activation_checkpointing:
        yield Change("train.activation_checkpointing=true", _train(activation_checkpointing=True))
    batch, accumulate = train.batch_size, train.accumulate
    while batch % 2 == 0:
        batch, accumulate = batch // 2, 2 * accumulate
        says = f"train.batch_size={batch} train.accumulate={accumulate}"
        yield Change(says, _train(batch_size=batch, accumulate=accumulate))
    if train.zero < 3 and ranks > 1:
        yield Change("train.zero=3", _train(zero=3))
    if not (train.offload.optimizer and train.offload.parameters) and not on_host(experiment):
        yield Change("configs/zero3_offload.yaml laid over it", zero3_offload)
    if experiment.adapters.lora is None and _adaptable(experiment):
        yield Change("LoRA (configs/lora.yaml laid over it)", _lora)


def _but_same_key(taken: Sequence[Change], change: Change) -> list[Change]:
    """``taken`` without an earlier value of what ``change`` sets."""
    key = change.says.partition("=")[0]
    return [one for one in taken if one.says.partition("=")[0] != key]


def _train(**values: object) -> Callable[[Experiment], Experiment]:
    def apply(experiment: Experiment) -> Experiment:
        train, _ = sections(experiment)
        return replace(experiment, train=replace(train, **values))  # type: ignore[arg-type]

    return apply


def zero3_offload(experiment: Experiment) -> Experiment:
    """``experiment`` with configs/zero3_offload.yaml laid over it."""
    return _train(zero=3, offload=OffloadConfig(optimizer=True, parameters=True))(experiment)


def _cached(experiment: Experiment) -> Experiment:
    _, data = sections(experiment)
    return replace(experiment, data=replace(data, cache=Path("CACHE")))


def _unsampled(experiment: Experiment) -> Experiment:
    return _train(sample_every=None)(_cached(experiment))


def _lora(experiment: Experiment) -> Experiment:
    return replace(experiment, adapters=replace(experiment.adapters, lora=LORA))


def _adaptable(experiment: Experiment) -> bool:
    """True of objectives that train a network of transformers."""
    train, _ = sections(experiment)
    return "model" in resolve(train.objective.target, experiment.imports).needs(train.objective.params)


_ZERO = Change("train.zero=2", _train(zero=2))
