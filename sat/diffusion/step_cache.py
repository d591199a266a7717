"""Steps that are not computed: where the network would do much as before, it is not asked again.

Off unless ``sampling.cache`` names one. What a cache remembers is its run's, and a run is one call of
``DiffusionEngine.sample``: pictures do not influence each other, except those that are drawn together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from sat.transformer import Context, Transformer
from sat.transformer.hooks import Layer


@dataclass
class Count:
    """Of ``looks`` at the network, how many were ``computed`` whole."""

    looks: int = 0
    computed: int = 0

    def add(self, other: Count) -> None:
        """Count ``other`` too."""
        self.looks += other.looks
        self.computed += other.computed


class StepCache(Protocol):
    """Wraps a network for one sampling run."""

    def over(self, network: nn.Module, count: Count) -> AbstractContextManager[None]:
        """A context in which ``network`` reuses what it did before; ``count`` is kept up to date."""
        ...


class FirstBlock:
    """Reuses what all blocks but the first added, as long as the first adds nearly what it added then.

    "Nearly": the mean absolute difference of what the first block adds now and what it added at the last
    computed step, over the mean of the latter, is at most ``threshold``. At 0 everything is computed. It is
    one number for all rows of a step, with and without condition, and the one thing in the loop that the host
    waits for.
    Sources: arXiv:2411.19108 (reuse by how much an early signal changed); the first block's residual as that
    signal after ParaAttention's first-block cache.
    """

    def __init__(self, threshold: float = 0.1) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is {threshold:g}, expected a relative change of 0 to below 1")
        self.threshold = threshold

    @contextmanager
    def over(self, network: nn.Module, count: Count) -> Iterator[None]:
        """Have the transformer's hook ``layer`` be the cached one meanwhile."""
        transformer = transformer_of(network)
        plain = transformer.resolved
        run = _Run(plain.hooks.layer, len(transformer.blocks), self.threshold, count)
        owners = {**plain.owners, "layer": ("step cache", *plain.owners["layer"])}
        transformer.resolved = replace(plain, hooks=replace(plain.hooks, layer=run), owners=owners)
        try:
            yield
        finally:
            transformer.resolved = plain


def transformer_of(network: nn.Module) -> Transformer:
    """The one transformer that the network consists of, of at least two blocks."""
    found = getattr(network, "transformer", None)
    if not isinstance(found, Transformer):
        raise ValueError(
            f"a step cache needs a network that is one transformer, and {type(network).__name__} is not"
        )
    if len(found.blocks) < 2:
        raise ValueError("a step cache needs at least 2 blocks, the network has 1")
    return found


@dataclass
class _Seen:
    """The last computed step of a batch of some rows: what its first block added, and what all others did."""

    first: Tensor
    rest: Tensor | None = None


class _Run:
    """The hook ``layer`` during one sampling run."""

    def __init__(self, inner: Layer, depth: int, threshold: float, count: Count) -> None:
        self._inner, self._last = inner, depth - 1
        self._threshold, self._count = threshold, count
        self._seen: dict[tuple[int, ...], _Seen] = {}  # by rows and tokens: guidance may show only some
        self._entered: Tensor | None = None  # output of the first block where the step is computed

    def __call__(self, x: Tensor, ctx: Context, layer: int) -> Tensor:
        if layer == 0:
            return self._begin(x, ctx)
        seen = self._seen[tuple(x.shape)]
        if self._entered is None:
            assert seen.rest is not None, "it is reused only once it is there"
            return x + seen.rest if layer == self._last else x
        out = self._inner(x, ctx, layer)
        if layer == self._last:
            seen.rest = out - self._entered
            self._entered = None
        return out

    def _begin(self, x: Tensor, ctx: Context) -> Tensor:
        """The first block, which is always computed, and whether the others are."""
        out = self._inner(x, ctx, 0)
        added = out - x
        before = self._seen.get(tuple(x.shape))
        self._count.looks += 1
        if before is not None and before.rest is not None and self._near(added, before.first):
            self._entered = None
            return out
        self._count.computed += 1
        self._seen[tuple(x.shape)] = _Seen(added)
        self._entered = out.clone()
        return out

    def _near(self, now: Tensor, then: Tensor) -> bool:
        if self._threshold == 0:
            return False
        change = (now - then).abs().mean(dtype=torch.float32) / then.abs().mean(dtype=torch.float32)
        return bool(change <= self._threshold)
