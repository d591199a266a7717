"""What the loader hands to training: one picture with its caption, and a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One picture with its caption. Sizes are pixels, (height, width) or (top, left)."""

    caption: str
    original_size: tuple[int, int]  # of the file
    crop: tuple[int, int]  # where the target was cut from the resized picture
    target_size: tuple[int, int]  # of the picture as trained on
    image: Tensor | None = None  # (3, H, W) float32 in [-1, 1]
    latent_moments: Tensor | None = None  # (2C, h, w) float32: mean and log variance, unscaled
    low_moments: Tensor | None = None  # the same of the low-resolution image, enlarged, for relay


@dataclass(frozen=True)
class Batch:
    """B pictures with captions and size conditions; ``image`` or, from a latent cache, ``latent_moments``."""

    caption: list[str]
    original_size: Tensor  # (B, 2) int64 height, width
    crop: Tensor  # (B, 2) int64 top, left
    target_size: Tensor  # (B, 2) int64 height, width
    image: Tensor | None = None  # (B, 3, H, W) float32 in [-1, 1]
    latent_moments: Tensor | None = None  # (B, 2C, h, w) float32: mean and log variance, unscaled
    low_moments: Tensor | None = None  # the same of the low-resolution images, enlarged, for relay

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and len(value) != len(self.caption):
                raise ValueError(f"batch: {len(value)} of {field.name} for {len(self.caption)} captions")

    def __len__(self) -> int:
        return len(self.caption)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""

        def moved(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return Batch(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})


def collate(samples: Sequence[Sample]) -> Batch:
    """``samples``, all of one size, as a batch."""
    if not samples:
        raise ValueError("a batch needs at least one sample")
    shapes = {None if sample.image is None else tuple(sample.image.shape) for sample in samples}
    if len(shapes) > 1:
        raise ValueError(f"samples of one batch must have one shape, got {sorted(map(str, shapes))}")
    images = [sample.image for sample in samples if sample.image is not None]
    moments = [sample.latent_moments for sample in samples if sample.latent_moments is not None]
    low = [sample.low_moments for sample in samples if sample.low_moments is not None]
    return Batch(
        caption=[sample.caption for sample in samples],
        original_size=torch.tensor([sample.original_size for sample in samples]),
        crop=torch.tensor([sample.crop for sample in samples]),
        target_size=torch.tensor([sample.target_size for sample in samples]),
        image=torch.stack(images) if images else None,
        latent_moments=torch.stack(moments) if moments else None,
        low_moments=torch.stack(low) if low else None,
    )
