"""Latents as small pictures without the decoder: a linear map to colours, fitted once to the autoencoder."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sat.engine import DiffusionEngine
from sat.util.images import to_pil

_CELLS = 16
_COUNT, _DISCS = 12, 6
_RIDGE = 1e-3


class LatentPreview:
    """A 3 x C matrix and three offsets: each latent cell becomes the mean colour of its pixels.

    ``weight`` (3, C) and ``bias`` (3,) are float64 on the CPU; colours are in [0, 1].
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    @torch.inference_mode()
    def fit(cls, engine: DiffusionEngine) -> LatentPreview:
        """Least squares from latents of made-up pictures to their colours: no decoding, no data."""
        factor, device = engine.first_stage.factor, next(engine.first_stage.parameters()).device
        images = _drawings(factor)
        shape = (len(images), *engine.latent_shape(*images.shape[2:]))
        latents = engine.encode(images.to(device), torch.zeros(shape, device=device))
        cells = F.avg_pool2d(images, factor).add(1).div(2).double()
        x = latents.double().cpu().movedim(1, -1).flatten(0, 2)
        y = cells.movedim(1, -1).flatten(0, 2)
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        gram = x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        found = torch.linalg.solve(gram, x.T @ y)
        return cls(found[:-1].T.contiguous(), found[-1])

    @torch.inference_mode()
    def colours(self, latents: Tensor) -> Tensor:
        """(B, 3, h, w) float32 in [0, 1] on the CPU, of latents (B, C, h, w) anywhere."""
        z = latents.double().cpu()
        out = torch.einsum("kc,bchw->bkhw", self.weight, z) + self.bias[:, None, None]
        return out.clamp(0, 1).float()

    def images(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of h x w pixels."""
        return [to_pil(image) for image in self.colours(latents)]


def _drawings(factor: int) -> Tensor:
    """(12, 3, 16 f, 16 f) in [-1, 1]: shaded discs on white and on coloured grounds, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    side = _CELLS * factor
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")

    def unit(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    out = []
    for index in range(_COUNT):
        image = (unit(3, 1, 1) * 2 - 1 if index % 2 else torch.ones(3, 1, 1)).expand(3, side, side)
        for _ in range(_DISCS):
            colour, (left, top, size) = unit(3, 1, 1) * 2 - 1, unit(3).tolist()
            radius = (0.08 + 0.25 * size) * side
            across, down = (x - left * side) / radius, (y - top * side) / radius
            shaded = (colour + 0.2 * (across + down)).clamp(-1, 1)
            image = torch.where(across**2 + down**2 < 1, shaded, image)
        out.append(image)
    return torch.stack(out)
