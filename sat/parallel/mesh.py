"""Mesh of all ranks: data x guidance x sequence x tensor. Also DeepSpeed's ``mpu``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sat.errors import UserError
from sat.parallel.launch import Runtime

AXES = ("data", "guidance", "sequence", "tensor")


class LayoutError(UserError, ValueError):
    """The number of processes does not fit the layout that is asked for."""


@dataclass(frozen=True)
class Axis:
    """Ranks along one direction of the mesh; this rank is number ``rank`` of ``size``.

    ``group`` is None for an axis of one rank, along which nothing is sent.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        """The same: a copied model talks to the same ranks."""
        return self


ALONE = Axis()
"""An axis of this rank only."""


class Mesh:
    """Ranks laid out as (data, guidance, sequence, tensor), tensor ranks adjacent.

    ``guidance``, ``sequence`` and ``tensor`` are this rank's axes, ``team`` all three together: the ranks
    that work on the same images. ``gradient`` is data x guidance x sequence.

    DeepSpeed takes it as ``mpu``. Its "data parallel" group is ``gradient``, because gradients are averaged
    over all of it; the sequence methods that DeepSpeed probes for are left out: they would scale gradients
    wrongly.
    """

    def __init__(self, runtime: Runtime, *, tensor: int = 1, sequence: int = 1, guidance: int = 1) -> None:
        data = data_ranks(runtime.world, tensor=tensor, sequence=sequence, guidance=guidance)
        shape = (data, guidance, sequence, tensor)
        self.sizes = dict(zip(AXES, shape, strict=True))
        ranks = torch.arange(runtime.world).view(shape)

        def axis(*names: str) -> Axis:
            """The ranks that differ from this one along ``names`` alone; every rank makes all such groups."""
            dims = [AXES.index(name) for name in names]
            size = math.prod(shape[dim] for dim in dims)
            lines = ranks.movedim(dims, list(range(-len(dims), 0))).reshape(-1, size).tolist()
            own = next(line for line in lines if runtime.rank in line)
            if not dist.is_initialized():
                return ALONE
            if size == runtime.world:
                return Axis(size, runtime.rank, dist.group.WORLD)
            wait = timedelta(seconds=runtime.timeout)
            group, _ = dist.new_subgroups_by_enumeration(lines, timeout=wait)  # type: ignore[no-untyped-call]
            return Axis(size, own.index(runtime.rank), group)

        self.guidance, self.sequence, self.tensor = axis("guidance"), axis("sequence"), axis("tensor")
        self.team, self.gradient = axis(*AXES[1:]), axis(*AXES[:3])
        self.rank = runtime.rank
        self.data_rank = runtime.rank // (runtime.world // data)

    def __str__(self) -> str:
        """The axes longer than 1, as ``data 2 x sequence 2``."""
        return " x ".join(f"{name} {size}" for name, size in self.sizes.items() if size > 1) or "one rank"

    @property
    def data_ranks(self) -> int:
        """Number of teams, which work on different images; ``data_rank`` is the index of this one."""
        return self.sizes["data"]

    @property
    def leads(self) -> bool:
        """True on the first rank of each team, which writes the images."""
        return self.team.rank == 0

    # DeepSpeed's mpu: the seven methods the engine calls.
    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks over which gradients are averaged and optimizer state is sharded."""
        return self.gradient.group

    def get_data_parallel_world_size(self) -> int:
        """Size of the gradient group."""
        return self.gradient.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Tensor ranks of one model."""
        return self.tensor.group

    def get_model_parallel_world_size(self) -> int:
        """Number of tensor ranks."""
        return self.tensor.size

    def get_model_parallel_rank(self) -> int:
        """This rank's place among the tensor ranks; names the checkpoint file."""
        return self.tensor.rank

    def get_tensor_model_parallel_rank(self) -> int:
        """The same under its newer name."""
        return self.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """The same under its newer name."""
        return self.tensor.size


def data_ranks(world: int, *, tensor: int = 1, sequence: int = 1, guidance: int = 1) -> int:
    """Number of teams of tensor x sequence x guidance ranks in ``world``; they must fill it."""
    inner = tensor * sequence * guidance
    if min(tensor, sequence, guidance) < 1 or world % inner:
        raise LayoutError(
            f"parallel.tensor {tensor} x sequence {sequence} x guidance {guidance} needs {inner} processes a "
            f"model, and this run has {world}: start {inner}, {2 * inner}, {3 * inner} or a multiple of "
            f"{inner}, as torchrun --standalone --nproc_per_node {inner} does, or change the layout"
        )
    return world // inner


# -- one rank of a team without the others, to measure the memory of each


@contextmanager
def fake_group(*, tensor: int = 1, sequence: int = 1) -> Iterator[Mesh]:
    """Mesh of one team as its first rank sees it; collectives inside the block send nothing.

    For tensors without data, in a process that has not joined others.
    """
    world = math.prod((tensor, sequence))
    runtime = Runtime(0, world, 0, torch.device("cpu"))
    if world == 1:
        yield Mesh(runtime)
        return
    if dist.is_initialized():
        raise RuntimeError("a process that has joined others cannot measure a team of others")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # also makes the backend known

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield Mesh(runtime, tensor=tensor, sequence=sequence)
    finally:
        dist.destroy_process_group()
