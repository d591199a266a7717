"""Speed of a loaded model, put on from outside; the numbers stay what they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sat.kernels import attention as kernels
from sat.kernels.compile import compile_blocks, replayed
from sat.kernels.folding import FOLD_FROM, fold
from sat.kernels.packed import pack
from sat.mixins.joint_attention import JointAttention
from sat.mixins.qk_norm import QKNorm
from sat.mixins.rope import RoPE
from sat.parallel.sequence import SequenceParallel
from sat.transformer import Transformer

if TYPE_CHECKING:
    from sat.engine import DiffusionEngine


@dataclass(frozen=True)
class Speed:
    """Choices of docs/performance.md; the fields are those of the config's ``sampling``."""

    attention: kernels.Backend = "auto"
    pack: bool = True
    fold: bool = True
    compile: bool = False
    graphs: bool = False


def quicken(engine: DiffusionEngine, speed: Speed, device: torch.device | None = None) -> str:
    """Apply ``speed`` to a loaded engine, for inference alone; returns the choices in words for the log.

    The last thing to be put on an engine: after adapters and parallelism. ``device``: where the network runs,
    if it waits elsewhere (:mod:`sat.offload.block_swap`). Raises ``ValueError`` for the impossible.
    """
    if engine.first_stage.dtype != torch.float32:
        channels_last(engine.first_stage)
    return quicken_network(engine.network, speed, device)


def quicken_network(network: nn.Module, speed: Speed, device: torch.device | None = None) -> str:
    """Apply ``speed`` to a network. Packed weights cannot be compiled: ``compile`` goes before ``pack``."""
    device = device or next(network.parameters()).device
    message = [f"attention: {use_kernel(network, speed.attention, device)}"]
    if speed.compile:
        message.append(f"{compiled(network)} blocks compiled, which the first step of a size waits for")
    elif speed.pack and device.type == "cpu" and (count := pack(network)):
        message.append(f"{count} weights packed for oneDNN")
    if speed.graphs:
        whole = getattr(network, "transformer", None)
        if not isinstance(whole, Transformer):
            raise ValueError(
                f"sampling.graphs records a transformer's pass, and {type(network).__name__} is not one "
                f"transformer: set it to false"
            )
        replayed(whole, device)
        message.append("CUDA graphs")
    if speed.fold and device.type == "cpu":  # elsewhere two smaller passes were not measured
        fold(network, FOLD_FROM)
    return ", ".join(message)


def channels_last(module: nn.Module) -> None:
    """Lay convolution weights out channels last; the maps between them follow."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def compiled(network: nn.Module) -> int:
    """Compile the blocks of every transformer in ``network`` when they first run; returns their number."""
    count = 0
    for transformer in transformers(network):
        compile_blocks(transformer, alike=layers_alike(transformer))
        count += len(transformer.blocks)
    return count


def use_kernel(network: nn.Module, name: kernels.Backend, device: torch.device | None = None) -> str:
    """Let every transformer in ``network`` attend with the kernel ``name``; returns the choice for the log.

    ``device``: as in :func:`quicken`.
    """
    chosen = []
    for transformer in transformers(network):
        weight = next(transformer.parameters())
        kernel, title = kernels.choose(
            name, device or weight.device, weight.dtype, largest_logit(transformer)
        )
        kernels.put_kernel(transformer, kernel)
        chosen.append(title)
    return ", ".join(dict.fromkeys(chosen)) or "none"


def transformers(network: nn.Module) -> list[Transformer]:
    """All transformers in ``network``: itself or one inside, or the many of a UNet."""
    return [module for module in network.modules() if isinstance(module, Transformer)]


def layers_alike(transformer: Transformer) -> bool:
    """True if no hook inside a block looks at the layer's number; modulations come from outside."""
    owners = transformer.resolved.owners
    return owners["cross"] == ("default",) and plain_heads(transformer)


def largest_logit(transformer: Transformer) -> float | None:
    """The largest attention logit possible, or None where nothing bounds it.

    Layer norm without weights leaves q and k no longer than sqrt(d), and rotating keeps that: their product
    is at most d, times the scale. Anything else that touches q and k takes the promise away.
    """
    norm = dict(transformer.mixins.items()).get(transformer.resolved.owners["norm_qk"][-1])
    if not isinstance(norm, QKNorm) or not plain_heads(transformer):
        return None
    size = int(norm.norm.normalized_shape[0])
    return size * (transformer.spec.scale or 1 / math.sqrt(size))


def plain_heads(transformer: Transformer) -> bool:
    """True if q and k are at most normalised and rotated, and attention is that of all layers alike."""
    owners, mixins = transformer.resolved.owners, dict(transformer.mixins.items())

    def kinds(hook: str) -> list[type]:
        return [type(mixins.get(name)) for name in owners[hook]]

    return (
        kinds("norm_qk") in ([QKNorm], [type(None)])
        and kinds("rotate_qk") in ([RoPE], [type(None)])
        and {*kinds("attend")} <= {JointAttention, SequenceParallel, kernels.AttentionKernel, type(None)}
    )
