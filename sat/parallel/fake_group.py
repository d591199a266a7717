"""A team of which only this rank is there: for measuring what each of its ranks will take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from sat.parallel.launch import Runtime
from sat.parallel.mesh import Mesh


@contextmanager
def pretended(*, tensor: int = 1, sequence: int = 1) -> Iterator[Mesh]:
    """The mesh of one team, as its first rank sees it; what is sent along it inside the block goes nowhere.

    For tensors without data. Not for a process that has joined others.
    """
    world = math.prod((tensor, sequence))
    runtime = Runtime(0, world, 0, torch.device("cpu"))
    if world == 1:
        yield Mesh(runtime)
        return
    if dist.is_initialized():
        raise RuntimeError("a process that has joined others cannot pretend to be in a team")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # also makes the backend known

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield Mesh(runtime, tensor=tensor, sequence=sequence)
    finally:
        dist.destroy_process_group()
