"""Data of a training: its data sets, brought to size and in buckets, and the caches of their encodings."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from sat.checkpoint.format import DTYPES, PARTS, Part
from sat.checkpoint.formats import digest, part_digest
from sat.config.build import build_engine
from sat.config.check import resolve
from sat.config.schema import (
    CheckpointConfig,
    DataConfig,
    Experiment,
    SourceConfig,
    TokenConfig,
    TrainConfig,
    plain,
)
from sat.data.buckets import BucketRule, Buckets, Size, measure_all, measured
from sat.data.cache import (
    CachedDataset,
    Job,
    Store,
    Stores,
    caption_key,
    fill_latents,
    fill_text,
    missing,
    prune,
)
from sat.data.dataset import NOTHING_MADE, Dataset, Encode, Items, LatentCache, MadeExtra
from sat.data.records import CONTROL, MASK, BadRecord, DataPathError, ExtraRule, note
from sat.data.sources import Source, read_sources
from sat.data.transforms import Augment, Transform
from sat.engine import DiffusionEngine
from sat.parallel.collectives import barrier, from_main, gather
from sat.parallel.launch import Runtime
from sat.sampling.generator import EncodedPrompt
from sat.train.objectives import Objective
from sat.train.optim import autocast
from sat.util.log import progress

log = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = 1
"""Version of the cached files; another number makes all of them anew."""


@dataclass(frozen=True)
class DataSets:
    """Data sets to train on, and held out (None: nothing)."""

    train: Dataset
    held_out: Dataset | None

    def both(self) -> list[Dataset]:
        """Those that there are."""
        return [self.train] if self.held_out is None else [self.train, self.held_out]


def bucket_rule(data: DataConfig) -> BucketRule | None:
    """The rule of ``data.buckets``."""
    rule = data.buckets
    return None if rule is None else BucketRule(rule.areas, rule.step, rule.max_ratio, rule.min_images)


def made_extras(experiment: Experiment) -> dict[str, MadeExtra]:
    """Extra pictures that are made of the data's pictures: a control's, where one learns or is there."""
    if experiment.adapters.control is None:
        return {}
    from sat.train.control import made_pictures

    return made_pictures(experiment)


def source_of(source: SourceConfig) -> Source:
    """A source of ``data.sources`` as it is read."""
    extras = {
        name: ExtraRule(rule.column, rule.folder, rule.alpha, required=name != MASK)
        for name, rule in source.extras.items()
    }
    return Source(source.path, source.repeats, source.weight, source.caption, extras, source.loss_weight)


def open_data(
    data: DataConfig, runtime: Runtime, *, held_out: bool, made: Mapping[str, MadeExtra] = NOTHING_MADE
) -> DataSets:
    """Open the data sets of the ``data`` section; every rank calls it, the first one logs skipped files.

    ``made`` are extra pictures that are made of the pictures.
    """
    moving = None if data.augment is None else Augment(**plain(data.augment))
    still = data.validation if held_out else []
    sets = DataSets(
        _open(data, data.sources, moving, runtime, made, still=False),
        _open(data, still, None, runtime, made, still=True) if still else None,
    )
    if sets.held_out is not None and runtime.is_main:
        trained, kept = ({record.name for record in one.records} for one in sets.both())
        for line in note("pictures of data.validation that are trained on too", sorted(trained & kept)):
            log.warning("data: %s", line)
    return sets


def _open(
    data: DataConfig,
    sources: Sequence[SourceConfig],
    augment: Augment | None,
    runtime: Runtime,
    made: Mapping[str, MadeExtra],
    *,
    still: bool,
) -> Dataset:
    named = [source_of(one) for one in sources]
    records = read_sources(named, data.max_bad_share)
    buckets, rule = None, bucket_rule(data)
    if rule is not None:
        sizes: list[Size | BadRecord] = [(1, 1)] * len(records.records)  # each rank measures a share
        for rank, part in enumerate(gather(measure_all(records.records[runtime.rank :: runtime.world]))):
            sizes[rank :: runtime.world] = part
        records, kept = measured(records, sizes, data.max_bad_share)
        buckets = Buckets.of(kept, rule)
        log.info("%d images in %d buckets", len(records), len(buckets.sizes))
    for line in records.told() if runtime.is_main else []:
        log.warning("data: %s", line)
    height, width = buckets.sizes[0] if buckets is not None else (data.height, data.width)
    assert height is not None and width is not None, "the section's rules ask for them"
    transform = Transform(height, width, "center" if still else data.crop, augment)
    return Dataset(records, transform, data.max_bad_share, buckets=buckets, made=made)


def check_words(words: Sequence[TokenConfig], dataset: Dataset) -> None:
    """Raise if a new word to learn is in no caption."""
    for one in words:
        if not any(one.word in caption for record in dataset.records for caption in record.captions):
            raise DataPathError(
                f"no caption has the new word {one.word!r} (adapters.tokens): write it into the captions"
            )


def in_memory(
    sets: DataSets,
    data: DataConfig,
    train: TrainConfig,
    engine: DiffusionEngine,
    objective: Objective,
    runtime: Runtime,
) -> list[Items]:
    """Data sets as they are, or with latents of ``data.cache_views`` placements of an image in memory."""
    degrade, device = objective.degrade(), runtime.device

    def encode(images: Tensor) -> Tensor:
        with autocast(train, device.type):
            return engine.first_stage.encode(images.to(device)).moments

    def degraded(images: Tensor) -> Tensor:
        assert degrade is not None, "only called with one"
        with autocast(train, device.type):
            return degrade(images.to(device))

    own: dict[str, Encode] = {}
    if (control := getattr(objective, "control", None)) is not None:
        own[CONTROL] = control.encode
    items: list[Items] = []
    for dataset, views in zip(sets.both(), (data.cache_views, min(data.cache_views, 1)), strict=False):
        if views and not dataset.pictureless:
            log.info("encoding %d images %d times to keep their latents in memory", len(dataset), views)
            low = None if degrade is None else degraded
            items.append(LatentCache(dataset, encode, views, train.seed, degrade=low, own=own))
        else:
            items.append(dataset)
    return items


# -- caches on disk


@dataclass(frozen=True)
class Count:
    """Numbers over all ranks: encodings that there should be, and those of them that are missing."""

    latents: int
    text: int
    latents_missing: int
    text_missing: int

    def __str__(self) -> str:
        return (
            f"{self.latents} latents, {self.latents_missing} of them to make; "
            f"{self.text} text embeddings, {self.text_missing} of them to make"
        )


@dataclass(frozen=True)
class _Work:
    """Encodings to make for one data set."""

    jobs: Mapping[str, Job]
    captions: Mapping[str, str]


def spare_parts(experiment: Experiment, train: TrainConfig) -> frozenset[Part]:
    """Parts of the engine that full caches make unnecessary; drawing samples needs the first stage."""
    kind: type[Objective] = resolve(train.objective.target, experiment.imports)
    needs = kind.needs(train.objective.params)
    spare: set[Part] = set()
    if "first_stage" not in needs and train.sample_every is None:
        spare.add("first_stage")
    if "text" not in needs:
        spare.add("text")
    return frozenset(spare)


class Caches:
    """Caches under ``root`` for one experiment.

    Latents are cached unless the objective runs the first stage itself, embeddings unless it runs the text
    encoder (``Objective.needs``). Ranks share the work. Prompts of samples drawn in between are captions too.
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
        self._kind: type[Objective] = resolve(train.objective.target, experiment.imports)
        needs = self._kind.needs(train.objective.params)
        self.latents, self.text = "first_stage" not in needs, "text" not in needs
        if not (self.latents or self.text):
            log.warning("data.cache: %s runs every part itself, so nothing is cached", self._kind.__name__)

        # Captions of samples in between; an empty negative prompt steers away from nothing.
        negative = experiment.sampling.negative_prompt
        self._encodes_empty = experiment.conditioning.empty_prompt == "encoded"
        needed = [negative] if negative.strip() or self._encodes_empty else []
        prompts = [*train.sample_prompts, *needed]
        drawn = train.sample_every is not None
        self._prompts = {caption_key(prompt): prompt for prompt in prompts if drawn}
        if self._encodes_empty:
            self._prompts[caption_key("")] = ""
        self._shell = build_engine(
            experiment, device="cpu", dtype=DTYPES[train.dtype], checkpoint=weights, without=PARTS
        )
        self._facts: dict[str, dict[str, object]] = from_main(self._describe() if runtime.is_main else None)

    def _describe(self) -> dict[str, dict[str, object]]:
        """Facts that cached latents and embeddings depend on; with others they are made anew."""
        experiment, conditioning = self.experiment, self.experiment.conditioning
        precision = {"format": FORMAT, "dtype": self.train.dtype, "autocast": self.train.autocast}

        def weights(part: Part) -> str:
            source = self.weights.source(part)
            if source is None:
                return f"random {self.weights.random}"
            return part_digest(source, part, allow_pickle=self.weights.allow_pickle)

        latents: dict[str, object] = {}
        if self.latents:
            latents = {"first_stage": plain(experiment.first_stage), "weights": weights("first_stage")}
            latents |= precision
        text: dict[str, object] = {}
        if self.text:
            tokenizer = self._shell.conditioner.tokenizer
            text = {
                "text": plain(conditioning.text),
                "weights": weights("text"),
                "max_length": conditioning.max_length,
                "tokenizer": None if tokenizer is None else sha256(tokenizer.path.read_bytes()).hexdigest(),
                **({"padding": conditioning.padding} if conditioning.padding == "masked" else {}),
                "adapters": [(digest(one.path), one.strength) for one in experiment.adapters.load],
            }
            if experiment.memory.quantize.text_encoder is not None:
                text["quantize"] = plain(experiment.memory.quantize)
            text |= precision
        return {"latents": latents, "text": text}

    @staticmethod
    def _placing(augment: Augment) -> dict[str, object]:
        """Its settings, those of the mesh only where they are in use: caches of before keep their names."""
        return {name: value for name, value in plain(augment).items() if value or name in ("shift", "scale")}

    @property
    def spare(self) -> frozenset[Part]:
        """Parts of the engine that training can do without, once the caches are full."""
        return spare_parts(self.experiment, self.train)

    def over(self, dataset: Dataset, views: int) -> CachedDataset:
        """Items of ``dataset`` out of the caches, which need not be full yet."""
        first = dataset.transform(0)
        moving = None if first.augment is None else self._placing(first.augment)
        placing = {"crop": first.crop, "augment": moving}
        facts = self._facts["latents"] | {"placing": placing}
        low = self._kind.degradation(self.train.objective.params, self._shell)
        stores = Stores(
            latents=Store(self.root, "latents", facts) if self.latents else None,
            low=Store(self.root, "low", facts | {"low": low.name}) if self.latents and low else None,
            text=Store(self.root, "text", self._facts["text"]) if self.text else None,
            extras={
                name: Store(self.root, "extra", facts | {"extra": name} | self._encoded_as(name))
                for name in sorted({n for record in dataset.records for n in record.extras} | {*dataset.made})
                if self.latents
            },
        )
        return CachedDataset(dataset, stores, views)

    def _encoded_as(self, name: str) -> dict[str, object]:
        """Facts about the encoding of an extra picture that is not kept as moments."""
        if name != CONTROL or self.experiment.adapters.control is None:
            return {}
        from sat.train.control import without_weights

        return {"as": without_weights(self.experiment).takes}

    def count(self, sets: Sequence[CachedDataset]) -> Count:
        """Count the encodings and the missing ones; every rank calls it."""
        return self._count(sets, self._missing(sets))

    def fill(self, sets: Sequence[CachedDataset], batch_size: int) -> Count:
        """Make missing encodings; every rank calls it. The count is from before."""
        absent = self._missing(sets)
        count = self._count(sets, absent)
        log.info("%s: %s", self.root, count)
        if count.latents_missing or count.text_missing:
            self._make(sets, absent, count, batch_size)
            self.runtime.free_memory()
        barrier(self.runtime.device)
        for cached in sets:
            if self.latents:
                cached.reject_unreadable(cached.jobs())
        return count

    def encoded(self) -> list[EncodedPrompt] | None:
        """Encodings of ``train.sample_prompts``; None if no embeddings are cached."""
        if not self.text:
            return None
        negative = self.experiment.sampling.negative_prompt
        against = self._read(negative) if negative.strip() or self._encodes_empty else None
        return [EncodedPrompt(self._read(prompt), negative=against) for prompt in self.train.sample_prompts]

    def empty(self) -> Tensor | None:
        """(1, T, C_text) encoding of the empty prompt, where it is encoded and embeddings are cached."""
        return self._read("") if self.text and self._encodes_empty else None

    def _read(self, prompt: str) -> Tensor:
        store = Store(self.root, "text", self._facts["text"])
        return store.read(caption_key(prompt))["text"][None]

    def prune(self, sets: Sequence[CachedDataset]) -> int:
        """Delete files that these sets do not use; their number (0 on other ranks)."""
        used: dict[Path, set[str]] = {}
        for cached in sets if self.runtime.is_main else []:
            jobs = cached.jobs() if self.latents else {}
            stores, captions = cached.stores, cached.captions() | self._prompts
            keys = {cached.key(job) for job in jobs.values()}
            for store, own in ((stores.latents, keys), (stores.low, keys), (stores.text, captions)):
                if store is not None:
                    used.setdefault(store.folder, set()).update(own)
            for job in jobs.values() if stores.extras else ():
                for name, key in cached.extra_keys(job).items():
                    used.setdefault(stores.extras[name].folder, set()).add(key)
        return prune(self.root, {folder: frozenset(keys) for folder, keys in used.items()}) if used else 0

    # -- missing encodings

    def _missing(self, sets: Sequence[CachedDataset]) -> list[_Work]:
        """Encodings that this rank has to make for each set; the ranks take turns."""
        absent = []
        for cached, work in zip(sets, self._work(sets), strict=True):
            jobs = cached.missing(self._own(work.jobs)) if self.latents else {}
            text = missing([cached.stores.text], self._own(work.captions))
            absent.append(_Work(jobs, {key: work.captions[key] for key in text}))
        return absent

    def _work(self, sets: Sequence[CachedDataset]) -> list[_Work]:
        """All encodings of each set, without those that an earlier set keeps in the same place."""
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

    def _count(self, sets: Sequence[CachedDataset], absent: Sequence[_Work]) -> Count:
        everyone = gather([sum(len(a.jobs) for a in absent), sum(len(a.captions) for a in absent)])
        latents, text = (sum(counts) for counts in zip(*everyone, strict=True))
        work = self._work(sets)
        return Count(sum(len(w.jobs) for w in work), sum(len(w.captions) for w in work), latents, text)

    # -- making it

    def _make(  # noqa: C901 - the encoders and their use, in order
        self, sets: Sequence[CachedDataset], absent: Sequence[_Work], count: Count, batch_size: int
    ) -> None:
        """Build the parts that encode, and fill the caches."""
        if self.runtime.is_main:
            for store in {store for cached in sets for store in cached.stores.all()}:
                store.write_facts()
        without: set[Part] = {"model"}
        if not count.latents_missing:
            without.add("first_stage")
        if not count.text_missing:
            without.add("text")
        device = self.runtime.device
        engine = build_engine(
            self.experiment, device=device, dtype=DTYPES[self.train.dtype],
            checkpoint=self.weights, without=without,
        ).eval().requires_grad_(False)  # fmt: skip
        low = self._kind.degradation(self.train.objective.params, engine)

        def encode(images: Tensor) -> Tensor:
            with autocast(self.train, device.type):
                return engine.first_stage.encode(images.to(device)).moments

        def degrade(images: Tensor) -> Tensor:
            assert low is not None, "only called with one"
            with autocast(self.train, device.type):
                return low.apply(images.to(device))

        own: dict[str, Encode] = {}
        if self.experiment.adapters.control is not None:
            from sat.train.control import encoder

            own[CONTROL] = encoder(self.experiment, engine, self.train)

        def read(captions: Sequence[str]) -> Sequence[Tensor]:
            with autocast(self.train, device.type):
                return engine.conditioner.encode_apart(captions, device)

        with progress(
            sum(len(a.jobs) + len(a.captions) for a in absent), unit="cached item", rank=self.runtime.rank
        ) as bar:
            for cached, todo in zip(sets, absent, strict=True):
                made: list[Iterator[int]] = []
                if todo.jobs:
                    made.append(fill_latents(
                        cached, todo.jobs, encode, degrade if low else None, own=own, batch_size=batch_size
                    ))  # fmt: skip
                if todo.captions and cached.stores.text is not None:
                    made.append(fill_text(cached.stores.text, todo.captions, read, batch_size=8 * batch_size))
                for done in itertools.chain(*made):
                    bar.update(done)
