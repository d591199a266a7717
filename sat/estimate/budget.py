"""Memory of sampling on the device, and the options that bring it into a budget.

Shapes alone are run (:mod:`sat.estimate.trace`): one prompt through the text encoder, the preparation of an
image with one step, and its decoding, each beside the weights that are on the device then. With
``parallel.tensor`` the weights are one rank's share, but activations those of a whole model, which is more
than a rank has. All numbers are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from sat.checkpoint.format import DTYPES, PARTS, Part
from sat.conditioning.conditioner import Condition
from sat.config.build import build_shapes, components
from sat.config.schema import Experiment, MemoryConfig, QuantizeConfig
from sat.config.settle import slow_convolutions
from sat.diffusion.tiles import tile_size
from sat.engine import DiffusionEngine
from sat.errors import UserError
from sat.estimate.trace import Ledger
from sat.offload.block_swap import (
    host_bytes,
    offloaded_parts,
    parts,
    resident_bytes,
    swap_groups,
    tensors,
)
from sat.parallel.launch import Axis
from sat.parallel.tensor import apply_sharding
from sat.sharding import family_sharding
from sat.util.host import available_memory, parse_size

SPARE = 0.1
"""Share of a budget that is left to what kernels need beside their results, and to gaps."""
STAGES: dict[str, Part] = {"text": "text", "denoising": "model", "decoding": "first_stage"}
"""Stages of drawing an image, and the part that works in each."""
_WHILE = {"text": "encoding text", "denoising": "denoising", "decoding": "decoding"}


class BudgetError(UserError, ValueError):
    """Nothing brings sampling into its budget."""

    exit_code = 1


@dataclass(frozen=True)
class Peaks:
    """Peak memory in each stage, weights included."""

    text: int
    denoising: int
    decoding: int

    @property
    def total(self) -> int:
        """Peak of all stages."""
        return max(self.text, self.denoising, self.decoding)

    @property
    def stage(self) -> str:
        """Stage with that peak."""
        return max(STAGES, key=lambda name: int(getattr(self, name)))


@dataclass(frozen=True)
class MemoryOption:
    """One setting that saves memory, as it is written, and the experiment with it."""

    setting: str
    apply: Callable[[Experiment], Experiment]


@dataclass(frozen=True)
class Budgeted:
    """An experiment within its budget, and the options that brought it there."""

    experiment: Experiment
    options: tuple[MemoryOption, ...]
    peaks: Peaks
    budget: int
    host: int = 0  # bytes of page-locked host memory
    note: str = ""  # about memory that is not in the peaks

    def __str__(self) -> str:
        found = f"{_gb(self.peaks.total)} estimated, most while {_WHILE[self.peaks.stage]}"
        if self.host:
            found += f"; {_gb(self.host)} of page-locked host memory"
            if self.host > (free := available_memory()) > 0:
                found += f", but only {_gb(free)} are free here: other memory settings need less of it"
        if self.note:
            found += f"; {self.note}"
        options = " ".join(option.setting for option in self.options) or "nothing needs to change"
        return f"memory.budget {_gb(self.budget)}: {options} ({found})"


def apply_budget(
    experiment: Experiment, device: torch.device, estimator: SamplingEstimator | None = None
) -> Budgeted | None:
    """``experiment`` with the options that its ``memory.budget`` needs, the cheapest first; None without one.

    ``estimator``: of an earlier call for the same experiment, so that nothing is measured twice. Raises
    :class:`BudgetError` where all options together are not enough.
    """
    if experiment.memory.budget is None:
        return None
    budget = parse_size(experiment.memory.budget)
    estimator = estimator or SamplingEstimator(host=device.type == torch.device("cpu").type)
    limit = int(budget * (1 - SPARE))

    def changed(options: Sequence[MemoryOption]) -> Experiment:
        made = experiment
        for option in options:
            made = option.apply(made)
        return made

    taken: list[MemoryOption] = []
    best = estimator.peaks(experiment)
    for option in estimator.options(experiment):
        if best.total <= limit:
            break
        tried = estimator.peaks(changed([*taken, option]))
        # An option may help only once another has made room, so any that lowers one stage is kept.
        if any(getattr(tried, name) < getattr(best, name) for name in STAGES):
            taken, best = [*taken, option], tried
    if best.total > limit:
        last = {one.setting.partition("=")[0]: one.setting for one in taken}  # of a key, the last
        raise BudgetError(
            f"memory.budget is {experiment.memory.budget}, with {_gb(limit)} usable, but "
            f"sampling takes {_gb(best.total)} while {_WHILE[best.stage]}, even with "
            f"{' '.join(last.values()) or 'all that is known here'}: give more"
            + ("" if best.stage == "text" else ", or draw smaller pictures")
        )
    for option in reversed(list(taken)):  # those that turn out not to be needed
        fewer = [one for one in taken if one is not option]
        if (without := estimator.peaks(changed(fewer))).total <= limit:
            taken, best = fewer, without
    made = changed(taken)
    note = slow_convolutions(experiment.sampling.dtype) if estimator.host else ""
    return Budgeted(made, tuple(taken), best, budget, estimator.locked(made), note)


class SamplingEstimator:
    """Peaks of one experiment and of changes to it; each stage is run once for the settings it depends on.

    ``host``: the device is the CPU, where nothing can be offloaded.
    """

    def __init__(self, *, host: bool) -> None:
        self.host = host
        self._engines: dict[str, tuple[Ledger, DiffusionEngine]] = {}
        self._shares: dict[int, Mapping[Part, nn.Module]] = {}
        self._activations: dict[str, int] = {}

    def peaks(self, experiment: Experiment) -> Peaks:
        """Peak memory in each stage."""
        found = {}
        for stage in STAGES:
            weights = sum(self._weights(experiment, part, stage) for part in PARTS)
            found[stage] = weights + self._activation(experiment, stage)
        return Peaks(**found)

    def locked(self, experiment: Experiment) -> int:
        """Page-locked host memory in which offloaded parts wait, of each process."""
        if self.host:
            return 0
        memory, found = experiment.memory, 0
        for part in offloaded_parts(memory):
            module = self._module(experiment, part)
            stays = part == "model" and memory.network == "keep"
            found += host_bytes(module, swap_groups(module, memory, part), stays=stays)
        return found

    def options(self, experiment: Experiment) -> Iterator[MemoryOption]:  # noqa: C901 - one list, in order
        """Options not taken yet: first those that cost nothing, last those that cost time at every step."""
        memory, sampling = experiment.memory, experiment.sampling
        if memory.text_encoder == "keep":
            yield _option(text_encoder="free")
        if memory.decode_batch > 1:
            yield _option(decode_batch=1)
        if sampling.at_once > 1:
            yield MemoryOption(
                "sampling.at_once=1", lambda e: replace(e, sampling=replace(e.sampling, at_once=1))
            )
        if not self.host:  # parts wait in host memory; images stay the same, and each part costs copies
            if memory.first_stage == "keep":
                yield _option(first_stage="cpu")
            if memory.text_encoder != "blocks":
                yield _option(text_encoder="blocks")
            if memory.adaln == "keep" and not sampling.graphs:
                yield _option(adaln="cpu")
            if memory.network == "keep" and not sampling.graphs:
                yield _option(network="cpu")
        side = memory.decode_tile or max(
            self._engine(experiment)[1].latent_shape(sampling.height, sampling.width)[1:]
        )
        for tile in (64, 32):
            if tile < side:
                yield _option(decode_tile=tile)
        for name in ("network", "text_encoder"):  # int4 is never picked, as it shows in images
            if experiment.parallel.tensor == 1 and getattr(memory.quantize, name) is None:
                yield _quantised(name)
        if not (self.host or sampling.graphs or sampling.compile) and memory.network != "blocks":
            yield _option(network="blocks")

    def _engine(self, experiment: Experiment) -> tuple[Ledger, DiffusionEngine]:
        key = repr(experiment.memory.quantize)
        if key not in self._engines:
            ledger = Ledger(blocked=self.host)
            dtype = DTYPES[experiment.sampling.dtype]
            engine = build_shapes(experiment, dtype, ledger.without_data()).requires_grad_(False)
            self._engines[key] = ledger, engine.eval()
        return self._engines[key]

    def _module(self, experiment: Experiment, part: Part) -> nn.Module:
        """``part`` without data; of tensor ranks, one rank's share."""
        ranks = experiment.parallel.tensor
        if ranks == 1:
            return parts(self._engine(experiment)[1])[part]
        if ranks not in self._shares:
            # Apart from those that are run, whole: there is nobody here to send to.
            ledger = Ledger()
            engine = build_shapes(experiment, DTYPES[experiment.sampling.dtype], ledger.without_data())
            with ledger.without_data():
                for split in (engine.network, engine.conditioner.text):
                    apply_sharding(split, family_sharding(type(split)), Axis(ranks))
            self._shares[ranks] = parts(engine.requires_grad_(False))
        return self._shares[ranks][part]

    def _weights(self, experiment: Experiment, part: Part, stage: str) -> int:
        """Bytes of ``part`` on the device in a stage; of tensor ranks, those of one rank's share."""
        memory, module = experiment.memory, self._module(experiment, part)
        if self.host:
            freed = part == "text" and memory.text_encoder == "free" and stage != "text"
            return 0 if freed else sum(t.nbytes for t in tensors([module]))
        waits = {"text": memory.text_encoder, "model": memory.network, "first_stage": memory.first_stage}
        if part == "model" and stage == "text" and memory.text_encoder == "free":
            return 0  # it comes once the text encoder has gone
        if part != STAGES[stage] and waits[part] != "keep":
            return 0
        return resident_bytes(module, swap_groups(module, memory, part))

    def _activation(self, experiment: Experiment, stage: str) -> int:
        """Peak bytes beside the weights in a stage."""
        sampling, memory = experiment.sampling, experiment.memory
        size, integers = (sampling.height, sampling.width, sampling.dtype), memory.quantize
        depends: tuple[object, ...] = {
            "text": (replace(integers, network=None),),
            "denoising": (
                size, replace(integers, text_encoder=None), sampling.at_once, sampling.steps, sampling.tile,
                sampling.guider,
            ),
            "decoding": (size, memory.decode_batch, memory.decode_tile, sampling.at_once),
        }[stage]  # fmt: skip
        key = repr((stage, *depends))
        if key not in self._activations:
            ledger, engine = self._engine(experiment)
            with torch.no_grad(), ledger.without_data():
                base = ledger.live
                ledger.mark()
                if stage == "text":  # one prompt
                    ids = torch.zeros(1, experiment.conditioning.max_length, dtype=torch.int64)
                    engine.conditioner.text(ids)
                elif stage == "denoising":
                    _denoise(experiment, engine)
                else:  # the images that are decoded together
                    shape = engine.latent_shape(sampling.height, sampling.width)
                    z = torch.zeros(sampling.at_once, *shape, dtype=engine.first_stage.dtype)
                    batch = min(memory.decode_batch, sampling.at_once)
                    engine.decode(z, batch=batch, tile=memory.decode_tile)
                self._activations[key] = ledger.peak - base
        return self._activations[key]


def _denoise(experiment: Experiment, engine: DiffusionEngine) -> None:
    """Run what is prepared for images that are drawn together, and their first step."""
    sampling, conditioner = experiment.sampling, engine.conditioner
    shape = engine.latent_shape(sampling.height, sampling.width)
    if engine.process.input is not None:  # the enlarged image's latent, with the network there already
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


def _option(**values: object) -> MemoryOption:
    """Settings of the section ``memory``."""

    def apply(experiment: Experiment) -> Experiment:
        memory: MemoryConfig = replace(experiment.memory, **values)  # type: ignore[arg-type]
        return replace(experiment, memory=memory)

    return MemoryOption(" ".join(f"memory.{name}={value}" for name, value in values.items()), apply)


def _quantised(name: str) -> MemoryOption:
    """Part ``name`` with int8 weights."""

    def apply(experiment: Experiment) -> Experiment:
        quantize: QuantizeConfig = replace(experiment.memory.quantize, **{name: "int8"})  # type: ignore[arg-type]
        return replace(experiment, memory=replace(experiment.memory, quantize=quantize))

    return MemoryOption(f"memory.quantize.{name}=int8", apply)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
