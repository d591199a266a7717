"""What the loader hands to training: one picture with its caption, and a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    text: Tensor | None = None  # (T, C_text) hidden states of the caption, from a cache


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
    text: Tensor | None = None  # (B, T, C_text) hidden states of the captions in the encoder's dtype

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and len(value) != len(self.caption):
                raise ValueError(f"batch: {len(value)} of {field.name} for {len(self.caption)} captions")

    def __len__(self) -> int:
        return len(self.caption)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in memory that a GPU copies from without waiting."""
        return self._each(Tensor.pin_memory)

    def _each(self, act: Callable[[Tensor], Tensor]) -> Batch:
        def acted(value: Any) -> Any:
            return act(value) if isinstance(value, Tensor) else value

        return Batch(**{field.name: acted(getattr(self, field.name)) for field in fields(self)})


def collate(samples: Sequence[Sample]) -> Batch:
    """``samples``, all of one size, as a batch."""
    if not samples:
        raise ValueError("a batch needs at least one sample")

    def stacked(name: str) -> Tensor | None:
        values = [value for sample in samples if (value := getattr(sample, name)) is not None]
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1 or len(values) not in (0, len(samples)):
            found = sorted(map(str, shapes))
            raise ValueError(
                f"samples of one batch must have one shape, got {found} in {len(values)} of {len(samples)} "
                f"({name})"
            )
        return torch.stack(values) if values else None

    return Batch(
        caption=[sample.caption for sample in samples],
        original_size=torch.tensor([sample.original_size for sample in samples]),
        crop=torch.tensor([sample.crop for sample in samples]),
        target_size=torch.tensor([sample.target_size for sample in samples]),
        image=stacked("image"),
        latent_moments=stacked("latent_moments"),
        low_moments=stacked("low_moments"),
        text=stacked("text"),
    )
