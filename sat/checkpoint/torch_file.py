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
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sat.checkpoint.format import CheckpointError, InMemory, TensorInfo, tensor_bytes
from sat.checkpoint.verify import FileCheck, Range, Verify, crc32

logger = logging.getLogger(__name__)

#: Keys under which training code keeps the tensors: official SAT and DeepSpeed, VAE and Lightning files.
_ROOTS = ("module", "state_dict", "model")

#: Plain numpy data that official files carry (random states); these globals build arrays and nothing else.
_SAFE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("uint8", "uint32", "int64", "float32", "float64")),
]
_MOST_PICKLE = 1 << 28  # bytes; of names, shapes and settings
_LOAD_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError),
    *(AttributeError, IndexError, TypeError, OSError),
)


class TorchFile(InMemory):
    """The tensors of one ``torch.save`` file, mapped. ``allow_pickle`` runs any code the pickle holds.

    ``check`` compares the file with its digests; without one the CRC-32 of the zip is looked at.
    """

    def __init__(
        self,
        path: Path,
        *,
        allow_pickle: bool = False,
        check: FileCheck | None = None,
        verify: Verify | None = None,
    ) -> None:
        verify = verify or Verify()
        crc = check_zip(path, verify, check is None)
        content = _load(path, allow_pickle)
        super().__init__(_tensors(path, content), str(path))
        self.facts = _facts(content)
        self._check, self.digested = check or crc, check is not None
        # Addresses at which the system has mapped the file (Linux; none elsewhere).
        self._ranges: list[tuple[int, int]] = []
        maps = Path("/proc/self/maps")
        if maps.exists() and hasattr(mmap, "MADV_DONTNEED"):
            for line in maps.read_text(errors="replace").splitlines():
                addresses, *_, file = line.split(maxsplit=5)
                if file == str(path.resolve()):
                    begin, end = addresses.split("-")
                    self._ranges.append((int(begin, 16), int(end, 16)))

    def release(self, key: str) -> None:
        """Let the system take back the mapped pages of ``key``; they are read again if asked for again.

        Memory that is not mapped from the file is left alone.
        """
        storage = self._tensors[key].untyped_storage()
        page = mmap.PAGESIZE
        begin = -(-storage.data_ptr() // page) * page
        end = (storage.data_ptr() + storage.nbytes()) // page * page
        if begin < end and any(low <= begin and end <= high for low, high in self._ranges):
            address, length = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
            ctypes.CDLL(None).madvise(address, length, mmap.MADV_DONTNEED)

    def verified(self) -> None:
        """Wait for the check of the file."""
        if self._check is not None:
            self._check.finish()

    def close(self) -> None:
        """Drop the map."""
        if self._check is not None:
            self._check.close()
        self._tensors = {}


def check_zip(  # noqa: C901 - one fault after the other
    path: Path, verify: Verify, crc: bool
) -> FileCheck | None:
    """Check of the CRC-32 of the zip's records; those that are not tensors at once.

    Compressed records, and more bytes than the file has, are refused: ``torch.save`` only stores.
    """
    if not zipfile.is_zipfile(path):
        return None
    ranges: list[Range] = []
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = archive.infolist()
            if packed := [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]:
                raise CheckpointError(
                    f"{path}: {packed[0][:80]!r} in it is compressed, as torch.save never does: refused"
                )
            total = sum(entry.file_size for entry in entries)
            if total > size or any(entry.file_size != entry.compress_size for entry in entries):
                raise CheckpointError(
                    f"{path}: its records claim {total:,} bytes, the file has {size:,}: damaged"
                )
            if verify.mode != "full" or not crc:
                return None
            for entry in entries:
                file.seek(entry.header_offset)
                head = file.read(30)
                begin = (
                    entry.header_offset
                    + 30
                    + sum(int.from_bytes(head[i : i + 2], "little") for i in (26, 28))
                )
                if head[:4] != b"PK\3\4" or begin + entry.file_size > size:
                    raise CheckpointError(
                        f"{path}: damaged at {entry.filename[:80]!r}; copy or download it again"
                    )
                ranges.append(Range(begin, begin + entry.file_size, f"{entry.CRC:08x}"))
                if "/data/" not in entry.filename:
                    if entry.file_size > _MOST_PICKLE:
                        raise CheckpointError(
                            f"{path}: {entry.filename[:80]!r} in it has {entry.file_size:,} bytes beside the "
                            f"tensors, at most {_MOST_PICKLE:,} are read"
                        )
                    file.seek(begin)
                    if zlib.crc32(file.read(entry.file_size)) != entry.CRC:
                        raise CheckpointError(
                            f"{path}: truncated or corrupt: {entry.filename[:80]!r} has another CRC-32; "
                            f"copy or download it again"
                        )
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or corrupt PyTorch file ({error}); copy or download it again"
        ) from error
    return FileCheck(path, sorted(ranges), verify, crc32)


def _load(path: Path, allow_pickle: bool) -> object:
    is_zip = zipfile.is_zipfile(path)
    if not is_zip:
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                raise CheckpointError(
                    f"{path}: truncated or corrupt: a PyTorch file whose end is missing "
                    f"({path.stat().st_size:,} bytes); copy or download it again"
                )
    numpy_arrays = sys.modules.get("numpy._core.multiarray") or sys.modules["numpy.core.multiarray"]
    safe = [*_SAFE, numpy_arrays._reconstruct]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(safe):
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols; a failure is told below
            if path.suffix == ".safetensors":  # by that name torch would read another format
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=not allow_pickle)
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=not allow_pickle)
    except ImportError as error:  # only with allow_pickle: a class of a package that is not here
        raise CheckpointError(f"{path}: its pickle needs a module that is not installed: {error}") from error
    except _LOAD_ERRORS as error:
        message = str(error)
        if isinstance(error, pickle.UnpicklingError):  # refused by torch's restricted unpickler, or broken
            found = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+)", message)
            needs = found.group(1) if found else "unsupported objects"
            if found or "Trying to " in message or "Can only " in message:
                raise CheckpointError(
                    f"{path}: its pickle needs {needs}, more than tensors: loading it could run any code; "
                    f"if you trust the file, set checkpoint.allow_pickle=true"
                ) from error
        text = message.rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
        raise CheckpointError(
            f"{path}: truncated or corrupt PyTorch file ({text.splitlines()[0][:120]}); "
            f"copy or download it again"
        ) from error


def _tensors(path: Path, content: object) -> dict[str, Tensor]:
    """The state dict in a loaded file, under one of ``_ROOTS`` or the file itself."""
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
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {name!r} is not a plain tensor with all its values in the file (sparse, quantised, "
                f"expanded or without data): save it by .contiguous() first"
            )
        tensors[name] = value
    return tensors


def _facts(content: object) -> dict[str, int]:
    """Numbers beside a training's tensors: steps done, model-parallel ranks, the rank's own seed."""
    told = content if isinstance(content, Mapping) else {}
    found = {
        key: told[key] for key in ("iteration", "global_steps", "mp_world_size") if type(told.get(key)) is int
    }
    states = told.get("rng_tracker_states")
    state = states.get("model-parallel-rng") if isinstance(states, Mapping) else None
    if isinstance(state, Tensor) and state.dtype == torch.uint8 and state.numel() >= 16:
        found["seed"] = int.from_bytes(bytes(state.flatten()[-16:-8].tolist()), "little")  # then the offset
    return found


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
