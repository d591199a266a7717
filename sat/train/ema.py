"""An exponential moving average of the weights, in float32, of this rank's share of the masters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sat.train.deepspeed import TrainEngine


class Ema:
    """Averages what the optimizer steps: full weights at ZeRO 0, this rank's float32 shard at ZeRO 1 and 2.

    The decay after n steps is ``min(decay, n / (9 + n))``, so that early averages forget the random start.
    """

    def __init__(self, engine: TrainEngine, decay: float) -> None:
        self._engine = engine
        self.decay = decay
        self._masters: list[Tensor] = []
        self._names: list[str] = []
        for name, parameter in engine.parameters.items():
            master = engine.master(parameter)
            if master is not None:
                self._masters.append(master)
                self._names.append(name)
        self._shards: list[Tensor] = []
        self.restart()

    def restart(self) -> None:
        """The averages are the current weights."""
        self._shards = [master.detach().float().clone() for master in self._masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the current weights after ``step`` steps."""
        decay = min(self.decay, step / (9 + step))
        torch._foreach_lerp_(self._shards, self._masters, 1 - decay)

    def gather(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full float32 average) one by one; every rank must go through all of them."""
        shards = dict(zip(self._names, self._shards, strict=True))
        for name, parameter in self._engine.parameters.items():
            yield name, _assemble(self._engine, parameter, shards.get(name))

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take this rank's share of full averages, as ``gather`` gave them."""
        for name, shard in zip(self._names, self._shards, strict=True):
            start, length = self._engine.master_range(self._engine.parameters[name])
            shard.copy_(values[name].reshape(-1)[start : start + length])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module's parameters hold the averages inside the block, and their exact old values after it."""
        old = {name: p.detach().clone() for name, p in self._engine.parameters.items()}
        try:
            with torch.no_grad():
                for name, value in self.gather():
                    self._engine.parameters[name].copy_(value)
            yield
        finally:
            with torch.no_grad():
                for name, p in self._engine.parameters.items():
                    p.copy_(old[name])


@torch.no_grad()
def masters(engine: TrainEngine) -> Iterator[tuple[str, Tensor]]:
    """(name, full float32 weight) one by one; every rank must go through all of them."""
    for name, parameter in engine.parameters.items():
        yield name, _assemble(engine, parameter, engine.master(parameter))


def _assemble(engine: TrainEngine, parameter: nn.Parameter, shard: Tensor | None) -> Tensor:
    """A full float32 tensor of ``parameter``'s shape from every rank's flat share of it."""
    if engine.config.zero == 0:
        if shard is None:
            raise RuntimeError("at ZeRO 0 every rank holds every parameter")
        return shard.float().view(parameter.shape)
    full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if shard is not None:
        start, length = engine.master_range(parameter)
        full[start : start + length] = shard
    if engine.mesh.gradient.size > 1:
        dist.all_reduce(full, group=engine.mesh.gradient.group)
    return full.view(parameter.shape)
