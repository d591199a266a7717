"""Official SAT files: ``latest`` and ``1/mp_rank_00_model_states.pt``, the VAE's .pt, a T5 folder.

    DIR/latest                          the iteration's number, or the word release
    DIR/1/mp_rank_00_model_states.pt    {"module": {"model.diffusion_model.…": …}}, perhaps also
    first_stage_model.…
                                        and conditioner.embedders.0.transformer.…
    DIR/1/mp_rank_01_model_states.pt    and so on, of a network split over model-parallel ranks
    DIR/imagekl_ch16.pt                 or DIR/vae/…: {"state_dict": {"encoder.…": …}}
    DIR/t5-v1_1-xxl/                    a Hugging Face folder

The first two may also lie one folder further down, as the official archives unpack. Tensors of a part that
the engine file holds win over a separate file, as in the official loader.
Source: SwissArmyTransformer ``training/model_io.py``; official ``sgm/models/autoencoder.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat.checkpoint.files import SAFETENSORS, TORCH, open_file, read_json, weight_files
from sat.checkpoint.format import (
    ENGINE_PREFIXES,
    PARTS,
    CheckpointError,
    LazyStateDict,
    Part,
    Prefixed,
    listing,
)
from sat.checkpoint.formats.hf_t5 import HuggingFaceT5
from sat.checkpoint.ranks import RankFiles

ENGINE_FILE = "mp_rank_00_model_states.pt"
#: Our writer's addition, which the official code does not look at: the config sections the weights belong to.
SIDECAR = "config_sections.json"
_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_T5 = HuggingFaceT5()


class Sat:
    """Reads official folders; :func:`sat.checkpoint.save.save_sat` writes them."""

    name = "sat"

    def detects(self, path: Path) -> bool:
        """A folder with an engine checkpoint in it or one folder down, or one iteration's folder."""
        return bool(_engine_folders(path))

    def parts(self, path: Path, *, allow_pickle: bool = False) -> list[Part]:
        """The parts found in the engine file and beside it."""
        return [part for part in PARTS if self._find(path, part, allow_pickle) is not None]

    def locate(self, path: Path, part: Part, *, allow_pickle: bool = False) -> Path:
        """The engine file, the VAE's file or the T5 folder."""
        found = self._find(path, part, allow_pickle)
        if found is None:
            where = (
                "the engine file, the folder and vae/"
                if part == "first_stage"
                else "the engine file and the folder"
            )
            raise CheckpointError(f"{path}: holds no {part} weights (looked in {where}); name their own path")
        return found

    def open(self, path: Path, part: Part, *, allow_pickle: bool = False) -> LazyStateDict:
        """The tensors of ``part`` under the official names."""
        found = self.locate(path, part, allow_pickle=allow_pickle)
        if found.is_dir():
            return _T5.open(found, part, allow_pickle=allow_pickle)
        files = rank_files(found) if found.name == ENGINE_FILE else [found]
        opened = [open_file(file, allow_pickle=allow_pickle) for file in files]
        tensors = opened[0] if len(opened) == 1 else RankFiles(opened, str(found.parent))
        if (
            found.name != ENGINE_FILE or part == "model"
        ):  # what the model leaves over must be seen and refused
            return tensors
        return Prefixed(tensors, ENGINE_PREFIXES[part])

    def config(self, path: Path) -> Mapping[str, Any]:
        """The sections our writer adds; official folders carry none, except for T5."""
        if (path / SIDECAR).is_file():
            return read_json(path / SIDECAR)
        text = _text_folder(path)
        return {} if text is None else _T5.config(text)

    def tokenizer(self, path: Path) -> Path | None:
        """The one in the T5 folder."""
        text = _text_folder(path)
        return None if text is None else _T5.tokenizer(text)

    def _find(self, path: Path, part: Part, allow_pickle: bool) -> Path | None:
        engine = engine_file(path)
        if part == "model":
            return engine
        with open_file(engine, allow_pickle=allow_pickle) as tensors:
            if any(name.startswith(ENGINE_PREFIXES[part]) for name in tensors):
                return engine
        return _vae_file(path) if part == "first_stage" else _text_folder(path)


def _engine_folders(path: Path) -> list[Path]:
    """Folders that hold, or clearly should hold, an engine checkpoint: ``path``, else its sub-folders."""

    def looks_so(folder: Path) -> bool:
        return (
            (folder / "latest").is_file()
            or (folder / ENGINE_FILE).is_file()
            or next(folder.glob(f"*/{ENGINE_FILE}"), None) is not None
        )

    if looks_so(path):
        return [path]
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and looks_so(folder))


def engine_file(path: Path) -> Path:
    """The engine checkpoint file of a SAT folder, following ``latest``."""
    folders = _engine_folders(path)
    if not folders:
        raise CheckpointError(f"{path}: holds no SAT checkpoint (no `latest`, no {ENGINE_FILE})")
    if len(folders) > 1:
        raise CheckpointError(
            f"{path}: holds several SAT checkpoints, name one of {listing([f.name for f in folders])}"
        )
    folder = folders[0]
    if (folder / ENGINE_FILE).is_file():
        return folder / ENGINE_FILE
    latest = folder / "latest"
    if not latest.is_file():
        there = sorted(file.parent.name for file in folder.glob(f"*/{ENGINE_FILE}"))
        raise CheckpointError(
            f"{folder}: has no `latest` file; it should hold the name of the folder to read, of {there}"
        )
    word = latest.read_text(errors="replace").strip()
    if not (word == "release" or word.isdecimal() and int(word) > 0):
        raise CheckpointError(
            f"{latest}: holds {word[:40]!r}, expected an iteration number above 0 or 'release'"
        )
    iteration = folder / (word if word == "release" else str(int(word)))
    if not (iteration / ENGINE_FILE).is_file():
        raise CheckpointError(f"{iteration / ENGINE_FILE}: no such file, but {latest} names it")
    return iteration / ENGINE_FILE


def rank_files(engine: Path) -> list[Path]:
    """The files of all model-parallel ranks, of which ``engine`` is the first."""
    names = engine.parent.glob("mp_rank_*_model_states.pt")
    there = sorted(int(found[1]) for path in names if (found := _RANK.fullmatch(path.name)))
    if absent := sorted(set(range(there[-1] + 1)) - set(there)):
        raise CheckpointError(
            f"{engine.parent}: mp_rank_{absent[0]:02d}_model_states.pt is missing, one of {there[-1] + 1}"
        )
    return [engine.with_name(rank_file(rank)) for rank in there]


def rank_file(rank: int) -> str:
    """The name of the engine file of a model-parallel rank."""
    return f"mp_rank_{rank:02d}_model_states.pt"


def _vae_file(path: Path) -> Path | None:
    """The autoencoder's file in ``path`` or ``path``/vae; of several, the one named like one."""
    for folder in (path, path / "vae"):
        files = weight_files(folder, (*TORCH, *SAFETENSORS)) if folder.is_dir() else []
        files = [file for file in files if file.name != ENGINE_FILE]
        named = [file for file in files if "imagekl" in file.name or "vae" in file.name]
        files = files if len(files) < 2 else named
        if len(files) > 1:
            raise CheckpointError(
                f"{folder}: several autoencoder files, name one of {listing([f.name for f in files])}"
            )
        if files:
            return files[0]
    return None


def _text_folder(path: Path) -> Path | None:
    found = sorted(folder for folder in path.iterdir() if folder.is_dir() and _T5.detects(folder))
    if len(found) > 1:
        raise CheckpointError(f"{path}: several T5 folders, name one of {listing([f.name for f in found])}")
    return found[0] if found else None
