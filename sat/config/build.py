"""Objects from checked components, and the engine from an experiment."""

from __future__ import annotations

import inspect
import types
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Union, cast, get_args, get_origin

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sat.config.check import BAD, fit, is_plain, split
from sat.config.schema import (
    WEIGHTS,
    CheckpointConfig,
    Component,
    ConditioningConfig,
    Experiment,
    LoraConfig,
    QuantizeConfig,
)
from sat.config.source import ConfigError, Key, Problem
from sat.config.targets import resolve, signature
from sat.parallel.apply import apply_plan, check_plan
from sat.plan import family_plan

if TYPE_CHECKING:
    from sat.checkpoint.format import Part
    from sat.diffusion.guidance import Guider
    from sat.diffusion.sampler import Sampler
    from sat.diffusion.step_cache import StepCache
    from sat.engine import DiffusionEngine
    from sat.first_stage.autoencoder import AutoencoderKL
    from sat.memory.quantize import Quantizer
    from sat.models.t5 import T5Encoder, T5Tokenizer
    from sat.parallel.mesh import Mesh

_VOCABULARY = "spiece.model"


def build(component: Component | Mapping[str, Any], *, imports: Collection[str] = (), **runtime: Any) -> Any:
    """The object that ``component`` names; ``runtime`` are the arguments that only the caller has."""
    target, params = _parts(component)
    made = resolve(target, imports)
    takes = signature(made)
    if strange := sorted(set(runtime) - {*takes.runtime, *takes.params}):
        raise TypeError(f"{takes.name} takes no {', '.join(strange)}")
    if both := sorted(set(runtime) & set(params)):
        raise TypeError(f"{takes.name}: {', '.join(both)} given both in the config and at run time")
    values = {n: _argument(takes.params.get(n, Any), v, imports) for n, v in params.items()}
    for name, value in values.items():
        if isinstance(value, list) and isinstance(takes.defaults.get(name), tuple):
            values[name] = tuple(value)  # of a package without annotations
    return made(**values, **runtime)


def _parts(component: Component | Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(component, Component):
        return component.target, component.params
    return component["target"], component.get("params") or {}


def _argument(wanted: Any, value: Any, imports: Collection[str]) -> Any:
    """``value`` of YAML as an argument: components built, lists turned into tuples where asked for."""
    wanted, _ = split(wanted)
    if isinstance(value, Component) or (isinstance(value, Mapping) and "target" in value):
        return build(value, imports=imports)
    if is_plain(wanted):
        made = fit(wanted, value)
        if made is BAD:
            raise TypeError(f"expected {wanted}, got {value!r}")
        return made
    arms = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    inner = next((a for a in arms if a is not type(None)), Any)
    arguments = get_args(inner) or (Any,)
    if isinstance(value, Mapping):
        if inspect.isclass(inner) and hasattr(inner, "__dataclass_fields__"):
            return build_record(inner, value, imports)
        return {n: _argument(arguments[-1], v, imports) for n, v in value.items()}
    if isinstance(value, list):
        items = [_argument(arguments[0], v, imports) for v in value]
        return tuple(items) if get_origin(inner) is tuple else items
    return value


def build_record(cls: type, value: Mapping[str, Any], imports: Collection[str]) -> Any:
    """An instance of the dataclass ``cls`` from a mapping of its fields."""
    takes = signature(cls)
    return cls(**{n: _argument(takes.params.get(n, Any), v, imports) for n, v in value.items()})


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
    hosted: Collection[Part] = (),
) -> DiffusionEngine:
    """The engine on ``device``, its weights in ``dtype``, read from ``checkpoint`` (None: the experiment's).

    Parts are built on the meta device and filled tensor by tensor. A part without a path is drawn at random
    only when ``checkpoint.random`` gives a seed. ``load_weights=False`` draws every part from torch's current
    seed: for training from scratch. With float16 the first stage stays float32, whose range it needs.
    Parts ``without`` are not loaded; whatever calls them raises. Network and text encoder are split over the
    tensor ranks of ``mesh`` by their plans, and each rank reads its share. Linears that ``memory.quantize``
    names are quantised as they are read. Parts ``hosted`` are left in host memory
    (:mod:`sat.memory.offload`).
    """
    weights = checkpoint or experiment.checkpoint
    fill = _Fill(
        weights, torch.device(device), dtype, experiment.imports, load_weights, frozenset(without), mesh,
        quantizers(experiment.memory.quantize), frozenset(hosted),
    )  # fmt: skip
    text = cast(
        "T5Encoder", fill.part(experiment.conditioning.text, "text")
    )  # the check made sure of classes
    network = fill.part(experiment.model, "model")
    first_stage = cast("AutoencoderKL", fill.part(experiment.first_stage, "first_stage"))
    tokenizer = find_tokenizer(experiment.conditioning, weights)
    engine = _assemble(experiment, network, text, first_stage, tokenizer, without)
    _move(engine, torch.device(device), hosted)
    if experiment.adapters.load:
        from sat.adapters.merge import Loading, load_adapters

        wanted = [Loading(item.path, item.strength) for item in experiment.adapters.load]
        adapted = {"model": network, "text": text}  # parts left out are on the meta device, and go unused
        load_adapters(adapted, wanted, fold=experiment.adapters.merge)
    return engine


def _move(engine: DiffusionEngine, device: torch.device, hosted: Collection[Part]) -> None:
    """Everything to ``device`` but the parts that are ``hosted``."""
    named: dict[nn.Module, Part] = {
        engine.network: "model", engine.conditioner.text: "text", engine.first_stage: "first_stage"
    }  # fmt: skip
    for module in (*engine.children(), *engine.conditioner.children()):
        if module is not engine.conditioner and named.get(module) not in hosted:
            module.to(device)


def build_shapes(
    experiment: Experiment,
    dtype: torch.dtype,
    mode: AbstractContextManager[None],
    without: Collection[Part] = (),
) -> DiffusionEngine:
    """An engine whose parts are made inside ``mode``, which gives tensors no data; without a tokenizer.

    For measuring (:mod:`sat.train.trace`): no file is read, and no memory taken.
    """
    made: dict[Part, nn.Module] = {}
    parts: dict[Part, Component] = {
        "model": experiment.model, "text": experiment.conditioning.text, "first_stage": experiment.first_stage
    }  # fmt: skip
    fill = _Fill(
        experiment.checkpoint, torch.device("meta"), dtype, experiment.imports, load=False,
        quantizers=quantizers(experiment.memory.quantize),
    )  # fmt: skip
    with mode, _NoFill():
        for part, component in parts.items():
            if part in without:
                made[part] = build_empty(component, experiment.imports)
            else:
                module = _cast(build(component, imports=experiment.imports), fill.dtype_of(part))
                made[part] = fill._quantised(module, part)
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
    from sat.config.absent import Absent, AbsentAutoencoder
    from sat.engine import DiffusionEngine

    c, d = experiment.conditioning, experiment.diffusion
    make = partial(build, imports=experiment.imports)
    conditioner = Conditioner(text, make(c.size), tokenizer, c.max_length)
    if "text" in without:
        conditioner.text = Absent("text encoder")
    return DiffusionEngine(
        Absent("network") if "model" in without else network,
        conditioner,
        AbsentAutoencoder(first_stage) if "first_stage" in without else first_stage,
        make(d.schedule),
        make(d.parameterisation),
        make(d.process),
        None if d.loss is None else make(d.loss),
    )


def quantizers(config: QuantizeConfig) -> dict[str, Quantizer]:
    """What quantises each part that ``memory.quantize`` names."""
    kinds = {"model": config.network, "text": config.text_encoder}
    if not any(kinds.values()):
        return {}
    from sat.memory.quantize import Quantizer, Scheme

    return {
        part: Quantizer(part, Scheme(kind, config.group), tuple(config.patterns()))
        for part, kind in kinds.items()
        if kind is not None
    }


def adaptable(engine: DiffusionEngine) -> dict[str, nn.Module]:
    """The parts of an engine that adapters can be attached to, by their names in adapters."""
    return {"model": engine.network, "text": engine.conditioner.text}


@dataclass(frozen=True)
class _Fill:
    """Makes the parts of an engine with their weights."""

    weights: CheckpointConfig
    device: torch.device
    dtype: torch.dtype
    imports: Collection[str]
    load: bool
    without: frozenset[Part] = frozenset()
    mesh: Mesh | None = None
    quantizers: Mapping[str, Quantizer] = field(default_factory=dict)
    hosted: frozenset[Part] = frozenset()

    def part(self, component: Component, part: Part) -> nn.Module:
        """The module of one part, filled from its file or at random; those left out stay empty."""
        if part in self.without:
            return build_empty(component, self.imports)
        source = self.weights.source(part)
        if not self.load:
            return self._random(component, part)
        if source is None and self.weights.random is None:
            raise ConfigError(
                [
                    Problem(
                        "checkpoint",
                        part,
                        f"no weights are named: set checkpoint.path (a folder with every part) or "
                        f"checkpoint.{part}; checkpoint.random=SEED draws them at random",
                    )
                ]
            )
        if source is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed(part))
                return self._random(component, part)
        if not source.exists():
            raise ConfigError([Problem("checkpoint", part, f"there is no {str(source)!r}; {WEIGHTS}")])
        from sat.checkpoint.load import load

        module = self._split(build_empty(component, self.imports), part)
        quantizer = self.quantizers.get(part)
        load(
            module,
            source,
            part,
            device=self.device_of(part),
            dtype=self.dtype_of(part),
            allow_missing=self.weights.allow_missing,
            allow_unexpected=self.weights.allow_unexpected,
            allow_pickle=self.weights.allow_pickle,
            placed=None if quantizer is None else quantizer.placed,
        )
        return module

    def dtype_of(self, part: Part) -> torch.dtype:
        """The dtype of a part: float32 for an autoencoder that would run, and overflow, in float16.

        The transformers of the other parts guard themselves (:mod:`sat.transformer.attention`).
        """
        narrow = part == "first_stage" and self.dtype == torch.float16
        return torch.float32 if narrow else self.dtype

    def _seed(self, part: Part) -> int:
        """Each part has its own: its weights do not depend on which others are read from files."""
        return (self.weights.random or 0) + {"model": 0, "first_stage": 1, "text": 2}[part]

    def _random(self, component: Component, part: Part) -> nn.Module:
        """Made on the CPU, so that a seed means the same weights on every device and layout.

        Whole there too; what is not this rank's goes layer by layer before the rest moves to the device.
        """
        module: nn.Module = build(component, imports=self.imports)
        module = self._split(module, part)
        return self._quantised(_cast(module, self.dtype_of(part)).to(self.device_of(part)), part)

    def _split(self, module: nn.Module, part: Part) -> nn.Module:
        """``module`` with this tensor rank's share of its planned layers; the autoencoder stays whole."""
        if self.mesh is None or part == "first_stage":
            return module
        return apply_plan(module, family_plan(type(module)), self.mesh.tensor)

    def device_of(self, part: Part) -> torch.device:
        """Where a part is to be."""
        return torch.device("cpu") if part in self.hosted else self.device

    def _quantised(self, module: nn.Module, part: Part) -> nn.Module:
        """``module`` with the linears quantised that ``memory.quantize`` names."""
        if part in self.quantizers:
            self.quantizers[part](module)
        return module


def build_empty(component: Component, imports: Collection[str] = ()) -> nn.Module:
    """The module that ``component`` names on the meta device: shapes and names, no memory."""
    with torch.device("meta"), _NoFill():
        module: nn.Module = build(component, imports=imports)
    return module


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
            check_plan(module, family_plan(type(module)), size)
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


class _NoFill(TorchFunctionMode):
    """Skips ``torch.nn.init``: no effect on the meta device, where it first imports sympy, for seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func in (
            torch.Tensor.normal_,
            torch.Tensor.uniform_,
        ):
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module`` with its floating-point parameters in ``dtype``; buffers keep theirs (float32 tables)."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return module


def find_tokenizer(config: ConditioningConfig, weights: CheckpointConfig) -> T5Tokenizer | None:
    """The tokenizer of the config, or the one beside the text encoder's weights; None without either."""
    from sat.models.t5 import T5Tokenizer

    if config.tokenizer is not None:
        return T5Tokenizer(config.tokenizer, config.max_length)
    beside = weights.source("text")
    if beside is None:
        return None
    folders = (
        beside if beside.is_dir() else beside.parent,
        beside / "tokenizer",
        beside.parent / "tokenizer",
    )
    found = next((f / _VOCABULARY for f in folders if (f / _VOCABULARY).is_file()), None)
    if found is None:
        raise ConfigError(
            [
                Problem(
                    "conditioning",
                    "tokenizer",
                    f"there is no {_VOCABULARY} in {beside}; name one in conditioning.tokenizer",
                )
            ]
        )
    return T5Tokenizer(found, config.max_length)
