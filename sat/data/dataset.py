"""Items by number: records opened, transformed and captioned, the same way every time."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sat.data.batch import Sample, collate, groups
from sat.data.buckets import Buckets
from sat.data.formats import PromptLine
from sat.data.preprocess import Preprocess
from sat.data.records import MASK, BadRecord, DataError, Record, RecordSet, check_bad_share
from sat.data.transforms import Resized, Transform

log = logging.getLogger(__name__)

NOTHING_MADE: Mapping[str, Any] = MappingProxyType({})
KEEP_BYTES = 1 << 30  # of decoded pictures that a data set keeps in memory


class Items(Protocol):
    """Items that a loader reads."""

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int, seed: int) -> Sample:
        """Item ``index`` as it is in ``epoch``; the same for the same three numbers."""
        ...


def item_random(seed: int, epoch: int, index: int, what: str) -> random.Random:
    """Random numbers of one item in one epoch for one purpose, independent of all others."""
    return random.Random(f"{seed}/{epoch}/{index}/{what}")


class MadeExtra(NamedTuple):
    """An extra picture that is made of a record's own where it has none; ``told`` says how, for caches."""

    make: Preprocess
    told: str


class Dataset:
    """Pictures and captions of ``records``, transformed. Safe to read from several threads.

    Pictures that belong to a record come with it, cut and placed alike; a record without a mask has one of
    ones where another has one. ``made`` are extra pictures that are made of the placed picture where a record
    has none of their name. With ``buckets`` each item is brought to the size of its bucket instead of the
    transform's. Decoded pictures stay in memory up to ``keep_bytes``. An unreadable picture is logged, listed
    in ``bad`` and replaced by the next readable one (of its bucket); more than ``max_bad_share`` of the set
    raises :class:`DataError`.
    """

    def __init__(
        self,
        records: RecordSet,
        transform: Transform,
        max_bad_share: float = 0.05,
        keep_bytes: int = KEEP_BYTES,
        buckets: Buckets | None = None,
        made: Mapping[str, MadeExtra] = NOTHING_MADE,
    ) -> None:
        if not records.records:
            raise DataError("the data set is empty")
        self.records, self.made = records.records, made
        self.max_bad_share = max_bad_share
        self.bad: list[BadRecord] = list(records.bad)
        self.groups = groups(records, buckets)
        self._room = keep_bytes
        self._kept: dict[object, Resized] = {}
        self.pictureless = any(isinstance(record.inside, PromptLine) for record in self.records)
        self.masked = any(MASK in record.extras for record in self.records)
        self._unreadable: dict[str, str] = {}  # by name, why
        self._lock = threading.Lock()
        self._files = len({record.name for record in self.records})
        self._transforms = [transform]
        self._buckets: Sequence[Sequence[int]] = [range(len(self.records))]
        if buckets is not None:
            self._transforms = [
                replace(transform, height=height, width=width) for height, width in buckets.sizes
            ]
            self._buckets = buckets.items
        self._places = {
            index: (bucket, place)
            for bucket, items in enumerate(self._buckets)
            for place, index in enumerate(items)
        }

    def __len__(self) -> int:
        return len(self.records)

    def get(self, index: int, epoch: int, seed: int) -> Sample:
        """Item ``index`` of ``epoch``: its caption and picture drawn from (seed, epoch, index) alone."""
        for other in self._from(index):
            record = self.records[other]
            if isinstance(record.inside, PromptLine):
                transform = self.transform(index)
                size = (transform.height, transform.width)
                return Sample(record.captions[0], size, (0, 0), size, loss_weight=record.loss_weight)
            resized = self._load(record, self.transform(index))
            if resized is not None:
                caption = record.caption(item_random(seed, epoch, index, "caption").random())
                return self._sample(other, resized, caption, item_random(seed, epoch, index, "picture"))
        raise DataError("no picture of the data set can be read")

    def view(self, index: int, view: int) -> Sample | None:
        """The picture of record ``index`` in a placement that depends on its place and ``view`` alone.

        For caches, which outlive changes elsewhere in the data. The caption is the first; None: unreadable.
        """
        record = self.records[index]
        resized = self._load(record, self.transform(index))
        if resized is None:
            return None
        return self._sample(index, resized, record.captions[0], random.Random(f"{record.place}/{view}/view"))

    def _sample(self, index: int, resized: Resized, caption: str, numbers: random.Random) -> Sample:
        transform = self.transform(index)
        image, crop, extras = transform.place(resized, transform.drawn(numbers))
        size = (transform.height, transform.width)
        if self.masked and MASK not in extras:
            extras[MASK] = torch.ones(1, *size)
        extras |= {name: one.make(image, numbers) for name, one in self.made.items() if name not in extras}
        weight = self.records[index].loss_weight
        return Sample(
            caption, resized.original_size, crop, size, image=image, loss_weight=weight, extras=extras
        )

    def transform(self, index: int) -> Transform:
        """The transform of item ``index``, to the size of its bucket."""
        return self._transforms[self._places[index][0]]

    def shown(self, index: int) -> int:
        """The record that ``get`` shows for item ``index``, going by the pictures found unreadable so far."""
        for other in self._from(index):
            if self.records[other].name not in self._unreadable:
                return other
        raise DataError("no picture of the data set can be read")

    def record(self, index: int) -> Record:
        """The record that ``get`` shows for ``index``."""
        return self.records[self.shown(index)]

    def reason(self, index: int) -> str:
        """Reason that the picture of record ``index`` cannot be read; empty if it can."""
        return self._unreadable.get(self.records[index].name, "")

    def reject(self, record: Record, reason: str) -> None:
        """Notes that the picture of ``record`` cannot be read; raises if that makes too many."""
        with self._lock:
            if record.name in self._unreadable:
                return
            self._unreadable[record.name] = reason
            self.bad.append(BadRecord(record.name, reason, "picture"))
            log.warning("skipped %s", self.bad[-1])
            total = self._files + len(self.bad) - len(self._unreadable)
            check_bad_share(self.bad, total, self.max_bad_share, "data")

    def _from(self, index: int) -> Iterator[int]:
        """The items of a bucket from ``index`` on, cyclically."""
        bucket, place = self._places[index]
        items = self._buckets[bucket]
        return (items[(place + step) % len(items)] for step in range(len(items)))

    def _load(self, record: Record, transform: Transform) -> Resized | None:
        key = (record.name, *((name, one.name) for name, one in record.extras.items()))
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        if record.name in self._unreadable:
            return None
        try:
            resized = transform.load_all(record)
        except (OSError, ValueError) as error:
            self.reject(record, str(error))
            return None
        with self._lock:
            if key not in self._kept and resized.nbytes <= self._room:
                self._kept[key] = resized
                self._room -= resized.nbytes
        return resized


Encode = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w), mean and log variance, unscaled."""


def encoded(
    extras: Mapping[str, Tensor], encode: Encode, own: Mapping[str, Encode], cells: tuple[int, int]
) -> dict[str, Tensor]:
    """Extra pictures (B, 3, H, W) as moments, or as the encoder of their ``own`` gives them.

    A mask (B, 1, H, W) becomes its means over ``cells``.
    """
    return {
        name: F.interpolate(extra, cells, mode="area").cpu()
        if extra.shape[1] == 1
        else own.get(name, encode)(extra).detach().float().cpu()
        for name, extra in extras.items()
    }


class LatentCache:
    """``views`` differently placed pictures of every item of ``dataset``, encoded once and kept in memory.

    The
    view that an epoch shows is drawn from (seed, epoch, index); captions are drawn as without the cache.
    ``degrade``: the images -> their low-resolution versions; their moments are kept too, for relay. ``own``:
    encoders of extra pictures by name, where they are not :data:`Encode`.
    """

    def __init__(
        self,
        dataset: Dataset,
        encode: Encode,
        views: int,
        seed: int,
        batch_size: int = 64,
        degrade: Callable[[Tensor], Tensor] | None = None,
        own: Mapping[str, Encode] = NOTHING_MADE,
    ) -> None:
        if views < 1:
            raise ValueError(f"data.cache_views {views}: expected at least 1 to cache latents")
        self.dataset, self.views = dataset, views
        self._made: dict[tuple[int, int], Sample] = {}  # by item and view
        with torch.no_grad():
            by_size: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (item, view) of every picture
            for view in range(views):
                for index in range(len(dataset)):
                    transform = dataset.transform(index)
                    by_size.setdefault((transform.height, transform.width), []).append((index, view))
            batches = [
                same[start : start + batch_size]
                for same in by_size.values()
                for start in range(0, len(same), batch_size)
            ]
            for jobs in batches:
                batch = collate([dataset.get(index, view, seed) for index, view in jobs])
                assert batch.image is not None, "a dataset gives images"
                made = encode(batch.image).detach().float().cpu()
                low = None if degrade is None else encode(degrade(batch.image)).detach().float().cpu()
                cells = (made.shape[2], made.shape[3])
                extras = encoded(batch.extras, encode, own, cells)
                sizes = (batch.original_size.tolist(), batch.crop.tolist(), batch.target_size.tolist())
                for row, (job, *geometry) in enumerate(zip(jobs, *sizes, strict=True)):
                    original, crop, target = ((int(y), int(x)) for y, x in geometry)
                    self._made[job] = Sample(
                        "", original, crop, target, latent_moments=made[row],
                        low_moments=None if low is None else low[row],
                        extras={name: extra[row] for name, extra in extras.items()},
                    )  # fmt: skip

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, index: int, epoch: int, seed: int) -> Sample:
        """Item ``index`` of ``epoch`` with ``latent_moments`` (and ``low_moments``) instead of an image."""
        view = int(item_random(seed, epoch, index, "view").random() * self.views)
        caption = self.dataset.record(index).caption(item_random(seed, epoch, index, "caption").random())
        weight = self.dataset.record(index).loss_weight
        return replace(self._made[index, view], caption=caption, loss_weight=weight)
