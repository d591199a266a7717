"""What only the classes themselves refuse: every component made without memory, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from torch import nn

from sat.config.component import build
from sat.config.parts import build_empty, quantizers
from sat.config.schema import Component, Experiment, LoraConfig
from sat.config.yaml_source import Key
from sat.parallel.tensor import check_sharding
from sat.sharding import family_sharding

if TYPE_CHECKING:
    from sat.kernels.quantize import Quantizer


def refusals(experiment: Experiment) -> Iterator[tuple[Key, str]]:
    """(key, why) of components whose classes refuse their values, found by making them without memory."""
    c, d, s = experiment.conditioning, experiment.diffusion, experiment.sampling
    components: dict[Key, Component | None] = {
        ("model",): experiment.model,
        ("first_stage",): experiment.first_stage,
        **{("diffusion", f.name): getattr(d, f.name) for f in fields(d)},
        ("conditioning", "text"): c.text,
        ("conditioning", "size"): c.size,
        ("sampling", "guider"): s.guider,
        ("sampling", "sampler"): s.sampler,
        ("sampling", "cache"): s.cache,
    }
    empty: dict[Key, nn.Module] = {}
    for key, component in components.items():
        try:
            if component is not None and key[0] != "diffusion":
                empty[key] = build_empty(component, experiment.imports)
            elif component is not None:  # schedules compute their tables
                build(component, imports=experiment.imports)
        except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, AssertionError) as error:
            yield key, f"{component.target if component else ''} refuses these parameters: {error}"
    if (size := experiment.parallel.tensor) > 1:
        yield from _splits(
            {key: empty[key] for key in (("model",), ("conditioning", "text")) if key in empty}, size
        )
    if experiment.adapters.lora is not None and {("model",), ("conditioning", "text")} <= set(empty):
        yield from _targets(experiment.adapters.lora, empty[("model",)], empty[("conditioning", "text")])
    if s.cache is not None and ("model",) in empty:
        yield from _cached(empty[("model",)])
    for part, quantizer in quantizers(experiment.memory.quantize).items():
        yield from _quantised(quantizer, empty.get(_PARTS[part]))


def _splits(parts: Mapping[Key, nn.Module], size: int) -> Iterator[tuple[Key, str]]:
    """Parts that do not divide over ``size`` tensor ranks."""
    for module in parts.values():
        try:
            check_sharding(module, family_sharding(type(module)), size)
        except ValueError as error:
            yield ("parallel", "tensor"), str(error)


def _targets(lora: LoraConfig, model: nn.Module, text: nn.Module) -> Iterator[tuple[Key, str]]:
    """Targets of LoRA that the model has no layers for."""
    from sat.adapters.factors import AdapterError
    from sat.adapters.select import choose

    try:
        choose({"model": model, "text": text}, lora.targets, lora.rank, lora.ranks)
    except AdapterError as error:
        yield ("adapters", "lora", "targets"), str(error)


def _cached(network: nn.Module) -> Iterator[tuple[Key, str]]:
    """Why steps of ``network`` cannot be cached."""
    from sat.diffusion.step_cache import transformer_of

    try:
        transformer_of(network)
    except ValueError as error:
        yield ("sampling", "cache"), str(error)


_PARTS: dict[str, Key] = {"model": ("model",), "text": ("conditioning", "text")}


def _quantised(quantizer: Quantizer, module: nn.Module | None) -> Iterator[tuple[Key, str]]:
    """Why ``quantizer`` does nothing for the empty ``module``, or cannot do it."""
    if module is None:
        return  # said with the component itself
    names = list(quantizer.wanted(module))
    if not names:
        yield (
            ("memory", "quantize", "layers"),
            f"none of {', '.join(quantizer.patterns)} is a linear of {type(module).__name__}",
        )
    odd = [name for name in names if module.get_submodule(name).in_features % 2]  # type: ignore[operator]
    if odd and quantizer.scheme.kind == "int4":
        yield (
            ("memory", "quantize", "layers"),
            f"int4 keeps two inputs in a byte, but {odd[0]} has an odd number of them: leave it out",
        )
