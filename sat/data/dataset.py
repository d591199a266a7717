"""Items by number: records opened, transformed and captioned, the same way every time."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sat.data.batch import Sample, collate
from sat.data.records import Bad, DataError, Record, RecordSet, check_bad_share
from sat.data.transforms import Draws, Fitted, Transform

log = logging.getLogger(__name__)

KEEP_BYTES = 1 << 30  # of decoded pictures that a data set keeps in memory


class Items(Protocol):
    """What a loader reads from."""

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int, seed: int) -> Sample:
        """Item ``index`` as it is in ``epoch``; the same for the same three numbers."""
        ...


def item_random(seed: int, epoch: int, index: int, what: str) -> random.Random:
    """The random numbers of one item in one epoch for one purpose, independent of everything else."""
    return random.Random(f"{seed}/{epoch}/{index}/{what}")


class Dataset:
    """Pictures and captions of ``records``, transformed. Safe to read from several threads.

    Decoded pictures stay in memory up to ``keep_bytes``. An unreadable picture is logged, listed in ``bad``
    and replaced by the next readable one; more than ``max_bad_share`` of the set raises :class:`DataError`.
    """

    def __init__(
        self,
        records: RecordSet,
        transform: Transform,
        max_bad_share: float = 0.05,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        if not records.records:
            raise DataError("the data set is empty")
        self.records = records.records
        self.transform = transform
        self.max_bad_share = max_bad_share
        self.bad: list[Bad] = list(records.bad)
        self._unreadable: set[str] = set()
        self._kept: dict[str, Fitted] = {}
        self._room = keep_bytes
        self._lock = threading.Lock()
        self._files = len({str(record.path) for record in self.records})

    def __len__(self) -> int:
        return len(self.records)

    def get(self, index: int, epoch: int, seed: int) -> Sample:
        """Item ``index`` of ``epoch``: its caption and picture drawn from (seed, epoch, index) alone."""
        record, fitted = self._readable(index)
        caption = record.caption(item_random(seed, epoch, index, "caption").random())
        numbers = item_random(seed, epoch, index, "picture")
        image, crop = self.transform.place(fitted, Draws(*(numbers.random() for _ in Draws._fields)))
        target = (self.transform.height, self.transform.width)
        return Sample(caption, fitted.original_size, crop, target, image=image)

    def record(self, index: int) -> Record:
        """The record that ``get`` shows for ``index``, going by the pictures found unreadable so far."""
        for step in range(len(self.records)):
            record = self.records[(index + step) % len(self.records)]
            if str(record.path) not in self._unreadable:
                return record
        raise DataError("no picture of the data set can be read")

    def _readable(self, index: int) -> tuple[Record, Fitted]:
        """The first readable record from ``index`` on, cyclically."""
        for step in range(len(self.records)):
            record = self.records[(index + step) % len(self.records)]
            fitted = self._load(record)
            if fitted is not None:
                return record, fitted
        raise DataError("no picture of the data set can be read")

    def _load(self, record: Record) -> Fitted | None:
        key = str(record.path)
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        if key in self._unreadable:
            return None
        try:
            fitted = self.transform.load(record.path)
        except Exception as error:  # noqa: BLE001 - decoders raise anything: SyntaxError, struct.error, bomb errors
            self._reject(key, f"{type(error).__name__}: {error}")
            return None
        with self._lock:
            if key not in self._kept and fitted.pixels.nbytes <= self._room:
                self._kept[key] = fitted
                self._room -= fitted.pixels.nbytes
        return fitted

    def _reject(self, key: str, reason: str) -> None:
        with self._lock:
            if key in self._unreadable:
                return
            self._unreadable.add(key)
            self.bad.append(Bad(key, reason))
            log.warning("skipped %s: %s", key, reason)
            check_bad_share(
                self.bad, self._files + len(self.bad) - len(self._unreadable), self.max_bad_share, "data"
            )


class LatentCache:
    """``views`` differently placed pictures of every item of ``dataset``, encoded once and kept in memory.

    ``encode``: images (B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w), mean and log variance, unscaled. The
    view that an epoch shows is drawn from (seed, epoch, index); captions are drawn as without the cache.
    ``degrade``: the images -> what low-resolution images look like, whose moments are kept too, for relay.
    """

    def __init__(
        self,
        dataset: Dataset,
        encode: Callable[[Tensor], Tensor],
        views: int,
        seed: int,
        batch_size: int = 64,
        degrade: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if views < 1:
            raise ValueError(f"data.cache_views {views}: expected at least 1 to cache latents")
        self.dataset, self.views = dataset, views
        jobs = [(index, view) for view in range(views) for index in range(len(dataset))]
        made: list[Tensor] = []
        low: list[Tensor] = []
        geometry = []
        with torch.no_grad():
            for start in range(0, len(jobs), batch_size):
                samples = [dataset.get(index, view, seed) for index, view in jobs[start : start + batch_size]]
                batch = collate(samples)
                assert batch.image is not None, "a dataset gives images"
                made.append(encode(batch.image).detach().float().cpu())
                if degrade is not None:
                    low.append(encode(degrade(batch.image)).detach().float().cpu())
                geometry += [(sample.original_size, sample.crop, sample.target_size) for sample in samples]
        self.moments = torch.cat(made)  # (views * items, 2C, h, w)
        self.low = torch.cat(low) if low else None
        self.geometry = geometry

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, index: int, epoch: int, seed: int) -> Sample:
        """Item ``index`` of ``epoch`` with ``latent_moments`` (and ``low_moments``) instead of an image."""
        view = int(item_random(seed, epoch, index, "view").random() * self.views)
        place = view * len(self) + index
        caption = self.dataset.record(index).caption(item_random(seed, epoch, index, "caption").random())
        low = None if self.low is None else self.low[place]
        return Sample(caption, *self.geometry[place], latent_moments=self.moments[place], low_moments=low)
