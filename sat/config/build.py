"""The engine of an experiment: parts built without memory and filled from a checkpoint, put together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from sat.config.check import build, built, resolve
from sat.config.schema import (
    WEIGHTS,
    CheckpointConfig,
    Component,
    ConditioningConfig,
    Experiment,
    QuantizeConfig,
)
from sat.config.yaml_source import ConfigError
from sat.errors import UserError
from sat.first_stage.model import AutoencoderKL, Posterior
from sat.parallel.collectives import gather
from sat.parallel.launch import ALONE
from sat.parallel.tensor import apply_sharding
from sat.sharding import family_sharding

if TYPE_CHECKING:
    from pathlib import Path

    from sat.checkpoint.format import Part
    from sat.conditioning.conditioner import TextEncoder, Tokenizer
    from sat.diffusion.guidance import Guider
    from sat.diffusion.loss import DenoisingLoss
    from sat.diffusion.prediction import Prediction
    from sat.diffusion.process import Process
    from sat.diffusion.samplers import Sampler
    from sat.diffusion.schedule import Schedule
    from sat.diffusion.step_cache import StepCache
    from sat.engine import DiffusionEngine
    from sat.kernels.quantize import Quantizer
    from sat.parallel.launch import Mesh


class MissingPartError(RuntimeError):
    """Something needs a part of the engine that was left out."""

    def __init__(self, part: str) -> None:
        super().__init__(
            f"the {part} was not loaded, because a cache (data.cache) stands for it: "
            "set data.cache to null, or build the engine with every part"
        )


class MissingAutoencoder(AutoencoderKL):
    """The sizes of an autoencoder that is not there."""

    def __init__(self, like: AutoencoderKL) -> None:
        nn.Module.__init__(self)
        self.factor, self.channels = like.factor, like.channels
        self.image_channels, self.scale_factor = like.image_channels, like.scale_factor

    def encode(self, image: Tensor) -> Posterior:
        """Raise: there is nothing to encode with."""
        raise MissingPartError("first stage")

    def decode(self, latent: Tensor) -> Tensor:
        """Raise: there is nothing to decode with."""
        raise MissingPartError("first stage")


class MissingPart(nn.Module):
    """Any other module that is not there."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def prepare(self, *args: Any) -> NoReturn:
        """Raise: there is no network."""
        raise MissingPartError(self._part)

    def forward(self, *args: Any) -> NoReturn:
        """Raise: there is nothing to run."""
        raise MissingPartError(self._part)


_SEEDS: dict[Part, int] = {"model": 0, "first_stage": 1, "text": 2}


@dataclass(frozen=True)
class PartBuilder:
    """Makes the parts of an engine with their weights."""

    weights: CheckpointConfig
    device: torch.device
    dtype: torch.dtype
    imports: Collection[str]
    load: bool
    without: frozenset[Part] = frozenset()
    mesh: Mesh | None = None
    quantizers: Mapping[str, Quantizer] = field(default_factory=dict)
    offloaded: frozenset[Part] = frozenset()

    def part(self, component: Component, part: Part) -> nn.Module:
        """The module of one part, filled from its file or at random; those left out stay empty."""
        if part in self.without:
            return build_empty(component, self.imports)
        source = self.weights.source(part)
        if not self.load:
            return self._random(component, part)
        if source is None and self.weights.random is None:
            what = f"checkpoint.path (a folder with every part) or checkpoint.{part}"
            what = f"no weights are named: set {what}; checkpoint.random=SEED draws them at random"
            raise ConfigError.of("checkpoint", part, what)
        if source is None:  # each part has a seed of its own, whichever others are read from files
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((self.weights.random or 0) + _SEEDS[part])
                return self._random(component, part)
        if not source.exists():
            raise ConfigError.of("checkpoint", part, f"there is no {str(source)!r}; {WEIGHTS}")
        from sat.checkpoint.load import load
        from sat.checkpoint.verify import Verify

        axis = ALONE if self.mesh is None else self.mesh.tensor
        verify = Verify(self.weights.verify, axis.rank, axis.size, lambda found: gather(found, axis))
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
            replacing=quantizer,
            verify=verify,
        )
        return module

    def dtype_of(self, part: Part) -> torch.dtype:
        """The dtype of a part: float32 for an autoencoder that would run, and overflow, in float16.

        The transformers of the other parts guard themselves (:mod:`sat.transformer.transformer`).
        """
        narrow = part == "first_stage" and self.dtype == torch.float16
        return torch.float32 if narrow else self.dtype

    def _random(self, component: Component, part: Part) -> nn.Module:
        """Made on the CPU, so that a seed means the same weights on every device and layout.

        Whole there too; what is not this rank's goes layer by layer before the rest moves to the device.
        """
        module: nn.Module = build(component, imports=self.imports)
        module = self._split(module, part)
        return self.quantised(cast_weights(module, self.dtype_of(part)).to(self.device_of(part)), part)

    def _split(self, module: nn.Module, part: Part) -> nn.Module:
        """``module`` with this tensor rank's share of its layers; the autoencoder stays whole."""
        if self.mesh is None or self.mesh.tensor.size == 1 or part == "first_stage":
            return module
        return apply_sharding(module, family_sharding(type(module)), self.mesh.tensor)

    def device_of(self, part: Part) -> torch.device:
        """Device of a part."""
        return torch.device("cpu") if part in self.offloaded else self.device

    def quantised(self, module: nn.Module, part: Part) -> nn.Module:
        """``module`` with the linears quantised that ``memory.quantize`` names."""
        if part in self.quantizers:
            self.quantizers[part](module)
        return module


MOST_MODULES, MOST_WEIGHTS = 10_000, 10**12
"""Of one part; no more are made. CogView3's UNet has 1,400 modules, its T5 5e9 weights."""


class PartSizeError(UserError, ValueError):
    """A part that is larger than any that can be meant, or empty."""


def build_empty(component: Component, imports: Collection[str] = ()) -> nn.Module:
    """The module that ``component`` names on the meta device: shapes and names, no memory.

    :class:`PartSizeError` beyond :data:`MOST_MODULES` and :data:`MOST_WEIGHTS`, and for an empty weight.
    """
    left = iter(range(MOST_MODULES))

    def refuse(what: str) -> NoReturn:
        raise PartSizeError(what)

    many = f"more than {MOST_MODULES} modules: is a depth or a number of blocks too large?"
    hook = module_hooks.register_module_module_registration_hook(
        lambda *_: refuse(many) if next(left, None) is None else None
    )
    try:
        with torch.device("meta"), without_init():
            module: nn.Module = build(component, imports=imports)
    finally:
        hook.remove()
    if sum(t.numel() for t in (*module.parameters(), *module.buffers())) > MOST_WEIGHTS:
        refuse(f"more than {MOST_WEIGHTS:.0e} weights: is a width or a length too large?")
    for name, weight in module.named_parameters():
        if not weight.numel():
            owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
            last, shape = name.rpartition(".")[2], list(weight.shape)
            refuse(f"{last} of {owner} has shape {shape}: is a width or a length 0?")
    return module


@contextmanager
def without_init(skips: Callable[[Tensor], bool] = lambda tensor: tensor.is_meta) -> Iterator[None]:
    """Inside, functions of ``torch.nn.init`` return a tensor that ``skips`` is true of as it is.

    On the meta device they have no effect, and the first of them imports sympy, for seconds.
    """
    before = {name: fill for name, fill in vars(nn.init).items() if name.endswith("_") and callable(fill)}
    for name, fill in before.items():
        setattr(nn.init, name, lambda x, *a, fill=fill, **k: x if skips(x) else fill(x, *a, **k))
    try:
        yield
    finally:
        for name, fill in before.items():
            setattr(nn.init, name, fill)


def cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module`` with its floating-point parameters in ``dtype``; buffers keep theirs (float32 tables)."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return module


def quantizers(config: QuantizeConfig) -> dict[str, Quantizer]:
    """Quantizers of the parts that ``memory.quantize`` names."""
    kinds = {"model": config.network, "text": config.text_encoder}
    if not any(kinds.values()):
        return {}
    from sat.kernels.quantize import Quantizer, Scheme

    return {
        part: Quantizer(part, Scheme(kind, config.group), tuple(config.patterns()))
        for part, kind in kinds.items()
        if kind is not None
    }


def find_tokenizer(
    config: ConditioningConfig, weights: CheckpointConfig, imports: Collection[str] = ()
) -> Tokenizer | None:
    """The text encoder's tokenizer over the vocabulary of the config, or the one beside the weights.

    None without either. The class is that of the encoder's ``tokenizer``; T5's where it names none.
    """
    found = find_vocabulary(config, weights)
    if found is None:
        return None
    kind = getattr(resolve(config.text.target, imports), "tokenizer", "sat.tokenizers.T5Tokenizer")
    tokenizer: Tokenizer = resolve(kind, imports)(found, config.max_length)
    return tokenizer


def find_vocabulary(config: ConditioningConfig, weights: CheckpointConfig) -> Path | None:
    """The file of that tokenizer. Raises if the text encoder has weights and none lies beside them."""
    found = config.tokenizer
    beside = weights.source("text")
    if found is None and beside is None:
        return None
    from sat.checkpoint.files import VOCABULARY, vocabulary
    from sat.checkpoint.verify import Verify, verify_file

    if found is None and beside is not None:
        folders = (
            beside if beside.is_dir() else beside.parent,
            beside / "tokenizer",
            beside.parent / "tokenizer",
        )
        found = next((file for folder in folders if (file := vocabulary(folder)) is not None), None)
    if found is None:
        what = f"there is no {' or '.join(VOCABULARY)} in {beside}; name one in conditioning.tokenizer"
        raise ConfigError.of("conditioning", "tokenizer", what)
    if found.is_file():
        verify_file(found, Verify(weights.verify))
    return found


# -- the engine of an experiment, and what samples with it


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
    tokenizer = find_tokenizer(experiment.conditioning, weights, experiment.imports)
    engine = _assemble(experiment, parts, tokenizer, without)
    stay = [module for part, module in parts.items() if part in offloaded]
    for module in (*engine.children(), *engine.conditioner.children()):
        if module is not engine.conditioner and module not in stay:
            module.to(device)
    if experiment.adapters.load:
        from sat.adapters.merge import AdapterRef, load_adapters
        from sat.checkpoint.verify import Verify

        wanted = [AdapterRef(item.path, item.strength) for item in experiment.adapters.load]
        load_adapters(
            {"model": parts["model"], "text": parts["text"]}, wanted,
            fold=experiment.adapters.merge, verify=Verify(weights.verify),
        )  # fmt: skip
    if experiment.adapters.embeddings and "text" not in without:
        from sat.adapters.tokens import load_words
        from sat.checkpoint.verify import Verify

        load_words(engine.conditioner, experiment.adapters.embeddings, Verify(weights.verify))
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
    tokenizer: Tokenizer | None,
    without: Collection[Part],
) -> DiffusionEngine:
    """The engine of these parts; something that raises stands where one of them was left out."""
    from sat.conditioning.conditioner import Conditioner
    from sat.engine import DiffusionEngine

    c, light = experiment.conditioning, components(experiment)
    size = build(c.size, imports=experiment.imports)
    conditioner = Conditioner(
        cast("TextEncoder", parts["text"]), size, tokenizer, c.max_length, c.padding, c.empty_prompt
    )
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
