"""Small collectives, free in a single process: votes, means, gathered objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sat.parallel.launch import Axis

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier(device: torch.device) -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier(device_ids=[device.index] if device.index is not None else None)


def agree(flags: list[bool]) -> list[bool]:
    """``flags``, each true on all ranks if it is true on one; devices go on with their work meanwhile."""
    if world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)  # among the hosts: a group has gloo beside nccl
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def mean(values: Tensor) -> Tensor:
    """``values`` averaged over the ranks (float32 or float64, any shape)."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()


def gather(value: Any, axis: Axis | None = None) -> list[Any]:  # noqa: ANN401 - any picklable object
    """``value`` of every rank (of ``axis``), in rank order, on every one of them."""
    size = world_size() if axis is None else axis.size
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=None if axis is None else axis.group)
    return values


def from_main(value: Any) -> Any:  # noqa: ANN401 - any picklable object
    """Rank 0's ``value`` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def by_first(axis: Axis, make: Callable[[], T]) -> T:
    """Call ``make`` on the first rank of ``axis``; its (picklable) result, on all ranks of the axis."""
    if axis.size == 1:
        return make()
    assert axis.group is not None, "an axis of several ranks has a group"
    box: list[Any] = [make() if axis.rank == 0 else None]
    dist.broadcast_object_list(box, src=dist.get_global_rank(axis.group, 0), group=axis.group)
    made: T = box[0]
    return made


def stacked(axis: Axis, x: Tensor) -> Tensor:
    """Stack ``x`` of the S ranks of ``axis``, all of one shape: (S, …). Without a gradient."""
    out = x.new_empty(axis.size, *x.shape)
    # all_gather_single is the name since torch 2.13.
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather_into(out.view(-1), x.contiguous().view(-1), group=axis.group)
    return out


def taking_turns(axis: Axis, jobs: Sequence[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """Results of ``jobs`` (one shape), in order and on every rank of ``axis``; the ranks share the work."""
    for start in range(0, len(jobs), axis.size):
        own = jobs[min(start + axis.rank, len(jobs) - 1)]()
        done = stacked(axis, own) if axis.size > 1 else own[None]
        yield from done[: len(jobs) - start]
