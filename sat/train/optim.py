"""Optimisation: weight-decay groups, learning rate, precision, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sat.config.check import build
from sat.config.schema import TrainConfig
from sat.config.targets import resolve

if TYPE_CHECKING:
    from sat.train.deepspeed import TrainEngine


class ParameterGroup(TypedDict):
    """A parameter group as torch optimizers take it."""

    params: list[nn.Parameter]
    weight_decay: float


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that receive gradients, by name, each once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def groups(module: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Trainable parameters in a decayed and an undecayed group; an empty group is left out.

    Matrices and convolution kernels decay. Biases, norms, embeddings and position tables do not: shrinking
    them towards zero does not make the function simpler.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_matrix = name == "weight" and parameter.ndim >= 2 and not isinstance(owner, nn.Embedding)
            (decayed if is_matrix else kept).append(parameter)
    if not seen:
        raise ValueError("nothing to train: the objective has no parameter that requires a gradient")
    pairs = ((decayed, weight_decay), (kept, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in pairs if params]


def build_optimizer(train: TrainConfig, imports: Sequence[str], groups: Sequence[Any]) -> Optimizer:
    """``train.optimizer`` over parameter groups.

    Torch's own optimizers run fused where they can, unless the YAML chooses an implementation.
    """
    given = train.optimizer.params
    fused = resolve(train.optimizer.target, imports) in (
        torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad
    ) and not {"fused", "foreach", "differentiable"} & set(given)  # fmt: skip
    component = replace(train.optimizer, params={"fused": True, **given} if fused else given)
    optimizer: Optimizer = build(component, imports=imports, params=groups, lr=train.lr)
    return optimizer


def rate(step: int, config: TrainConfig) -> float:
    """Learning rate of ``step`` (0-based): linear warm-up, then constant, or a cosine to ``min_lr_ratio``.

    A pure function of the step, so there is no scheduler state to save.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_rate(optimizer: Optimizer, value: float) -> None:
    """Write the learning rate into every group (a tensor rate is filled in place)."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def autocast(config: TrainConfig, device: str) -> AbstractContextManager[Any]:
    """bf16 computation with float32 weights on a ``device`` type, where ``train.autocast`` asks for it."""
    return nullcontext() if config.autocast is None else torch.autocast(device, torch.bfloat16)


class Ema:
    """Exponential moving average, in float32, of the weights: whole at ZeRO 0, else this rank's masters.

    The decay after n steps is ``min(decay, n / (9 + n))``, so that early averages forget the random start.
    ``shards`` are the averages, flat, by the name of the parameter.
    """

    def __init__(self, engine: TrainEngine, decay: float) -> None:
        self._engine = engine
        self.decay = decay
        self._masters = [fragment.master for fragment in engine.fragments.values()]
        self.shards: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Set the averages to the current weights."""
        self.shards = {
            name: fragment.master.float().clone() for name, fragment in self._engine.fragments.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the current weights after ``step`` steps."""
        decay = min(self.decay, step / (9 + step))
        torch._foreach_lerp_(list(self.shards.values()), self._masters, 1 - decay)

    def gather(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 average) one by one; every rank must go through all of them."""
        for name in self._engine.parameters:
            yield name, self._engine.whole(name, self.shards.get(name))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in place of the weights inside the block, and the exact old weights after it."""
        parameters = self._engine.parameters
        keeps_itself = self._engine.config.zero == 3
        with self._engine.unsharded():
            old = {} if keeps_itself else {name: p.detach().clone() for name, p in parameters.items()}
            try:
                for name, value in self.gather():
                    parameters[name].detach().copy_(value)
                yield
            finally:
                for name, value in old.items():
                    parameters[name].detach().copy_(value)
