"""Adapters in use: on an engine's parts, and folded into a checkpoint as its tensors stream by."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor, nn

from sat.adapters.factors import LayerFactors, weight_change
from sat.adapters.files import Adapter, read
from sat.adapters.lora import attach, merge, names
from sat.adapters.names import Parts
from sat.checkpoint.format import LazyStateDict, Part, View

ADAPTABLE: tuple[Part, ...] = ("model", "text")

_PLAIN = re.compile(r"adapter|adapter_model|pytorch_lora_weights|native|step_\d+|checkpoints")
"""Names of files and folders that tell nothing of their content."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterRef:
    """An adapter file or folder, and its strength."""

    path: Path
    strength: float = 1.0


def load_adapters(parts: Parts, wanted: Sequence[AdapterRef], *, fold: bool = False) -> dict[str, Adapter]:
    """Attach the adapters to ``parts``, each under a name made of its path; ``fold`` merges them at once."""
    found: dict[str, Adapter] = {}
    for item in wanted:
        adapter = read(item.path, parts)
        name = adapter_name(item.path, [*found, *(n for module in parts.values() for n in names(module))])
        for part, module in parts.items():
            if layers := adapter.of(part):
                attach(module, name, layers, strength=item.strength)
        log.info(
            "%s: LoRA of %d layers, rank %d, at strength %g (%s)",
            item.path, len(adapter.layers), adapter.info.rank, item.strength, adapter.layout,
        )  # fmt: skip
        found[name] = adapter
    if fold:
        for module in parts.values():
            merge(module)
    return found


def adapter_name(path: Path, taken: Collection[str] = ()) -> str:
    """A name for the adapter at ``path`` that is not ``taken``: of its file or folder, letters and ``_``."""
    places = (
        place.name.removesuffix(".safetensors") for place in (path.absolute(), *path.absolute().parents)
    )
    stem = next((name for name in places if name and not _PLAIN.fullmatch(name)), "adapter")
    stem = re.sub(r"\W+", "_", stem)
    number = 2
    name = stem
    while name in taken:
        name, number = f"{stem}_{number}", number + 1
    return name


class Merged(View):
    """``inner``, our names, with adapters folded into the weights they change as these are read."""

    def __init__(
        self, inner: LazyStateDict, adapters: Sequence[tuple[dict[str, LayerFactors], float]]
    ) -> None:
        super().__init__(inner)
        self.exact = inner.exact
        self._adapters = [({f"{n}.weight": v for n, v in layers.items()}, s) for layers, s in adapters]

    def __getitem__(self, key: str) -> Tensor:
        weight = self.inner[key]
        changes = [s * weight_change(weight, layers[key]) for layers, s in self._adapters if key in layers]
        if not changes:
            return weight
        return (weight.to(changes[0].dtype) + sum(changes)).to(weight.dtype)


class HasModule(Protocol):
    """A part of a checkpoint that knows the network it belongs to."""

    module: nn.Module


def folded(parts: Mapping[Part, LazyStateDict], wanted: Sequence[AdapterRef]) -> dict[Part, LazyStateDict]:
    """The ``parts`` of a checkpoint with the adapters in their weights; each part knows its ``module``."""
    modules: dict[str, nn.Module] = {
        part: cast(HasModule, parts[part]).module for part in ADAPTABLE if part in parts
    }
    adapters = [(read(item.path, modules), item.strength) for item in wanted]
    return {
        part: Merged(tensors, [(adapter.of(part), strength) for adapter, strength in adapters])
        if part in modules
        else tensors
        for part, tensors in parts.items()
    }
