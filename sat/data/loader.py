"""Batches without end, in an order that depends on the seed alone; exact to resume."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sat.data.batch import Batch, BatchOrder, Group, ItemStream, Sample, collate, one_group
from sat.data.dataset import Items
from sat.data.records import DataError

log = logging.getLogger(__name__)
Prepare = Callable[[int, Batch], Batch]
"""Last work on a batch, by its number since the iteration began, before it is pinned."""
AHEAD = 2  # batches that are read before they are asked for


class Loader:
    """This rank's batches of ``items``, ``batch_size`` each, for ever.

    All ranks walk one stream of items: the epochs' shuffles one after the other, so that every item comes
    once in an epoch over all ranks and a batch may span two epochs. Each step takes ``world * batch_size``
    items from it, the ranks in turn. The position is the number of items all ranks have taken; it means the
    same for any number of ranks.

    ``groups`` (aspect-ratio buckets; None: one group of all) have a stream each, and each step takes from
    one of them, the same on all ranks. ``workers``: threads that read ahead (0: none). ``pin``: batches lie
    in pinned memory, from which a GPU copies without waiting.
    """

    def __init__(
        self,
        items: Items,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        groups: Sequence[Group] | None = None,
        pin: bool = False,
    ) -> None:
        if len(items) < 1:
            raise DataError("the data set is empty")
        if batch_size < 1:
            raise ValueError(f"train.batch_size {batch_size}: expected at least 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: expected 0 <= rank < world")
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self.rank, self.world, self.workers, self.pin = rank, world, workers, pin
        groups = one_group(len(items)) if groups is None else list(groups)
        several = len(groups) > 1
        self._streams = [ItemStream(group, seed, i if several else None) for i, group in enumerate(groups)]
        self._per_round = [[share.per_round for share in group] for group in groups]
        self.position = 0
        self._begin(0, [0] * len(groups))

    def _begin(self, since: int, taken: Sequence[int]) -> None:
        """Order the groups anew from position ``since``, where ``taken`` items of each are gone."""
        self._since, self._taken = since, list(taken)
        sizes = [stream.size for stream in self._streams]
        self._order = BatchOrder(sizes, self.stride, (self.seed, since, len(sizes)))

    @property
    def stride(self) -> int:
        """Items that all ranks take in a step."""
        return self.world * self.batch_size

    @property
    def epoch(self) -> float:
        """Number of passes over the data so far."""
        return self.position / sum(stream.size for stream in self._streams)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch given out."""
        state: dict[str, Any] = {"position": self.position, "seed": self.seed, "items": len(self.items)}
        if self._plain:
            return state
        groups = {"since": self._since, "taken": self._taken, "stride": self.stride}
        return state | {"draws": self._per_round, "groups": groups}

    @property
    def _plain(self) -> bool:
        return self._per_round == [[len(self.items)]]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; the data, its weights and buckets, and the seed must be the same."""
        now = self.state_dict()
        for name in ("seed", "items", "draws"):
            if state.get(name) != now.get(name):
                what = "weights and buckets" if name == "draws" else name
                raise ValueError(
                    f"cannot go on in the data: it was left with {what} {state.get(name)}, now {what} "
                    f"{'are' if name == 'draws' else 'is'} {now.get(name)}; "
                    "use the same data and seed, or start a new run from the weights"
                )
        self.position = int(state["position"])
        if "groups" not in state:
            return
        since, taken, stride = (state["groups"][name] for name in ("since", "taken", "stride"))
        if stride == self.stride:
            self._begin(since, taken)
            return
        sizes = [stream.size for stream in self._streams]
        left = BatchOrder(sizes, stride, (self.seed, since, len(sizes)))
        given = left.given((self.position - since) // stride)
        self._begin(self.position, [gone + stride * count for gone, count in zip(taken, given, strict=True)])

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on."""
        return self.batches(lambda number, batch: batch)

    def batches(self, prepare: Prepare) -> Iterator[Batch]:
        """Batches from the current position on, each after ``prepare``, which a thread may run ahead."""

        def together(number: int, jobs: Sequence[Future[Sample]]) -> Batch:
            batch = prepare(number, collate([job.result() for job in jobs]))  # begun before: no vain wait
            return batch.pinned() if self.pin else batch

        start = self.position
        if self.workers < 1:
            for number in itertools.count():
                samples = [self.items.get(*job, self.seed) for job in self._jobs(self.position)]
                self.position += self.stride
                batch = prepare(number, collate(samples))
                yield batch.pinned() if self.pin else batch

        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="data")
        waiting: deque[Future[Batch]] = deque()  # read and put together by threads meanwhile
        numbers = itertools.count()
        try:
            while True:
                while len(waiting) < AHEAD:
                    jobs = [pool.submit(self.items.get, *job, self.seed) for job in self._jobs(start)]
                    waiting.append(pool.submit(together, next(numbers), jobs))
                    start += self.stride
                batch = waiting.popleft().result()
                self.position += self.stride
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _jobs(self, position: int) -> list[tuple[int, int]]:
        """(item, epoch) of this rank's batch that begins at ``position``."""
        if len(self._streams) == 1:
            stream, start = self._streams[0], position
        else:
            group, number = self._order.at((position - self._since) // self.stride)
            stream, start = self._streams[group], self._taken[group] + number * self.stride
        start += self.rank * self.batch_size
        return [stream.at(place) for place in range(start, start + self.batch_size)]

    def index(self, place: int) -> int:
        """The item at ``place`` of the stream (without groups)."""
        return self._streams[0].at(place)[0]


def validation_batches(
    items: Items,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    groups: Sequence[Group] | None = None,
    pin: bool = False,
) -> list[Batch]:
    """Every item once and in order, as whole batches shared over the ranks in turn; the same each time.

    All ranks get equally many batches of equal size, each of one group, so up to one round of
    every group's items is left out; if no group has enough items for one round, those of the largest are
    repeated to fill it.
    """
    members = [
        [int(item) for share in group for item in share.items] for group in (groups or one_group(len(items)))
    ]
    stride = batch_size * world
    rounds = [len(group) // stride for group in members]
    if not any(rounds):
        rounds[max(range(len(members)), key=lambda place: len(members[place]))] = 1
    shown = sum(rounds) * stride
    if rank == 0 and shown != len(items):
        log.warning("validation shows %d pictures in whole batches; there are %d", shown, len(items))
    batches = []
    for group, count in zip(members, rounds, strict=True):
        for round_ in range(count):
            start = round_ * stride + rank * batch_size
            places = range(start, start + batch_size)
            batch = collate([items.get(group[place % len(group)], 0, seed) for place in places])
            batches.append(batch.pinned() if pin else batch)
    return batches
