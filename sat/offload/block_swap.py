"""Parts of an engine, or single blocks of them, that wait in host memory and come to the device to work.

Weights do not change while sampling, so nothing is ever copied back: leaving means pointing at the host's
copy again. Results are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sat.checkpoint.format import PARTS, Part
from sat.engine import DiffusionEngine
from sat.mixins.adaln import AdaLN
from sat.mixins.cross_attention import CrossAttention, CrossLayer
from sat.transformer import Transformer

ALIGNED = 256
"""Bytes that tensors in a packed buffer start at multiples of."""
SLOTS = 2
"""Turns of a carousel on the device at a time: the one that runs and the next."""

Turn = Sequence[nn.Module]
"""Modules that run together; the first of them begins and ends it."""


class Placing(Protocol):
    """Where parts are while others work, as the config's section ``memory`` says it."""

    @property
    def text_encoder(self) -> str: ...  # noqa: D102
    @property
    def network(self) -> str: ...  # noqa: D102
    @property
    def first_stage(self) -> str: ...  # noqa: D102
    @property
    def adaln(self) -> str: ...  # noqa: D102


@dataclass(eq=False)
class Slot:
    """Device memory, uint8, that turns come into, with the lane's own notes of what to wait for."""

    memory: Tensor
    arrived: Any = None
    free: Any = None


class Lane(Protocol):
    """The way from host memory to a device, and the order of copies and computing on it."""

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in host memory from which the device reads fast."""
        ...

    def host(self, nbytes: int) -> Tensor:
        """As much of such memory, as uint8."""
        ...

    def slot(self, nbytes: int) -> Slot:
        """As much memory of the device."""
        ...

    def bring(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` on the device, for whatever is computed there next."""
        ...

    def fetch(self, slot: Slot, source: Tensor) -> None:
        """Copy ``source`` to the slot's beginning beside what is computed, but not before it is free."""
        ...

    def arrived(self, slot: Slot) -> None:
        """What is computed from now on waits for the copy into ``slot``."""
        ...

    def used(self, slot: Slot) -> None:
        """``slot`` is free when what has been asked of the device so far is computed."""
        ...


class Streams:
    """A lane of an accelerator: pinned memory, and a stream of its own for copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on = torch.get_device_module(device)
        self._copies = self._on.Stream(device)

    def keep(self, tensor: Tensor) -> Tensor:
        """A pinned copy."""
        return tensor.cpu().pin_memory()

    def host(self, nbytes: int) -> Tensor:
        """Pinned."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def slot(self, nbytes: int) -> Slot:
        """The copies' stream waits for whatever used this memory before."""
        made = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._copies.wait_stream(self._on.current_stream(self.device))
        return Slot(made)

    def bring(self, tensor: Tensor) -> Tensor:
        """On the stream that computes."""
        return tensor.to(self.device, non_blocking=True)

    def fetch(self, slot: Slot, source: Tensor) -> None:
        """On the copies' stream, once the event of the slot's last use has come."""
        with self._on.stream(self._copies):
            if slot.free is not None:
                self._copies.wait_event(slot.free)
            slot.memory[: len(source)].copy_(source, non_blocking=True)
            slot.arrived = self._copies.record_event()

    def arrived(self, slot: Slot) -> None:
        """Waits on the device, not here."""
        self._on.current_stream(self.device).wait_event(slot.arrived)

    def used(self, slot: Slot) -> None:
        """Records an event."""
        slot.free = self._on.current_stream(self.device).record_event()


class Packed:
    """The tensors of some modules, one after the other in one piece of host memory, which they point at."""

    def __init__(self, modules: Turn, lane: Lane) -> None:
        self._tensors = list(tensors(modules))
        self._places: list[int] = []
        self.nbytes = 0
        for tensor in self._tensors:
            self._places.append(self.nbytes)
            self.nbytes += -(-_bytes(tensor) // ALIGNED) * ALIGNED
        self.host = lane.host(self.nbytes)
        self._home = self.views(self.host)
        for tensor, home in zip(self._tensors, self._home, strict=True):
            home.copy_(tensor.data)
            tensor.data = home

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors as they lie in ``buffer``."""
        return [
            buffer[place : place + _bytes(tensor)].view(tensor.dtype).view(tensor.shape)
            for place, tensor in zip(self._places, self._tensors, strict=True)
        ]

    def point(self, views: Sequence[Tensor] | None = None) -> None:
        """Have the modules' tensors be ``views``; None is the host's."""
        for tensor, view in zip(self._tensors, self._home if views is None else views, strict=True):
            tensor.data = view


class Carousel:
    """Turns whose weights are on the device only while they run, the next one's arriving meanwhile.

    Two slots of device memory, each as large as the largest turn, take them in. The turns should run in
    order, over and over; one out of order is fetched when it is due.
    """

    def __init__(self, turns: Sequence[Turn], lane: Lane) -> None:
        self._lane = lane
        self._packed = [Packed(turn, lane) for turn in turns]
        self._count = min(SLOTS, len(turns))
        self._slots: list[Slot] = []
        self._views: dict[tuple[int, int], list[Tensor]] = {}  # (turn, slot) -> its tensors there
        self._holds: dict[int, int] = {}  # slot -> the turn whose weights are there, or on their way
        self._slot = 0  # of the turn that runs, or ran last
        for number, turn in enumerate(turns):
            turn[0].register_forward_pre_hook(_hook(self._begin, number))
            turn[0].register_forward_hook(_hook(self._end, number), always_call=True)

    def close(self) -> None:
        """Give the slots back until the next turn."""
        for number in self._holds:  # a copy on its way must not write into what others get
            self._lane.arrived(self._slots[number])
            self._lane.used(self._slots[number])
        self._slots, self._views, self._holds = [], {}, {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def _begin(self, number: int) -> None:
        """Wait for the turn's weights, and send for the next one's."""
        slot = next((slot for slot, held in self._holds.items() if held == number), None)
        if slot is None:
            slot = self._send(number, (self._slot + 1) % self._count)
        self._slot = slot
        self._lane.arrived(self._slots[slot])
        packed, key = self._packed[number], (number, slot)
        if key not in self._views:
            self._views[key] = packed.views(self._slots[slot].memory)
        packed.point(self._views[key])
        following = (number + 1) % len(self._packed)
        if following not in self._holds.values():
            self._send(following, (slot + 1) % self._count)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _end(self, number: int) -> None:
        """The weights may go."""
        self._lane.used(self._slots[self._slot])
        self._packed[number].point()

    def _send(self, number: int, slot: int) -> int:
        if not self._slots:
            largest = max(packed.nbytes for packed in self._packed)
            self._slots = [self._lane.slot(largest) for _ in range(self._count)]
        self._lane.fetch(self._slots[slot], self._packed[number].host)
        self._holds[slot] = number
        return slot


def _hook(act: Callable[[int], None], number: int) -> Callable[..., None]:
    def hook(*_: object) -> None:
        act(number)

    return hook


class Guest:
    """A part that is on the device only from ``arrive`` to ``leave``, apart from what ``carousels`` turn.

    ``stays``: once there it does not leave, and the host keeps nothing.
    """

    def __init__(
        self, module: nn.Module, lane: Lane, carousels: Sequence[Sequence[Turn]] = (), *, stays: bool = False
    ) -> None:
        self._lane, self._stays = lane, stays
        turned = {id(t) for turns in carousels for turn in turns for t in tensors(turn)}
        self._carousels = [Carousel(turns, lane) for turns in carousels]
        self._tensors = [tensor for tensor in tensors([module]) if id(tensor) not in turned]
        self._home: list[Tensor] = []
        for tensor in self._tensors:
            if not stays:
                tensor.data = lane.keep(tensor.data)
            self._home.append(tensor.data)
        self.there = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def arrive(self) -> None:
        """Be on the device."""
        if self.there:
            return
        for number, (tensor, home) in enumerate(zip(self._tensors, self._home, strict=True)):
            tensor.data = self._lane.bring(home)
            if self._stays:
                self._home[number] = tensor.data
        self.there = True

    def leave(self) -> None:
        """Give the device's memory back."""
        if self._stays or not self.there:
            return
        for tensor, home in zip(self._tensors, self._home, strict=True):
            tensor.data = home
        for carousel in self._carousels:
            carousel.close()
        self.there = False


class Stages:
    """Which of the ``guests`` is on the device: the one whose stage it is, and those that stay."""

    def __init__(self, guests: Mapping[Part, Guest] | None = None) -> None:
        self._guests = dict(guests or {})

    def enter(self, part: Part) -> None:
        """Others leave, ``part`` arrives; whatever is no guest is there anyway."""
        for name, guest in self._guests.items():
            if name != part:
                guest.leave()
        if part in self._guests:
            self._guests[part].arrive()

    def drop(self, part: Part) -> None:
        """Forget a guest that is needed no more."""
        self._guests.pop(part, None)


def stages(
    engine: DiffusionEngine, memory: Placing, device: torch.device, lane: Lane | None = None
) -> Stages:
    """The guests that ``memory`` asks for, of an engine whose :func:`hosted` parts are in host memory.

    ``lane`` None is the device's own; with one, parts are guests on any device.
    """
    there = hosted(memory, device) if lane is None else _waiting(memory)
    if not there:
        return Stages()
    lane = lane or Streams(device)
    guests = {}
    for part, module in parts(engine).items():
        if part in there:
            guests[part] = Guest(module, lane, turned(module, memory, part), stays=stays(memory, part))
    return Stages(guests)


def parts(engine: DiffusionEngine) -> dict[Part, nn.Module]:
    """The modules of an engine that can be guests."""
    return {"text": engine.conditioner.text, "model": engine.network, "first_stage": engine.first_stage}


def hosted(memory: Placing, device: torch.device) -> frozenset[Part]:
    """Parts that begin in host memory, none where that is the device's."""
    return frozenset() if device.type == torch.device("cpu").type else _waiting(memory)


def _waiting(memory: Placing) -> frozenset[Part]:
    """A text encoder that is freed has gone before the network comes."""
    waits = {
        "text": memory.text_encoder in ("cpu", "blocks"),
        "model": memory.network != "keep" or memory.adaln == "cpu" or memory.text_encoder == "free",
        "first_stage": memory.first_stage == "cpu",
    }
    return frozenset(part for part in PARTS if waits[part])


def stays(memory: Placing, part: Part) -> bool:
    """Whether ``part``, once on the device, does not leave it."""
    return part == "model" and memory.network == "keep"


def turned(module: nn.Module, memory: Placing, part: Part) -> list[list[Turn]]:
    """The carousels of a part."""
    blocks = {"text": memory.text_encoder, "model": memory.network}.get(part) == "blocks"
    return carousels(module, blocks=blocks, adaln=part == "model" and memory.adaln == "cpu")


def tensors(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    """Parameters and buffers of ``modules``, each once."""
    found = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return found.values()


def block_turns(part: nn.Module) -> list[Turn]:
    """The blocks of all transformers of ``part`` in the order they run, each with its cross-attention."""
    turns: list[Turn] = []
    for transformer in _transformers(part):
        crossed = _cross_layers(transformer)
        beside = [[layer.norm, layer.q, layer.proj] for layer in crossed] or [[]] * len(transformer.blocks)
        turns += [[block, *others] for block, others in zip(transformer.blocks, beside, strict=True)]
    return turns


def key_turns(part: nn.Module) -> list[Turn]:
    """The projections of the text to keys and values, which run once per image."""
    return [[layer.kv] for transformer in _transformers(part) for layer in _cross_layers(transformer)]


def adaln_turns(part: nn.Module) -> list[Turn]:
    """The modulation layers, which run once per image."""
    return [[layer] for module in part.modules() if isinstance(module, AdaLN) for layer in module.layers]


def _transformers(part: nn.Module) -> list[Transformer]:
    return [module for module in part.modules() if isinstance(module, Transformer)]


def _cross_layers(transformer: Transformer) -> list[CrossLayer]:
    mixins = [mixin for mixin in transformer.mixins.values() if isinstance(mixin, CrossAttention)]
    return [layer for mixin in mixins for layer in mixin.layers if isinstance(layer, CrossLayer)]


def carousels(part: nn.Module, *, blocks: bool, adaln: bool) -> list[list[Turn]]:
    """What of ``part`` comes to the device turn by turn."""
    made = [block_turns(part), key_turns(part)] if blocks else []
    made += [adaln_turns(part)] if blocks or adaln else []
    return [turns for turns in made if turns]


def resident(part: nn.Module, found: Sequence[Sequence[Turn]]) -> int:
    """Bytes that ``part`` takes on the device while it works, ``found`` of it in carousels."""
    turned = {id(t): t for turns in found for turn in turns for t in tensors(turn)}
    rest = sum(_bytes(t) for t in tensors([part]) if id(t) not in turned)
    return rest + sum(min(SLOTS, len(turns)) * max(map(_packed_bytes, turns)) for turns in found)


def _packed_bytes(turn: Turn) -> int:
    return sum(-(-_bytes(t) // ALIGNED) * ALIGNED for t in tensors(turn))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
