"""PyTorch files (.pt, .bin, .ckpt): read mapped and without running code, written by streaming.

Reading is ``torch.load(mmap=True, weights_only=True)``. Writing makes the same zip archive as ``torch.save``
(pickle of the names, one stored record per tensor), tensor by tensor, because ``torch.save`` wants them all
at once.
"""

from __future__ import annotations

import ctypes
import io
import logging
import mmap
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sat.checkpoint.format import CheckpointError, LazyStateDict, TensorInfo
from sat.checkpoint.safetensors_file import tensor_bytes

logger = logging.getLogger(__name__)

#: Keys under which training code keeps the tensors: official SAT and DeepSpeed, VAE and Lightning files.
_ROOTS = ("module", "state_dict", "model")

#: Plain numpy data that official files carry (random states); these globals build arrays and nothing else.
_SAFE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("uint8", "uint32", "int64", "float32", "float64")),
]


class TorchFile(LazyStateDict):
    """The tensors of one ``torch.save`` file, mapped. ``allow_pickle`` runs any code the pickle holds."""

    def __init__(self, path: Path, *, allow_pickle: bool = False) -> None:
        self._path = path
        content = _load(path, allow_pickle)
        self.root, self._tensors = _tensors(path, content)
        self._ranges = _mapped_ranges(path)

    @property
    def source(self) -> str:
        """The file."""
        return str(self._path)

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        tensor = self._tensors[key]
        return TensorInfo(tuple(tensor.shape), tensor.dtype)

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key].detach()

    def release(self, key: str) -> None:
        """Let the system take back the mapped pages of ``key``; they are read again if asked for again."""
        _forget(self._tensors[key], self._ranges)

    def close(self) -> None:
        """Drop the map."""
        self._tensors = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _load(path: Path, allow_pickle: bool) -> object:
    is_zip = zipfile.is_zipfile(path)
    if not is_zip:
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                raise CheckpointError(
                    f"{path}: truncated or corrupt: a PyTorch file whose end is missing "
                    f"({path.stat().st_size:,} bytes); copy or download it again"
                )
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([*_SAFE, _numpy_rebuild()]):
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols; a failure is told below
            if path.suffix == ".safetensors":  # by that name torch would read another format
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=not allow_pickle)
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        if needs := _unsafe(str(error)):
            raise CheckpointError(
                f"{path}: its pickle needs {needs}, more than tensors: loading it could run any code; "
                f"if you trust the file, set checkpoint.allow_pickle=true"
            ) from error
        raise CheckpointError(_damaged(path, error)) from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        TypeError,
        OSError,
    ) as error:
        raise CheckpointError(_damaged(path, error)) from error
    except ImportError as error:  # only with allow_pickle: a class of a package that is not here
        raise CheckpointError(f"{path}: its pickle needs a module that is not installed: {error}") from error


def _damaged(path: Path, error: Exception) -> str:
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    return (
        f"{path}: truncated or corrupt PyTorch file ({text.splitlines()[0][:120]}); copy or download it again"
    )


def _unsafe(message: str) -> str | None:
    """What torch's restricted unpickler refused, or None where the pickle is simply broken."""
    found = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+)", message)
    if found:
        return found.group(1)
    return "unsupported objects" if "Trying to " in message or "Can only " in message else None


def _numpy_rebuild() -> Callable[..., Any]:
    module = sys.modules.get("numpy._core.multiarray") or sys.modules["numpy.core.multiarray"]
    rebuild: Callable[..., Any] = module._reconstruct
    return rebuild


def _tensors(path: Path, content: object) -> tuple[str, dict[str, Tensor]]:
    """The state dict in a loaded file and the key it was under ('' = the file itself)."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    root = next((key for key in _ROOTS if isinstance(content.get(key), Mapping)), "")
    found = content[root] if root else content
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            where = f" under {root!r}" if root else ""
            raise CheckpointError(
                f"{path}: {name!r}{where} is a {type(value).__name__}, expected tensors by name "
                f"(or those under one of {list(_ROOTS)})"
            )
        tensors[name] = value
    return root, tensors


def _mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Addresses at which the system has mapped ``path`` (Linux; empty elsewhere)."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or not hasattr(mmap, "MADV_DONTNEED"):
        return []
    name = str(path.resolve())
    lines = [line.split(maxsplit=5) for line in maps.read_text(errors="replace").splitlines()]
    found = [line[0].split("-") for line in lines if len(line) == 6 and line[5] == name]
    return [(int(begin, 16), int(end, 16)) for begin, end in found]


def _forget(tensor: Tensor, ranges: list[tuple[int, int]]) -> None:
    """Give the mapped pages of a tensor back to the system; memory that is no map of ours is left alone."""
    storage = tensor.untyped_storage()
    page = mmap.PAGESIZE
    begin = -(-storage.data_ptr() // page) * page
    end = (storage.data_ptr() + storage.nbytes()) // page * page
    if begin < end and any(low <= begin and end <= high for low, high in ranges):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


# -- writing

_STORAGES: dict[torch.dtype, type] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_ALIGN = 64  # bytes; where torch.save puts a record's data


class _Record:
    """Stands for a tensor in the pickle: the storage that its record becomes."""

    def __init__(self, index: int, info: TensorInfo) -> None:
        self.index = index
        self.info = info


class _Storage:
    def __init__(self, record: _Record) -> None:
        self.record = record


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, _Record):
            return NotImplemented
        shape = obj.info.shape
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        arguments: tuple[Any, ...] = (_Storage(obj), 0, shape, tuple(reversed(strides)), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, obj: object) -> Any:
        if not isinstance(obj, _Storage):
            return None
        info = obj.record.info
        return ("storage", _STORAGES[info.dtype], str(obj.record.index), "cpu", info.numel)


def write_torch(
    path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], root: str
) -> None:
    """Write ``{root: {name: tensor}}`` as ``torch.save`` would, asking ``read`` for one tensor at a time."""
    for name, info in infos.items():
        if info.dtype not in _STORAGES:
            raise CheckpointError(f"{path}: {name!r} is {info.dtype}, which this writer cannot hold")
    records = {name: _Record(index, info) for index, (name, info) in enumerate(infos.items())}
    text = io.BytesIO()
    _Pickler(text, protocol=2).dump({root: dict(records)})
    stem = path.stem
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _put(archive, f"{stem}/data.pkl", [memoryview(text.getvalue())], len(text.getvalue()))
            _put(archive, f"{stem}/byteorder", [memoryview(sys.byteorder.encode())], len(sys.byteorder))
            for name, record in records.items():
                pieces = tensor_bytes(read(name), record.info, name)
                _put(archive, f"{stem}/data/{record.index}", pieces, record.info.nbytes)
            _put(archive, f"{stem}/version", [memoryview(b"3\n")], 2)
        file.flush()
        os.fsync(file.fileno())


def _put(
    archive: zipfile.ZipFile, name: str, pieces: Iterator[memoryview] | list[memoryview], nbytes: int
) -> None:
    """Add a stored record whose data starts on a multiple of 64 bytes of the file."""
    assert archive.fp is not None, "the archive is open"
    large = nbytes >= 1 << 31
    entry = zipfile.ZipInfo(name)
    entry.file_size = nbytes
    head = archive.fp.tell() + 30 + len(name.encode()) + (20 if large else 0)
    padding = -(head + 4) % _ALIGN
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=large) as record:
        for piece in pieces:
            record.write(piece)
