"""An exponential moving average of the weights, in float32, of this rank's share of the masters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sat.train.deepspeed import TrainEngine


class Ema:
    """Averages what the optimizer steps: full weights at ZeRO 0, else this rank's float32 share of them.

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
        """The averages are the current weights."""
        self.shards = {
            name: fragment.master.float().clone() for name, fragment in self._engine.fragments.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the current weights after ``step`` steps."""
        decay = min(self.decay, step / (9 + step))
        torch._foreach_lerp_(list(self.shards.values()), self._masters, 1 - decay)

    def gather(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full float32 average) one by one; every rank must go through all of them."""
        for name in self._engine.parameters:
            yield name, self._engine.whole(name, self.shards.get(name))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module's parameters hold the averages inside the block, and their exact old values after it."""
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


@torch.no_grad()
def masters(engine: TrainEngine) -> Iterator[tuple[str, Tensor]]:
    """(name, full float32 weight) one by one; every rank must go through all of them."""
    for name in engine.parameters:
        fragment = engine.fragments.get(name)
        yield name, engine.whole(name, None if fragment is None else fragment.master)
