"""Which parameters decay, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sat.config.schema import TrainConfig


class ParameterGroup(TypedDict):
    """A parameter group as torch optimizers take it."""

    params: list[nn.Parameter]
    weight_decay: float


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that receive gradients, by name, each once."""
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


def fast_options(optimizer: type[Optimizer], given: Iterable[str]) -> dict[str, bool]:
    """``fused=True`` for torch's own optimizers that have it, unless the YAML chose an implementation."""
    has_fused = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
    if optimizer in has_fused and not {"fused", "foreach", "differentiable"} & set(given):
        return {"fused": True}
    return {}


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
