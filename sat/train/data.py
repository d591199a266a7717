"""What a training reads: its data sets, brought to size, in buckets, and out of caches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sat.config.schema import DataConfig, SourceConfig
from sat.data.buckets import BucketRule, Buckets, Size, measure_all, measured
from sat.data.dataset import Dataset, Items, LatentCache
from sat.data.records import BadRecord, Record
from sat.data.sources import Source, read_sources
from sat.data.transforms import Augment, Transform
from sat.parallel.collectives import gather
from sat.parallel.launch import Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSets:
    """What is trained on, and what is held out (None: nothing)."""

    train: Dataset
    held_out: Dataset | None

    def both(self) -> list[Dataset]:
        """Those that there are."""
        return [self.train] if self.held_out is None else [self.train, self.held_out]


def bucket_rule(data: DataConfig) -> BucketRule | None:
    """The rule of ``data.buckets``."""
    rule = data.buckets
    return None if rule is None else BucketRule(rule.areas, rule.step, rule.max_ratio, rule.min_images)


def open_data(data: DataConfig, runtime: Runtime, *, held_out: bool) -> DataSets:
    """The data sets of the ``data`` section; every rank calls it, the first says what was skipped."""
    moving = None if data.augment is None else Augment(data.augment.shift, data.augment.scale)
    still = data.validation if held_out else []
    return DataSets(
        _open(data, data.sources, moving, runtime, still=False),
        _open(data, still, None, runtime, still=True) if still else None,
    )


def _open(
    data: DataConfig,
    sources: Sequence[SourceConfig],
    augment: Augment | None,
    runtime: Runtime,
    *,
    still: bool,
) -> Dataset:
    records = read_sources([Source(s.path, s.repeats, s.weight) for s in sources], data.max_bad_share)
    buckets, rule = None, bucket_rule(data)
    if rule is not None:
        records, sizes = measured(records, _measure(records.records, runtime), data.max_bad_share)
        buckets = Buckets.of(sizes, rule)
        log.info("%d images in %d buckets", len(records), len(buckets.sizes))
    for bad in records.bad[:20] if runtime.is_main else []:
        log.warning("skipped %s", bad)
    height, width = buckets.sizes[0] if buckets is not None else (data.height, data.width)
    assert height is not None and width is not None, "the section's rules ask for them"
    transform = Transform(height, width, "center" if still else data.crop, augment)
    return Dataset(records, transform, data.max_bad_share, buckets=buckets)


def _measure(records: Sequence[Record], runtime: Runtime) -> list[Size | BadRecord]:
    """The sizes of all pictures; the ranks take turns."""
    seen: list[Size | BadRecord] = [(1, 1)] * len(records)
    for rank, part in enumerate(gather(measure_all(records[runtime.rank :: runtime.world]))):
        seen[rank :: runtime.world] = part
    return seen


def in_memory(
    dataset: Dataset,
    views: int,
    seed: int,
    encode: Callable[[Tensor], Tensor],
    degrade: Callable[[Tensor], Tensor] | None,
) -> Items:
    """``dataset`` as it is, or with the latents of ``views`` placements of each picture kept in memory."""
    if not views:
        return dataset
    log.info("encoding %d images %d times to keep their latents in memory", len(dataset), views)
    return LatentCache(dataset, encode, views, seed, degrade=degrade)
