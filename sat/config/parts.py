"""Parts of a model, built without memory and filled from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from sat.config.component import build
from sat.config.schema import WEIGHTS, CheckpointConfig, Component, ConditioningConfig, QuantizeConfig
from sat.config.yaml_source import ConfigError
from sat.first_stage.model import AutoencoderKL, Posterior
from sat.parallel.tensor import apply_sharding
from sat.sharding import family_sharding

if TYPE_CHECKING:
    from pathlib import Path

    from sat.checkpoint.format import Part
    from sat.kernels.quantize import Quantizer
    from sat.parallel.launch import Mesh
    from sat.tokenizers import T5Tokenizer


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


_VOCABULARY = "spiece.model"
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

        The transformers of the other parts guard themselves (:mod:`sat.transformer.block`).
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
        if self.mesh is None or part == "first_stage":
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


def build_empty(component: Component, imports: Collection[str] = ()) -> nn.Module:
    """The module that ``component`` names on the meta device: shapes and names, no memory."""
    with torch.device("meta"), without_init():
        module: nn.Module = build(component, imports=imports)
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


def find_tokenizer(config: ConditioningConfig, weights: CheckpointConfig) -> T5Tokenizer | None:
    """The tokenizer of the config, or the one beside the text encoder's weights; None without either."""
    from sat.tokenizers import T5Tokenizer

    found = find_vocabulary(config, weights)
    return None if found is None else T5Tokenizer(found, config.max_length)


def find_vocabulary(config: ConditioningConfig, weights: CheckpointConfig) -> Path | None:
    """The file of that tokenizer. Raises if the text encoder has weights and none lies beside them."""
    if config.tokenizer is not None:
        return config.tokenizer
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
        what = f"there is no {_VOCABULARY} in {beside}; name one in conditioning.tokenizer"
        raise ConfigError.of("conditioning", "tokenizer", what)
    return found
