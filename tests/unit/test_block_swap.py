"""Parts and blocks that wait on the host give the same results, in the order that hides their copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sat.config.build import build_engine, components
from sat.config.schema import MemoryConfig
from sat.kernels.quantize import Quantizer, Scheme
from sat.models.cogview3_plus import CogView3Plus
from sat.models.t5 import T5Encoder
from sat.offload.block_swap import (
    BlockSwap,
    DeviceBuffer,
    DeviceStream,
    OffloadedPart,
    host_bytes,
    offload_schedule,
    offloaded_parts,
    resident_bytes,
    swap_groups,
    tensors,
)
from sat.sampling.generator import Generator, ImageRng, SamplingParams
from tests.adapters import output, t5, unet
from tests.checkpoints import tokenizer as written
from tests.configs import debug
from tests.small import plus
from tests.tolerances import EXACT

BLOCKS = MemoryConfig(text_encoder="free", network="blocks")
MODELS = {"plus": plus, "unet": unet, "t5": t5}


@dataclass
class Recorder:
    """A transfer stream to a device that is more of the host's memory: copies wait until they are waited for.

    A buffer is wiped when it is prefetched into, and a copy that overtakes the use of its buffer is an error.
    """

    said: list[str] = field(default_factory=list)
    waiting: dict[int, list[tuple[Tensor, int]]] = field(default_factory=dict)
    buffers: list[DeviceBuffer] = field(default_factory=list)
    busy: set[int] = field(default_factory=set)
    on_device: int = 0
    onloaded: list[Tensor] = field(default_factory=list)

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def device_buffer(self, nbytes: int) -> DeviceBuffer:
        self.on_device += nbytes
        self.buffers.append(
            DeviceBuffer(torch.full((nbytes,), 255, dtype=torch.uint8))
        )  # NaN in every floating type
        return self.buffers[-1]

    def to_device(self, tensor: Tensor) -> Tensor:
        self.onloaded.append(tensor.clone())
        return self.onloaded[-1]

    def prefetch(self, buffer: DeviceBuffer, source: Tensor, at: int = 0) -> None:
        number = self.buffers.index(buffer)
        assert number not in self.busy, "the group in this buffer still runs"
        if at == 0:
            buffer.memory.fill_(255)
            self.waiting[number] = []
        self.waiting[number].append((source, at))
        if at:
            return
        self.said.append(f"prefetch {number}")

    def wait_copied(self, buffer: DeviceBuffer) -> None:
        number = self.buffers.index(buffer)
        for source, at in self.waiting.pop(number, []):
            buffer.memory[at : at + len(source)] = source
        self.busy.add(number)
        self.said.append(f"copied {number}")

    def mark_free(self, buffer: DeviceBuffer) -> None:
        self.busy.discard(self.buffers.index(buffer))
        self.said.append(f"free {self.buffers.index(buffer)}")


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_swapped_blocks_compute_the_same(name: str, quantise: bool) -> None:
    model = MODELS[name]()
    if quantise:
        Quantizer("any", Scheme("int8"), ["*"])(model)
    plain = [output(model), output(model)]
    stream = Recorder()
    groups = swap_groups(model, BLOCKS, "model")
    kept = resident_bytes(model, groups)
    part = OffloadedPart(model, stream, groups)
    part.onload()
    assert [(output(model) - before).abs().max().item() for before in plain] == [EXACT, EXACT]
    there = stream.on_device + sum(t.numel() * t.element_size() for t in stream.onloaded)
    assert there == kept
    part.offload()
    assert not any(torch.isnan(p).any() for p in model.parameters() if p.is_floating_point())
    part.onload()
    assert (output(model) - plain[0]).abs().max() == EXACT


def test_the_next_group_is_prefetched_while_one_runs() -> None:
    layers = [nn.Linear(3, 3) for _ in range(3)]
    stream = Recorder()
    BlockSwap([[layer] for layer in layers], stream)
    x = torch.ones(1, 3)
    with torch.inference_mode():
        for layer in (*layers, *layers):
            x = layer(x)
    said = " ".join(stream.said)
    assert said.startswith("prefetch 1 copied 1 prefetch 0 free 1 copied 0 prefetch 1 free 0")
    groups = said.split("free")
    assert len(groups) == 7 and all("prefetch" in group for group in groups[:-1])  # before its end
    assert said.count("prefetch") == 7  # one a group, and the first


def test_a_group_out_of_order_is_copied_when_it_is_due() -> None:
    layers = [nn.Linear(3, 3) for _ in range(4)]
    want = [layer(torch.ones(1, 3)).detach() for layer in layers]
    BlockSwap([[layer] for layer in layers], Recorder())
    for number in (2, 0, 3, 3, 1, 2):
        assert torch.equal(layers[number](torch.ones(1, 3)), want[number])


def test_a_group_that_fails_is_back_on_the_host() -> None:
    layers = [nn.Linear(3, 3) for _ in range(3)]
    home = [layer.weight.detach().clone() for layer in layers]
    stream = Recorder()
    BlockSwap([[layer] for layer in layers], stream)
    with pytest.raises(RuntimeError):
        layers[1](torch.ones(1, 5))
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, home, strict=True))
    assert not stream.busy


def test_host_memory_comes_in_few_blocks_of_powers_of_two_and_little_over() -> None:
    with torch.device("meta"):
        published = {"model": CogView3Plus(), "text": T5Encoder()}
    for part, model in published.items():
        asked = sum(t.nbytes for t in tensors([model.bfloat16()]))
        for how in ("cpu", "blocks"):
            memory = MemoryConfig(network=how, text_encoder=how)
            taken = host_bytes(model, swap_groups(model, memory, part), stays=False)
            assert asked < taken < 1.03 * asked, (part, how)
    made: list[int] = []
    layers = nn.Sequential(*(nn.Linear(300, 700) for _ in range(9)))
    layers[4].weight.data = layers[4].weight.data.t().contiguous().t()  # of another layout
    before = copy.deepcopy(layers)
    stream = Recorder()
    stream.host_buffer = lambda nbytes: made.append(nbytes) or torch.empty(nbytes, dtype=torch.uint8)
    part = OffloadedPart(layers, stream, [[[layer] for layer in layers[:4]]])
    assert len(made) <= 4 and all(size.bit_count() == 1 for size in made)
    assert layers[4].weight.stride() == (1, 700)
    part.onload()
    assert all(torch.equal(a, b) for a, b in zip(layers.parameters(), before.parameters(), strict=True))


class Streams(TorchDispatchMode):
    """Streams of a device, on the CPU: computing is done at once, copies ``late``, when waited for."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late, self.clock, self.waited, self.transfers = late, 0, 0, False
        self.queue: list[Callable[[], object]] = []
        self.freed: dict[int, int] = {}  # a buffer's memory -> when its last use was over
        streams = self

        class Stream:
            def __init__(self, device: object = None, *, copies: bool = True) -> None:
                self.copies = copies

            def record_event(self) -> tuple[bool, int]:
                streams.clock += 1
                return self.copies, len(streams.queue) if self.copies else streams.clock

            def wait_event(self, event: tuple[bool, int]) -> None:
                of_copies, place = event
                if self.copies:
                    assert not of_copies
                    streams.waited = max(streams.waited, place)
                elif of_copies:
                    streams.run(place)

            def wait_stream(self, other: Stream) -> None:
                streams.waited = streams.clock

        @contextmanager
        def entered(stream: Stream) -> Iterator[None]:
            streams.transfers = stream.copies
            yield
            streams.transfers = False

        computing = Stream(copies=False)
        self.module = SimpleNamespace(Stream=Stream, stream=entered, current_stream=lambda device: computing)

    def run(self, count: int) -> None:
        """Do the first ``count`` copies."""
        for place in range(count):
            self.queue[place]()
            self.queue[place] = lambda: None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if not (self.transfers and func is torch.ops.aten.copy_.default):
            out = func(*args, **kwargs)
            return out.fill_(255) if func is torch.ops.aten.empty.memory_format else out
        memory = args[0].untyped_storage().data_ptr()
        assert self.waited >= self.freed.get(memory, 0), "a copy into memory that is in use"
        self.queue.append(partial(func, *args))
        if not self.late:
            self.run(len(self.queue))
        return args[0]


class Careless(DeviceStream):
    """A stream whose blocks do not wait for their weights, or whose copies do not wait for the blocks."""

    def __init__(self, waits_copied: bool, waits_free: bool) -> None:
        super().__init__(torch.device("cpu"))
        self.waits_copied, self.waits_free = waits_copied, waits_free

    def wait_copied(self, buffer: DeviceBuffer) -> None:
        if self.waits_copied:
            super().wait_copied(buffer)

    def prefetch(self, buffer: DeviceBuffer, source: Tensor, at: int = 0) -> None:
        if not self.waits_free:
            buffer.free = None
        super().prefetch(buffer, source, at)

    def mark_free(self, buffer: DeviceBuffer) -> None:
        super().mark_free(buffer)
        _streams[-1].freed[buffer.memory.untyped_storage().data_ptr()] = buffer.free[1]


_streams: list[Streams] = []


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("name", ["plus", "unet"])
def test_no_block_runs_on_weights_that_have_not_arrived(
    name: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = MODELS[name](), MODELS[name]()
    want, streams = output(plain), Streams(late)
    _streams.append(streams)
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams.module)
    with streams:
        part = OffloadedPart(model, Careless(True, True), swap_groups(model, BLOCKS, "model"))
        for _ in range(2):
            part.onload()
            assert (output(model) - want).abs().max() == EXACT
            assert (output(model) - want).abs().max() == EXACT
            part.offload()
    assert len(streams.queue) >= 8


@pytest.mark.parametrize("waits", [(False, True), (True, False)])
def test_a_stream_that_does_not_wait_is_caught(waits: tuple[bool, bool], monkeypatch) -> None:
    model = unet()  # of more blocks than buffers
    want, streams = output(model), Streams(late=True)
    _streams.append(streams)
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams.module)
    with streams:
        part = OffloadedPart(model, Careless(*waits), swap_groups(model, BLOCKS, "model"))
        part.onload()
        if waits[0]:
            with pytest.raises(AssertionError, match="memory that is in use"):
                output(model)
        else:
            assert (output(model) - want).abs().max() != EXACT


def test_every_block_has_a_group_and_nothing_else_does() -> None:
    blocks = {n.rpartition(".")[0] for n, _ in plus().named_modules() if n.endswith(".attn")}
    assert [len(groups) for groups in swap_groups(plus(), BLOCKS, "model")] == [len(blocks), 2]  # 2 of adaLN
    count = len([n for n, _ in unet().named_modules() if n.endswith(".attn")])
    assert [len(groups) for groups in swap_groups(unet(), BLOCKS, "model")] == [
        count,
        count,
    ]  # keys and values


# ---------------------------------------------------------------------- in a run


def generator(
    tokenizer: Path, *overrides: str, stream: Recorder | None = None
) -> tuple[Generator, SamplingParams]:
    experiment = debug(f"conditioning.tokenizer={tokenizer}", "checkpoint.random=0", *overrides)
    engine = build_engine(experiment, device="cpu", dtype=torch.float32)
    engine.conditioner.moves_encoder = False
    sampling, memory = experiment.sampling, experiment.memory
    made = Generator(
        engine, components(experiment).sampler, device=torch.device("cpu"), text_memory=memory.text_encoder
    )
    if stream is not None:
        made.offload = offload_schedule(engine, memory, torch.device("cpu"), stream)
    return made, SamplingParams(sampling.height, sampling.width, 3, components(experiment).guider)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


WAYS = [
    ["memory.text_encoder=cpu", "memory.network=cpu", "memory.first_stage=cpu"],
    ["memory.text_encoder=blocks", "memory.network=blocks"],
    ["memory.text_encoder=free", "memory.adaln=cpu"],
]


def pictures(made: Generator, params: SamplingParams) -> list[bytes]:
    shape = made.engine.latent_shape(params.height, params.width)
    encoded = made.encode(["a red apple", "a blue bird"])
    rngs = [ImageRng.of(0, [i], shape) for i in range(2)]
    return [
        image.tobytes()
        for one, rng in zip(encoded, rngs, strict=True)
        for image in made.images(made.latents(one, rng, params))
    ]


@pytest.mark.parametrize("ways", WAYS)
def test_pictures_are_the_same_wherever_parts_wait(ways: list[str], tokenizer: Path) -> None:
    plain = pictures(*generator(tokenizer))
    stream = Recorder()
    made, params = generator(tokenizer, *ways, stream=stream)
    assert pictures(made, params) == plain
    assert stream.onloaded or stream.said


def test_only_the_part_whose_stage_it_is_is_on_the_device(tokenizer: Path) -> None:
    made, _ = generator(tokenizer, *WAYS[0], stream=Recorder())
    offloaded = made.offload._offloaded
    for part in ("text", "model", "first_stage", "model"):
        made.offload.enter(part)  # type: ignore[arg-type]
        assert [name for name, one in offloaded.items() if one.on_device] == [part]


def test_a_network_that_stays_comes_once_the_text_encoder_has_gone(tokenizer: Path) -> None:
    made, params = generator(tokenizer, "memory.text_encoder=free", stream=Recorder())
    part = made.offload._offloaded["model"]
    made.encode(["a red apple"])
    assert not part.on_device
    made.offload.enter("model")
    made.offload.enter("first_stage")
    assert part.on_device


def test_on_the_cpu_nothing_waits() -> None:
    memory = debug("memory.network=blocks", "memory.text_encoder=cpu").memory
    assert offloaded_parts(memory, torch.device("cpu")) == frozenset()
    assert offloaded_parts(memory, torch.device("meta")) == {"model", "text"}
