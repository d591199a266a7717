"""The first stage: images to latents and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sat.first_stage.blocks import Pointwise
from sat.first_stage.decoder import Decoder
from sat.first_stage.encoder import Encoder
from sat.first_stage.posterior import Posterior


class AutoencoderKL(nn.Module):
    """Convolutional autoencoder with a Gaussian latent: (B, 3, H, W) in [-1, 1] <-> (B, C, H/f, W/f).

    The defaults are the 16-channel autoencoder of CogView3-Plus. The 4-channel one of CogView3 is
    ``width=128, multipliers=(1, 2, 4, 4), res_blocks=2, latent_channels=4, mid_attention=True,
    quant_convs=True, scale_factor=0.13025``. Level i is ``width * multipliers[i]`` wide; every level but the
    last halves the image, so the factor f is 2 ** (levels - 1). Latents in and out are unscaled: the caller
    multiplies by ``scale_factor`` after encoding and divides before decoding.

    Source: arXiv:2112.10752; official ``sgm/models/autoencoder.py``; equal to diffusers' ``AutoencoderKL``
    (tests/parity/test_first_stage.py).
    """

    def __init__(  # noqa: PLR0913 - the fields of the YAML component
        self,
        width: int = 128,
        multipliers: Sequence[int] = (1, 4, 8, 8),
        res_blocks: int = 3,
        latent_channels: int = 16,
        groups: int = 32,
        mid_attention: bool = False,
        quant_convs: bool = False,
        scale_factor: float = 1.0,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        if (
            not multipliers
            or min(width, res_blocks, latent_channels, groups, image_channels, *multipliers) < 1
        ):
            raise ValueError(
                f"first_stage: width {width}, multipliers {list(multipliers)}, res_blocks {res_blocks}, "
                f"latent_channels {latent_channels}, groups {groups}, image_channels {image_channels}: "
                f"all must be at least 1"
            )
        if not scale_factor > 0:
            raise ValueError(f"first_stage.scale_factor is {scale_factor}, expected a positive number")
        widths = [width * multiplier for multiplier in multipliers]
        self.factor = 2 ** (len(widths) - 1)
        self.channels = latent_channels
        self.image_channels = image_channels
        self.scale_factor = scale_factor
        self.encoder = Encoder(
            widths,
            blocks=res_blocks,
            groups=groups,
            latent_channels=latent_channels,
            image_channels=image_channels,
            mid_attention=mid_attention,
        )
        self.decoder = Decoder(
            widths,
            blocks=res_blocks,
            groups=groups,
            latent_channels=latent_channels,
            image_channels=image_channels,
            mid_attention=mid_attention,
        )
        self.quant = Pointwise(2 * latent_channels, 2 * latent_channels) if quant_convs else nn.Identity()
        self.post_quant = Pointwise(latent_channels, latent_channels) if quant_convs else nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type; inputs are cast to it."""
        return next(self.parameters()).dtype

    def encode(self, image: Tensor) -> Posterior:
        """Distribution of the unscaled latents (B, C, H/f, W/f) of images (B, 3, H, W) in [-1, 1]."""
        self.check_image(image)
        return Posterior.from_moments(self.quant(self.encoder(image.to(self.dtype))))

    def decode(self, latent: Tensor) -> Tensor:
        """Images (B, 3, f*h, f*w), about [-1, 1] and not clamped, of unscaled latents (B, C, h, w)."""
        self.check_latent(latent)
        out: Tensor = self.decoder(self.post_quant(latent.to(self.dtype)))
        return out

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruction (B, 3, H, W) of images (B, 3, H, W) through the mode of the latent."""
        return self.decode(self.encode(image).mode())

    def check_image(self, image: Tensor) -> None:
        """Refuse an image batch that the encoder cannot take."""
        if image.ndim != 4 or image.shape[1] != self.image_channels:
            raise ValueError(
                f"image batch is {tuple(image.shape)}, expected (B, {self.image_channels}, H, W)"
            )
        height, width = image.shape[2:]
        if height % self.factor or width % self.factor or not height or not width:
            nearest = [max(self.factor, round(side / self.factor) * self.factor) for side in (height, width)]
            raise ValueError(
                f"image is {height} x {width} pixels (height x width); the first stage needs multiples of "
                f"{self.factor}, nearest: {nearest[0]} x {nearest[1]}"
            )

    def check_latent(self, latent: Tensor) -> None:
        """Refuse a latent batch that the decoder cannot take."""
        if latent.ndim != 4 or latent.shape[1] != self.channels or not latent.shape[2] or not latent.shape[3]:
            raise ValueError(f"latent batch is {tuple(latent.shape)}, expected (B, {self.channels}, h, w)")
