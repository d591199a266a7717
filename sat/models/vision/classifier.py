"""A small classifier of the thing that a picture shows and of its style, for the retrieval score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Logits(NamedTuple):
    """Scores of B pictures and the features (B, width) they were made from."""

    concept: Tensor  # (B, concepts)
    style: Tensor  # (B, styles)
    features: Tensor


@dataclass(frozen=True)
class Card:
    """Labels and accuracies of a classifier. ``size``: pixels a side that it reads. Accuracies are shares.

    ``width``: features; ``stages``: channels of the three stages before, by default a quarter, three and five
    sevenths of ``width``.
    """

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    size: int
    width: int
    scores: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, str | int | float] = field(default_factory=dict)
    stages: tuple[int, ...] = ()

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Card:
        """The card of a parsed ``classifier.json``."""
        lists = {name: tuple(raw[name]) for name in ("concepts", "styles", "stages") if name in raw}
        return cls(**{**raw, **lists})


class _Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(width, width, 1), nn.ReLU(), *_conv(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(x + self.body(x))
        return out


def _conv(inner: int, outer: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """A 3x3 convolution and its batch norm."""
    return nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outer)


class Classifier(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] of any size -> :class:`Logits`; 0.3 M parameters at width 112.

    Four halvings, two residual blocks, the mean over the picture, two linear heads. ``real_mean`` (width) and
    ``real_cov`` (width, width) are the features' statistics on real pictures, for the Fréchet distance.
    """

    real_mean: Tensor
    real_cov: Tensor

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        width = card.width
        usual = (max(width // 4, 1), max(width * 3 // 7, 1), max(width * 5 // 7, 1))
        stem, low, middle = card.stages or usual
        self.body = nn.Sequential(
            *_conv(3, stem, 2), nn.ReLU(),
            *_conv(stem, low, 2), nn.ReLU(), _Residual(low),
            *_conv(low, middle, 2), nn.ReLU(), _Residual(middle),
            *_conv(middle, width, 2), nn.ReLU(),
        )  # fmt: skip
        self.concept = nn.Linear(width, len(card.concepts))
        self.style = nn.Linear(width, len(card.styles))
        self.register_buffer("real_mean", torch.zeros(width))
        self.register_buffer("real_cov", torch.eye(width))

    def forward(self, images: Tensor) -> Logits:
        """:class:`Logits` of images (B, 3, H, W) in [-1, 1]."""
        side = self.card.size
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
        features = self.body(images).mean(dim=(2, 3))  # (B, width, H / 16, W / 16) -> (B, width)
        return Logits(self.concept(features), self.style(features), features)

    @torch.no_grad()
    def start(self, other: Classifier) -> None:
        """Take the body of ``other``, of equal widths, and the rows of its heads for the labels of both."""
        self.body.load_state_dict(other.body.state_dict())
        for name in ("concept", "style"):
            here, there = getattr(self.card, f"{name}s"), getattr(other.card, f"{name}s")
            own, theirs = getattr(self, name), getattr(other, name)
            both = [(here.index(label), row) for row, label in enumerate(there) if label in here]
            to, rows = (list(indices) for indices in zip(*both, strict=True))
            own.weight[to], own.bias[to] = theirs.weight[rows], theirs.bias[rows]

    def keep(self, concepts: int, styles: int) -> None:
        """Forget all but the first ``concepts`` and ``styles`` labels."""
        for head, count in ((self.concept, concepts), (self.style, styles)):
            head.weight = nn.Parameter(head.weight[:count].detach().clone())
            head.bias, head.out_features = nn.Parameter(head.bias[:count].detach().clone()), count
        card = self.card
        self.card = replace(card, concepts=card.concepts[:concepts], styles=card.styles[:styles])


def embed(model: Classifier, images: Tensor, batch_size: int = 256) -> Logits:
    """:class:`Logits`, float32 on the CPU, of images (B, 3, H, W) in [-1, 1]; without gradients."""
    device = model.concept.weight.device
    parts: list[Logits] = []
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            out = model(images[start : start + batch_size].to(device))
            parts.append(Logits(*(value.float().cpu() for value in out)))
    return Logits(*(torch.cat(values) for values in zip(*parts, strict=True)))


def top_shares(logits: Tensor, target: Tensor, at: Sequence[int] = (1, 5)) -> list[float]:
    """Share of rows of ``logits`` (B, classes) with ``target`` (B) among the best k, for each k of ``at``."""
    ranked = logits.argsort(dim=1, descending=True)
    return [(ranked[:, :k] == target[:, None]).any(1).double().mean().item() for k in at]
