"""What one step computes with: its precision and its random numbers."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sat.config.schema import TrainConfig
from sat.parallel.launch import Runtime

VALIDATION = -1
"""The step that validation draws its noise for: the same noise every time."""


def computing(config: TrainConfig, runtime: Runtime) -> AbstractContextManager[Any]:
    """bf16 computation with float32 weights, if ``train.autocast`` asks for it."""
    if config.autocast is None:
        return nullcontext()
    return torch.autocast(runtime.device.type, torch.bfloat16)


def step_generator(seed: int, step: int, place: int) -> torch.Generator:
    """A CPU generator for the micro-batch at ``place`` among those of one step over all ranks.

    Also seeds torch's global generators, for modules that draw from them. Nothing random is carried from step
    to step, so a resumed run needs no generator state, and a step does not depend on how its micro-batches
    are split over ranks and accumulation.
    """
    digest = hashlib.blake2b(f"{seed} {step} {place}".encode(), digest_size=4).digest()
    mixed = int.from_bytes(digest, "little")  # 32 bits: torch's CPU generator looks at no more
    torch.manual_seed(mixed)
    return torch.Generator().manual_seed(mixed)
