"""Read one golden file: safetensors in groups ``w.``, ``in.``, ``mid.``, ``out.``, JSON in the metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor


class GoldenError(ValueError):
    """A golden file that lacks something its kind needs, or of a kind that is not supported."""


class Golden(Mapping[str, Tensor]):
    """Tensors by full name (``in.noise``); floats as float32, which is exact for stored bfloat16."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name.removesuffix(".safetensors")
        try:
            with safe_open(path, "pt") as opened:
                self.metadata: dict[str, str] = dict(opened.metadata() or {})
            self._tensors = load_file(path)
        except Exception as problem:  # safetensors raises its own error class for a damaged file
            raise GoldenError(f"{path}: not a readable safetensors file ({problem})") from problem

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise GoldenError(f"{self.path}: has no tensor {name!r}; it has {sorted(self.names())}")
        tensor = self._tensors[name]
        return tensor.float() if tensor.is_floating_point() else tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def names(self, *prefixes: str) -> list[str]:
        """Names under the prefixes (all but the weights, if none are given), in sorted order."""
        wanted = prefixes or ("in.", "mid.", "out.")
        return sorted(name for name in self._tensors if name.startswith(wanted))

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Weights whose official name starts with ``prefix``, under the name that follows it."""
        start = f"w.{prefix}"
        return {name.removeprefix(start): self[name] for name in self._tensors if name.startswith(start)}

    def json(self, key: str) -> Any:
        """A metadata entry parsed as JSON."""
        if key not in self.metadata:
            raise GoldenError(f"{self.path}: its metadata has no {key!r}; it has {sorted(self.metadata)}")
        return json.loads(self.metadata[key])

    def number(self, key: str, default: float | None = None) -> float:
        """A metadata entry that is a number."""
        return float(default if default is not None and key not in self.metadata else self.json(key))
