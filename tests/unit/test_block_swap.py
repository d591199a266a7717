"""Parts and blocks that wait on the host give the same results, in the order that hides their copies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sat.config.build import build_engine, components
from sat.config.schema import MemoryConfig
from sat.kernels.quantize import Quantizer, Scheme
from sat.offload.block_swap import (
    BlockSwap,
    DeviceBuffer,
    OffloadedPart,
    offload_schedule,
    offloaded_parts,
    resident_bytes,
    swap_groups,
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
    waiting: dict[int, Tensor] = field(default_factory=dict)
    buffers: list[DeviceBuffer] = field(default_factory=list)
    busy: set[int] = field(default_factory=set)
    on_device: int = 0
    onloaded: list[Tensor] = field(default_factory=list)

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

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

    def prefetch(self, buffer: DeviceBuffer, source: Tensor) -> None:
        number = self.buffers.index(buffer)
        assert number not in self.busy, "the group in this buffer still runs"
        buffer.memory.fill_(255)
        self.waiting[number] = source
        self.said.append(f"prefetch {number}")

    def wait_copied(self, buffer: DeviceBuffer) -> None:
        number = self.buffers.index(buffer)
        if number in self.waiting:
            source = self.waiting.pop(number)
            buffer.memory[: len(source)] = source
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
