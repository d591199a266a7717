"""Step caches: a step where the network would do much as before reuses what it did then.

Off unless ``sampling.cache`` names one. A cache lasts for one call of ``DiffusionEngine.sample``: pictures do
not influence each other, except those that are drawn together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sat.mixin import Mixin, wraps
from sat.transformer import Context, Transformer, TransformerHooks
from sat.transformer.hooks import Layer

NAME = "step cache"


@dataclass
class Count:
    """Evaluations of the network, and those ``computed`` whole."""

    evaluations: int = 0
    computed: int = 0

    def add(self, other: Count) -> None:
        """Count ``other`` too."""
        self.evaluations += other.evaluations
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
        """Wrap the transformer's hook ``layer`` meanwhile."""
        transformer = transformer_of(network)
        transformer.extend(NAME, _Run(len(transformer.blocks), self.threshold, count))
        try:
            yield
        finally:
            transformer.remove(NAME)


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
    """Residuals of the last computed step of some rows: of its first block, and of all others together."""

    first: Tensor
    rest: Tensor | None = None


class _Run(Mixin):
    """The cache during one sampling run."""

    host = TransformerHooks

    def __init__(self, depth: int, threshold: float, count: Count) -> None:
        super().__init__()
        self._last, self._threshold, self._count = depth - 1, threshold, count
        self._seen: dict[tuple[int, ...], _Seen] = {}  # by rows and tokens: guidance may show only some
        self._entered: Tensor | None = None  # output of the first block where the step is computed

    @wraps("layer")
    def layer(self, inner: Layer, x: Tensor, ctx: Context, layer: int) -> Tensor:
        key = tuple(x.shape)
        if layer == 0:  # always computed; decides whether the others are
            out = inner(x, ctx, 0)
            added, before = out - x, self._seen.get(key)
            self._count.evaluations += 1
            if self._threshold and before is not None and before.rest is not None:
                change = (added - before.first).abs().mean(dtype=torch.float32)
                if change / before.first.abs().mean(dtype=torch.float32) <= self._threshold:
                    self._entered = None
                    return out
            self._count.computed += 1
            self._seen[key] = _Seen(added)
            self._entered = out.clone()
            return out
        seen = self._seen[key]
        if self._entered is None:
            assert seen.rest is not None, "it is reused only once it is there"
            return x + seen.rest if layer == self._last else x
        out = inner(x, ctx, layer)
        if layer == self._last:
            seen.rest = out - self._entered
            self._entered = None
        return out
