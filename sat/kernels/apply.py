"""What makes a loaded model sample faster and leaves what it computes as it is, put on from outside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sat.kernels import attention as kernels
from sat.kernels.compile import compile_blocks, pack, replayed
from sat.mixins.cross_attention import CrossAttention
from sat.mixins.qk_norm import QKNorm
from sat.mixins.rope import RoPE
from sat.models.cogview3_plus import CogView3Plus
from sat.parallel.sequence import SequenceParallel
from sat.transformer import Transformer

if TYPE_CHECKING:
    from sat.engine import DiffusionEngine

FOLD_FROM = 512
"""Tokens from which two passes without the repeated ones are faster than one with them (on two cores)."""


@dataclass(frozen=True)
class Speed:
    """What to use (docs/performance.md); the fields are those of the config's ``sampling``."""

    attention: kernels.Backend = "auto"
    pack: bool = True
    fold: bool = True
    compile: bool = False
    graphs: bool = False


def quicken(engine: DiffusionEngine, speed: Speed, device: torch.device | None = None) -> str:
    """Apply ``speed`` to a loaded engine, for inference alone; what was chosen, in words for the log.

    Raises ``ValueError`` for the impossible.

    ``device``: where the network runs, if it waits elsewhere (:mod:`sat.offload.block_swap`).
    """
    if engine.first_stage.dtype != torch.float32:
        channels_last(engine.first_stage)
    return quicken_network(engine.network, speed, device)


def quicken_network(network: nn.Module, speed: Speed, device: torch.device | None = None) -> str:
    """Apply ``speed`` to a network. Packed weights cannot be compiled: ``compile`` goes before ``pack``."""
    device = device or next(network.parameters()).device
    said = [f"attention: {use_kernel(network, speed.attention, device)}"]
    if isinstance(network, CogView3Plus):
        here = speed.fold and device.type == "cpu"  # elsewhere two smaller passes were not measured
        network.fold = FOLD_FROM if here else None
    if speed.compile:
        said.append(f"{compiled(network)} blocks compiled, which the first step of a size waits for")
    elif speed.pack and device.type == "cpu" and (count := pack(network)):
        said.append(f"{count} weights packed for oneDNN")
    if speed.graphs:
        whole = getattr(network, "transformer", None)
        if not isinstance(whole, Transformer):
            raise ValueError(
                f"sampling.graphs records a transformer's pass, and {type(network).__name__} is not one "
                f"transformer: set it to false"
            )
        replayed(whole, device)
        said.append("CUDA graphs")
    return ", ".join(said)


def channels_last(module: nn.Module) -> None:
    """Lay convolution weights out channels last; the maps between them follow."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def compiled(network: nn.Module) -> int:
    """Compile the blocks of every transformer in ``network`` when they first run; how many there are."""
    count = 0
    for transformer in transformers(network):
        compile_blocks(transformer, alike=layers_alike(transformer))
        count += len(transformer.blocks)
    return count


def use_kernel(network: nn.Module, name: kernels.Backend, device: torch.device | None = None) -> str:
    """Let every transformer in ``network`` attend with the kernel ``name``; what was chosen.

    ``device``: as in :func:`quicken`.
    """
    chosen = []
    for transformer in transformers(network):
        weight = next(transformer.parameters())
        kernel, title = kernels.choose(
            name, device or weight.device, weight.dtype, largest_logit(transformer)
        )
        transformer.kernel = kernel
        for mixin in transformer.mixins.values():
            if isinstance(mixin, CrossAttention):
                mixin.kernel = kernel
        chosen.append(title)
    return ", ".join(dict.fromkeys(chosen)) or "none"


def transformers(network: nn.Module) -> Iterator[Transformer]:
    """All transformers in ``network``: itself or one inside, or the many of a UNet."""
    return (module for module in network.modules() if isinstance(module, Transformer))


def layers_alike(transformer: Transformer) -> bool:
    """Whether no hook inside a block looks at the layer's number; modulations come from outside."""
    owners = transformer.resolved.owners
    known = all(
        type(_owner(transformer, hook)) in (QKNorm, RoPE, type(None)) for hook in ("norm_qk", "rotate_qk")
    )
    plain = all(owners[hook] == ("default",) for hook in ("attend", "cross"))
    return known and plain and len(owners["norm_qk"]) == len(owners["rotate_qk"]) == 1


def largest_logit(transformer: Transformer) -> float | None:
    """The largest attention logit possible, or None where nothing bounds it.

    Layer norm without weights leaves q and k no longer than sqrt(d), and rotating keeps that: their product
    is at most d, times the scale. Anything else that touches q and k takes the promise away.
    """
    norm, rotation = _owner(transformer, "norm_qk"), _owner(transformer, "rotate_qk")
    if type(norm) is not QKNorm or type(rotation) not in (RoPE, type(None)):
        return None
    owners = transformer.resolved.owners
    others = {type(dict(transformer.mixins)[name]) for name in owners["attend"] if name != "default"}
    if len(owners["norm_qk"]) > 1 or len(owners["rotate_qk"]) > 1 or others - {SequenceParallel}:
        return None
    size = int(norm.norm.normalized_shape[0])
    return size * (transformer.spec.scale or 1 / math.sqrt(size))


def _owner(transformer: Transformer, hook: str) -> nn.Module | None:
    """The mixin that replaces ``hook``; None for the default."""
    name = transformer.resolved.owners[hook][-1]
    return dict(transformer.mixins).get(name)
