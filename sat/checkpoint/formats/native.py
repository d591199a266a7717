"""The native format: a manifest, safetensors shards under our own names, the tokenizer.

DIR/manifest.json             format, version, files of each part, the config sections the weights belong to
DIR/model.safetensors         or model-00001-of-00003.safetensors …; likewise first_stage and text
DIR/tokenizer/spiece.model
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat.checkpoint.files import open_shards, read_json
from sat.checkpoint.format import PARTS, CheckpointError, LazyStateDict, Part

MANIFEST = "manifest.json"
FORMAT = "cogview3-native"
VERSION = 1


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

    def open(self, path: Path, part: Part, *, allow_pickle: bool = False) -> LazyStateDict:
        """The tensors of ``part``; files must be there in the size that was written."""
        self.locate(path, part)
        try:
            files = {
                str(entry["name"]): int(entry["bytes"])
                for entry in self.manifest(path)["parts"][part]["files"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path / MANIFEST}: the file list of {part} is damaged ({error})"
            ) from error
        for name, size in files.items():
            if (path / name).is_file() and (path / name).stat().st_size != size:
                there = (path / name).stat().st_size
                state = "truncated" if there < size else "not the file that was written"
                raise CheckpointError(
                    f"{path / name}: {state}: {there:,} bytes, {size:,} in the manifest; copy it again"
                )
        return open_shards(path, list(files))

    def config(self, path: Path) -> Mapping[str, Any]:
        """The config sections in the manifest."""
        config: dict[str, Any] = self.manifest(path).get("config", {})
        return config

    def tokenizer(self, path: Path) -> Path | None:
        """``tokenizer/spiece.model``."""
        file = path / "tokenizer" / "spiece.model"
        return file if file.is_file() else None
