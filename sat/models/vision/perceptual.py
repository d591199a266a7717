"""Distances of pictures in the features of a frozen network, and a discriminator of patches.

``Features`` of a network are maps after several of its stages; their distance is that of LPIPS
(arXiv:1801.03924, eq. 1): channels brought to unit length at each place, squared differences summed over
channels by weights (1 without learned ones), averaged over places, summed over stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.models.vision.classifier import Classifier

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Channels of VGG16's convolutions; 0 is a halving. Source: arXiv:1409.1556, table 1, column D."""
_LPIPS_MEAN, _LPIPS_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of pictures in [-1, 1], for networks trained on ImageNet. Source: lpips, ``ScalingLayer``."""


class Features(Protocol):
    """A frozen network (``nn.Module``) that gives maps of its stages."""

    weights: Sequence[Tensor | None]  # (C,) of each stage; None: 1

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) of every stage, of images (B, 3, H, W) in [-1, 1]."""
        ...


class VGG16Features(nn.Module):
    """The maps of VGG16 after the last rectifier before each halving and at its end: 64 to 512 channels.

    Parameters have torchvision's names (``features.0.weight`` …), so its file loads as it is. Pictures need
    16 pixels a side at least.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers, channels = list[nn.Module](), 3
        for width in VGG16:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.weights: list[Tensor | None] = [None] * 5
        self.register_buffer("mean", torch.tensor(_LPIPS_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_LPIPS_STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, 64, H, W), (B, 128, H / 2, W / 2) … of images (B, 3, H, W) in [-1, 1]."""
        x, maps = (images - self.mean) / self.std, list[Tensor]()
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return [*maps, x]

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Load torchvision's weights; those of its classifier are left out.

        Weights of LPIPS's stages (``lin0.model.1.weight`` (1, C, 1, 1) …) are taken if they are there.
        """
        own = {name: value for name, value in tensors.items() if name.startswith("features.")}
        known = self.state_dict()
        odd = sorted(known.keys() ^ own.keys()) or [n for n, p in known.items() if own[n].shape != p.shape]
        if odd:
            what = "is missing, unknown or of another shape"
            raise ValueError(f"no VGG16 under torchvision's names: {odd[0]!r} {what}")
        self.load_state_dict(own)
        for stage in range(5):
            learned = tensors.get(f"lin{stage}.model.1.weight")
            self.weights[stage] = None if learned is None else learned.flatten().float()


class ClassifierFeatures(nn.Module):
    """The maps of the small classifier after each halving, for pictures of desk size."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.body = classifier.body
        self.weights: list[Tensor | None] = [None] * 4

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, H / 2, W / 2) … (B, C, H / 16, W / 16) of images (B, 3, H, W) in [-1, 1]."""
        maps, x = list[Tensor](), images
        for layer in self.body:
            if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) and x is not images:
                maps.append(x)
            x = layer(x)
        return [*maps, x]


def perceptual_distance(features: Features, made: Tensor, target: Tensor) -> Tensor:
    """(B,) distance of images (B, 3, H, W) in [-1, 1]; gradients reach ``made`` alone."""
    with torch.no_grad():
        theirs = features(target)
    total = torch.zeros(len(made), device=made.device)
    for a, b, weight in zip(features(made), theirs, features.weights, strict=True):
        difference = (unit(a) - unit(b)).square()  # (B, C, h, w)
        if weight is not None:
            difference = difference * weight.to(difference)[:, None, None]
        total = total + difference.sum(1).mean((1, 2))
    return total


def unit(x: Tensor) -> Tensor:
    """``x`` (B, C, h, w) with channels of length 1 at each place."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) -> (B, 1, h, w) scores of overlapping patches: high for real ones.

    ``layers`` halvings by 4x4 convolutions from ``width`` channels on (8 times that at most), then two at one
    resolution. Source: PatchGAN, arXiv:1611.07004; group norms in place of batch norms, whose statistics of
    real and made batches differ.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        body: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        inner = width
        for layer in range(1, layers + 1):
            outer, stride = width * min(2**layer, 8), 2 if layer < layers else 1
            body += [
                nn.Conv2d(inner, outer, 4, stride, 1, bias=False),
                nn.GroupNorm(8 if outer % 8 == 0 else 1, outer),
                nn.LeakyReLU(0.2),
            ]
            inner = outer
        self.body = nn.Sequential(*body, nn.Conv2d(inner, 1, 4, 1, 1))
        for module in self.body:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, 1, h, w)."""
        out: Tensor = self.body(images)
        return out


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """Loss of a discriminator: (mean max(0, 1 - real) + mean max(0, 1 + made)) / 2. arXiv:1705.02894."""
    return (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """|gradient of ``reconstruction``| / |that of ``adversarial``| in a decoder's ``last`` weight, up to 1e4.

    So both pull alike at the picture. Source: VQGAN, arXiv:2012.09841, eq. 7.
    """
    (one,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (other,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    weight: Tensor = one.norm() / (other.norm() + 1e-4)
    return weight.clamp(0, 1e4).detach()
