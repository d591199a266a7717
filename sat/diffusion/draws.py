"""Random numbers of a training step, from a generator for each picture by its place in the step.

Every number depends on the seed, the step, the picture's place among all of the step's and the name of what
is drawn, so it is the same however the step is split over micro-batches and ranks, and nothing random is
carried from step to step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    """Source of the random numbers of B pictures, on the CPU unless it says otherwise."""

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) float32, standard normal."""
        ...

    def uniform(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B,) in [0, 1)."""
        ...

    def integers(self, name: str, high: int) -> Tensor:
        """(B,) int64 in 0 … high - 1."""
        ...

    def strata(self) -> Tensor:
        """(B,) float64 in [0, 1), one of each of as many equal parts as there are pictures."""
        ...

    def child(self, key: int) -> Draws:
        """Other numbers for the same pictures, the same at each call with ``key``."""
        ...


def keyed(*key: int | str) -> int:
    """A seed of 32 bits, as torch's CPU generator looks at no more."""
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=4).digest(), "little")


def strata(seed: int, step: int | str, first: int, count: int, total: int) -> Tensor:
    """(count,) float64 shares of the pictures from place ``first`` on, among the ``total`` of a step.

    All of a step hold one number of each of ``total`` equal parts of [0, 1), in a random order.
    """
    generator = torch.Generator().manual_seed(keyed(seed, step, "strata"))
    inside = torch.rand(total, generator=generator, dtype=torch.float64)
    return ((torch.randperm(total, generator=generator) + inside) / total)[first : first + count]


class PictureDraws:
    """Draws for the ``count`` pictures from ``place`` on, among the ``total`` of an optimizer step."""

    def __init__(self, seed: int, step: int | str, place: int, count: int, total: int) -> None:
        self.seed, self.step, self.places, self.total = seed, step, range(place, place + count), total

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) float32, standard normal."""
        return self._stacked(name, lambda generator: torch.randn(tuple(shape), generator=generator))

    def uniform(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B,) in [0, 1)."""
        return self._stacked(name, lambda generator: torch.rand((), generator=generator, dtype=dtype))

    def integers(self, name: str, high: int) -> Tensor:
        """(B,) int64 in 0 … high - 1."""
        return self._stacked(name, lambda generator: torch.randint(high, (), generator=generator))

    def strata(self) -> Tensor:
        """(B,) float64 in [0, 1): the pictures' strata of their step."""
        return strata(self.seed, self.step, self.places.start, len(self.places), self.total)

    def child(self, key: int) -> PictureDraws:
        """Other numbers for the same pictures, the same at each call with ``key``."""
        return PictureDraws(self.seed, f"{self.step}/{key}", self.places.start, len(self.places), self.total)

    def _stacked(self, name: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        """(B, …): what ``draw`` makes of each picture's generator."""
        made, generator = list[Tensor](), torch.Generator()
        for place in self.places:
            made.append(draw(generator.manual_seed(keyed(self.seed, self.step, place, name))))
        return torch.stack(made)


class GeneratorDraws:
    """Draws for ``count`` pictures from one ``generator`` (None: torch's), in the order of the calls.

    For callers with a generator of their own. ``shares``: the pictures' strata, otherwise those of the batch.
    """

    def __init__(
        self,
        count: int,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,  # of what is drawn: the generator's, or this without one
        shares: Tensor | None = None,
    ) -> None:
        self.count, self.generator, self.shares = count, generator, shares
        self.device = device if generator is None else generator.device
        self._seed: int | None = None

    @classmethod
    def of_micro_batch(cls, seed: int, step: int, place: int, count: int, total: int) -> GeneratorDraws:
        """Rule of runs that were saved before ``draws: 2``: one generator for each micro-batch of a step."""
        generator = torch.Generator().manual_seed(keyed(seed, step, place // count))
        shares = None if step < 0 else strata(seed, step, place, count, total)
        return cls(count, generator, shares=shares)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) float32, standard normal."""
        return torch.randn((self.count, *shape), generator=self.generator, device=self.device)

    def uniform(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B,) in [0, 1)."""
        return torch.rand(self.count, generator=self.generator, device=self.device, dtype=dtype)

    def integers(self, name: str, high: int) -> Tensor:
        """(B,) int64 in 0 … high - 1."""
        return torch.randint(high, (self.count,), generator=self.generator, device=self.device)

    def strata(self) -> Tensor:
        """(B,) float64 in [0, 1): given ones, otherwise those of the batch."""
        if self.shares is not None:
            return self.shares
        inside = self.uniform("inside", torch.float64)
        return (
            torch.randperm(self.count, generator=self.generator, device=self.device) + inside
        ) / self.count

    def child(self, key: int) -> GeneratorDraws:
        """Other numbers for the same pictures, the same at each call with ``key``."""
        if self._seed is None:
            self._seed = int(torch.randint(2**31, (), generator=self.generator))
        return GeneratorDraws(self.count, torch.Generator().manual_seed(self._seed + key))
