"""Parts and blocks that wait on the host give the same results, in the order that hides their copies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sat.config.build import build_engine, build_guider, build_sampler
from sat.kernels.quantize import Quantizer, Scheme
from sat.offload.block_swap import (
    Carousel,
    Guest,
    Slot,
    adaln_turns,
    block_turns,
    carousels,
    hosted,
    resident,
    stages,
)
from sat.sampling.generator import Generator, SamplingParams
from sat.util.rng import ImageRng
from tests.adapters import output, t5, unet
from tests.checkpoints import tokenizer as written
from tests.configs import debug
from tests.small import plus
from tests.tolerances import EXACT

MODELS = {"plus": plus, "unet": unet, "t5": t5}


@dataclass
class Recorder:
    """A lane to a device that is more of the host's memory: copies wait until they are waited for.

    What a slot held is wiped when it is fetched into, and a copy that overtakes its slot's use is an error.
    """

    said: list[str] = field(default_factory=list)
    waiting: dict[int, Tensor] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    busy: set[int] = field(default_factory=set)
    on_device: int = 0
    brought: list[Tensor] = field(default_factory=list)

    def keep(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def slot(self, nbytes: int) -> Slot:
        self.on_device += nbytes
        self.slots.append(Slot(torch.full((nbytes,), 255, dtype=torch.uint8)))  # NaN in every floating type
        return self.slots[-1]

    def bring(self, tensor: Tensor) -> Tensor:
        self.brought.append(tensor.clone())
        return self.brought[-1]

    def fetch(self, slot: Slot, source: Tensor) -> None:
        number = self.slots.index(slot)
        assert number not in self.busy, "the turn in this slot is not over"
        slot.memory.fill_(255)
        self.waiting[number] = source
        self.said.append(f"fetch {number}")

    def arrived(self, slot: Slot) -> None:
        number = self.slots.index(slot)
        if number in self.waiting:
            source = self.waiting.pop(number)
            slot.memory[: len(source)] = source
        self.busy.add(number)
        self.said.append(f"arrived {number}")

    def used(self, slot: Slot) -> None:
        self.busy.discard(self.slots.index(slot))
        self.said.append(f"used {self.slots.index(slot)}")


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_that_come_in_turn_compute_the_same(name: str, quantise: bool) -> None:
    model = MODELS[name]()
    if quantise:
        Quantizer("any", Scheme("int8"), ["*"])(model)
    plain = [output(model), output(model)]
    lane = Recorder()
    found = carousels(model, blocks=True, adaln=True)
    kept = resident(model, found)
    guest = Guest(model, lane, found)
    guest.arrive()
    assert [(output(model) - before).abs().max().item() for before in plain] == [EXACT, EXACT]
    there = lane.on_device + sum(t.numel() * t.element_size() for t in lane.brought)
    assert there == kept
    guest.leave()
    assert not any(torch.isnan(p).any() for p in model.parameters() if p.is_floating_point())
    guest.arrive()
    assert (output(model) - plain[0]).abs().max() == EXACT


def test_the_next_turn_is_sent_for_while_one_runs() -> None:
    layers = [nn.Linear(3, 3) for _ in range(3)]
    lane = Recorder()
    Carousel([[layer] for layer in layers], lane)
    x = torch.ones(1, 3)
    with torch.inference_mode():
        for layer in (*layers, *layers):
            x = layer(x)
    said = " ".join(lane.said)
    assert said.startswith("fetch 1 arrived 1 fetch 0 used 1 arrived 0 fetch 1 used 0")
    turns = said.split("used")
    assert len(turns) == 7 and all("fetch" in turn for turn in turns[:-1])  # the next one's, before its end
    assert said.count("fetch") == 7  # one a turn, and the first


def test_a_turn_out_of_order_is_fetched_when_it_is_due() -> None:
    layers = [nn.Linear(3, 3) for _ in range(4)]
    want = [layer(torch.ones(1, 3)).detach() for layer in layers]
    Carousel([[layer] for layer in layers], Recorder())
    for number in (2, 0, 3, 3, 1, 2):
        assert torch.equal(layers[number](torch.ones(1, 3)), want[number])


def test_a_turn_that_fails_leaves_its_weights_at_home() -> None:
    layers = [nn.Linear(3, 3) for _ in range(3)]
    home = [layer.weight.detach().clone() for layer in layers]
    lane = Recorder()
    Carousel([[layer] for layer in layers], lane)
    with pytest.raises(RuntimeError):
        layers[1](torch.ones(1, 5))
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, home, strict=True))
    assert not lane.busy


def test_every_block_has_a_turn_and_nothing_else_does() -> None:
    blocks = {n.rpartition(".")[0] for n, _ in plus().named_modules() if n.endswith(".attn")}
    assert len(block_turns(plus())) == len(blocks) and len(adaln_turns(plus())) == 2
    assert len(block_turns(unet())) == len([n for n, _ in unet().named_modules() if n.endswith(".attn")])
    assert not adaln_turns(unet())


# ---------------------------------------------------------------------- in a run


def generator(
    tokenizer: Path, *overrides: str, lane: Recorder | None = None
) -> tuple[Generator, SamplingParams]:
    experiment = debug(f"conditioning.tokenizer={tokenizer}", "checkpoint.random=0", *overrides)
    engine = build_engine(experiment, device="cpu", dtype=torch.float32)
    engine.conditioner.follows = False
    sampling, memory = experiment.sampling, experiment.memory
    made = Generator(
        engine, build_sampler(experiment), device=torch.device("cpu"), text_memory=memory.text_encoder
    )
    if lane is not None:
        made.stages = stages(engine, memory, torch.device("cpu"), lane)
    return made, SamplingParams(sampling.height, sampling.width, 3, build_guider(experiment))


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
    lane = Recorder()
    made, params = generator(tokenizer, *ways, lane=lane)
    assert pictures(made, params) == plain
    assert lane.brought or lane.said


def test_only_the_part_whose_stage_it_is_is_on_the_device(tokenizer: Path) -> None:
    made, _ = generator(tokenizer, *WAYS[0], lane=Recorder())
    guests = made.stages._guests
    for part in ("text", "model", "first_stage", "model"):
        made.stages.enter(part)  # type: ignore[arg-type]
        assert [name for name, guest in guests.items() if guest.there] == [part]


def test_a_network_that_stays_comes_once_the_text_encoder_has_gone(tokenizer: Path) -> None:
    made, params = generator(tokenizer, "memory.text_encoder=free", lane=Recorder())
    guest = made.stages._guests["model"]
    made.encode(["a red apple"])
    assert not guest.there
    made.stages.enter("model")
    made.stages.enter("first_stage")
    assert guest.there


def test_on_the_cpu_nothing_waits() -> None:
    memory = debug("memory.network=blocks", "memory.text_encoder=cpu").memory
    assert hosted(memory, torch.device("cpu")) == frozenset()
    assert hosted(memory, torch.device("meta")) == {"model", "text"}
