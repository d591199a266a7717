"""Caches of a training: what they depend on, what they stand for in the engine, and how they are made."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from sat.checkpoint.digest import digest, part_digest
from sat.checkpoint.format import DTYPES, PARTS, Part
from sat.config.build import build_engine
from sat.config.schema import CheckpointConfig, Experiment, TrainConfig, plain
from sat.config.targets import resolve
from sat.data.cache import (
    Cached,
    Job,
    Store,
    Stores,
    caption_key,
    fill_latents,
    fill_text,
    missing,
    prune,
)
from sat.parallel.collectives import barrier, from_main, gather
from sat.sampling.generator import EncodedPrompt
from sat.train.loop import computing
from sat.util.log import progress

if TYPE_CHECKING:
    from pathlib import Path

    from sat.data.dataset import Dataset
    from sat.engine import DiffusionEngine
    from sat.parallel.launch import Runtime
    from sat.train.objectives.base import Degradation, Objective

log = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = 1
"""Of what the files hold; another number makes all of them anew."""


@dataclass(frozen=True)
class Count:
    """Over all ranks: how many there should be, and how many of them are not there."""

    latents: int
    text: int
    latents_missing: int
    text_missing: int

    def __str__(self) -> str:
        return (
            f"{self.latents} latents, {self.latents_missing} of them to make; "
            f"{self.text} text embeddings, {self.text_missing} of them to make"
        )


class Caches:
    """The caches under ``root`` for one experiment.

    Latents are cached unless the objective runs the first stage itself, embeddings unless it runs the text
    encoder (``Objective.needs``). Ranks share the work. Prompts of pictures drawn in between are captions
    too.
    """

    def __init__(
        self,
        root: Path,
        experiment: Experiment,
        train: TrainConfig,
        weights: CheckpointConfig,
        runtime: Runtime,
    ) -> None:
        self.root, self.experiment, self.train = root, experiment, train
        self.weights, self.runtime = weights, runtime
        kind: type[Objective] = resolve(train.objective.target, experiment.imports)
        needs = kind.needs(train.objective.params)
        self.latents, self.text = "first_stage" not in needs, "text" not in needs
        if not (self.latents or self.text):
            log.warning("data.cache: %s runs every part itself, so nothing is cached", kind.__name__)
        self._kind = kind
        self._prompts = _prompts(experiment, train)
        self._shell = build_engine(
            experiment, device="cpu", dtype=DTYPES[train.dtype], checkpoint=weights, without=PARTS
        )
        facts = None
        if runtime.is_main:
            facts = {
                "latents": self._latent_facts() if self.latents else {},
                "text": self._text_facts() if self.text else {},
            }
        self._facts: dict[str, dict[str, object]] = from_main(facts)

    @property
    def spare(self) -> frozenset[Part]:
        """Parts of the engine that training can do without, once the caches are full."""
        return spare_parts(self.experiment, self.train)

    def over(self, dataset: Dataset, views: int) -> Cached:
        """The items of ``dataset`` out of the caches, which need not be full yet."""
        first = dataset.transform(0)
        placing = {"crop": first.crop, "augment": None if first.augment is None else plain(first.augment)}
        facts = self._facts["latents"] | {"placing": placing}
        low = self._degradation(self._shell)
        stores = Stores(
            latents=Store(self.root, "latents", facts) if self.latents else None,
            low=Store(self.root, "low", facts | {"low": low.name}) if self.latents and low else None,
            text=Store(self.root, "text", self._facts["text"]) if self.text else None,
        )
        return Cached(dataset, stores, views)

    def count(self, sets: Sequence[Cached]) -> Count:
        """What there is and what is missing; every rank calls it."""
        return self._count(sets, self._missing(sets))

    def fill(self, sets: Sequence[Cached], batch_size: int) -> Count:
        """Make what is missing; every rank calls it. The count is from before."""
        absent = self._missing(sets)
        count = self._count(sets, absent)
        log.info("%s: %s", self.root, count)
        if count.latents_missing or count.text_missing:
            self._make(sets, absent, count, batch_size)
        barrier(self.runtime.device)
        for cached in sets:
            if self.latents:
                cached.settle(cached.jobs())
        return count

    def encoded(self) -> list[EncodedPrompt] | None:
        """The encodings of ``train.sample_prompts``, if they are all kept; None if no embeddings are."""
        if not self.text:
            return None
        store = Store(self.root, "text", self._facts["text"])

        def read(prompt: str) -> Tensor:
            return store.read(caption_key(prompt))["text"][None]

        negative = self.experiment.sampling.negative_prompt
        against = read(negative) if negative.strip() else None
        return [EncodedPrompt(read(prompt), negative=against) for prompt in self.train.sample_prompts]

    def prune(self, sets: Sequence[Cached]) -> int:
        """Delete what these sets do not use; how many files that were (0 on other ranks)."""
        used: dict[Path, set[str]] = {}
        for cached in sets if self.runtime.is_main else []:
            jobs = cached.jobs() if self.latents else {}
            stores, captions = cached.stores, cached.captions() | self._prompts
            for store, keys in ((stores.latents, jobs), (stores.low, jobs), (stores.text, captions)):
                if store is not None:
                    used.setdefault(store.folder, set()).update(keys)
        return prune(self.root, {folder: frozenset(keys) for folder, keys in used.items()}) if used else 0

    # ------------------------------------------------------------------ what is missing

    def _missing(self, sets: Sequence[Cached]) -> list[_Work]:
        """What this rank has to make for each set; the ranks take turns."""
        absent = []
        for cached, work in zip(sets, self._work(sets), strict=True):
            jobs = cached.missing(self._own(work.jobs)) if self.latents else {}
            text = missing([cached.stores.text], self._own(work.captions))
            absent.append(_Work(jobs, {key: work.captions[key] for key in text}))
        return absent

    def _work(self, sets: Sequence[Cached]) -> list[_Work]:
        """All there is to keep for each set, without what an earlier set keeps in the same place."""
        work, seen = [], set[tuple[Store | None, str]]()
        for cached in sets:
            every = cached.jobs() if self.latents else {}
            wanted = cached.captions() | self._prompts
            jobs = {k: v for k, v in every.items() if (cached.stores.latents, k) not in seen}
            captions = {k: v for k, v in wanted.items() if (cached.stores.text, k) not in seen}
            seen |= {(cached.stores.latents, k) for k in jobs} | {(cached.stores.text, k) for k in captions}
            work.append(_Work(jobs, captions if self.text else {}))
        return work

    def _own(self, work: Mapping[str, T]) -> dict[str, T]:
        return dict(itertools.islice(work.items(), self.runtime.rank, None, self.runtime.world))

    def _count(self, sets: Sequence[Cached], absent: Sequence[_Work]) -> Count:
        everyone = gather([sum(len(a.jobs) for a in absent), sum(len(a.captions) for a in absent)])
        latents, text = (sum(counts) for counts in zip(*everyone, strict=True))
        work = self._work(sets)
        return Count(sum(len(w.jobs) for w in work), sum(len(w.captions) for w in work), latents, text)

    # ------------------------------------------------------------------ making it

    def _make(self, sets: Sequence[Cached], absent: Sequence[_Work], count: Count, batch_size: int) -> None:
        if self.runtime.is_main:
            for store in {s for c in sets for s in (c.stores.latents, c.stores.low, c.stores.text) if s}:
                store.describe()
        without = self._without(count)
        engine = build_engine(
            self.experiment, device=self.runtime.device, dtype=DTYPES[self.train.dtype],
            checkpoint=self.weights, without=without,
        ).eval().requires_grad_(False)  # fmt: skip
        total = sum(len(a.jobs) + len(a.captions) for a in absent)
        with progress(total, rank=self.runtime.rank) as bar:
            for cached, todo in zip(sets, absent, strict=True):
                for done in self._filling(engine, cached, todo, batch_size):
                    bar.advance(done)
        del engine
        self.runtime.free_memory()

    def _without(self, count: Count) -> Collection[Part]:
        """Parts that nothing is to be made with."""
        without: set[Part] = {"model"}
        if not count.latents_missing:
            without.add("first_stage")
        if not count.text_missing:
            without.add("text")
        return without

    def _filling(
        self, engine: DiffusionEngine, cached: Cached, absent: _Work, batch_size: int
    ) -> Iterator[int]:
        device = self.runtime.device
        low = self._degradation(engine)

        def encode(images: Tensor) -> Tensor:
            with computing(self.train, self.runtime):
                return engine.first_stage.encode(images.to(device)).moments

        def degrade(images: Tensor) -> Tensor:
            assert low is not None, "only called with one"
            with computing(self.train, self.runtime):
                return low.apply(images.to(device))

        def read(captions: Sequence[str]) -> Tensor:
            with computing(self.train, self.runtime):
                encoded = engine.conditioner.encode_batch(captions, device)
            assert encoded.mask is None, "the cache keeps no masks"
            return encoded.text

        if absent.jobs:
            yield from fill_latents(
                cached, absent.jobs, encode, degrade if low else None, batch_size=batch_size
            )
        if absent.captions and cached.stores.text is not None:
            yield from fill_text(cached.stores.text, absent.captions, read, batch_size=8 * batch_size)

    # ------------------------------------------------------------------ what it depends on

    def _degradation(self, engine: DiffusionEngine) -> Degradation | None:
        return self._kind.degradation(self.train.objective.params, engine)

    def _latent_facts(self) -> dict[str, object]:
        first_stage = plain(self.experiment.first_stage)
        return {"first_stage": first_stage, "weights": self._digest("first_stage")} | self._precision()

    def _text_facts(self) -> dict[str, object]:
        conditioning, tokenizer = self.experiment.conditioning, self._shell.conditioner.tokenizer
        adapters = [(digest(one.path), one.strength) for one in self.experiment.adapters.load]
        facts: dict[str, object] = {
            "text": plain(conditioning.text),
            "weights": self._digest("text"),
            "max_length": conditioning.max_length,
            "tokenizer": None
            if tokenizer is None
            else hashlib.sha256(tokenizer.path.read_bytes()).hexdigest(),
            "adapters": adapters,
        }
        if self.experiment.memory.quantize.text_encoder is not None:
            facts["quantize"] = plain(self.experiment.memory.quantize)
        return facts | self._precision()

    def _precision(self) -> dict[str, object]:
        return {"format": FORMAT, "dtype": self.train.dtype, "autocast": self.train.autocast}

    def _digest(self, part: Part) -> str:
        source = self.weights.source(part)
        if source is None:
            return f"random {self.weights.random}"
        return part_digest(source, part, allow_pickle=self.weights.allow_pickle)


def spare_parts(experiment: Experiment, train: TrainConfig) -> frozenset[Part]:
    """Parts of the engine that full caches make unnecessary; drawing pictures needs the first stage."""
    kind: type[Objective] = resolve(train.objective.target, experiment.imports)
    needs = kind.needs(train.objective.params)
    spare: set[Part] = set()
    if "first_stage" not in needs and train.sample_every is None:
        spare.add("first_stage")
    if "text" not in needs:
        spare.add("text")
    return frozenset(spare)


def _prompts(experiment: Experiment, train: TrainConfig) -> dict[str, str]:
    """By their keys, what is drawn in between and what guidance steers away from (nothing if empty)."""
    if train.sample_every is None:
        return {}
    negative = experiment.sampling.negative_prompt
    prompts = [*train.sample_prompts, *([negative] if negative.strip() else [])]
    return {caption_key(prompt): prompt for prompt in prompts}


@dataclass(frozen=True)
class _Work:
    """What is to be made for one data set."""

    jobs: Mapping[str, Job]
    captions: Mapping[str, str]
