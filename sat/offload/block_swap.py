"""Offloading of an engine's parts to host memory while sampling, whole or group by group of their blocks.

Weights do not change while sampling, so nothing is ever copied back: to offload a tensor is to point it at
the host's copy again. Results are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sat.checkpoint.format import PARTS, Part
from sat.engine import DiffusionEngine
from sat.mixins.adaln import AdaLN
from sat.mixins.cross_attention import CrossAttention, CrossLayer
from sat.transformer import Transformer

ALIGNMENT = 256
"""Bytes; every tensor in a packed buffer begins at a multiple of them."""
BUFFERS = 2
"""Device buffers of a :class:`BlockSwap`: one for the group that runs, one for the next."""

BlockGroup = Sequence[nn.Module]
"""Modules that run one after the other; the first of them begins and ends the group."""


class Placement(Protocol):
    """Section ``memory`` of a config: where each part waits while others work."""

    @property
    def text_encoder(self) -> str: ...  # noqa: D102
    @property
    def network(self) -> str: ...  # noqa: D102
    @property
    def first_stage(self) -> str: ...  # noqa: D102
    @property
    def adaln(self) -> str: ...  # noqa: D102


# -- copies between host and device


@dataclass(eq=False)
class DeviceBuffer:
    """Device memory, uint8, that holds one group at a time, with the events of its last copy and use."""

    memory: Tensor
    copied: Any = None
    free: Any = None


class TransferStream(Protocol):
    """Copies from host memory to a device, ordered against what is computed there."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """Host memory from which the device reads fast, uint8."""
        ...

    def device_buffer(self, nbytes: int) -> DeviceBuffer:
        """Device memory of the same size."""
        ...

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` on the device, ready for what is computed next."""
        ...

    def prefetch(self, buffer: DeviceBuffer, source: Tensor, at: int = 0) -> None:
        """Start to copy ``source`` into ``buffer`` from byte ``at`` on, once the buffer is free."""
        ...

    def wait_copied(self, buffer: DeviceBuffer) -> None:
        """Let everything computed from now on wait for the copy into ``buffer``."""
        ...

    def mark_free(self, buffer: DeviceBuffer) -> None:
        """Let the next copy into ``buffer`` wait for everything computed so far."""
        ...


class DeviceStream:
    """Transfer stream of an accelerator: pinned host memory, and copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        self._copies = self._module.Stream(device)

    def host_buffer(self, nbytes: int) -> Tensor:
        """Pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def device_buffer(self, nbytes: int) -> DeviceBuffer:
        """Memory that copies enter only after its previous owner's work is done."""
        buffer = DeviceBuffer(torch.empty(nbytes, dtype=torch.uint8, device=self.device))
        self._copies.wait_stream(self._module.current_stream(self.device))
        return buffer

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copied on the computing stream."""
        return tensor.to(self.device, non_blocking=True)

    def prefetch(self, buffer: DeviceBuffer, source: Tensor, at: int = 0) -> None:
        """Copied on the transfer stream, after the event of the buffer's last use."""
        with self._module.stream(self._copies):
            if buffer.free is not None:
                self._copies.wait_event(buffer.free)
            buffer.memory[at : at + len(source)].copy_(source, non_blocking=True)
            buffer.copied = self._copies.record_event()

    def wait_copied(self, buffer: DeviceBuffer) -> None:
        """The device waits; the host goes on."""
        self._module.current_stream(self.device).wait_event(buffer.copied)

    def mark_free(self, buffer: DeviceBuffer) -> None:
        """Records an event on the computing stream."""
        buffer.free = self._module.current_stream(self.device).record_event()


LARGEST, SMALLEST = 1 << 30, 1 << 20
"""Bytes of the blocks of a host arena."""


class HostArena:
    """Host memory of a part, in few blocks of powers of two: torch's pinned memory is rounded up to these.

    ``total``: bytes that will be taken, alignment included. ``nbytes``: bytes of the blocks so far, which are
    made when they are needed.
    """

    def __init__(self, total: int, allocate: Callable[[int], Tensor]) -> None:
        self._left, self._allocate = total, allocate
        self._blocks: list[Tensor] = []
        self._used: list[int] = []

    @property
    def nbytes(self) -> int:  # noqa: D102
        return sum(map(len, self._blocks))

    def take(self, tensor: Tensor) -> tuple[int, int]:
        """The block and the byte in it from which ``tensor`` may lie: the first that it fits into."""
        size = _aligned(tensor)
        fits = (i for i, used in enumerate(self._used) if used + size <= len(self._blocks[i]))
        if (index := next(fits, None)) is None:
            below = 1 << max(self._left.bit_length() - 1, 0)  # most of what is left, and nothing over
            wanted = max(min(below, LARGEST), SMALLEST, 1 << (size - 1).bit_length() if size else 1)
            index = len(self._blocks)
            self._blocks.append(self._allocate(wanted))
            self._used.append(0)
        begin = self._used[index]
        self._used[index] += size
        self._left -= size
        return index, begin

    def block(self, index: int) -> Tensor:
        """A block, uint8."""
        return self._blocks[index]

    def keep(self, tensor: Tensor) -> tuple[int, int]:
        """Move ``tensor`` into the arena, as it lies in memory; returns its place."""
        index, begin = self.take(tensor)
        view = _typed(self._blocks[index][begin:], tensor)
        view.copy_(tensor.data)
        tensor.data = view
        return index, begin


def _typed(memory: Tensor, like: Tensor) -> Tensor:
    """The beginning of ``memory``, uint8, as a tensor of the type, shape and layout of ``like``."""
    flat = memory[: like.nbytes].view(like.dtype)
    reach = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
    return flat.as_strided(like.shape, like.stride()) if reach == like.numel() else flat.view(like.shape)


# -- blocks that are on the device only while they run


class _PackedGroup:
    """Tensors of a group, packed into a host arena that they point at while they do not run.

    ``pieces``: (host memory, byte of the device's buffer) of each copy that brings the group there.
    """

    def __init__(self, group: BlockGroup, arena: HostArena) -> None:
        self._tensors = list(tensors(group))
        self._offsets: list[int] = []
        self.nbytes = 0
        runs: list[list[int]] = []  # block, its byte, the device's byte, length
        for tensor in self._tensors:
            block, begin = arena.keep(tensor)
            size = _aligned(tensor)
            if runs and runs[-1][0] == block and runs[-1][1] + runs[-1][3] == begin:
                runs[-1][3] += size
            else:
                runs.append([block, begin, self.nbytes, size])
            self._offsets.append(self.nbytes)
            self.nbytes += size
        self._host_views = [tensor.data for tensor in self._tensors]
        self.pieces = [(arena.block(i)[begin : begin + size], at) for i, begin, at, size in runs]

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors as they lie in ``buffer``."""
        return [_typed(buffer[at:], t) for at, t in zip(self._offsets, self._tensors, strict=True)]

    def point_at(self, views: Sequence[Tensor] | None = None) -> None:
        """Point the modules' tensors at ``views``, by default at those of the host."""
        for tensor, view in zip(self._tensors, views or self._host_views, strict=True):
            tensor.data = view


class BlockSwap:
    """Keeps groups of blocks in host memory and prefetches the next group while the current one runs.

    Two device buffers, each as large as the largest group, hold the weights. Groups should run in order, over
    and over; one out of order is copied when it is due. ``arena``: of the whole part; None makes one.
    """

    def __init__(
        self, groups: Sequence[BlockGroup], stream: TransferStream, arena: HostArena | None = None
    ) -> None:
        self._stream = stream
        arena = arena or HostArena(
            sum(map(_aligned, tensors(m for group in groups for m in group))), stream.host_buffer
        )
        self._packed = [_PackedGroup(group, arena) for group in groups]
        self._count = min(BUFFERS, len(groups))
        self._buffers: list[DeviceBuffer] = []
        self._views: dict[tuple[int, int], list[Tensor]] = {}  # (group, buffer) -> its tensors there
        self._holds: dict[int, int] = {}  # buffer -> group that it holds, or waits for
        self._buffer = 0  # of the group that runs, or ran last
        for index, group in enumerate(groups):
            group[0].register_forward_pre_hook(lambda *_, index=index: self._begin(index))
            group[0].register_forward_hook(lambda *_, index=index: self._end(index), always_call=True)

    def close(self) -> None:
        """Give the device buffers back until the next group runs."""
        for index in self._holds:  # a copy on its way must not write into memory that others get
            self._stream.wait_copied(self._buffers[index])
            self._stream.mark_free(self._buffers[index])
        self._buffers, self._views, self._holds = [], {}, {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def _begin(self, group: int) -> None:
        """Wait for the group's weights, and prefetch the next group's."""
        index = next((index for index, held in self._holds.items() if held == group), None)
        if index is None:
            index = self._prefetch(group, (self._buffer + 1) % self._count)
        self._buffer = index
        self._stream.wait_copied(self._buffers[index])
        if (group, index) not in self._views:
            self._views[group, index] = self._packed[group].views(self._buffers[index].memory)
        self._packed[group].point_at(self._views[group, index])
        following = (group + 1) % len(self._packed)
        if following not in self._holds.values():
            self._prefetch(following, (index + 1) % self._count)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _end(self, group: int) -> None:
        """Release the buffer of a group that has run."""
        self._stream.mark_free(self._buffers[self._buffer])
        self._packed[group].point_at()

    def _prefetch(self, group: int, index: int) -> int:
        if not self._buffers:
            largest = max(packed.nbytes for packed in self._packed)
            self._buffers = [self._stream.device_buffer(largest) for _ in range(self._count)]
        for source, at in self._packed[group].pieces:
            self._stream.prefetch(self._buffers[index], source, at)
        self._holds[index] = group
        return index


# -- parts that are on the device only in their stage


class OffloadedPart:
    """A part that is on the device from ``onload`` to ``offload``; ``swapped`` groups only while they run.

    ``stays``: once loaded it remains on the device, and the host keeps no copy.
    """

    def __init__(
        self,
        module: nn.Module,
        stream: TransferStream,
        swapped: Sequence[Sequence[BlockGroup]] = (),
        *,
        stays: bool = False,
    ) -> None:
        self._stream, self._stays = stream, stays
        waiting = _waiting(module, swapped, stays)
        arena = HostArena(sum(map(_aligned, waiting)), stream.host_buffer)
        self._swaps = [BlockSwap(groups, stream, arena) for groups in swapped]
        apart = _swapped_tensors(swapped)
        self._tensors = [tensor for tensor in tensors([module]) if id(tensor) not in apart]
        for tensor in self._tensors if not stays else ():
            arena.keep(tensor)
        self._host = [tensor.data for tensor in self._tensors]
        self.on_device = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def onload(self) -> None:
        """Copy the weights to the device."""
        if self.on_device:
            return
        for index, (tensor, host) in enumerate(zip(self._tensors, self._host, strict=True)):
            tensor.data = self._stream.to_device(host)
            if self._stays:
                self._host[index] = tensor.data
        self.on_device = True

    def offload(self) -> None:
        """Give the device's memory back."""
        if self._stays or not self.on_device:
            return
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host
        for swap in self._swaps:
            swap.close()
        self.on_device = False


class OffloadSchedule:
    """Keeps the part of the current stage on the device, and the other ``offloaded`` parts off it."""

    def __init__(self, offloaded: Mapping[Part, OffloadedPart]) -> None:
        self._offloaded = dict(offloaded)

    def enter(self, part: Part) -> None:
        """Offload other parts, then onload ``part``; a part that is never offloaded is there anyway."""
        for name, other in self._offloaded.items():
            if name != part:
                other.offload()
        if part in self._offloaded:
            self._offloaded[part].onload()

    def drop(self, part: Part) -> None:
        """Forget a part that is needed no more."""
        self._offloaded.pop(part, None)


def offload_schedule(
    engine: DiffusionEngine, memory: Placement, device: torch.device, stream: TransferStream | None = None
) -> OffloadSchedule | None:
    """Offload the parts of ``engine`` that ``memory`` asks for; None where it asks for none.

    :func:`offloaded_parts` must be in host memory. ``stream`` None is the device's own; with one, parts are
    offloaded on any device, the CPU included.
    """
    names = offloaded_parts(memory, device if stream is None else None)
    if not names:
        return None
    stream = stream or DeviceStream(device)
    offloaded: dict[Part, OffloadedPart] = {}
    for part, module in parts(engine).items():
        if part in names:
            stays = part == "model" and memory.network == "keep"
            offloaded[part] = OffloadedPart(module, stream, swap_groups(module, memory, part), stays=stays)
    return OffloadSchedule(offloaded)


def parts(engine: DiffusionEngine) -> dict[Part, nn.Module]:
    """Modules of an engine that can be offloaded."""
    return {"text": engine.conditioner.text, "model": engine.network, "first_stage": engine.first_stage}


def offloaded_parts(memory: Placement, device: torch.device | None = None) -> frozenset[Part]:
    """Parts to build in host memory for a run on ``device`` (None: any accelerator); on the CPU none."""
    if device is not None and device.type == torch.device("cpu").type:
        return frozenset()
    waits = {
        "text": memory.text_encoder in ("cpu", "blocks"),
        # A text encoder that is freed has gone before the network is loaded.
        "model": memory.network != "keep" or memory.adaln == "cpu" or memory.text_encoder == "free",
        "first_stage": memory.first_stage == "cpu",
    }
    return frozenset(part for part in PARTS if waits[part])


def swap_groups(module: nn.Module, memory: Placement, part: Part) -> list[list[BlockGroup]]:
    """Groups of ``module`` that ``memory`` has swapped, one list for each :class:`BlockSwap`, in run order.

    The blocks of all transformers, each with its cross-attention's queries and output; the cross-attention's
    keys and values, which run once per image; and the modulation layers (adaLN), which do so too.
    """
    blocks = {"text": memory.text_encoder, "model": memory.network}.get(part) == "blocks"
    found: list[list[BlockGroup]] = [[], [], []]
    for transformer in [m for m in module.modules() if isinstance(m, Transformer)] if blocks else []:
        crossed = [
            layer
            for mixin in transformer.mixins.values()
            if isinstance(mixin, CrossAttention)
            for layer in mixin.layers
            if isinstance(layer, CrossLayer)
        ]
        beside = [[layer.norm, layer.q, layer.proj] for layer in crossed] or [[]] * len(transformer.blocks)
        found[0] += [[block, *rest] for block, rest in zip(transformer.blocks, beside, strict=True)]
        found[1] += [[layer.kv] for layer in crossed]
    if blocks or (part == "model" and memory.adaln == "cpu"):
        found[2] = [[layer] for m in module.modules() if isinstance(m, AdaLN) for layer in m.layers]
    return [groups for groups in found if groups]


def tensors(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    """Parameters and buffers of ``modules``, each once."""
    found = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return found.values()


def resident_bytes(module: nn.Module, swapped: Sequence[Sequence[BlockGroup]]) -> int:
    """Bytes of ``module`` on the device while it works, the buffers of its ``swapped`` groups included."""
    apart = _swapped_tensors(swapped)
    rest = sum(t.nbytes for t in tensors([module]) if id(t) not in apart)
    largest = [max(sum(map(_aligned, tensors(group))) for group in groups) for groups in swapped]
    return rest + sum(min(BUFFERS, len(groups)) * most for groups, most in zip(swapped, largest, strict=True))


def host_bytes(module: nn.Module, swapped: Sequence[Sequence[BlockGroup]], *, stays: bool) -> int:
    """Page-locked host memory of an :class:`OffloadedPart`."""
    waiting = _waiting(module, swapped, stays)
    empty = partial(torch.empty, dtype=torch.uint8, device="meta")
    arena = HostArena(sum(map(_aligned, waiting)), empty)
    for tensor in waiting:
        arena.take(tensor)
    return arena.nbytes


def _waiting(module: nn.Module, swapped: Sequence[Sequence[BlockGroup]], stays: bool) -> list[Tensor]:
    """Tensors that the host keeps: those of swapped groups, and unless the part stays all others."""
    groups = [*tensors(module for groups in swapped for group in groups for module in group)]
    known = {id(tensor) for tensor in groups}
    return groups + [t for t in tensors([module]) if not stays and id(t) not in known]


def _swapped_tensors(swapped: Sequence[Sequence[BlockGroup]]) -> set[int]:
    """Ids of the tensors in swapped groups."""
    return {id(t) for groups in swapped for group in groups for t in tensors(group)}


def _aligned(tensor: Tensor) -> int:
    """Bytes of ``tensor``, rounded up to the alignment."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
