"""What a training run will take, found before anything is loaded: memory of each rank, tokens, FLOPs.

Sizes are those of the tensors that the run will make: the engine and the objective are built without data and
one micro-batch goes through them (:mod:`sat.estimate.trace`). What the optimizer side takes is DeepSpeed's
arithmetic (0.19, ``runtime/zero/stage_1_and_2.py``), written out below. All numbers are bytes unless a name
says otherwise. P are the trained parameters of a rank, N the ranks that share out their optimizer state. Of a
team (``parallel.tensor``, ``sequence``) the first rank is measured, with its share of weights and tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sat.checkpoint.format import DTYPES, Part
from sat.conditioning.conditioner import Tokens
from sat.config.build import build_shapes
from sat.config.component import build
from sat.config.schema import DataConfig, Experiment, OffloadConfig, TrainConfig
from sat.config.targets import resolve
from sat.data.batch import Batch
from sat.data.loader import AHEAD
from sat.engine import DiffusionEngine
from sat.estimate.trace import Ledger, Trace, trace
from sat.kernels.compile import recompute
from sat.kernels.packed import packable
from sat.parallel.mesh import Mesh, fake_group
from sat.parallel.sequence import apply_sequence
from sat.parallel.tensor import apply_sharding
from sat.sharding import family_sharding
from sat.tokenizers import T5Tokenizer
from sat.train import optim
from sat.train.data import bucket_rule, spare_parts
from sat.train.lora import add_lora, packed_bytes, unpacked
from sat.train.objectives import Objective

BUCKET = 500_000_000
"""Elements of the buffer that DeepSpeed gathers gradients in (``reduce_bucket_size``)."""
LIVE = 1_000_000_000
"""Elements that ZeRO 3 may have gathered at a time (``stage3_max_live_parameters``)."""
FULL = 4
"""Bytes of a float32."""
PACKED = "packed for the backward pass"
"""What the second copy of frozen weights is called; at ZeRO 3 there is none."""


@dataclass(frozen=True)
class Weights:
    """Bytes of what a rank holds; ``frozen`` by part, the tables of trained parts included."""

    trained: int
    trained_elements: int
    frozen: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return self.trained + sum(self.frozen.values())


@dataclass(frozen=True)
class Measured:
    """What running one micro-batch without data showed; nothing in it depends on ranks or the ZeRO stage."""

    weights: Weights
    trace: Trace
    batch: int  # bytes of the data of a micro-batch, which are in the trace too
    size: tuple[int, int]  # pixels
    image_tokens: int  # of one image: patches, or latent cells of a network without patches
    text_tokens: int


@dataclass(frozen=True)
class State:
    """Bytes that an optimizer keeps and needs while it steps, for each trained element."""

    kept: float
    passing: float


@dataclass(frozen=True)
class Phase:
    """The most memory of a part of a step, beside what is always there."""

    name: str
    extra: int


@dataclass(frozen=True)
class Estimate:
    """The memory of one of ``ranks`` ranks, of which ``tensor`` share the weights; see the module."""

    measured: Measured
    state: State
    ranks: int
    zero: int
    accumulate: int
    batch_size: int
    averaged: bool
    host: bool  # on the CPU: unwritten memory takes none; batches and checkpoints are there too
    waiting: int  # batches that are read ahead
    offload: OffloadConfig = OffloadConfig()
    tensor: int = 1

    @property
    def sharing(self) -> int:
        """Ranks with the same weights, which share out their optimizer state: N."""
        return self.ranks // self.tensor

    @property
    def stepped_away(self) -> bool:
        """Whether the optimizer is not in the device's memory."""
        return self.offload.optimizer and self.zero > 0 and not self.host

    @property
    def away(self) -> int:
        """What offloading has in the CPU's memory, while the device is a GPU."""
        optimizer = self.masters + self.optimizer + self.average + FULL * self.share  # and its gradients
        return (optimizer if self.stepped_away else 0) + self._weights_away

    @property
    def _weights_away(self) -> int:
        if not self.offload.parameters or self.zero < 3 or self.host:
            return 0
        return self.measured.weights.trained // self.sharing

    @property
    def gradient(self) -> int:
        """Bytes of one element of a gradient: that of its weight."""
        weights = self.measured.weights
        return max(1, round(weights.trained / max(1, weights.trained_elements)))

    @property
    def share(self) -> int:
        """Elements whose optimizer state is on this rank: P / N, at ZeRO 0 all."""
        elements = self.measured.weights.trained_elements
        return elements if self.zero == 0 else -(-elements // self.sharing)

    @property
    def weights(self) -> Weights:
        """At ZeRO 3 shared out, with what may be gathered at a time."""
        whole = self.measured.weights
        if self.zero < 3:
            return whole
        network = whole.trained + whole.frozen.get("network", 0)
        gathered = min(network, LIVE * self.gradient)
        kept = {name: size for name, size in whole.frozen.items() if name != PACKED}
        frozen = {k: v // self.sharing if k == "network" else v for k, v in kept.items()}
        return Weights(whole.trained // self.sharing + gathered, whole.trained_elements, frozen)

    @property
    def masters(self) -> int:
        """Float32 copies of the weights; at ZeRO 0 the weights are float32 themselves."""
        return 0 if self.zero == 0 else FULL * self.share

    @property
    def optimizer(self) -> int:
        """What the optimizer keeps."""
        return int(self.state.kept * self.share)

    @property
    def average(self) -> int:
        """The moving average of the weights, float32."""
        return FULL * self.share if self.averaged else 0

    @property
    def lasting(self) -> int:
        """What is there throughout."""
        weights = self.weights.total - self._weights_away
        if self.stepped_away:
            return weights + self.loading
        kept = FULL * self.share if self.offload.optimizer and self.zero else 0  # gradients of the optimizer
        return weights + self.masters + self.optimizer + self.average + self.loading + kept

    @property
    def loading(self) -> int:
        """The samples of the batch, and batches read ahead; with a GPU they are not in its memory."""
        return self.measured.batch * (1 + self.waiting) if self.host else 0

    @property
    def gradients(self) -> int:
        """Of one finished backward pass."""
        elements = self.measured.weights.trained_elements if self.zero < 2 else self.share
        return self.gradient * elements

    @property
    def bucket(self) -> int:
        """DeepSpeed's gradient buffer: whole on a GPU, on a CPU only as far as it is written."""
        if self.zero == 0:
            return 0
        elements = min(BUCKET, self.measured.weights.trained_elements) if self.host else BUCKET
        return self.gradient * elements

    @property
    def phases(self) -> list[Phase]:
        """The parts of a step that may be the largest."""
        found = [Phase("forward and backward", self._backward()), Phase("optimizer step", self._step())]
        return [*found, Phase("saving", self._saving())] if self.host else found

    @property
    def largest(self) -> Phase:
        """The one that decides."""
        return max(self.phases, key=lambda phase: phase.extra)

    @property
    def total(self) -> int:
        """The most memory at a time."""
        return self.lasting + self.largest.extra

    def _backward(self) -> int:
        """Activations and the gradients so far, those of earlier micro-batches included."""
        trace, earlier = self.measured.trace, self.accumulate > 1
        if self.zero < 2:  # every gradient stays; the bucket is filled when all are there
            held = self.gradients if earlier else 0
            bucket = 0 if self.host else self.bucket
            return trace.peak(0 if earlier else self.gradient) + held + bucket
        own = self.gradients * (2 if earlier else 1)  # of this pass, and the sum over those before
        if not self.host:
            return trace.peak() + own + self.bucket
        return trace.peak(self.gradient) + (self.gradients if earlier else 0)  # the bucket fills as they come

    def _step(self) -> int:
        """Gradients are gathered, brought to float32 and applied; activations are gone."""
        own, passing = self.gradient * self.share, int(self.state.passing * self.share)
        if self.stepped_away:
            return self.bucket
        if self.zero == 0:
            together = FULL * min(BUCKET, self.share) if self.sharing > 1 else 0
            return self.gradients + max(passing, together)
        wide = 0 if self.gradient == FULL else FULL * self.share
        applied = 2 * own + wide + passing  # the share, its flat copy, and that in float32
        elements = self.measured.weights.trained_elements
        if self.zero == 1:
            begun = self.gradients + (0 if self.host else self.bucket)
            first = self.gradient * max(0, elements - BUCKET) + self.bucket + own
            return max(begun, first, applied)
        return max(self.bucket + own * (2 if self.accumulate > 1 else 1), applied)

    def _saving(self) -> int:
        """Whole float32 weights on rank 0, and once more as the bytes of a file."""
        whole = FULL * self.measured.weights.trained_elements
        gathered = 0 if self.zero == 0 else whole
        return gathered + (whole if self.averaged else 0)


class Estimator:
    """Plans of one experiment and of changes to it. Each micro-batch is measured once."""

    def __init__(self) -> None:
        self._measured: dict[str, Measured] = {}
        self._states: dict[str, State] = {}

    def estimate(self, experiment: Experiment, ranks: int, zero: int | None = None) -> Estimate:
        """Memory of ``experiment`` on ``ranks`` ranks, at its own ZeRO stage or at another."""
        train, data = sections(experiment)
        measured = self.measured(experiment)
        stage = train.zero if zero is None else zero
        host = on_host(experiment)
        key = repr((train.optimizer, train.weight_decay))
        if key not in self._states:
            self._states[key] = optimizer_state(train, tuple(experiment.imports))
        return Estimate(
            measured, self._states[key], ranks, stage, train.accumulate, train.batch_size,
            train.ema is not None, host, AHEAD if data.workers else 0, train.offload,
            experiment.parallel.tensor,
        )  # fmt: skip

    def measured(self, experiment: Experiment) -> Measured:
        """One micro-batch of ``experiment``, which is not run again if only other things changed."""
        train, data = sections(experiment)
        key = repr((
            experiment.model, experiment.diffusion, experiment.adapters, train.objective, train.batch_size,
            train.dtype, train.autocast, train.activation_checkpointing, data.height, data.width,
            train.pack, train.compile, data.buckets, bool(data.cache), bool(data.cache_views),
            train.sample_every is None, experiment.memory.quantize, experiment.parallel.tensor,
            experiment.parallel.sequence,
        ))  # fmt: skip
        if key not in self._measured:
            self._measured[key] = measure(experiment)
        return self._measured[key]


def sections(experiment: Experiment) -> tuple[TrainConfig, DataConfig]:
    """The sections that a training has."""
    if experiment.train is None or experiment.data is None:
        raise ValueError("an estimate needs the config sections train and data")
    return experiment.train, experiment.data


def on_host(experiment: Experiment) -> bool:
    """Whether the run is estimated for the CPU: if it says so; anything else is estimated for a GPU."""
    return experiment.parallel.device == "cpu"


def measure(experiment: Experiment) -> Measured:
    """Build ``experiment`` without data and run one micro-batch, as the first rank of a team does."""
    team = max(experiment.parallel.tensor, experiment.parallel.sequence) > 1
    if team and not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "Meta"):
        raise RuntimeError(
            f"torch {torch.__version__} cannot estimate a team, as its collectives take no tensors without "
            f"data: install a newer one, or estimate with parallel.tensor and parallel.sequence 1"
        )
    with fake_group(tensor=experiment.parallel.tensor, sequence=experiment.parallel.sequence) as mesh:
        return _measure(experiment, mesh)


def _measure(experiment: Experiment, mesh: Mesh) -> Measured:
    train, data = sections(experiment)
    kind: type[Objective] = resolve(train.objective.target, experiment.imports)
    needs = kind.needs(train.objective.params)
    cached = data.cache is not None
    spare = spare_parts(experiment, train) if cached else frozenset[Part]()
    size = largest_size(data)
    params = train.objective.params
    for stage in kind.rounds(params)[:1]:  # the first is the largest: its teacher is guided
        params = {**params, **stage.params}
    ledger = Ledger(blocked=on_host(experiment))
    packs = _packs(experiment, train)  # tries it, which takes data
    engine = build_shapes(experiment, DTYPES[train.dtype], ledger.without_data(), spare)
    with ledger.without_data():
        _split(engine, mesh, spare)
    engine.conditioner.tokenizer = _AnyText(experiment.conditioning.max_length)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Accessing the data pointer of FakeTensor"
        )  # copies of a teacher do
        objective: Objective = build(
            replace(train.objective, params=params), imports=experiment.imports, engine=engine
        )
    objective.train()
    moments = (cached or bool(data.cache_views)) and "first_stage" not in needs
    text = cached and "text" not in needs

    def batch() -> Batch:
        return _batch(engine, objective, train, size, moments=moments, text=text)

    def loss() -> Tensor:
        with _autocast(train):
            return objective(batch(), torch.Generator())["loss"]  # type: ignore[no-any-return]

    with ledger.without_data():
        if experiment.adapters.lora is not None:
            add_lora(objective, replace(experiment.adapters.lora, start=None), train.seed)
        if train.activation_checkpointing:
            recompute(objective)
        weights = _weights(engine, objective)
        if packs:
            copies = packed_bytes(objective.parts())
            weights = replace(weights, frozen={**weights.frozen, PACKED: copies})
        found = trace(ledger, objective, loss)
        data_bytes = sum(
            x.numel() * x.element_size() for x in vars(batch()).values() if isinstance(x, Tensor)
        )
    text_tokens = experiment.conditioning.max_length if "model" in objective.parts() else 0
    return Measured(weights, found, data_bytes, size, _image_tokens(engine, size), text_tokens)


def _packs(experiment: Experiment, train: TrainConfig) -> bool:
    """Whether frozen weights are packed, at another stage than ZeRO 3."""
    wanted = experiment.adapters.lora is not None and not unpacked(train, stage=0)
    return wanted and on_host(experiment) and packable(DTYPES[train.dtype])


def _split(engine: DiffusionEngine, mesh: Mesh, spare: Collection[Part]) -> None:
    """As a training does: network and text encoder over tensor ranks, the network's tokens over others."""
    parts: dict[Part, nn.Module] = {"model": engine.network, "text": engine.conditioner.text}
    for module in (module for part, module in parts.items() if part not in spare and mesh.tensor.size > 1):
        apply_sharding(module, family_sharding(type(module)), mesh.tensor)
    apply_sequence(engine.network, mesh.sequence)


def largest_size(data: DataConfig) -> tuple[int, int]:
    """(height, width) of the largest images."""
    rule = bucket_rule(data)
    if rule is not None:
        return max((one for area in rule.areas for one in rule.sizes(area)), key=lambda one: one[0] * one[1])
    assert data.height is not None and data.width is not None, "the section's rules ask for them"
    return data.height, data.width


class _AnyText(T5Tokenizer):
    """Gives as many ids as any text has, for a vocabulary that need not be there."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def __call__(self, texts: Any) -> Tokens:
        ids = torch.zeros(len(texts), self.max_length, dtype=torch.int64)
        return Tokens(ids, ids.bool())


def _autocast(train: TrainConfig) -> AbstractContextManager[Any]:
    """As :func:`sat.train.loop.computing`; tensors without data say that they are on the CPU."""
    return nullcontext() if train.autocast is None else torch.autocast(_here(), torch.bfloat16)


def _here() -> str:
    return torch.empty(0).device.type


def _batch(
    engine: DiffusionEngine,
    objective: Objective,
    train: TrainConfig,
    size: tuple[int, int],
    *,
    moments: bool,
    text: bool,
) -> Batch:
    """A micro-batch as the loader would give it: pictures with captions, or what caches hold of them."""
    count = train.batch_size
    pair = torch.zeros(count, 2, dtype=torch.int64)
    channels, h, w = engine.latent_shape(*size)
    latent = torch.empty(count, 2 * channels, h, w) if moments else None
    relay = moments and objective.degrade() is not None
    shape = (count, engine.conditioner.max_length, engine.conditioner.text_dim) if text else None
    return Batch(
        [f"caption {i}" for i in range(count)], pair, pair, pair,
        image=None if moments else torch.empty(count, engine.first_stage.image_channels, *size),
        latent_moments=latent, low_moments=None if latent is None or not relay else latent.clone(),
        text=None if shape is None else torch.empty(shape, dtype=DTYPES[train.dtype]),
    )  # fmt: skip


def _weights(engine: DiffusionEngine, objective: Objective) -> Weights:
    """Bytes by what they belong to, each tensor once."""
    seen: set[int] = set()

    def size(tensor: Tensor) -> int:
        if id(tensor) in seen:
            return 0
        seen.add(id(tensor))
        return tensor.numel() * tensor.element_size()

    def of(module: nn.Module) -> int:
        return sum(size(tensor) for tensor in [*module.parameters(), *module.buffers()])

    learns = list(optim.trainable(objective).values())
    trained = sum(size(p) for p in learns)
    frozen = {"network": of(engine.network), "text encoder": of(engine.conditioner.text)}
    frozen["first stage"] = of(engine.first_stage)
    frozen["teacher"] = sum(of(module) for module in objective.beside())
    return Weights(trained, sum(p.numel() for p in learns), {k: v for k, v in frozen.items() if v})


def _image_tokens(engine: DiffusionEngine, size: tuple[int, int]) -> int:
    _, h, w = engine.latent_shape(*size)
    patch = getattr(engine.network, "patch", 1)
    return h * w // cast(int, patch) ** 2


def optimizer_state(train: TrainConfig, imports: tuple[str, ...]) -> State:
    """What ``train.optimizer`` keeps, seen in two steps of a flat float32 vector, as ZeRO gives it to it.

    An optimizer that looks at the shapes of matrices may keep less at ZeRO 0.
    """
    count = 1 << 20
    ledger = Ledger()
    with ledger.without_data():
        vector = nn.Parameter(torch.empty(count))
        vector.grad = torch.empty(count)
        group = {"params": [vector], "weight_decay": train.weight_decay}
        optimizer = optim.build_optimizer(train, imports, [group])
        base = ledger.live
        optimizer.step()
        ledger.mark()
        optimizer.step()
        return State((ledger.live - base) / count, (ledger.peak - ledger.live) / count)
