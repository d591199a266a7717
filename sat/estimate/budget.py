"""What sampling takes of the device's memory, and which ways to save it bring that into a budget.

Shapes alone are run (:mod:`sat.estimate.trace`): one prompt through the text encoder, what is prepared for a
picture with one step, and the decoding of a picture, each beside the weights that are on the device then. Of
ranks that share the weights (``parallel.tensor``) those are a rank's; what is run is whole, which is more
than a rank runs. All numbers are bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from sat.checkpoint.format import DTYPES, PARTS, Part
from sat.conditioning.condition import Condition
from sat.config.build import build_shapes, components
from sat.config.schema import Experiment, MemoryConfig, QuantizeConfig
from sat.diffusion.tiles import tile_size
from sat.engine import DiffusionEngine
from sat.estimate.trace import Ledger
from sat.offload.block_swap import parts, resident_bytes, swap_groups, tensors
from sat.parallel.mesh import Axis
from sat.parallel.tensor import apply_sharding
from sat.sharding import family_sharding
from sat.util.host import parse_size

log = logging.getLogger(__name__)

SPARE = 0.1
"""Share of a budget that a plan leaves, for what kernels need beside their results and for gaps."""
STAGES: tuple[tuple[str, Part], ...] = (("text", "text"), ("denoising", "model"), ("decoding", "first_stage"))
"""The stages of a picture, and the part that works in each."""


class BudgetError(ValueError):
    """Nothing brings a sampling into its budget."""


@dataclass(frozen=True)
class Peaks:
    """The most memory in each stage, weights included."""

    text: int
    denoising: int
    decoding: int

    @property
    def total(self) -> int:
        """The most at all."""
        return max(self.text, self.denoising, self.decoding)

    @property
    def stage(self) -> str:
        """The stage that decides."""
        return max(("text", "denoising", "decoding"), key=lambda name: int(getattr(self, name)))


@dataclass(frozen=True)
class MemoryOption:
    """One way to save memory, as it is written, and how it changes an experiment."""

    says: str
    apply: Callable[[Experiment], Experiment]


@dataclass(frozen=True)
class Budgeted:
    """An experiment that is within its budget, and the ways that brought it there."""

    experiment: Experiment
    ways: tuple[MemoryOption, ...]
    peaks: Peaks
    budget: int

    def __str__(self) -> str:
        found = f"{_gb(self.peaks.total)} planned, most while {_WHILE[self.peaks.stage]}"
        ways = " ".join(way.says for way in self.ways) or "nothing needs to change"
        return f"memory.budget {_gb(self.budget)}: {ways} ({found})"


_WHILE = {"text": "encoding text", "denoising": "denoising", "decoding": "decoding"}


def apply_budget(
    experiment: Experiment, device: torch.device, estimator: SamplingEstimator | None = None
) -> Budgeted | None:
    """``experiment`` with what its ``memory.budget`` needs, the cheapest ways first; None without a budget.

    ``estimator``: of an earlier call for the same experiment, so that nothing is measured twice. Raises
    :class:`BudgetError` where all ways together are not enough.
    """
    if experiment.memory.budget is None:
        return None
    budget = parse_size(experiment.memory.budget)
    estimator = estimator or SamplingEstimator(host=device.type == torch.device("cpu").type)
    limit = int(budget * (1 - SPARE))

    def peaks(ways: Sequence[MemoryOption]) -> Peaks:
        return estimator.peaks(_changed(experiment, ways))

    taken: list[MemoryOption] = []
    best = peaks(taken)
    for way in estimator.ways(experiment):
        if best.total <= limit:
            break
        tried = peaks([*taken, way])
        # A way may help only once another has made room, so whatever lowers any stage is kept.
        if any(getattr(tried, name) < getattr(best, name) for name, _ in STAGES):
            taken, best = [*taken, way], tried
    if best.total > limit:
        last = {way.says.partition("=")[0]: way.says for way in taken}  # of a key that is set twice the last
        raise BudgetError(
            f"memory.budget is {experiment.memory.budget}, of which {_gb(limit)} are planned with, but "
            f"sampling takes {_gb(best.total)} while {_WHILE[best.stage]}, even with "
            f"{' '.join(last.values()) or 'all that is known here'}: give more"
            + ("" if best.stage == "text" else ", or draw smaller pictures")
        )
    for way in reversed(list(taken)):
        fewer = [one for one in taken if one is not way]
        if (without := peaks(fewer)).total <= limit:
            taken, best = fewer, without
    return Budgeted(_changed(experiment, taken), tuple(taken), best, budget)


def _changed(experiment: Experiment, ways: Sequence[MemoryOption]) -> Experiment:
    for way in ways:
        experiment = way.apply(experiment)
    return experiment


class SamplingEstimator:
    """Peaks of one experiment and of changes to it; each stage is run once for what it depends on.

    ``host``: the device is the CPU, where nothing can wait elsewhere.
    """

    def __init__(self, *, host: bool) -> None:
        self.host = host
        self._engines: dict[str, tuple[Ledger, DiffusionEngine]] = {}
        self._shares: dict[int, Mapping[Part, nn.Module]] = {}
        self._activations: dict[str, int] = {}

    def peaks(self, experiment: Experiment) -> Peaks:
        """The most memory in each stage."""
        found = {}
        for stage, _ in STAGES:
            weights = sum(self._weights(experiment, part, stage) for part in PARTS)
            found[stage] = weights + self._activation(experiment, stage)
        return Peaks(**found)

    def ways(self, experiment: Experiment) -> Iterator[MemoryOption]:
        """What could be done that is not: first what costs nothing, last what costs time at every step."""
        memory, sampling = experiment.memory, experiment.sampling
        if memory.text_encoder == "keep":
            yield _memory("memory.text_encoder=free", text_encoder="free")
        if memory.decode_batch > 1:
            yield _memory("memory.decode_batch=1", decode_batch=1)
        if sampling.at_once > 1:
            yield MemoryOption(
                "sampling.at_once=1", lambda e: replace(e, sampling=replace(e.sampling, at_once=1))
            )
        yield from () if self.host else _waiting(experiment)
        yield from self._tiles(experiment)
        if experiment.parallel.tensor == 1:
            yield from _integers(memory)
        if not (self.host or sampling.graphs or sampling.compile) and memory.network != "blocks":
            yield _memory("memory.network=blocks", network="blocks")

    def _tiles(self, experiment: Experiment) -> Iterator[MemoryOption]:
        """Decoding in tiles, the larger first."""
        _, engine = self._engine(experiment)
        side = max(engine.latent_shape(experiment.sampling.height, experiment.sampling.width)[1:])
        now = experiment.memory.decode_tile or side
        for tile in (64, 32):
            if tile < now:
                yield _memory(f"memory.decode_tile={tile}", decode_tile=tile)

    def _engine(self, experiment: Experiment) -> tuple[Ledger, DiffusionEngine]:
        key = repr(experiment.memory.quantize)
        if key not in self._engines:
            ledger = Ledger(blocked=self.host)
            dtype = DTYPES[experiment.sampling.dtype]
            engine = build_shapes(experiment, dtype, ledger.without_data()).requires_grad_(False)
            self._engines[key] = ledger, engine.eval()
        return self._engines[key]

    def _held(self, experiment: Experiment) -> Mapping[Part, nn.Module]:
        """The parts as a rank holds them: of tensor ranks, its share."""
        ranks = experiment.parallel.tensor
        if ranks == 1:
            return parts(self._engine(experiment)[1])
        if ranks not in self._shares:
            # Apart from those that are run, whole: there is nobody here to send to.
            ledger = Ledger()
            engine = build_shapes(experiment, DTYPES[experiment.sampling.dtype], ledger.without_data())
            split = {"model": engine.network, "text": engine.conditioner.text}
            with ledger.without_data():
                for module in split.values():
                    apply_sharding(module, family_sharding(type(module)), Axis(ranks))
            self._shares[ranks] = parts(engine.requires_grad_(False))
        return self._shares[ranks]

    def _weights(self, experiment: Experiment, part: Part, stage: str) -> int:
        """Bytes of ``part`` on the device in a stage."""
        memory, worker = experiment.memory, dict(STAGES)[stage]
        module = self._held(experiment)[part]
        if self.host:
            gone = part == "text" and memory.text_encoder == "free" and stage != "text"
            return 0 if gone else _size(module)
        waits = {"text": memory.text_encoder, "model": memory.network, "first_stage": memory.first_stage}
        if part == "model" and stage == "text" and memory.text_encoder == "free":
            return 0  # it comes once the text encoder has gone
        if part != worker and waits[part] != "keep":
            return 0
        return resident_bytes(module, swap_groups(module, memory, part))

    def _activation(self, experiment: Experiment, stage: str) -> int:
        """The most bytes beside the weights in a stage."""
        sampling, memory = experiment.sampling, experiment.memory
        size = (sampling.height, sampling.width, sampling.dtype, memory.quantize)
        key = {
            "text": ("text", memory.quantize),
            "denoising": (
                "denoising",
                size,
                sampling.at_once,
                sampling.steps,
                sampling.tile,
                sampling.guider,
            ),
            "decoding": ("decoding", size, memory.decode_batch, memory.decode_tile, sampling.at_once),
        }[stage]
        if repr(key) not in self._activations:
            ledger, engine = self._engine(experiment)
            with torch.no_grad(), ledger.without_data():
                base = ledger.live
                ledger.mark()
                {"text": _encode, "denoising": _denoise, "decoding": _decode}[stage](experiment, engine)
                self._activations[repr(key)] = ledger.peak - base
        return self._activations[repr(key)]


def _waiting(experiment: Experiment) -> Iterator[MemoryOption]:
    """Parts that may wait on the host: pictures stay the same, and each costs copies."""
    memory = experiment.memory
    if memory.first_stage == "keep":
        yield _memory("memory.first_stage=cpu", first_stage="cpu")
    if memory.text_encoder != "blocks":
        yield _memory("memory.text_encoder=blocks", text_encoder="blocks")
    if experiment.sampling.graphs:
        return
    if memory.adaln == "keep":
        yield _memory("memory.adaln=cpu", adaln="cpu")
    if memory.network == "keep":
        yield _memory("memory.network=cpu", network="cpu")


def _integers(memory: MemoryConfig) -> Iterator[MemoryOption]:
    """Parts whose weights may be int8; int4 is never picked, as it shows in pictures."""
    for name in ("network", "text_encoder"):
        if getattr(memory.quantize, name) is None:
            yield MemoryOption(f"memory.quantize.{name}=int8", _quantised(name))


def _encode(experiment: Experiment, engine: DiffusionEngine) -> None:
    """One prompt through the text encoder."""
    engine.conditioner.text(torch.zeros(1, experiment.conditioning.max_length, dtype=torch.int64))


def _denoise(experiment: Experiment, engine: DiffusionEngine) -> None:
    """What is prepared for the pictures that are drawn together, and their first step."""
    sampling, conditioner = experiment.sampling, engine.conditioner
    shape = engine.latent_shape(sampling.height, sampling.width)
    if engine.process.input is not None:  # the enlarged picture's latent, with the network there already
        large = torch.zeros(
            sampling.at_once, engine.first_stage.image_channels, sampling.height, sampling.width
        )
        engine.encode(large, torch.zeros(sampling.at_once, *shape), tile=experiment.memory.decode_tile)
        del large
    size = shape[1:] if sampling.tile is None else tile_size((shape[1], shape[2]), sampling.tile)
    batch, dtype = sampling.at_once, DTYPES[sampling.dtype]
    text = torch.zeros(batch, conditioner.max_length, conditioner.text_dim, dtype=dtype)
    cond = Condition(text, torch.zeros(batch, conditioner.size.width))
    rows = components(experiment).guider.rows(cond, cond.null())
    # One row of sizes and strengths: whether several are alike could only be told from data.
    strengths = None if rows.guidance is None else rows.guidance[:1]
    rows = replace(rows, vector=rows.vector[:1], guidance=strengths)
    levels = engine.process.hooks.levels(engine.schedule, sampling.steps)
    timesteps = [float(level.timestep) for level in levels[:-1]]
    prepared = engine.network.prepare(rows, size, timesteps)  # type: ignore[operator]
    kept = [torch.zeros(batch, *shape) for _ in range(4)]  # the sampler's
    engine.denoiser(torch.zeros(len(rows), shape[0], *size), levels[0], prepared)
    del kept


def _decode(experiment: Experiment, engine: DiffusionEngine) -> None:
    """The pictures that are decoded together."""
    sampling, memory = experiment.sampling, experiment.memory
    batch = min(memory.decode_batch, sampling.at_once)
    shape = engine.latent_shape(sampling.height, sampling.width)
    z = torch.zeros(sampling.at_once, *shape, dtype=engine.first_stage.dtype)
    engine.decode(z, batch=batch, tile=memory.decode_tile)


def _size(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in tensors([module]))


def _memory(says: str, **values: object) -> MemoryOption:
    def apply(experiment: Experiment) -> Experiment:
        memory: MemoryConfig = replace(experiment.memory, **values)  # type: ignore[arg-type]
        return replace(experiment, memory=memory)

    return MemoryOption(says, apply)


def _quantised(name: str) -> Callable[[Experiment], Experiment]:
    def apply(experiment: Experiment) -> Experiment:
        quantize: QuantizeConfig = replace(experiment.memory.quantize, **{name: "int8"})  # type: ignore[arg-type]
        return replace(experiment, memory=replace(experiment.memory, quantize=quantize))

    return apply


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
