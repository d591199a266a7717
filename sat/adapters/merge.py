"""Adapters in use: on an engine's parts, and folded into a checkpoint as its tensors stream by."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor, nn

from sat.adapters.factors import LinearLike, finite_cast, row_norms, some_norms, weight_change
from sat.adapters.files import Adapter, read
from sat.adapters.lora import adapted, attach, base_norms, merge, names
from sat.adapters.names import Parts
from sat.checkpoint.format import LazyStateDict, Part, View
from sat.checkpoint.verify import Verify
from sat.kernels.quantize import QuantizedLinear

ADAPTABLE: tuple[Part, ...] = ("model", "text")

_PLAIN = re.compile(r"adapter|adapter_model|pytorch_lora_weights|native|step_\d+|checkpoints")
"""Names of files and folders that tell nothing of their content."""

_SAME = 0.002
"""Relative difference of norms up to which weights are the same: bf16 makes a tenth of it."""
_ROUNDED: dict[str, float] = {"int8": 0.06, "int4": 0.5}
"""More of it for weights of few bits, over the square root of a row's length."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterRef:
    """An adapter file or folder, and its strength."""

    path: Path
    strength: float = 1.0


def load_adapters(
    parts: Parts, wanted: Sequence[AdapterRef], *, fold: bool = False, verify: Verify | None = None
) -> dict[str, Adapter]:
    """Attach the adapters to ``parts``, each under a name made of its path; ``fold`` merges them at once.

    Files are checked as ``verify`` says; weights other than those an adapter was trained on get a notice.
    """
    found: dict[str, Adapter] = {}
    for item in wanted:
        adapter = read(item.path, parts, verify)
        compare_base(adapter, parts)
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


def compare_base(adapter: Adapter, parts: Parts) -> None:
    """Log a notice where ``parts`` hold other weights than ``adapter`` was trained on.

    Of parts that are split every tensor rank calls it. Nothing is compared on the meta device.
    """
    for part, module in parts.items():
        compare_norms(adapter.source, adapter.info.norms.get(part, {}), module)


def compare_norms(source: str, trained: Mapping[str, Sequence[float]], module: nn.Module) -> None:
    """The same for the norms of weights by layer that the file ``source`` says it was trained beside."""
    for name, norms in trained.items():
        if (layer := dict(adapted(module)).get(name)) is not None:
            base = layer.base
        elif name in dict(module.named_modules()):
            base = module.get_submodule(name)
        else:
            continue
        if cast(LinearLike, base).weight.is_meta:
            continue
        most = _SAME
        if isinstance(base, QuantizedLinear):
            most += _ROUNDED[base.scheme.kind] / math.sqrt(base.in_features)
        if _tell_other(source, name, norms, base_norms(base), most):
            break


def _tell_other(source: str, name: str, trained: Sequence[float], norms: Tensor, most: float = _SAME) -> bool:
    """Log a notice if the rows' ``norms`` (O,) of a weight are not ``trained``; true if they are not."""
    here = some_norms(norms)
    apart = max((abs(a - b) / max(abs(a), 1e-12) for a, b in zip(trained, here, strict=False)), default=0.0)
    other = len(here) != len(trained) or apart > most
    if other:
        log.warning(
            "%s: was trained on other weights of the same shapes: rows of %r are up to %.2g %% longer or "
            "shorter here; its effect may be another", source, name, 100 * apart,
        )  # fmt: skip
    return other


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

    def __init__(self, inner: LazyStateDict, adapters: Sequence[tuple[Adapter, float]], part: str) -> None:
        super().__init__(inner)
        self.exact = inner.exact
        self._adapters = [
            ({f"{n}.weight": v for n, v in adapter.of(part).items()}, s) for adapter, s in adapters
        ]
        self._told = {
            (f"{name}.weight", adapter.source): (adapter, norms)
            for adapter, _ in adapters
            for name, norms in adapter.info.norms.get(part, {}).items()
        }

    def __getitem__(self, key: str) -> Tensor:
        weight = self.inner[key]
        changes = [s * weight_change(weight, layers[key]) for layers, s in self._adapters if key in layers]
        if not changes:
            return weight
        for at in [at for at in self._told if at[0] == key]:
            adapter, norms = self._told.pop(at)
            if _tell_other(adapter.source, key.removesuffix(".weight"), norms, row_norms(weight)):
                self._told = {k: v for k, v in self._told.items() if k[1] != adapter.source}
        return finite_cast(weight.to(changes[0].dtype) + sum(changes), weight.dtype, key)


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
        part: Merged(tensors, adapters, part) if part in modules else tensors
        for part, tensors in parts.items()
    }
