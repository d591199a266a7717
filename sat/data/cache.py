"""Latents and text embeddings kept on disk: a small file each, named by a digest of all it was made from.

A file is written beside its place and renamed into it, so that it is there whole or not at all, also with
several writers. A stale file has another name and is made again; nothing needs deleting by hand.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sat.data.batch import Sample, collate
from sat.data.dataset import NOTHING_MADE, Dataset, Encode, encoded, item_random
from sat.data.records import DataError, PictureFile

_OLD = 24 * 3600  # seconds, after which a partial file's writer is taken to be dead
Kind = Literal["latents", "low", "text", "extra"]


class CacheError(DataError):
    """A cache file that cannot be used, or is missing."""


class Store:
    """Tensors by key under ``root``, apart from those with other ``facts``: all that they are made from.

    The facts are in the folder's name as a digest, and readable in its ``made_from.json``.
    """

    def __init__(self, root: Path, kind: Kind, facts: Mapping[str, object]) -> None:
        text = json.dumps(facts, sort_keys=True, default=str, indent=1)
        self.folder = root / f"{kind}-{_digest(text)[:16]}"
        self.facts = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.folder == self.folder

    def __hash__(self) -> int:
        return hash(self.folder)

    def path(self, key: str) -> Path:
        """File of the tensors of ``key``."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def complete(self, key: str) -> bool:
        """True if they are there, in a file of the length that its header tells."""
        try:
            with self.path(key).open("rb") as file:
                head = int.from_bytes(file.read(8), "little")
                tensors = json.loads(file.read(head))
                end = max(one["data_offsets"][1] for name, one in tensors.items() if name != "__metadata__")
                return bool(os.fstat(file.fileno()).st_size == 8 + head + end)
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return False

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors``, replacing earlier ones of ``key``."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._place(self.path(key), safetensors.torch.save(plain))
        self._reason(key).unlink(missing_ok=True)

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of ``key``."""
        try:
            found: dict[str, Tensor] = safetensors.torch.load_file(self.path(key))
        except Exception as error:  # safetensors has an error type of its own
            raise CacheError(
                f"{self.path(key)}: cannot be read ({error}); starting again makes it anew"
            ) from error
        return found

    def reject(self, key: str, reason: str) -> None:
        """Keep the reason that there is nothing for ``key``."""
        self._place(self._reason(key), reason.encode())

    def rejected(self, key: str) -> str | None:
        """The reason that there is nothing for ``key``, None if there is none."""
        try:
            return self._reason(key).read_text("utf-8", "replace")
        except OSError:
            return None

    def write_facts(self) -> None:
        """Write ``made_from.json``, and delete the partial files of dead writers."""
        self._place(self.folder / "made_from.json", self.facts.encode())
        for partial in self.folder.glob("*/.*.part"):
            try:
                if time.time() - partial.stat().st_mtime > _OLD:
                    partial.unlink()
            except OSError:  # somebody else was faster
                continue

    def _reason(self, key: str) -> Path:
        return self.path(key).with_suffix(".unreadable")

    def _place(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
        partial = path.with_name(f".{path.name}.{own}.part")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


class Stamps:
    """Stamps by which a changed picture is noticed: its place, and its file's size and time of change.

    A place is told from the name of the source's folder on (``Record.place``), so that it can be moved.
    """

    def __init__(self) -> None:
        self._files: dict[Path, str] = {}

    def of(self, picture: PictureFile) -> str:
        """A line for ``picture``."""
        if picture.path not in self._files:
            stat = picture.path.stat()
            self._files[picture.path] = f"{stat.st_size}|{stat.st_mtime_ns}"
        return f"{picture.place}|{self._files[picture.path]}"


class Job(NamedTuple):
    """A picture to encode: its record's index in the data set, and the number of its placement."""

    item: int
    view: int


@dataclass(frozen=True)
class Stores:
    """The caches of one training. ``low`` and ``extras`` are kept beside ``latents``; None: not cached.

    ``extras`` are those of the records' extra pictures by name, under a key of their own files too.
    """

    latents: Store | None = None
    low: Store | None = None
    text: Store | None = None
    extras: Mapping[str, Store] = field(default_factory=dict)

    def all(self) -> list[Store]:
        """Those that there are."""
        return [s for s in (self.latents, self.low, self.text, *self.extras.values()) if s is not None]


class CachedDataset:
    """The items of ``dataset`` with latents, text embeddings or both out of ``stores``.

    ``views`` placements of every picture are cached; the one that an epoch shows is drawn from (seed, epoch,
    index). Captions are drawn as without a cache.
    """

    def __init__(self, dataset: Dataset, stores: Stores, views: int) -> None:
        if views < 1:
            raise ValueError(f"data.cache_views {views}: expected at least 1 to cache latents")
        self.dataset, self.stores, self.views = dataset, stores, views
        self._stamps = Stamps()

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, index: int, epoch: int, seed: int) -> Sample:
        """Item ``index`` of ``epoch``."""
        if self.stores.latents is None:
            sample = self.dataset.get(index, epoch, seed)
        else:
            shown = self.dataset.shown(index)
            drawn = item_random(seed, epoch, index, "view").random()
            caption = self.dataset.records[shown].caption(item_random(seed, epoch, index, "caption").random())
            sample = self._latents(Job(shown, int(drawn * self.views)), caption)
        if self.stores.text is None:
            return sample
        text = self.stores.text.read(caption_key(sample.caption))["text"]
        return Sample(**{**sample.__dict__, "text": text})

    def _latents(self, job: Job, caption: str) -> Sample:
        assert self.stores.latents is not None, "only called with one"
        key = self.key(job)
        made = self.stores.latents.read(key)
        original, crop, target = ((int(a), int(b)) for a, b in made["sizes"].tolist())
        low = None if self.stores.low is None else self.stores.low.read(key)["moments"].float()
        moments, keys = made["moments"].float(), self.extra_keys(job)
        extras = {
            name: store.read(keys[name])["extra"].float()
            if name in keys
            else torch.ones(1, *moments.shape[1:])
            for name, store in self.stores.extras.items()
        }
        return Sample(
            caption, original, crop, target, latent_moments=moments, low_moments=low,
            loss_weight=self.dataset.records[job.item].loss_weight, extras=extras,
        )  # fmt: skip

    def key(self, job: Job) -> str:
        """Key of the latents of a picture."""
        transform = self.dataset.transform(job.item)
        stamp = self._stamps.of(self.dataset.records[job.item])
        return _digest(f"{stamp}|{transform.height}x{transform.width}|{job.view}")[:32]

    def extra_keys(self, job: Job) -> dict[str, str]:
        """Keys of the extra pictures of ``job`` by their names."""
        extras, made = self.dataset.records[job.item].extras, self.dataset.made
        key = self.key(job) if extras or made else ""
        of = {name: one.told for name, one in made.items()}
        of |= {name: self._stamps.of(one) for name, one in extras.items()}
        return {name: _digest(f"{key}|{what}")[:32] for name, what in of.items()}

    def jobs(self) -> dict[str, Job]:
        """Every picture to encode by its key; the same on all ranks."""
        made: dict[str, Job] = {}
        for view in range(self.views):
            for index in range(len(self.dataset)):
                record = self.dataset.records[index]
                try:
                    key, extra = self.key(Job(index, view)), self.extra_keys(Job(index, view))
                    job = made.setdefault(key, Job(index, view))
                    if extra != self.extra_keys(job):  # the same picture with other extra ones
                        made[f"{key} {index}"] = Job(index, view)
                    one, other = self.dataset.records[job.item].path, record.path
                    if one != other and not filecmp.cmp(one, other, shallow=False):
                        raise CacheError(
                            f"{one} and {other} are alike in folder, name, size and time of change, and "
                            "differ: a cache cannot tell them apart; rename the folder of one of them "
                            "(data.sources)"
                        )
                except OSError as error:
                    self.dataset.reject(record, str(error))
        return made

    def missing(self, jobs: Mapping[str, Job]) -> dict[str, Job]:
        """The ``jobs`` to do: not there, and not pictures that still cannot be read."""
        latents = self.stores.latents
        assert latents is not None, "only called with one"
        own = {key: self.key(job) for key, job in jobs.items()}
        lacking = {*missing([latents, self.stores.low], own.values())}
        for name, store in self.stores.extras.items():
            keys = {key: found[name] for key, job in jobs.items() if name in (found := self.extra_keys(job))}
            gone = {*missing([store], keys.values())}
            lacking |= {own[key] for key, extra in keys.items() if extra in gone}
        absent = [key for key in jobs if own[key] in lacking]
        return {
            key: jobs[key]
            for key in absent
            if latents.rejected(own[key]) is None or self.dataset.view(*jobs[key]) is not None
        }

    def captions(self) -> dict[str, str]:
        """Every different caption by its key."""
        return {
            caption_key(caption): caption for record in self.dataset.records for caption in record.captions
        }

    def reject_unreadable(self, jobs: Mapping[str, Job]) -> None:
        """Have the data set skip the pictures found unreadable; raises if they are too many."""
        if self.stores.latents is None:
            return
        for key, job in jobs.items():
            key = self.key(job)
            reason = None if job.view else self.stores.latents.rejected(key)
            if reason is not None and not self.stores.latents.path(key).exists():
                self.dataset.reject(self.dataset.records[job.item], reason)


def caption_key(caption: str) -> str:
    """Key of the embedding of ``caption``."""
    return _digest(caption)[:32]


def missing(stores: Sequence[Store | None], keys: Iterable[str]) -> list[str]:
    """The ``keys`` that one of ``stores`` does not have whole."""
    keys, given = list(keys), [store for store in stores if store is not None]

    def there(key: str) -> bool:
        return all(store.complete(key) for store in given)

    with ThreadPoolExecutor(8, thread_name_prefix="cache") as pool:
        complete = pool.map(there, keys, chunksize=64)
        return [key for key, is_there in zip(keys, complete, strict=True) if not is_there]


def fill_latents(
    cached: CachedDataset,
    jobs: Mapping[str, Job],
    encode: Encode,
    degrade: Callable[[Tensor], Tensor] | None = None,
    *,
    own: Mapping[str, Encode] = NOTHING_MADE,
    batch_size: int = 8,
    workers: int = 2,
) -> Iterator[int]:
    """Makes the latents (and low-resolution latents) of ``jobs``; yields the size of each batch done.

    ``own``: encoders of extra pictures by name, where they are not :data:`Encode`.
    """
    stores, dataset = cached.stores, cached.dataset
    assert stores.latents is not None, "only called with one"
    by_size: dict[tuple[int, int], list[str]] = {}
    for key, job in jobs.items():
        transform = dataset.transform(job.item)
        by_size.setdefault((transform.height, transform.width), []).append(key)
    chunks = [
        keys[start : start + batch_size]
        for keys in by_size.values()
        for start in range(0, len(keys), batch_size)
    ]

    def opened(keys: Sequence[str]) -> list[tuple[str, Sample | None]]:
        return [(key, dataset.view(*jobs[key])) for key in keys]

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="cache") as pool, torch.no_grad():
        waiting = [pool.submit(opened, chunk) for chunk in chunks[: workers + 1]]
        for number, chunk in enumerate(chunks):
            pairs = waiting.pop(0).result()
            if number + workers + 1 < len(chunks):
                waiting.append(pool.submit(opened, chunks[number + workers + 1]))
            for key, sample in pairs:
                if sample is None:
                    stores.latents.reject(cached.key(jobs[key]), dataset.reason(jobs[key].item))
            good = [(jobs[key], sample) for key, sample in pairs if sample is not None]
            if good:
                _encode(cached, good, encode, degrade, own)
            yield len(chunk)


def _encode(
    cached: CachedDataset,
    pairs: Sequence[tuple[Job, Sample]],
    encode: Encode,
    degrade: Callable[[Tensor], Tensor] | None,
    own: Mapping[str, Encode],
) -> None:
    stores, batch = cached.stores, collate([sample for _, sample in pairs])
    assert batch.image is not None and stores.latents is not None, "a data set gives images"
    moments = encode(batch.image)
    low = None if degrade is None else encode(degrade(batch.image))
    sizes = torch.stack([batch.original_size, batch.crop, batch.target_size], dim=1)  # (B, 3, 2)
    cells = (moments.shape[2], moments.shape[3])
    extras = encoded(batch.extras, encode, own, cells)
    for row, (job, _) in enumerate(pairs):
        key = cached.key(job)
        for name, extra_key in cached.extra_keys(job).items():
            stores.extras[name].write(extra_key, {"extra": extras[name][row]})
        if low is not None and stores.low is not None:
            stores.low.write(key, {"moments": low[row]})
        stores.latents.write(key, {"moments": moments[row], "sizes": sizes[row]})


def fill_text(
    store: Store,
    captions: Mapping[str, str],
    encode: Callable[[Sequence[str]], Sequence[Tensor]],
    *,
    batch_size: int = 32,
) -> Iterator[int]:
    """Makes the embeddings (T, C_text) of ``captions``; yields the size of each batch done."""
    keys = list(captions)
    with torch.no_grad():
        for start in range(0, len(keys), batch_size):
            part = keys[start : start + batch_size]
            for key, text in zip(part, encode([captions[key] for key in part]), strict=True):
                store.write(key, {"text": text})
            yield len(part)


def prune(root: Path, used: Mapping[Path, frozenset[str]]) -> int:
    """Delete the files that no store of ``used`` (its folder: its keys) needs; returns their number."""
    count = 0
    for folder in root.glob("*-*"):
        if not (folder / "made_from.json").is_file():
            continue
        keys = used.get(folder, frozenset())
        for file in [*folder.glob("*/*.safetensors"), *folder.glob("*/*.unreadable")]:
            if file.stem not in keys:
                file.unlink(missing_ok=True)
                count += 1
        if not keys:
            (folder / "made_from.json").unlink(missing_ok=True)
        for left in [*(sub for sub in folder.iterdir() if sub.is_dir()), folder]:
            if left.is_dir() and not any(left.iterdir()):
                left.rmdir()
    return count


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()  # of any file name
