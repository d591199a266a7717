"""Random numbers of a sampling run: one generator per image, so that no image depends on another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SEED_LIMIT = 2**32
"""torch's CPU generator looks at 32 bits of a seed: 2**32 would silently repeat seed 0."""


class ImageRng:
    """Unit normal noise of some images, (n, C, h, w) float32 on the CPU: each row from its image's generator.

    Every call takes the next numbers of each generator, so the rows are the same whatever images are drawn
    together. ``given`` latents take the place of the noise that sampling starts from.
    """

    def __init__(
        self, generators: Sequence[torch.Generator], shape: Sequence[int], given: Tensor | None = None
    ) -> None:
        self._generators, self._shape, self._given = list(generators), tuple(shape), given

    @classmethod
    def of(
        cls, seed: int, images: Sequence[int], shape: Sequence[int], given: Tensor | None = None
    ) -> ImageRng:
        """Of images numbered ``images``: image i has a generator seeded with ``seed`` + i.

        On the CPU whatever the device, so one seed means one picture everywhere.
        """
        for own in (seed + i for i in images):
            if not 0 <= own < SEED_LIMIT:
                raise ValueError(
                    f"seed {own} is out of range: 0 to {SEED_LIMIT - 1} (image i of a batch uses seed + i)"
                )
        generators = [torch.Generator(device="cpu").manual_seed(seed + i) for i in images]
        return cls(generators, shape, given)

    def __len__(self) -> int:
        return len(self._generators)

    def start(self) -> Tensor:
        """The noise that sampling starts from."""
        return self.unit() if self._given is None else self._given

    def unit(self) -> Tensor:
        """Noise that has not been given out before."""
        return torch.stack(
            [torch.randn(self._shape, generator=g, dtype=torch.float32) for g in self._generators]
        )


def image_noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """The first unit normal noise of image ``index``: ``shape`` (C, h, w) float32 on the CPU."""
    return ImageRng.of(seed, [index], shape).unit()[0]
