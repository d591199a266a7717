"""Formats of weights on disk: our own folders, the one a path is found to hold, and digests of parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from sat import compat
from sat.checkpoint.files import open_file, open_folder, open_shards, vocabulary
from sat.checkpoint.format import PARTS, CheckpointError, LazyStateDict, Part, listing
from sat.checkpoint.formats.diffusers import DiffusersComponent, DiffusersPipeline, HuggingFaceText
from sat.checkpoint.formats.sat import Sat
from sat.checkpoint.verify import DIGESTS, MANIFEST, CheckpointPathError, Verify, read_json, records

FORMAT = "cogview3-native"
VERSION = 1
_FULL = Verify()


class Native:
    """Reads native folders; :func:`sat.checkpoint.save.save_native` writes them."""

    name = "native"

    def detects(self, path: Path) -> bool:
        """A folder with a manifest."""
        return (path / MANIFEST).is_file()

    def manifest(self, path: Path) -> dict[str, Any]:
        """The checked manifest."""
        file = path / MANIFEST
        content = read_json(file)
        if content.get("format") != FORMAT:
            raise CheckpointError(f"{file}: format is {content.get('format')!r}, expected {FORMAT!r}")
        if content.get("version") != VERSION:
            raise CheckpointError(
                f"{file}: version is {content.get('version')!r}; this code reads version {VERSION}, "
                f"use a matching release"
            )
        if not isinstance(content.get("parts"), dict) or not isinstance(content.get("config", {}), dict):
            raise CheckpointError(f"{file}: `parts` and `config` must be objects")
        return content

    def parts(self, path: Path, *, allow_pickle: bool = False) -> list[Part]:
        """The parts in the manifest."""
        written = self.manifest(path)["parts"]
        return [part for part in PARTS if part in written]

    def locate(self, path: Path, part: Part, *, allow_pickle: bool = False) -> Path:
        """The folder, if the manifest lists ``part``."""
        if part not in self.parts(path):
            raise CheckpointError(f"{path}: holds no {part} weights, only {self.parts(path)}")
        return path

    def open(
        self, path: Path, part: Part, *, allow_pickle: bool = False, verify: Verify = _FULL
    ) -> LazyStateDict:
        """The tensors of ``part``; files, names and counts must be those that were written."""
        self.locate(path, part)
        entry, listed = self.manifest(path)["parts"][part], records(path / MANIFEST)
        own = {str(file["name"]) for file in entry["files"]}
        files = {record["name"]: record["bytes"] for record in listed if record["name"] in own}
        for name, size in files.items():
            if (path / name).is_file() and (path / name).stat().st_size != size:
                there = (path / name).stat().st_size
                state = "truncated" if there < size else "not the file that was written"
                raise CheckpointError(
                    f"{path / name}: {state}: {there:,} bytes, {size:,} in the manifest; copy it again"
                )
        tensors = open_shards(path, list(files), verify=verify)
        if verify.mode != "off":
            infos = tensors.infos().values()
            counts: dict[str, Any] = {
                "tensors": len(tensors),
                "elements": sum(info.numel for info in infos),
                "dtypes": sorted({str(info.dtype)[6:] for info in infos}),
            }
            for key, value in counts.items():
                if key in entry and entry[key] != value:
                    tensors.close()
                    raise CheckpointError(
                        f"{path / MANIFEST}: {key} of {part} is {str(entry[key])[:80]}, its files "
                        f"hold {value}: one of them is not what was written; copy the folder again"
                    )
        return tensors

    def config(self, path: Path) -> Mapping[str, Any]:
        """The config sections in the manifest, under today's names."""
        return compat.today(self.manifest(path).get("config", {}))

    def tokenizer(self, path: Path) -> Path | None:
        """``tokenizer/spiece.model`` or ``tokenizer/tokenizer.json``."""
        return vocabulary(path / "tokenizer")


# -- checkpoint formats, and their detection by the content of a path


class Format(Protocol):
    """One way of keeping weights on disk."""

    name: str

    def detects(self, path: Path) -> bool:
        """True if the folder ``path`` is in this format."""
        ...

    def parts(self, path: Path, *, allow_pickle: bool = False) -> list[Part]:
        """The parts it holds."""
        ...

    def locate(self, path: Path, part: Part, *, allow_pickle: bool = False) -> Path:
        """The file or folder that holds ``part``; an error where there is none."""
        ...

    def open(
        self, path: Path, part: Part, *, allow_pickle: bool = False, verify: Verify = _FULL
    ) -> LazyStateDict:
        """The tensors of ``part`` under the format's own names, checked as ``verify`` says."""
        ...

    def config(self, path: Path) -> Mapping[str, Any]:
        """The config sections the folder carries: some of model, diffusion, conditioning, first_stage."""
        ...

    def tokenizer(self, path: Path) -> Path | None:
        """The vocabulary beside the text encoder: spiece.model, else tokenizer.json."""
        ...


class Weights:
    """A file, or a folder with weight files and nothing that names their part."""

    name = "weights"

    def detects(self, path: Path) -> bool:
        """Any file; any folder with weight files or an index directly in it."""
        kinds = ("*.safetensors", "*.pt", "*.pth", "*.bin", "*.ckpt", "*.index.json")
        return path.is_file() or any(next(path.glob(kind), None) for kind in kinds)

    def parts(self, path: Path, *, allow_pickle: bool = False) -> list[Part]:
        """None: they cannot be told."""
        return []

    def locate(self, path: Path, part: Part, *, allow_pickle: bool = False) -> Path:
        """The path itself."""
        return path

    def open(
        self, path: Path, part: Part, *, allow_pickle: bool = False, verify: Verify = _FULL
    ) -> LazyStateDict:
        """All tensors of the path."""
        return (open_folder if path.is_dir() else open_file)(path, allow_pickle=allow_pickle, verify=verify)

    def config(self, path: Path) -> Mapping[str, Any]:
        """Empty: there is none."""
        return {}

    def tokenizer(self, path: Path) -> Path | None:
        """The vocabulary that lies in the folder."""
        return vocabulary(path.parent if path.is_file() else path)


FORMATS: tuple[Format, ...] = (
    Native(),
    DiffusersPipeline(),
    DiffusersComponent(),
    HuggingFaceText(),
    Sat(),
    Weights(),
)


MARKS = ("manifest.json", "model_index.json", "latest", "config.json")


def detect(path: Path) -> Format:
    """The format that ``path`` is in; one clear line where it is in none."""
    if not path.exists():
        raise CheckpointPathError(f"{path}: no such file or folder")
    if not path.is_dir():
        return FORMATS[-1]
    for found in FORMATS:
        if found.detects(path):
            return found
    inside = sorted(entry.name for entry in path.iterdir())
    nested = [name for name in inside if any((path / name / mark).is_file() for mark in MARKS)]
    hint = f"; did you mean {str(path / nested[0])!r}?" if nested else ""
    raise CheckpointPathError(
        f"{path}: no known checkpoint format: expected manifest.json (native), model_index.json or "
        f"config.json (diffusers, Hugging Face), `latest` (SAT) or weight files; it "
        f"holds {listing(inside) or 'nothing'}{hint}"
    )


def find_part(path: Path | str, part: Part, *, allow_pickle: bool = False) -> Path:
    """The file or folder under ``path`` that holds ``part``."""
    path = Path(path)
    return detect(path).locate(path, part, allow_pickle=allow_pickle)


def find_tokenizer(path: Path | str) -> Path | None:
    """The vocabulary file that belongs to the text encoder under ``path``, or None."""
    path = Path(path)
    return detect(path).tokenizer(path)


def open_part(
    path: Path | str, part: Part, *, allow_pickle: bool = False, verify: Verify = _FULL
) -> LazyStateDict:
    """The tensors of ``part`` under ``path``, under the names of the format it is in.

    ``verify`` says how its files are checked; reading a tensor, or ``verified()``, raises if one is damaged.
    """
    if part not in PARTS:
        raise ValueError(f"part is one of {PARTS}, got {part!r}")
    path = Path(path)
    return detect(path).open(path, part, allow_pickle=allow_pickle, verify=verify)


# -- short fingerprints: of a checkpoint's files, for records of runs; of one part's weights, for caches


_WHOLE = 64 << 20  # bytes; up to here a file is hashed whole
_PIECE = 1 << 16
_PIECES = 64
_KINDS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json", ".model")


def digest(path: Path | str) -> str:
    """16 hexadecimal digits for a file or folder of weights, in about a second whatever the size.

    Names inside the folder, sizes, and contents: whole up to 64 MB, else 64 evenly spaced pieces of 64 kB. It
    tells checkpoints apart; it is no proof against tampering. The place of the folder does not matter, nor do
    the chunk digests that `convert.py verify --write` adds.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointPathError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _counts(p))
    total = hashlib.sha256()
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        size = file.stat().st_size
        if file.name == MANIFEST and (plain := _without_chunks(file)) is not None:
            total.update(f"{name}\0{len(plain)}\0".encode() + plain)
            continue
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
    # The contents are checked where the weights are loaded.
    with open_part(path, part, allow_pickle=allow_pickle, verify=Verify("manifest")) as tensors:
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
    return (file.suffix in _KINDS and file.name != DIGESTS) or file.name == "latest"


def _without_chunks(file: Path) -> bytes | None:
    """Content of a native manifest as it was before it had chunk digests; None if it is no such manifest."""
    try:
        content = read_json(file)
        for part in content["parts"].values():
            part["files"] = [{k: record[k] for k in ("name", "bytes", "sha256")} for record in part["files"]]
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None
    content.pop("tokenizer", None)
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
