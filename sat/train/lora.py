"""Training of low-rank factors: everything else is frozen, and the adapter alone is exported."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sat.adapters.factors import (
    AdapterError,
    LayerFactors,
    LinearLike,
    initial_factors,
    row_norms,
    some_norms,
    telling,
)
from sat.adapters.files import NATIVE_FILE, AdapterInfo, Distilled, read
from sat.adapters.lora import Adapted, adapted, attach, base_norms, extract
from sat.adapters.merge import compare_base
from sat.adapters.names import choose
from sat.adapters.tokens import NewWord, WordTable, learn_words, table_of
from sat.adapters.write import write_native
from sat.checkpoint.verify import Verify
from sat.conditioning.conditioner import Conditioner
from sat.config.schema import LoraConfig, TokenConfig, TrainConfig
from sat.kernels.packed import FrozenLinear, freezable, join_gelu
from sat.train.objectives import Objective
from sat.transformer.transformer import Attention, FeedForward

log = logging.getLogger(__name__)

NAME = "trained"
"""Name of the adapter in the model while it is trained."""


def add_lora(objective: Objective, lora: LoraConfig, seed: int, verify: Verify | None = None) -> None:
    """Attach fresh factors to the parts that ``objective`` trains, and freeze all else.

    The factors are drawn from ``seed`` and a layer's name, not from the device or the order; those of an
    adapter to go on from are checked as ``verify`` says.
    """
    parts = {part: module for part, module in objective.parts().items() if part in ("model", "text")}
    if not parts:
        raise AdapterError(
            f"{type(objective).__name__} trains no part that LoRA adapts: set adapters.lora to null"
        )
    objective.requires_grad_(False)
    layers: dict[str, dict[str, LayerFactors]] = {part: {} for part in parts}
    if lora.start is not None:
        found = read(lora.start, parts, verify)
        compare_base(found, parts)
        layers = {part: found.of(part) for part in parts}
        log.info("training goes on from the adapter %s (rank %d)", lora.start, found.info.rank)
    else:
        for name, (linear, rank) in choose(parts, lora.targets, lora.rank, lora.ranks).items():
            part, _, path = name.partition(".")
            layer, count = parts[part].get_submodule(path), linear.parts
            alpha = lora.effective_alpha(rank)
            layers[part][path] = initial_factors(
                cast(LinearLike, layer), [rank] * count, [alpha] * count, f"{seed} {name}",
                base_norms(layer) if lora.dora else None, lora.lokr,
            )  # fmt: skip
    for part, module in parts.items():
        attach(module, NAME, layers[part], dropout=lora.dropout)
    for module in objective.modules():
        if isinstance(module, Adapted) and NAME in module.strengths:
            module.named(NAME).requires_grad_(True)


def add_tokens(
    objective: Objective, conditioner: Conditioner, words: Sequence[TokenConfig], seed: int, *, alone: bool
) -> None:
    """Add new ``words`` to train; ``alone``: all else is frozen, none has low-rank factors."""
    if "text" not in objective.parts():
        raise AdapterError(
            f"{type(objective).__name__} does not train the text encoder, through which words are learned: "
            f"set train.objective.params.train_text=true"
        )
    if alone:
        objective.requires_grad_(False)
    learn_words(conditioner, [NewWord(one.word, one.vectors, one.start) for one in words], seed)
    table = table_of(conditioner.text)[1]
    assert isinstance(table, WordTable), "words were just added"
    table.new.requires_grad_(True)


def unpacked(train: TrainConfig, stage: int) -> list[str]:
    """Settings that keep frozen weights from being packed at ZeRO ``stage``; none: they are."""
    against = {
        "train.pack=false": not train.pack,
        "train.compile": train.compile,
        "train.autocast": train.autocast is not None,
        "train.zero 3, which shares weights out": stage == 3,
    }
    return [name for name, holds in against.items() if holds]


def pack_frozen(parts: Mapping[str, nn.Module]) -> str:
    """Pack frozen weights of attention and feed-forward layers for both passes; a line for the log.

    The plain weights are freed. Layers that :class:`FrozenLinear` cannot replace stay as they are: DoRA reads
    the weight itself in every step, a quantised or split layer has its own product.
    """
    done, left = 0, Counter[str]()
    for owner, name, why in list(_in_blocks(parts)):
        child = owner.get_submodule(name)
        if why:
            left[why] += 1
            continue
        place = (child, "base") if isinstance(child, Adapted) else (owner, name)
        setattr(*place, FrozenLinear(cast(nn.Linear, _base(child))))
        done += 1
    for part in parts.values():
        join_gelu(part)
    others = ", ".join(f"{count} {kind}" for kind, count in left.items())
    if not done:
        why = f": {others}" if others else ""
        return f"frozen weights are not packed (train.pack), as no layer can be here{why}"
    message = f"{done} frozen weights packed for oneDNN, both ways (train.pack)"
    return message + (f"; as they are: {others}" if others else "")


def packed_bytes(parts: Mapping[str, nn.Module]) -> int:
    """Bytes that :func:`pack_frozen` takes beside the weights: a second copy of each packed one."""
    layers = [_base(owner.get_submodule(name)) for owner, name, why in _in_blocks(parts) if not why]
    weights = [cast(nn.Linear, layer).weight for layer in layers]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _in_blocks(parts: Mapping[str, nn.Module]) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, name, reason against packing or "") of the linears in attention and feed-forward layers."""
    for part in parts.values():
        for owner in [m for m in part.modules() if isinstance(m, (Attention, FeedForward))]:
            for name, child in owner.named_children():
                base = _base(child)
                if isinstance(child, Adapted) and any(
                    child.named(a).gain is not None for a in child.strengths
                ):
                    yield owner, name, "DoRA"
                else:
                    yield owner, name, "" if freezable(base) else type(base).__name__


def _base(layer: nn.Module) -> nn.Module:
    return layer.base if isinstance(layer, Adapted) else layer


def _telling(part: nn.Module) -> list[tuple[str, LinearLike]]:
    """Layers under training whose weights' norms are written with the adapter, to tell the base by."""
    layers = {name: module for name, module in adapted(part) if NAME in module.strengths}
    return [(name, cast(LinearLike, layers[name].base)) for name in telling(layers)]


@dataclass(frozen=True)
class AdapterExport:
    """Writes the adapter under training; see :class:`sat.train.checkpoints.Export`.

    ``base`` and ``digests`` describe, part by part, the model it was trained on: the config component and a
    fingerprint of the weights.
    """

    objective: Objective
    lora: LoraConfig
    base: Mapping[str, Any]
    digests: Mapping[str, str | None]
    dtype: torch.dtype
    distilled: Distilled | None = None

    def frozen(self) -> dict[str, Tensor]:
        """Weights of the model that DoRA's magnitudes are relative to, and those that tell it from others."""
        names = {id(parameter): name for name, parameter in self.objective.named_parameters()}
        bases = [
            module.weight
            for module in self.objective.modules()
            if isinstance(module, Adapted) and NAME in module.strengths
            if module.named(NAME).gain is not None
        ]
        bases += [base.weight for part in self.objective.parts().values() for _, base in _telling(part)]
        return {names[id(weight)]: weight for weight in bases if id(weight) in names}

    def __call__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write ``folder/adapter.safetensors`` from ``weights``: tensors by their name in the objective."""
        names = {id(parameter): name for name, parameter in self.objective.named_parameters()}

        def value(parameter: nn.Parameter) -> Tensor:
            return weights.get(names.get(id(parameter), ""), parameter.detach()).cpu()

        layers = {
            f"{part}.{name}": layer
            for part, module in self.objective.parts().items()
            for name, layer in extract(module, NAME, value).items()
        }
        used = {name.partition(".")[0] for name in layers}
        about = AdapterInfo(
            *self._shape(layers),
            {part: component for part, component in self.base.items() if part in used},
            {part: digest for part, digest in self.digests.items() if part in used},
            {
                part: {
                    name: some_norms(row_norms(value(cast(nn.Parameter, base.weight))))
                    for name, base in bases
                }
                for part, module in self.objective.parts().items()
                if (bases := _telling(module))
            },
            self.distilled,
        )
        folder.mkdir(parents=True)
        write_native(folder / NATIVE_FILE, layers, about, self.dtype)

    def _shape(self, layers: Mapping[str, LayerFactors]) -> tuple[int, float, tuple[str, ...], bool]:
        """Rank, alpha, targets and use of DoRA: the config's, or those of the adapter it started from."""
        lora = self.lora
        if lora.start is None:
            return lora.rank, lora.effective_alpha(lora.rank), tuple(lora.targets), lora.dora
        pairs = [pair for layer in layers.values() for pair in layer.parts if pair is not None]
        (rank, alpha), _ = Counter((pair.rank, pair.alpha) for pair in pairs).most_common(1)[0]
        dora = any(layer.magnitude is not None for layer in layers.values())
        return rank, alpha, tuple(layers), dora
