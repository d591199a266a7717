"""Pictures shown before the finished ones: colours of unfinished latents, and pictures of controls."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sat.config.check import build
from sat.config.schema.base import ControlConfig
from sat.engine import DiffusionEngine
from sat.sampling.output import from_pil, to_pil
from sat.util.pictures import fitted, with_alpha

if TYPE_CHECKING:
    from sat.control.files import ControlInfo


class LatentPreview:
    """A 3 x C matrix and three offsets: each latent cell becomes the mean colour of its pixels.

    ``weight`` (3, C) and ``bias`` (3,) are float64 on the CPU; colours are in [0, 1].
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    @torch.inference_mode()
    def fit(cls, engine: DiffusionEngine) -> LatentPreview:
        """Least squares from latents of made-up pictures to their colours: no decoding, no data.

        The 12 pictures of 16 x 16 cells are shaded discs on white and on coloured grounds, always the same.
        """
        factor, device = engine.first_stage.factor, next(engine.first_stage.parameters()).device
        generator, side = torch.Generator().manual_seed(0), 16 * factor
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")

        def unit(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        drawings = []
        for index in range(12):
            image = (unit(3, 1, 1) * 2 - 1 if index % 2 else torch.ones(3, 1, 1)).expand(3, side, side)
            for _ in range(6):
                colour, (left, top, size) = unit(3, 1, 1) * 2 - 1, unit(3).tolist()
                radius = (0.08 + 0.25 * size) * side
                across, down = (x - left * side) / radius, (y - top * side) / radius
                shaded = (colour + 0.2 * (across + down)).clamp(-1, 1)
                image = torch.where(across**2 + down**2 < 1, shaded, image)
            drawings.append(image)
        images = torch.stack(drawings)  # (12, 3, side, side) in [-1, 1]
        shape = (len(images), *engine.latent_shape(side, side))
        latents = engine.encode(images.to(device), torch.zeros(shape, device=device)).double().cpu()
        cells = F.avg_pool2d(images, factor).add(1).div(2).double()
        a = rearrange(latents, "b c h w -> (b h w) c")
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)  # with an offset
        gram = a.T @ a + 1e-3 * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        found = torch.linalg.solve(gram, a.T @ rearrange(cells, "b c h w -> (b h w) c"))
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


@dataclass(frozen=True)
class ControlEntry:
    """A trained control that can be used: its file and usual settings, and the description in it."""

    config: ControlConfig
    info: ControlInfo

    def picture(self, image: Image.Image, height: int, width: int, imports: Sequence[str]) -> Image.Image:
        """The control's picture made of a plain one, as for its training."""
        assert self.info.picture is not None, "asked for before"
        shown = fitted(with_alpha(image).rgb, height, width, self.config.fit)
        made: Tensor = build(self.info.picture, imports=imports)(from_pil(shown), random.Random("0/0"))
        return to_pil(made[:3].add(1).div(2))
