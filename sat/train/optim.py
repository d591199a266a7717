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

from sat.config.check import build, resolve
from sat.config.schema import TrainConfig

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


def rate(step: int, config: TrainConfig, cycles: Sequence[int] = ()) -> float:
    """Learning rate of ``step`` (0-based): linear warm-up, then constant, or a cosine to ``min_lr_ratio``.

    ``cycles`` are the steps at which cosines end, one of ``config.steps`` without them. A later one warms up
    from the last rate of the one before; behind the last one that rate stays. A pure function of the step,
    so there is no scheduler state to save.
    """
    start, end, before = 0, config.steps, 0.0
    for end in cycles:
        if step < end or end == cycles[-1]:
            break
        start, before = end, rate(end - 1, config, cycles)
    place = min(step, end - 1) - start if cycles else step
    warmup = min(config.warmup, end - start) if start else config.warmup
    if place < warmup:
        return before + (config.lr - before) * (place + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (place - warmup) / max(1, end - start - warmup))
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def prolonged(
    config: TrainConfig, step: int, steps: int | None, cycles: Sequence[int]
) -> tuple[list[int], str]:
    """Cosine cycles of a run that goes on at ``step``, and a line for the user where they change.

    The run was made for ``steps`` (None: not known) with ``cycles``, and is for ``config.steps`` now.
    """
    if steps is None or steps == config.steps or step >= config.steps or config.schedule == "constant":
        return list(cycles) or [config.steps], ""
    cycles = list(cycles) or [steps]
    stretched = [end for end in cycles[:-1] if end < config.steps] + [config.steps]
    ways = {
        "stretch": (stretched, f"the cosine now ends at step {config.steps}"),
        "constant": (cycles, "the last rate of the cosine is kept behind it"),
        "rewarm": (
            sorted({*cycles, steps, config.steps}),
            "a second cosine follows, after train.warmup steps",
        ),
    }
    way = config.prolong if config.steps > steps else "stretch"
    now, words = ways[way]
    was, follows = rate(step - 1, config, cycles), rate(step, config, now)
    last = rate(config.steps - 1, config, now)
    return now, (
        f"train.steps {steps} -> {config.steps}: {words} (train.prolong={way}): the learning rate goes from "
        f"{was:.2g} to {follows:.2g} at step {step + 1} and ends at {last:.2g}; the other ways are "
        f"{' and '.join(name for name in ways if name != way)} (docs/training.md)"
    )


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
