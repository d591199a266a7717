"""The autoencoder: residual blocks, encoder, decoder and the posterior between pixels and latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sat.embeddings import sent

NORM_EPS = 1e-6


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Affine GroupNorm with the epsilon 1e-6 of the official autoencoders."""
    if channels % groups:
        raise ValueError(
            f"first_stage: {channels} channels cannot be normalised in {groups} groups; "
            f"width times every multiplier must be a multiple of groups"
        )
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class Pointwise(nn.Conv2d):
    """1x1 convolution (B, C_in, h, w) -> (B, C_out, h, w).

    For float32 pictures on the CPU it is a matrix product: oneDNN's 1x1 convolution rounds differently with
    the number of threads, and a picture must not depend on that.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(x)
        weight = self.weight[:, :, 0, 0]
        if x.is_contiguous():  # either way the memory format stays
            out = torch.matmul(weight, x.flatten(2)).view(len(x), len(weight), *x.shape[2:])
            return out if self.bias is None else out + self.bias[:, None, None]
        return F.linear(x.permute(0, 2, 3, 1), weight, self.bias).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """(B, C_in, h, w) -> (B, C_out, h, w): two normalised 3x3 convolutions added to the input.

    The input passes through a 1x1 convolution where the widths differ.
    """

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = Pointwise(channels, out_channels) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        spare = not torch.is_grad_enabled()  # the norm's output is nobody else's
        y = self.conv1(F.silu(self.norm1(x), inplace=spare))  # (B, C_out, h, w)
        y = self.conv2(F.silu(self.norm2(y), inplace=spare))
        out: Tensor = y.add_(self.shortcut(x)) if spare else self.shortcut(x) + y
        return out


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2): a 3x3 convolution of stride 2, padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2h, 2w): every cell repeated twice each way, then a 3x3 convolution.

    Of the nine cells that the convolution sees, five repeat others: on the CPU, where arithmetic is what
    counts, each of the four kinds of output cells is a 2x2 convolution of the small map, with the weights of
    repeated cells added up. The sums are the same in another order, with 4/9 of the products.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            return out
        b, c, h, w = x.shape
        rows_first = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if rows_first else torch.contiguous_format
        out = torch.empty(b, c, 2 * h, 2 * w, dtype=x.dtype, device=x.device, memory_format=layout)
        weight = self.conv.weight.to(torch.promote_types(x.dtype, torch.float32))
        for row, half in enumerate(phases(weight, 2)):
            for column, kernel in enumerate(phases(half, 3)):
                kernel = kernel.to(x.dtype, memory_format=layout)
                part = F.conv2d(x, kernel, self.conv.bias, padding=1)  # one cell too many each way
                out[..., row::2, column::2] = part[..., row : row + h, column : column + w]
        return out


def phases(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Along ``axis``, three weights on repeated cells as two on the cells: for even outputs, and for odd."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)


class Attention(nn.Module):
    """Single-head self-attention over all cells, added to its input; (B, C, h, w) -> the same.

    Logits are scaled by 1/sqrt(C). Only the 4-channel autoencoder has it, in the middle.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        cells = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")  # (B, one head, h w, C)
        y = F.scaled_dot_product_attention(self.q(cells), self.k(cells), self.v(cells))
        out: Tensor = rearrange(self.proj(y), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + out


class Middle(nn.Module):
    """(B, C, h, w) -> the same: two residual blocks at the lowest resolution, attention between or not."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, groups)
        self.attention = Attention(channels, groups) if attention else nn.Identity()
        self.block2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        out: Tensor = self.block2(self.attention(self.block1(x)))
        return out


# -- the autoencoder: encoder, decoder and the posterior between pixels and latents


LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


@dataclass(frozen=True)
class Posterior:
    """Independent normal distributions, one per latent value; ``mean`` and ``logvar`` are (B, C, h, w).

    ``logvar`` is clamped to [-30, 20] on construction. Latents are unscaled: multiply by the autoencoder's
    ``scale_factor`` before diffusion. The official code always samples, also when it encodes for relay.
    Source: arXiv:1312.6114; official ``sgm/modules/distributions/distributions.py``.
    """

    mean: Tensor
    logvar: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.logvar.shape:
            raise ValueError(
                f"posterior mean {tuple(self.mean.shape)} and logvar {tuple(self.logvar.shape)} differ"
            )
        object.__setattr__(self, "logvar", self.logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """Posterior of an encoder output (B, 2C, h, w): the means, then the log variances."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar)

    @property
    def moments(self) -> Tensor:
        """(B, 2C, h, w): the means, then the clamped log variances."""
        return torch.cat([self.mean, self.logvar], dim=1)

    @property
    def std(self) -> Tensor:
        """Standard deviation (B, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The most likely latent (B, C, h, w): the mean."""
        return self.mean

    def sample(self, noise: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """A latent (B, C, h, w) drawn with ``noise`` (standard normal, same shape) or with ``generator``.

        Neither given: torch's global generator. A generator of another device draws there, so a CPU generator
        gives the same latent on every device.
        """
        if noise is not None and generator is not None:
            raise ValueError("give noise or a generator, not both")
        if noise is None:
            noise = normal_like(self.mean, generator)
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise is {tuple(noise.shape)}, the latent {tuple(self.mean.shape)}")
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Divergence to the standard normal (B,), in nats, summed over C, h, w; at least float32."""
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


def normal_like(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of the shape, type and device of ``like``, drawn on the generator's device."""
    device = generator.device if generator is not None else like.device
    return sent(torch.randn(like.shape, generator=generator, device=device), like.device).to(like.dtype)


class ResLevel(nn.Module):
    """Residual blocks at one resolution, then halving, doubling or neither."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        blocks: int,
        groups: int,
        resize: Literal["down", "up"] | None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(channels if index == 0 else out_channels, out_channels, groups)
            for index in range(blocks)
        )
        self.down = Downsample(out_channels) if resize == "down" else nn.Identity()
        self.up = Upsample(out_channels) if resize == "up" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h/2, w/2), (B, C_out, 2h, 2w) or (B, C_out, h, w)."""
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.up(self.down(x))
        return out


class Encoder(nn.Module):
    """(B, image_channels, H, W) in [-1, 1] -> (B, 2C, h, w): the mean, then the log variance.

    Level 0 is the finest; every level but the last halves the image.
    Source: official ``sgm/modules/diffusionmodules/model.py`` Encoder.
    """

    def __init__(
        self,
        widths: Sequence[int],  # of the features of each level, finest first
        *,
        blocks: int,  # residual blocks a level
        groups: int,  # of every GroupNorm
        latent_channels: int,  # C
        image_channels: int = 3,
        mid_attention: bool = False,  # attention between the two blocks at the lowest resolution
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.stem = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            ResLevel(widths[max(i - 1, 0)], width, blocks, groups, "down" if i < last else None)
            for i, width in enumerate(widths)
        )
        self.middle = Middle(widths[-1], groups, mid_attention)
        self.norm = group_norm(widths[-1], groups)
        self.head = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, image_channels, H, W) -> (B, 2C, h, w)."""
        x = self.stem(image)  # (B, widths[0], H, W)
        for level in self.levels:
            x = level(x)  # (B, widths[i], H / 2^(i+1), W / 2^(i+1)), the last (B, widths[-1], h, w)
        out: Tensor = self.head(F.silu(self.norm(self.middle(x))))
        return out


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, image_channels, H, W), about [-1, 1], not clamped.

    The arguments are the encoder's. Level 0 is the coarsest (the first to run), and each level has one block
    more than the encoder's. Every level but the last doubles the image.
    Source: official ``sgm/modules/diffusionmodules/model.py`` Decoder.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        blocks: int,
        groups: int,
        latent_channels: int,
        image_channels: int = 3,
        mid_attention: bool = False,
    ) -> None:
        super().__init__()
        coarse_first = list(reversed(widths))
        last = len(coarse_first) - 1
        self.stem = nn.Conv2d(latent_channels, coarse_first[0], 3, padding=1)
        self.middle = Middle(coarse_first[0], groups, mid_attention)
        self.levels = nn.ModuleList(
            ResLevel(coarse_first[max(i - 1, 0)], width, blocks + 1, groups, "up" if i < last else None)
            for i, width in enumerate(coarse_first)
        )
        self.norm = group_norm(coarse_first[-1], groups)
        self.head = nn.Conv2d(coarse_first[-1], image_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, image_channels, H, W)."""
        x = self.middle(self.stem(latent))  # (B, widths[-1], h, w)
        for level in self.levels:
            x = level(x)  # twice as large each time but the last, which gives (B, widths[0], H, W)
        out: Tensor = self.head(F.silu(self.norm(x), inplace=not torch.is_grad_enabled()))
        return out


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
        width: int = 128,  # features of a level of multiplier 1
        multipliers: Sequence[int] = (1, 4, 8, 8),  # of the width at each level, finest first
        res_blocks: int = 3,  # residual blocks a level of the encoder; the decoder has one more
        latent_channels: int = 16,  # C
        groups: int = 32,  # of every GroupNorm; divides every width
        mid_attention: bool = False,  # self-attention at the lowest resolution
        quant_convs: bool = False,  # 1x1 convolutions on both sides of the latent
        scale_factor: float = 1.0,  # 1 / deviation of the latents; the caller applies it
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
        self.widths, self.groups = tuple(widths), groups
        self.factor = 2 ** (len(widths) - 1)
        self.channels = latent_channels
        self.image_channels = image_channels
        self.scale_factor = scale_factor
        halves: dict[str, Any] = {
            "blocks": res_blocks,
            "groups": groups,
            "latent_channels": latent_channels,
            "image_channels": image_channels,
            "mid_attention": mid_attention,
        }
        self.encoder = Encoder(widths, **halves)
        self.decoder = Decoder(widths, **halves)
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
