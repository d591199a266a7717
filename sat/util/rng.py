"""Random numbers of a sampling run: one generator per image, so that no image depends on another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SEED_LIMIT = 2**32
"""torch's CPU generator looks at 32 bits of a seed: 2**32 would silently repeat seed 0."""


def image_noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """Unit normal noise of image ``index``: ``shape`` (C, h, w) float32 on the CPU, from ``seed + index``.

    Drawn on the CPU whatever the device, so one seed means one picture everywhere; equal for every batch
    size, order of prompts and number of ranks because each image has its own generator.
    """
    generator = torch.Generator(device="cpu").manual_seed(checked_seed(seed + index))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def checked_seed(seed: int) -> int:
    """``seed`` itself if a generator tells it from every other seed, else an error."""
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(
            f"seed {seed} is out of range: 0 to {SEED_LIMIT - 1} (image i of a batch uses seed + i)"
        )
    return seed
