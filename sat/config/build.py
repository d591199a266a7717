"""The engine of an experiment, and what samples with it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn

from sat.config.component import build, built
from sat.config.parts import PartBuilder, build_empty, cast_weights, find_tokenizer, quantizers, without_init
from sat.config.schema import CheckpointConfig, Component, Experiment

if TYPE_CHECKING:
    from sat.checkpoint.format import Part
    from sat.diffusion.guidance import Guider
    from sat.diffusion.loss import DenoisingLoss
    from sat.diffusion.prediction import Prediction
    from sat.diffusion.process import Process
    from sat.diffusion.samplers import Sampler
    from sat.diffusion.schedule import Schedule
    from sat.diffusion.step_cache import StepCache
    from sat.engine import DiffusionEngine
    from sat.first_stage.model import AutoencoderKL
    from sat.models.t5 import T5Encoder
    from sat.parallel.launch import Mesh
    from sat.tokenizers import T5Tokenizer


class Components(NamedTuple):
    """The objects of an experiment that hold no weights."""

    schedule: Schedule
    prediction: Prediction
    process: Process
    loss: DenoisingLoss | None
    guider: Guider
    sampler: Sampler
    cache: StepCache | None


def components(experiment: Experiment) -> Components:
    """The light objects of ``experiment``: made once, shared by its check, its engines and its estimates."""
    d, s = experiment.diffusion, experiment.sampling
    listed = (d.schedule, d.prediction, d.process, d.loss, s.guider, s.sampler, s.cache)
    return Components(*(None if c is None else built(c, experiment.imports) for c in listed))  # type: ignore[arg-type]


def build_engine(
    experiment: Experiment,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    load_weights: bool = True,
    checkpoint: CheckpointConfig | None = None,
    without: Collection[Part] = (),
    mesh: Mesh | None = None,
    offloaded: Collection[Part] = (),
) -> DiffusionEngine:
    """The engine on ``device``, its weights in ``dtype``, read from ``checkpoint`` (None: the experiment's).

    Parts are built on the meta device and filled tensor by tensor. A part without a path is drawn at random
    only when ``checkpoint.random`` gives a seed. ``load_weights=False`` draws every part from torch's current
    seed: for training from scratch. With float16 the first stage stays float32, whose range it needs.
    Parts ``without`` are not loaded; whatever calls them raises. Network and text encoder are split over the
    tensor ranks of ``mesh`` by their plans, and each rank reads its share. Linears that ``memory.quantize``
    names are quantised as they are read. Parts ``offloaded`` are left in host memory
    (:mod:`sat.offload.block_swap`).
    """
    weights = checkpoint or experiment.checkpoint
    fill = PartBuilder(
        weights, torch.device(device), dtype, experiment.imports, load_weights, frozenset(without), mesh,
        quantizers(experiment.memory.quantize), frozenset(offloaded),
    )  # fmt: skip
    parts = {part: fill.part(component, part) for part, component in _parts(experiment).items()}
    tokenizer = find_tokenizer(experiment.conditioning, weights)
    engine = _assemble(experiment, parts, tokenizer, without)
    stay = [module for part, module in parts.items() if part in offloaded]
    for module in (*engine.children(), *engine.conditioner.children()):
        if module is not engine.conditioner and module not in stay:
            module.to(device)
    if experiment.adapters.load:
        from sat.adapters.merge import AdapterRef, load_adapters

        wanted = [AdapterRef(item.path, item.strength) for item in experiment.adapters.load]
        load_adapters(
            {"model": parts["model"], "text": parts["text"]}, wanted, fold=experiment.adapters.merge
        )
    return engine


def build_shapes(
    experiment: Experiment,
    dtype: torch.dtype,
    mode: AbstractContextManager[None],
    without: Collection[Part] = (),
) -> DiffusionEngine:
    """An engine whose parts are made inside ``mode``, which gives tensors no data; without a tokenizer.

    For measuring (:mod:`sat.estimate.trace`): no file is read, and no memory taken.
    """
    fill = PartBuilder(
        experiment.checkpoint, torch.device("meta"), dtype, experiment.imports, load=False,
        quantizers=quantizers(experiment.memory.quantize),
    )  # fmt: skip
    parts: dict[Part, nn.Module] = {}
    with mode, without_init(lambda tensor: True):
        for part, component in _parts(experiment).items():
            if part in without:
                parts[part] = build_empty(component, experiment.imports)
            else:
                module = cast_weights(build(component, imports=experiment.imports), fill.dtype_of(part))
                parts[part] = fill.quantised(module, part)
    return _assemble(experiment, parts, None, without)


def _parts(experiment: Experiment) -> dict[Part, Component]:
    """The components with weights, in the order in which random ones are drawn."""
    return {
        "text": experiment.conditioning.text,
        "model": experiment.model,
        "first_stage": experiment.first_stage,
    }


def _assemble(
    experiment: Experiment,
    parts: Mapping[Part, nn.Module],
    tokenizer: T5Tokenizer | None,
    without: Collection[Part],
) -> DiffusionEngine:
    """The engine of these parts; something that raises stands where one of them was left out."""
    from sat.conditioning.conditioner import Conditioner
    from sat.config.parts import MissingAutoencoder, MissingPart
    from sat.engine import DiffusionEngine

    c, light = experiment.conditioning, components(experiment)
    size = build(c.size, imports=experiment.imports)
    conditioner = Conditioner(cast("T5Encoder", parts["text"]), size, tokenizer, c.max_length)
    if "text" in without:
        conditioner.text = MissingPart("text encoder")
    first_stage = cast("AutoencoderKL", parts["first_stage"])
    process = light.process
    if [*process.parameters(), *process.buffers()]:  # engines on different devices do not share tensors
        process = copy.deepcopy(process)
    return DiffusionEngine(
        MissingPart("network") if "model" in without else parts["model"],
        conditioner,
        MissingAutoencoder(first_stage) if "first_stage" in without else first_stage,
        light.schedule,
        light.prediction,
        process,
        light.loss,
    )


def adaptable(engine: DiffusionEngine) -> dict[str, nn.Module]:
    """The parts of an engine that adapters can be attached to, by their names in adapters."""
    return {"model": engine.network, "text": engine.conditioner.text}
