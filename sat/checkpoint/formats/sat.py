"""Official SAT files: ``latest`` and ``1/mp_rank_00_model_states.pt``, the VAE's .pt, a T5 folder.

    DIR/latest                          the iteration's number, or the word release
    DIR/1/mp_rank_00_model_states.pt    {"module": {"model.diffusion_model.…": …}}, perhaps also
                                        first_stage_model.… and conditioner.embedders.0.transformer.…
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

from sat.checkpoint.files import SAFETENSORS, TORCH, open_file, weight_files
from sat.checkpoint.format import (
    ENGINE_PREFIXES,
    PARTS,
    CheckpointError,
    LazyStateDict,
    Part,
    Prefixed,
    listing,
)
from sat.checkpoint.formats.diffusers import HuggingFaceText
from sat.checkpoint.ranks import RankFiles
from sat.checkpoint.verify import Verify, read_json
from sat.util.host import read_bounded

ENGINE_FILE = "mp_rank_00_model_states.pt"
#: Config sections the weights belong to; our writer's addition, which the official code does not look at.
SIDECAR = "config_sections.json"
_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_T5 = HuggingFaceText()
_FULL = Verify()


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
            vae = ", the folder and vae/" if part == "first_stage" else " and the folder"
            raise CheckpointError(
                f"{path}: holds no {part} weights (looked in the engine file{vae}); name their own path"
            )
        return found

    def open(
        self, path: Path, part: Part, *, allow_pickle: bool = False, verify: Verify = _FULL
    ) -> LazyStateDict:
        """The tensors of ``part`` under the official names."""
        found = self.locate(path, part, allow_pickle=allow_pickle)
        if found.is_dir():
            return _T5.open(found, part, allow_pickle=allow_pickle, verify=verify)
        if found.name != ENGINE_FILE:
            return open_file(found, allow_pickle=allow_pickle, verify=verify)
        names = [path.name for path in found.parent.glob("mp_rank_*_model_states.pt")]
        ranks = sorted(int(rank[1]) for name in names if (rank := _RANK.fullmatch(name)))
        if absent := sorted(set(range(ranks[-1] + 1)) - set(ranks)):
            raise CheckpointError(
                f"{found.parent}: {rank_file(absent[0])} is missing, one of {ranks[-1] + 1}"
            )
        files = [
            open_file(found.with_name(rank_file(rank)), allow_pickle=allow_pickle, verify=verify)
            for rank in ranks
        ]
        tensors = files[0] if len(files) == 1 else RankFiles(files, str(found.parent))
        # A model gets all names: those it leaves over must be seen and refused.
        return tensors if part == "model" else Prefixed(tensors, ENGINE_PREFIXES[part])

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
        names_only = Verify("manifest")  # `open` checks the contents
        with open_file(engine, allow_pickle=allow_pickle, verify=names_only) as tensors:
            if any(name.startswith(ENGINE_PREFIXES[part]) for name in tensors):
                return engine
        if part == "text":
            return _text_folder(path)
        for folder in (path, path / "vae"):  # of several files, the one named like an autoencoder
            files = weight_files(folder, (*TORCH, *SAFETENSORS)) if folder.is_dir() else []
            files = [file for file in files if file.name != ENGINE_FILE]
            if len(files) > 1:
                files = [file for file in files if "imagekl" in file.name or "vae" in file.name]
            if len(files) > 1:
                raise CheckpointError(
                    f"{folder}: several autoencoder files, name one of {listing([f.name for f in files])}"
                )
            if files:
                return files[0]
        return None


def _engine_folders(path: Path) -> list[Path]:
    """Folders that hold, or clearly should hold, an engine checkpoint: ``path``, else its sub-folders."""

    def is_engine(folder: Path) -> bool:
        direct = (folder / "latest").is_file() or (folder / ENGINE_FILE).is_file()
        return direct or any(folder.glob(f"*/{ENGINE_FILE}"))

    if is_engine(path):
        return [path]
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and is_engine(folder))


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
    try:
        word = read_bounded(latest, 1 << 12).decode(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{latest}: {error.strerror or error}") from error
    if not re.fullmatch(r"release|0{0,9}[1-9][0-9]{0,17}", word):
        raise CheckpointError(
            f"{latest}: holds {word[:40]!r}, expected an iteration number above 0 or 'release'"
        )
    iteration = folder / (word if word == "release" else str(int(word)))
    if not (iteration / ENGINE_FILE).is_file():
        raise CheckpointError(f"{iteration / ENGINE_FILE}: no such file, but {latest} names it")
    return iteration / ENGINE_FILE


def rank_file(rank: int) -> str:
    """The name of the engine file of a model-parallel rank."""
    return f"mp_rank_{rank:02d}_model_states.pt"


def _text_folder(path: Path) -> Path | None:
    found = sorted(folder for folder in path.iterdir() if folder.is_dir() and _T5.detects(folder))
    if len(found) > 1:
        raise CheckpointError(f"{path}: several T5 folders, name one of {listing([f.name for f in found])}")
    return found[0] if found else None
