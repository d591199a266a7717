"""Short fingerprints: of a checkpoint's files, for records of runs; of one part's weights, for caches."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from sat.checkpoint.format import CheckpointError, Part
from sat.checkpoint.formats import open_part

_WHOLE = 64 << 20  # bytes; up to here a file is hashed whole
_PIECE = 1 << 16
_PIECES = 64
_KINDS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json", ".model")


def digest(path: Path | str) -> str:
    """16 hexadecimal digits for a file or folder of weights, in about a second whatever the size.

    Names inside the folder, sizes, and contents: whole up to 64 MB, else 64 evenly spaced pieces of 64 kB. It
    tells checkpoints apart; it is no proof against tampering. The place of the folder does not matter.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _counts(p))
    total = hashlib.sha256()
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        size = file.stat().st_size
        total.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as handle:
            if size <= _WHOLE:
                while piece := handle.read(1 << 22):
                    total.update(piece)
            else:
                for index in range(_PIECES):
                    handle.seek((size - _PIECE) * index // (_PIECES - 1))
                    total.update(handle.read(_PIECE))
    return total.hexdigest()[:16]


def part_digest(path: Path | str, part: Part, *, allow_pickle: bool = False) -> str:
    """16 hexadecimal digits for the weights of one ``part`` in ``path``, whatever else is beside them.

    Names, shapes, types, and values: all of a tensor up to 64 kB, else 256 evenly spaced ones.
    """
    total = hashlib.sha256()
    with open_part(path, part, allow_pickle=allow_pickle) as tensors:
        for name in sorted(tensors):
            tensor = tensors[name]
            total.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
            if tensor.numel() * tensor.element_size() > _PIECE:
                places = torch.linspace(0, tensor.numel() - 1, 256, dtype=torch.float64).long()
                tensor = tensor.flatten()[places]
            total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            tensors.release(name)
    return total.hexdigest()[:16]


def _counts(file: Path) -> bool:
    return file.suffix in _KINDS or file.name == "latest"
