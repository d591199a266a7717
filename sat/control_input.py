"""Pictures that steer a network beside its text: a control's encoded picture, and how strongly it acts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ImageTokens(NamedTuple):
    """Input of a control for each image token, (B, N, D); sequence parallelism shares it out."""

    tokens: Tensor


class KeysValues(NamedTuple):
    """Further keys and values of one ``layer``, (B, H, R, d) each; sequence parallelism shares heads out."""

    k: Tensor
    v: Tensor
    layer: int

    def of_heads(self, first: int, count: int, whole: int) -> KeysValues:
        """``count`` heads from ``first`` on, where these are of all ``whole`` heads; else as they are."""
        if self.k.shape[1] != whole:
            return self
        heads = slice(first, first + count)
        return KeysValues(self.k[:, heads], self.v[:, heads], self.layer)


@dataclass(frozen=True)
class ControlInput:
    """One picture for the control ``name``, encoded as that control asks, for B images.

    ``strengths`` (B,) count per row; the branch is left out where all are 0. ``start`` and ``end`` are shares
    of the *noise range*: 0 is pure noise, 1 a clean picture, so that a control acts in a run of one step too.
    ``layers`` are weights over the base's layers. ``guess``: the unconditional half of guidance does without
    it; ``blank``: that half gets zeros instead of the picture.
    """

    name: str
    value: Tensor  # (B, …) latents, pixels or features
    strengths: tuple[float, ...]  # (B,)
    start: float = 0.0
    end: float = 1.0
    layers: tuple[float, ...] | None = None  # None: all 1
    guess: bool = False
    blank: bool = False
    kept: Tensor | None = None  # (B,) factor of each row on its device, in training; None: 1
    made: Any = None  # by the control: per image what no step changes, then per step what its layers add

    def rows(self, index: slice) -> ControlInput:
        """A part of the batch."""
        kept = None if self.kept is None else self.kept[index]
        return replace(self, value=self.value[index], strengths=self.strengths[index], kept=kept)

    def cut(self, tile: tuple[slice, slice], size: tuple[int, int]) -> ControlInput:
        """The part of a map that lies at ``tile`` of a latent of ``size`` cells; any other value whole."""
        if self.value.ndim != 4:
            return self
        factors = (self.value.shape[2] // size[0], self.value.shape[3] // size[1])
        rows, columns = (slice(f * s.start, f * s.stop) for f, s in zip(factors, tile, strict=True))
        return replace(self, value=self.value[:, :, rows, columns])

    def null(self) -> ControlInput:
        """The unconditional half's: the same picture, or none in guess mode, or a blank one."""
        strengths = (0.0,) * len(self.strengths) if self.guess else self.strengths
        return replace(
            self, value=torch.zeros_like(self.value) if self.blank else self.value, strengths=strengths
        )

    def acts(self, noise_share: float | None) -> bool:
        """True at a level of this share of noise (None: any) if a strength and a layer's weight are not 0."""
        inside = noise_share is None or self.start <= 1 - noise_share <= self.end
        return inside and any(self.strengths) and (self.layers is None or any(self.layers))

    def weight(self, layer: int, like: Tensor) -> float | Tensor:
        """Strength at a layer of the base: one number, or (B, 1, …) with as many dimensions as ``like``."""
        scale = 1.0 if self.layers is None else self.layers[layer]
        if self.kept is not None:
            each = self.kept.to(like.dtype) * (scale * self.strengths[0])
            return each.view(-1, *[1] * (like.ndim - 1))
        if len(set(self.strengths)) == 1:
            return scale * self.strengths[0]
        each = torch.tensor([scale * s for s in self.strengths], dtype=like.dtype, device=like.device)
        return each.view(-1, *[1] * (like.ndim - 1))


Controls = tuple[ControlInput, ...]
"""Inputs of all controls in use; several may be of one control."""


def stacked(parts: list[Controls]) -> Controls:
    """Batches of the same inputs, one after the other."""
    if len({tuple(own.name for own in part) for part in parts}) > 1:
        raise ValueError("conditions of one batch must have the same controls")
    return tuple(
        replace(
            same[0],
            value=torch.cat([own.value for own in same]),
            strengths=tuple(strength for own in same for strength in own.strengths),
        )
        for same in zip(*parts, strict=True)
    )
