"""One micro-batch of a training, run without data: bytes of weights and activations, tokens, FLOPs.

The engine and the objective are built from tensors without data, and one micro-batch goes through them
(:mod:`sat.estimate.trace`), so all sizes are those of the tensors that the run will make. Of a team of ranks
(``parallel.tensor``, ``sequence``) the first is measured, with its share of weights and tokens. All numbers
are bytes unless a name says otherwise.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sat.checkpoint.format import DTYPES, Part
from sat.conditioning.conditioner import Tokens
from sat.config.build import build_shapes
from sat.config.check import build, resolve
from sat.config.schema import DataConfig, Experiment, TrainConfig
from sat.data.batch import Batch
from sat.engine import DiffusionEngine
from sat.estimate.trace import Ledger, Trace, trace
from sat.kernels.compile import recompute
from sat.kernels.packed import packable
from sat.parallel.launch import ALONE, Axis, fake_group
from sat.parallel.sequence import apply_sequence
from sat.parallel.tensor import apply_sharding
from sat.sharding import family_sharding
from sat.tokenizers import T5Tokenizer
from sat.train.data import bucket_rule, spare_parts
from sat.train.lora import NAME as TRAINED
from sat.train.lora import add_lora, add_tokens, packed_bytes, unpacked
from sat.train.objectives import Objective
from sat.train.optim import autocast, build_optimizer, groups, trainable

PACKED = "packed for the backward pass"
"""Name of the second copy of frozen weights; there is none at ZeRO 3."""


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights on a rank; ``frozen`` by part, the buffers of trained parts included."""

    trained: int
    trained_elements: int
    frozen: Mapping[str, int]
    roles: Mapping[str, int] = field(default_factory=dict)  # trained elements by role, where several learn

    @property
    def total(self) -> int:
        """All of them."""
        return self.trained + sum(self.frozen.values())


@dataclass(frozen=True)
class Measured:
    """Result of one micro-batch; nothing in it depends on the number of teams or the ZeRO stage."""

    weights: Weights
    trace: Trace
    batch: int  # bytes of the micro-batch's data, which are in the trace too
    size: tuple[int, int]  # pixels
    image_tokens: int  # of one image: patches, or latent cells of a network without patches
    text_tokens: int
    drawn: int = 0  # most bytes while weights without a file are drawn: in float32, then cast


@dataclass(frozen=True)
class OptimizerState:
    """Bytes that an optimizer keeps, and needs while it steps, for each trained element."""

    kept: float
    passing: float


def sections(experiment: Experiment) -> tuple[TrainConfig, DataConfig]:
    """The sections ``train`` and ``data``."""
    if experiment.train is None or experiment.data is None:
        raise ValueError("an estimate needs the config sections train and data")
    return experiment.train, experiment.data


def on_host(experiment: Experiment) -> bool:
    """True if the run is estimated for the CPU: where it says so; anything else is taken for a GPU."""
    return experiment.parallel.device == "cpu"


def largest_size(data: DataConfig) -> tuple[int, int]:
    """(height, width) of the largest images."""
    rule = bucket_rule(data)
    if rule is not None:
        return max((one for area in rule.areas for one in rule.sizes(area)), key=lambda one: one[0] * one[1])
    assert data.height is not None and data.width is not None, "the section's rules ask for them"
    return data.height, data.width


def measure(experiment: Experiment) -> Measured:
    """Build ``experiment`` without data and run one micro-batch, as the first rank of a team does."""
    parallel = experiment.parallel
    team = max(parallel.tensor, parallel.sequence) > 1
    if team and not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "Meta"):
        raise RuntimeError(
            f"torch {torch.__version__} cannot estimate a team, as its collectives take no tensors without "
            f"data: install a newer one, or estimate with parallel.tensor and parallel.sequence 1"
        )
    train, data = sections(experiment)
    lora, dtype, size = experiment.adapters.lora, DTYPES[train.dtype], largest_size(data)
    kind: type[Objective] = resolve(train.objective.target, experiment.imports)
    cached = data.cache is not None
    spare = spare_parts(experiment, train) if cached else frozenset[Part]()
    # Packing is tried out, which takes data.
    packs = lora is not None and not unpacked(train, stage=0) and on_host(experiment) and packable(dtype)

    ledger = Ledger(blocked=on_host(experiment))
    with fake_group(tensor=parallel.tensor, sequence=parallel.sequence) as mesh:
        engine = build_shapes(experiment, dtype, ledger.without_data(), spare)
        drawn = ledger.peak if experiment.checkpoint.source("model") is None else 0
        engine.conditioner.tokenizer = _AnyText(experiment.conditioning.max_length)
        with ledger.without_data():
            parts: dict[Part, nn.Module] = {"model": engine.network, "text": engine.conditioner.text}
            for part, module in parts.items() if parallel.tensor > 1 else []:
                if part not in spare:
                    apply_sharding(module, family_sharding(type(module)), mesh.tensor)
            apply_sequence(engine.network, mesh.sequence)
        objective = _objective(experiment, engine, ledger, mesh.tensor, mesh.sequence)
        needs = kind.needs(train.objective.params)
        moments = (cached or bool(data.cache_views)) and "first_stage" not in needs
        text = cached and "text" not in needs

        def batch() -> Batch:
            return _batch(engine, objective, train, size, moments=moments, text=text)

        def loss() -> Tensor:
            with autocast(train, torch.empty(0).device.type):  # that of tensors without data
                return objective(batch(), torch.Generator())["loss"]  # type: ignore[no-any-return]

        def at_step(step: int) -> Trace:
            objective.step = step
            return trace(ledger, objective, loss)

        with ledger.without_data():
            if train.activation_checkpointing:
                recompute(objective)
            weights = _weights(engine, objective)
            if packs:
                copies = packed_bytes(objective.parts())
                weights = replace(weights, frozen={**weights.frozen, PACKED: copies})
            found = max(map(at_step, objective.turns()), key=lambda one: one.peak(dtype.itemsize))
            data_bytes = sum(x.nbytes for x in vars(batch()).values() if isinstance(x, Tensor))
    _, h, w = engine.latent_shape(*size)
    image_tokens = h * w // cast(int, getattr(engine.network, "patch", 1)) ** 2
    text_tokens = experiment.conditioning.max_length if "model" in objective.parts() else 0
    return Measured(weights, found, data_bytes, size, image_tokens, text_tokens, drawn)


def _objective(
    experiment: Experiment,
    engine: DiffusionEngine,
    ledger: Ledger,
    tensor: Axis = ALONE,
    sequence: Axis = ALONE,
) -> Objective:
    """Objective of the first round over ``engine``, whose teacher is guided, with adapters and new words."""
    train, _ = sections(experiment)
    kind: type[Objective] = resolve(train.objective.target, experiment.imports)
    params, lora = train.objective.params, experiment.adapters.lora
    for stage in kind.rounds(params)[:1]:
        params = {**params, **stage.params}
    with warnings.catch_warnings():  # copying a teacher warns
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        component = replace(train.objective, params=params)
        objective: Objective = build(component, imports=experiment.imports, engine=engine)
    objective.train()
    with ledger.without_data():
        if lora is not None:
            add_lora(objective, replace(lora, start=None), train.seed)
        if experiment.adapters.control is not None:
            from sat.train.control import add_control

            add_control(objective, experiment, train, tensor, sequence, load=False)
        if words := [replace(one, start=None) for one in experiment.adapters.tokens]:
            add_tokens(objective, engine.conditioner, words, train.seed, alone=lora is None)
        with warnings.catch_warnings():  # as copying a critic does
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            objective.begin(None if lora is None else TRAINED)
    return objective


def check_groups(experiment: Experiment) -> None:
    """Raise for ``train.groups`` that fit no trained parameter, by names alone: no weight is read.

    Parameters of an adapter to go on from are not known before it is read.
    """
    train, lora = sections(experiment)[0], experiment.adapters.lora
    if not train.groups or (lora is not None and lora.start is not None):
        return
    ledger = Ledger()
    engine = build_shapes(experiment, torch.float32, ledger.without_data())
    engine.conditioner.tokenizer = _AnyText(experiment.conditioning.max_length)
    groups(_objective(experiment, engine, ledger), train.weight_decay, train.groups, train.lr, told=False)


class _AnyText(T5Tokenizer):
    """Tokenizer that gives the longest text's number of ids, without a vocabulary."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def __call__(self, texts: Any) -> Tokens:
        ids = torch.zeros(len(texts), self.max_length, dtype=torch.int64)
        return Tokens(ids, ids.bool())


def _batch(
    engine: DiffusionEngine,
    objective: Objective,
    train: TrainConfig,
    size: tuple[int, int],
    *,
    moments: bool,
    text: bool,
) -> Batch:
    """A micro-batch as the loader would give it: images with captions, or their cached encodings."""
    count = train.batch_size
    pair = torch.zeros(count, 2, dtype=torch.int64)
    channels, h, w = engine.latent_shape(*size)
    latent = torch.empty(count, 2 * channels, h, w) if moments else None
    relay = moments and objective.degrade() is not None
    shape = (count, engine.conditioner.max_length, engine.conditioner.text_dim) if text else None
    extras: dict[str, Tensor] = {}
    if getattr(objective, "control", None) is not None:
        from sat.train.control import empty_pictures

        extras = empty_pictures(objective, count, size, encoded=moments)
    own = (2 * channels, h, w) if moments else (engine.first_stage.image_channels, *size)
    extras |= {name: torch.empty(count, *own) for name in objective.required}
    return Batch(
        [f"caption {i}" for i in range(count)], pair, pair, pair,
        image=None if moments else torch.empty(count, engine.first_stage.image_channels, *size),
        latent_moments=latent, low_moments=None if latent is None or not relay else latent.clone(),
        text=None if shape is None else torch.empty(shape, dtype=DTYPES[train.dtype]), extras=extras,
    )  # fmt: skip


def _weights(engine: DiffusionEngine, objective: Objective) -> Weights:
    """Bytes of each part, each tensor counted once."""
    seen: set[int] = set()

    def size(tensor: Tensor) -> int:
        if id(tensor) in seen:
            return 0
        seen.add(id(tensor))
        return tensor.nbytes

    def of(module: nn.Module) -> int:
        return sum(size(tensor) for tensor in [*module.parameters(), *module.buffers()])

    learns = list(trainable(objective).values())
    trained = sum(size(p) for p in learns)
    frozen = {"network": of(engine.network), "text encoder": of(engine.conditioner.text)}
    frozen["first stage"] = of(engine.first_stage)
    frozen["teacher"] = sum(of(module) for module in objective.beside())
    roles = Counter[str]()
    for name, parameter in trainable(objective).items():
        roles[objective.role(name)] += parameter.numel()
    several = dict(roles) if len(roles) > 1 else {}
    kept = {name: size for name, size in frozen.items() if size}
    return Weights(trained, sum(p.numel() for p in learns), kept, several)


def optimizer_state(train: TrainConfig, imports: tuple[str, ...]) -> OptimizerState:
    """State of ``train.optimizer``, seen in two steps of a flat float32 vector, as ZeRO steps it.

    Of a matrix, for an optimizer that needs matrices; another that looks at shapes may keep less at ZeRO 0.
    """
    count, side = 1 << 20, 1 << 10
    matrices = getattr(resolve(train.optimizer.target, imports), "needs_matrices", False)
    ledger = Ledger()
    with ledger.without_data():
        vector = nn.Parameter(torch.empty(side, side) if matrices else torch.empty(count))
        vector.grad = torch.empty_like(vector)
        group = {"params": [vector], "weight_decay": train.weight_decay, "matrices": matrices}
        optimizer = build_optimizer(train, imports, [group])
        base = ledger.live
        optimizer.step()
        ledger.mark()
        optimizer.step()
        return OptimizerState((ledger.live - base) / count, (ledger.peak - ledger.live) / count)
