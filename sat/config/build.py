"""The engine of an experiment, and what samples with it."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from sat.config.component import build
from sat.config.parts import NoFill, PartBuilder, build_empty, cast_weights, find_tokenizer, quantizers
from sat.config.schema import CheckpointConfig, Component, Experiment

if TYPE_CHECKING:
    from sat.checkpoint.format import Part
    from sat.diffusion.guidance import Guider
    from sat.diffusion.samplers import Sampler
    from sat.diffusion.step_cache import StepCache
    from sat.engine import DiffusionEngine
    from sat.first_stage.model import AutoencoderKL
    from sat.models.t5 import T5Encoder
    from sat.parallel.mesh import Mesh
    from sat.tokenizers import T5Tokenizer


def build_guider(experiment: Experiment) -> Guider:
    """The guider of ``sampling.guider``."""
    made: Guider = build(experiment.sampling.guider, imports=experiment.imports)
    return made


def build_sampler(experiment: Experiment) -> Sampler:
    """The sampler of ``sampling.sampler``."""
    made: Sampler = build(experiment.sampling.sampler, imports=experiment.imports)
    return made


def build_cache(experiment: Experiment) -> StepCache | None:
    """The step cache of ``sampling.cache``, if there is one."""
    if experiment.sampling.cache is None:
        return None
    made: StepCache = build(experiment.sampling.cache, imports=experiment.imports)
    return made


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
    text = cast(
        "T5Encoder", fill.part(experiment.conditioning.text, "text")
    )  # the check made sure of classes
    network = fill.part(experiment.model, "model")
    first_stage = cast("AutoencoderKL", fill.part(experiment.first_stage, "first_stage"))
    tokenizer = find_tokenizer(experiment.conditioning, weights)
    engine = _assemble(experiment, network, text, first_stage, tokenizer, without)
    _move(engine, torch.device(device), offloaded)
    if experiment.adapters.load:
        from sat.adapters.merge import AdapterRef, load_adapters

        wanted = [AdapterRef(item.path, item.strength) for item in experiment.adapters.load]
        adapted = {"model": network, "text": text}  # parts left out are on the meta device, and go unused
        load_adapters(adapted, wanted, fold=experiment.adapters.merge)
    return engine


def _move(engine: DiffusionEngine, device: torch.device, offloaded: Collection[Part]) -> None:
    """Everything to ``device`` but the parts that are ``offloaded``."""
    named: dict[nn.Module, Part] = {
        engine.network: "model", engine.conditioner.text: "text", engine.first_stage: "first_stage"
    }  # fmt: skip
    for module in (*engine.children(), *engine.conditioner.children()):
        if module is not engine.conditioner and named.get(module) not in offloaded:
            module.to(device)


def build_shapes(
    experiment: Experiment,
    dtype: torch.dtype,
    mode: AbstractContextManager[None],
    without: Collection[Part] = (),
) -> DiffusionEngine:
    """An engine whose parts are made inside ``mode``, which gives tensors no data; without a tokenizer.

    For measuring (:mod:`sat.estimate.trace`): no file is read, and no memory taken.
    """
    made: dict[Part, nn.Module] = {}
    parts: dict[Part, Component] = {
        "model": experiment.model, "text": experiment.conditioning.text, "first_stage": experiment.first_stage
    }  # fmt: skip
    fill = PartBuilder(
        experiment.checkpoint, torch.device("meta"), dtype, experiment.imports, load=False,
        quantizers=quantizers(experiment.memory.quantize),
    )  # fmt: skip
    with mode, NoFill():
        for part, component in parts.items():
            if part in without:
                made[part] = build_empty(component, experiment.imports)
            else:
                module = cast_weights(build(component, imports=experiment.imports), fill.dtype_of(part))
                made[part] = fill.quantised(module, part)
    text, first_stage = cast("T5Encoder", made["text"]), cast("AutoencoderKL", made["first_stage"])
    return _assemble(experiment, made["model"], text, first_stage, None, without)


def _assemble(
    experiment: Experiment,
    network: nn.Module,
    text: T5Encoder,
    first_stage: AutoencoderKL,
    tokenizer: T5Tokenizer | None,
    without: Collection[Part],
) -> DiffusionEngine:
    """The engine of these parts; something that raises stands where one of them was left out."""
    from sat.conditioning.conditioner import Conditioner
    from sat.config.parts import MissingAutoencoder, MissingPart
    from sat.engine import DiffusionEngine

    c, d = experiment.conditioning, experiment.diffusion
    make = partial(build, imports=experiment.imports)
    conditioner = Conditioner(text, make(c.size), tokenizer, c.max_length)
    if "text" in without:
        conditioner.text = MissingPart("text encoder")
    return DiffusionEngine(
        MissingPart("network") if "model" in without else network,
        conditioner,
        MissingAutoencoder(first_stage) if "first_stage" in without else first_stage,
        make(d.schedule),
        make(d.prediction),
        make(d.process),
        None if d.loss is None else make(d.loss),
    )


def adaptable(engine: DiffusionEngine) -> dict[str, nn.Module]:
    """The parts of an engine that adapters can be attached to, by their names in adapters."""
    return {"model": engine.network, "text": engine.conditioner.text}
