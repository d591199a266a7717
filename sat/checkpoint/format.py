"""Weights by name, each tensor read when it is asked for: the interface, and safetensors files."""

from __future__ import annotations

import json
import math
import mmap
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import xxhash
from torch import Tensor

from sat.checkpoint.verify import CheckpointError as CheckpointError
from sat.checkpoint.verify import Digester, FileCheck
from sat.checkpoint.verify import Written as Written

#: A checkpoint's parts: the denoising network, the image autoencoder, the text encoder.
Part: TypeAlias = Literal["model", "first_stage", "text"]
PARTS: tuple[Part, ...] = ("model", "first_stage", "text")

#: Prefixes of a part's names in official engine files, and in our own engine.
ENGINE_PREFIXES: dict[Part, str] = {
    "model": "model.diffusion_model.",
    "first_stage": "first_stage_model.",
    "text": "conditioner.embedders.0.transformer.",
}
OWN_PREFIXES: dict[Part, str] = {
    "model": "network.",
    "first_stage": "first_stage.",
    "text": "conditioner.text.",
}

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


class LazyStateDict(Mapping[str, Tensor]):
    """Tensors by name: names, shapes and dtypes at once, values when asked for.

    A value may be a window on a mapped file: copy it to keep it, and do not write to it.
    """

    source: str  # file or folder of the tensors, for messages
    exact: frozenset[str] = frozenset()  # names that a native writer never narrows: buffers such as tables
    digested: bool = True  # false: values without digests of ours, which may hold NaN unseen

    @abstractmethod
    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``, without reading it."""

    def release(self, key: str) -> None:  # noqa: B027 (a hint; most sources hold nothing)
        """Hint that ``key`` has been used: memory that reading it took may go back to the system."""

    def verified(self) -> None:  # noqa: B027
        """Wait until the files behind the tensors are checked; :class:`CheckpointError` if one is damaged."""

    def close(self) -> None:  # noqa: B027
        """Close the files behind the tensors."""

    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        return {key: self.info(key) for key in self}

    def __enter__(self) -> LazyStateDict:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class InMemory(LazyStateDict):
    """A state dict that is already in memory."""

    def __init__(
        self, tensors: Mapping[str, Tensor], source: str = "memory", exact: Iterable[str] = ()
    ) -> None:
        self.source, self.exact = source, frozenset(exact)
        self._tensors = tensors

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        tensor = self._tensors[key]
        return TensorInfo(tuple(tensor.shape), tensor.dtype)

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class View(LazyStateDict):
    """The tensors of ``inner`` as they are; subclasses override the names, shapes or values they change."""

    def __init__(self, inner: LazyStateDict) -> None:
        self.inner = inner
        self.source, self.digested = inner.source, inner.digested

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        return self.inner.info(key)

    def release(self, key: str) -> None:
        """Pass the hint on."""
        self.inner.release(key)

    def verified(self) -> None:
        """Wait for the check of the files."""
        self.inner.verified()

    def close(self) -> None:
        """Close the files behind the tensors."""
        self.inner.close()

    def __getitem__(self, key: str) -> Tensor:
        return self.inner[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


class Prefixed(View):
    """The tensors of ``inner`` whose names start with ``prefix``, without it."""

    def __init__(self, inner: LazyStateDict, prefix: str) -> None:
        super().__init__(inner)
        self._prefix = prefix
        self._names = [name[len(prefix) :] for name in inner if name.startswith(prefix)]

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        return self.inner.info(self._prefix + key)

    def release(self, key: str) -> None:
        """Pass the hint on."""
        self.inner.release(self._prefix + key)

    def __getitem__(self, key: str) -> Tensor:
        return self.inner[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Joined(LazyStateDict):
    """Several shards as one. A name in two shards is an error."""

    def __init__(self, shards: Mapping[str, LazyStateDict], source: str) -> None:
        self.source = source
        self._shards = shards
        self.digested = all(shard.digested for shard in shards.values())
        self._owner: dict[str, LazyStateDict] = {}
        for file, shard in shards.items():
            for name in shard:
                if name in self._owner:
                    raise CheckpointError(f"{source}: {name!r} is in more than one shard, the last is {file}")
                self._owner[name] = shard

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        return self._owner[key].info(key)

    def release(self, key: str) -> None:
        """Pass the hint on."""
        self._owner[key].release(key)

    def verified(self) -> None:
        """Wait for the check of every shard."""
        for shard in self._shards.values():
            shard.verified()

    def close(self) -> None:
        """Close every shard."""
        for shard in self._shards.values():
            shard.close()

    def __getitem__(self, key: str) -> Tensor:
        return self._owner[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)


def as_lazy(tensors: Mapping[str, Tensor], source: str = "memory") -> LazyStateDict:
    """``tensors`` as a :class:`LazyStateDict`; itself if it is one."""
    return tensors if isinstance(tensors, LazyStateDict) else InMemory(tensors, source)


def listing(names: list[str], most: int = 5) -> str:
    """The first names and how many more: ``'a', 'b' and 7 more``."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


# -- safetensors files, read by mapping one tensor at a time and written by streaming: one tensor is held
#
# The format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, byte range), then the
# bytes. Source: https://github.com/huggingface/safetensors (checked against the library in
# tests/unit/test_checkpoint_files.py).


_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 1 << 24  # bytes; a tensor takes about 150
_SMALL = 16 << 20  # bytes; the digests take milliseconds
SEAL = "xxh3"
"""Entry of the metadata with digests of the header and of each tensor, where the writer put them."""


@dataclass(frozen=True)
class _Place:
    info: TensorInfo
    begin: int  # bytes from the start of the file
    nbytes: int


class SafetensorsFile(LazyStateDict):
    """The tensors of one file. The header is checked whole when opened; values are mapped when asked for.

    ``check`` compares the file with its digests while it is read, a small one when it is opened. Digests in
    its own header are compared as ``mode`` says: ``full``, the header alone (``manifest``), or not (``off``).
    """

    def __init__(self, path: Path, check: FileCheck | None = None, mode: str = "full") -> None:
        self.source, self._check = str(path), check
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error
        try:
            if check is not None and check.alone and (size := path.stat().st_size) <= _SMALL:
                check.first(size)
                self._check = None
            elif check is not None:
                check.first(8)
                check.first(8 + int.from_bytes(self._file.read(8), "little"))
                self._file.seek(0)
            self._places, self.metadata = _header(path, self._file.read)
            self._seal = _seal(self.metadata, self.infos(), self.source) if mode != "off" else {}
        except BaseException:
            self._file.close()
            raise
        self.digested = check is not None or bool(self._seal)
        self._seal = self._seal if mode == "full" else {}

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        return self._places[key].info

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._mapped(key)
        if self._seal and self._seal[key] != digest_of(tensor, self.info(key), key):
            raise CheckpointError(
                f"{self.source}: {key!r} is not what was written: damaged, or changed by a program that kept "
                f"the header; copy the file again"
            )
        return tensor

    def _mapped(self, key: str) -> Tensor:
        place = self._places[key]
        if not place.nbytes:
            return torch.empty(place.info.shape, dtype=place.info.dtype)
        if self._check is not None:
            self._check.wait(place.begin, place.begin + place.nbytes)
        page = mmap.ALLOCATIONGRANULARITY
        skip = place.begin % page
        try:  # a private map, which lives as long as the tensor; the file is never written
            window = mmap.mmap(
                self._file.fileno(), skip + place.nbytes, access=mmap.ACCESS_COPY, offset=place.begin - skip
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.source}: cannot map {key!r}: {error}") from error
        if hasattr(mmap, "MADV_WILLNEED"):
            window.madvise(mmap.MADV_WILLNEED)  # read ahead in one go instead of page by page
        flat = torch.frombuffer(window, dtype=torch.uint8, offset=skip, count=place.nbytes)
        if place.begin % place.info.dtype.itemsize:
            flat = flat.clone()
        return flat.view(place.info.dtype).reshape(place.info.shape)

    def verified(self) -> None:
        """Wait for the check of the whole file."""
        if self._check is not None:
            self._check.finish()

    def close(self) -> None:
        """Close the file; tensors already read stay valid."""
        if self._check is not None:
            self._check.close()
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _header(path: Path, read: Callable[[int], bytes]) -> tuple[dict[str, _Place], dict[str, str]]:
    """Byte ranges of all tensors, and the metadata; damage of any kind is one line."""
    size = path.stat().st_size
    length = int.from_bytes(read(8), "little")
    if size < 8 or length > min(size - 8, _MOST_HEADER):
        raise CheckpointError(
            f"{path}: truncated or corrupt: {size:,} bytes, but its safetensors header claims {length:,}; "
            f"copy or download it again"
        )
    try:
        header = json.loads(read(length))
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not texts")
        places = {name: _place(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the safetensors header is damaged ({error}); copy or download it again"
        ) from error
    end = 8 + length
    for name, place in sorted(places.items(), key=lambda item: item[1].begin):
        if place.begin != end or place.nbytes != place.info.nbytes:
            raise CheckpointError(
                f"{path}: the safetensors header is damaged at {name!r}; copy or download it again"
            )
        end += place.nbytes
    if end != size:
        what = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{path}: {what}: {size:,} bytes, {end:,} expected; copy or download it again")
    return places, metadata


def _place(entry: Mapping[str, Any], base: int) -> _Place:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    shape = tuple(entry["shape"])
    if not all(type(n) is int for n in (begin, end, *shape)):
        raise ValueError(f"no whole numbers: {begin!r}..{end!r}, shape {list(shape)!r}"[:200])
    if begin < 0 or end < begin or any(n < 0 for n in shape):
        raise ValueError(f"impossible range {begin}..{end} or shape {list(shape)}")
    return _Place(TensorInfo(shape, _DTYPES[entry["dtype"]]), base + begin, end - begin)


def seal(infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], metadata: Mapping[str, str]) -> str:
    """Digests to write as :data:`SEAL` beside ``metadata``: of each tensor, and of the header itself."""
    tensors = {name: digest_of(read(name), info, name) for name, info in infos.items()}
    return json.dumps({"tensors": tensors, "header": _header_digest(metadata, infos)})


def digest_of(tensor: Tensor, info: TensorInfo, name: str) -> str:
    """xxh3 of the bytes of ``tensor``, which is what ``info`` says."""
    hasher = xxhash.xxh3_64()
    for piece in tensor_bytes(tensor, info, name):
        hasher.update(piece)
    return hasher.hexdigest()


def _header_digest(metadata: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> str:
    shapes = {name: [str(info.dtype), *info.shape] for name, info in infos.items()}
    told = {key: text for key, text in metadata.items() if key != SEAL}
    return xxhash.xxh3_64_hexdigest(json.dumps([told, shapes], sort_keys=True).encode())


def _seal(metadata: Mapping[str, str], infos: Mapping[str, TensorInfo], source: str) -> dict[str, str]:
    """Digests of the tensors in a header that has them, which must be the one that was written."""
    if SEAL not in metadata:
        return {}
    try:
        content = json.loads(metadata[SEAL])
        found: dict[str, str] = content["tensors"]
        good, odd = content["header"] == _header_digest(metadata, infos), sorted(found.keys() ^ infos.keys())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good, odd = False, []
    if not good or odd:
        where = f" at {listing(odd, 3)}" if odd else ""
        raise CheckpointError(
            f"{source}: its header is not the one that was written{where}: damaged, or changed by another "
            f"program; copy the file again"
        )
    return found


def write_safetensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write the tensors named by ``infos``, asking ``read`` for one at a time; the result is synced to disk.

    Larger element types come first, so that every tensor stays aligned to its own type.
    """
    names = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        info = infos[name]
        if info.dtype not in _NAMES:
            raise CheckpointError(f"{path}: {name!r} is {info.dtype}, which safetensors cannot hold")
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digester = Digester()
    with path.open("wb") as file:
        for piece in (memoryview(len(text).to_bytes(8, "little")), memoryview(text)):
            digester.update(piece)
            file.write(piece)
        for name in names:
            for piece in tensor_bytes(read(name), infos[name], name):
                digester.update(piece)
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digester.written()


def tensor_bytes(tensor: Tensor, info: TensorInfo, name: str, step: int = 1 << 24) -> Iterator[memoryview]:
    """The bytes of ``tensor`` in pieces; it must be what ``info`` announced."""
    if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
        raise CheckpointError(
            f"{name!r} is {list(tensor.shape)} {tensor.dtype}, announced as {list(info.shape)} {info.dtype}"
        )
    if not info.nbytes:
        return
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(raw), step):
        yield raw[begin : begin + step]


def whole_number(file: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """``key`` of the ``config`` in ``file``, a positive whole number."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{file}: {key} is {value!r}, expected a positive whole number")
    return value
