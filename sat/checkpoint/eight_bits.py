"""Files of 8 bits a weight: small networks whose matrices are stored as int8 with a scale of each output.

A row w of a weight (its values for one output channel) is stored as round(w / s), s = max |w| / 127, under
its own name, and s (float32) under that name and ``.scale``. Reading makes the weight whole again: nothing
runs in int8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sat.checkpoint.format import CheckpointError, LazyStateDict, TensorInfo, View

SCALE = ".scale"  # ending of the name of a weight's scales


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with floating-point ones of two and more dimensions (O, …) as int8 and scales (O,)."""
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value.is_floating_point() and value.ndim > 1:
            scale = (value.float().flatten(1).abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            rows = value.float() / scale.view(-1, *[1] * (value.ndim - 1))
            out[name], out[name + SCALE] = rows.round().to(torch.int8).contiguous(), scale
        else:
            out[name] = value.contiguous()
    return out


class Whole(View):
    """The tensors of ``inner``, of which those of :func:`packed` are made whole in float32 when read."""

    def __init__(self, inner: LazyStateDict) -> None:
        super().__init__(inner)
        self._codes = {name for name in inner if inner.info(name).dtype == torch.int8}
        for name in self._codes:
            rows, scale = inner.info(name).shape[:1], name + SCALE
            if scale not in inner or inner.info(scale).shape != rows:
                raise CheckpointError(f"{inner.source}: {name!r} is of 8 bits and has no scales {list(rows)}")

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        found = self.inner.info(key)
        return TensorInfo(found.shape, torch.float32) if key in self._codes else found

    def release(self, key: str) -> None:
        """Pass the hint on."""
        self.inner.release(key)
        if key in self._codes:
            self.inner.release(key + SCALE)

    def __getitem__(self, key: str) -> Tensor:
        value = self.inner[key]
        if key not in self._codes:
            return value
        return value.float() * self.inner[key + SCALE].float().view(-1, *[1] * (value.ndim - 1))

    def __iter__(self) -> Iterator[str]:
        scales = {name + SCALE for name in self._codes}
        return (name for name in self.inner if name not in scales)

    def __len__(self) -> int:
        return len(self.inner) - len(self._codes)
