"""Batches without end, in an order that depends on nothing but the seed; exact to resume."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sat.data.batch import Batch, Sample, collate
from sat.data.dataset import Items
from sat.data.records import DataError


class Loader:
    """This rank's batches of ``items``, ``batch_size`` each, for ever.

    All ranks walk one stream of items: the epochs' shuffles one after the other, so that every item comes
    once in an epoch over all ranks and a batch may span two epochs. Each step takes ``world * batch_size``
    items from it, the ranks in turn. The position is the number of items all ranks have taken; it means the
    same for any number of ranks. ``workers``: threads that read ahead (0: none).
    """

    def __init__(
        self, items: Items, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1, workers: int = 0
    ) -> None:
        if len(items) < 1:
            raise DataError("the data set is empty")
        if batch_size < 1:
            raise ValueError(f"train.batch_size {batch_size}: expected at least 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: expected 0 <= rank < world")
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self.rank, self.world, self.workers = rank, world, workers
        self.position = 0
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def epoch(self) -> float:
        """How many times the data has been seen."""
        return self.position / len(self.items)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch given out."""
        return {"position": self.position, "seed": self.seed, "items": len(self.items)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a position; the data and the seed must be the same."""
        for name, now in (("seed", self.seed), ("items", len(self.items))):
            if state[name] != now:
                raise ValueError(
                    f"cannot go on in the data: it was left with {name} {state[name]}, now {name} is {now}; "
                    "use the same data and seed, or start a new run from the weights"
                )
        self.position = int(state["position"])

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on."""
        if self.workers < 1:
            while True:
                samples = [self._get(place) for place in self._places(self.position)]
                self.position += self.world * self.batch_size
                yield collate(samples)
        else:
            yield from self._read_ahead()

    def _read_ahead(self) -> Iterator[Batch]:
        """As above, the next two batches being read by threads meanwhile."""
        stride = self.world * self.batch_size
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="data")
        waiting: deque[list[Future[Sample]]] = deque()
        start = self.position
        try:
            while True:
                while len(waiting) < 2:
                    jobs = [(self.index(place), place // len(self.items)) for place in self._places(start)]
                    waiting.append(
                        [pool.submit(self.items.get, index, epoch, self.seed) for index, epoch in jobs]
                    )
                    start += stride
                samples = [job.result() for job in waiting.popleft()]
                self.position += stride
                yield collate(samples)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _places(self, position: int) -> range:
        """Places in the stream of this rank's batch that begins at ``position``."""
        start = position + self.rank * self.batch_size
        return range(start, start + self.batch_size)

    def _get(self, place: int) -> Sample:
        return self.items.get(self.index(place), place // len(self.items), self.seed)

    def index(self, place: int) -> int:
        """The item at ``place`` of the stream."""
        epoch, offset = divmod(place, len(self.items))
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._order = (epoch, generator.permutation(len(self.items)))
        return int(self._order[1][offset])


def once(items: Items, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1) -> list[Batch]:
    """Every item once and in order, as whole batches shared over the ranks in turn; the same each time.

    For validation. All ranks get equally many batches of equal size, so up to one round of items is left out;
    if there are too few items for one round, they are repeated to fill it.
    """
    rounds = max(1, len(items) // (batch_size * world))
    batches = []
    for round_ in range(rounds):
        start = (round_ * world + rank) * batch_size
        batches.append(
            collate([items.get(place % len(items), 0, seed) for place in range(start, start + batch_size)])
        )
    return batches
