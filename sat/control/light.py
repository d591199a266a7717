"""Controls without copied blocks: a small MLP a layer, and further input channels.

Sources: block-wise control as published for Qwen-Image (DiffSynth); channel concatenation as CogView4-Control
and the 33 channels of SD3's inpainting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition
from sat.control.base import BaseModel, Control, ControlError, behind, patches, transformer_of, weighted, zero
from sat.control_input import ControlInput, ImageTokens
from sat.first_stage.model import AutoencoderKL
from sat.mixin import Mixin, wraps
from sat.models.cogview3_unet.model import CogView3UNet, Enter, Prepared, UNetHooks
from sat.models.cogview3_unet.model import Prepare as PrepareUNet
from sat.transformer import Context, TransformerHooks
from sat.transformer.hooks import Layer, Position, Prepare
from sat.transformer.transformer import RMSNorm, dtype_of


class Blockwise(Control, Mixin):
    """One small MLP a layer and no copied blocks: 2 D ``hidden`` weights a layer (None: D).

    c = W (patches of the picture's latent), once. Behind layer l the image tokens get
    W2_l gelu(W1_l (rms(x) + rms(c))); W2_l starts at zero. The text plays no part.
    """

    host = TransformerHooks
    text_alike = True

    def __init__(self, hidden: int | None = None, *, base: BaseModel) -> None:
        super().__init__()
        whole = transformer_of(base, "block-wise control")
        dim, channels, self.patch = (int(getattr(base.network, n)) for n in ("dim", "channels", "patch"))
        depth, hidden = len(whole.blocks), hidden or dim
        if hidden < 1:
            raise ControlError(f"block-wise control: hidden is {hidden}, expected at least 1")
        self.picture = nn.Linear(channels * self.patch**2, dim)
        self.norm_c = RMSNorm(dim, 1e-6)
        self.norms = nn.ModuleList(RMSNorm(dim, 1e-6) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(depth))
        self.zeros = nn.ModuleList(zero(nn.Linear(hidden, dim)) for _ in range(depth))

    def places(self) -> Mapping[str, Mixin]:
        """On the transformer."""
        return {"transformer": self}

    def layers(self) -> int:
        """The base's layers."""
        return len(self.zeros)

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        def own(control: ControlInput) -> ImageTokens:
            cells = patches(control.value, self.patch).to(dtype_of(self.picture))
            return ImageTokens(self.norm_c(self.picture(cells)))  # (B, N, D)

        return inner(ctx).controlled(self.label, own)

    @wraps("layer")
    def layer(self, inner: Layer, x: Tensor, ctx: Context, layer: int) -> Tensor:
        out, image = inner(x, ctx, layer), sum(ctx.segments[:-1])
        for own in ctx.controls:
            if own.name == self.label:
                c = cast(ImageTokens, own.made).tokens
                h = self.norms[layer](out[:, image:]) + c  # (B, N, D)
                added = self.zeros[layer](F.gelu(self.up[layer](h), approximate="tanh"))
                out = behind(out, weighted(added, own.weight(layer, added)), image)
        return out


def concat(inpaint: bool = False, *, base: BaseModel) -> Control:
    """Further input channels of a network: the picture's latent beside the noisy one.

    They are a second patch embedding (a UNet's second first convolution) that starts at zero and is added to
    the first: the same as one of more channels, [x_t, picture]. ``inpaint``: the mask and the latent of the
    rest, [x_t, mask, rest].
    """
    if isinstance(base.network, CogView3UNet):
        return UNetConcat(inpaint, base=base)
    return TransformerConcat(inpaint, base=base)


class _Concat(Control):
    """The picture's latent, or for inpainting the mask (1 is to be drawn anew) and the latent of the rest."""

    def __init__(self, inpaint: bool) -> None:
        super().__init__()
        if inpaint:
            self.takes = "inpaint"  # type: ignore[misc]

    def encode(self, first_stage: AutoencoderKL, pictures: Tensor) -> Tensor:
        """(B, C, h, w); of pictures with a mask as fourth channel (B, 1 + C, h, w), masked pixels grey."""
        if self.takes != "inpaint":
            return super().encode(first_stage, pictures)
        picture, mask = pictures[:, :3], (pictures[:, 3:] > 0).to(pictures.dtype)
        rest = super().encode(first_stage, picture * (1 - mask))
        return torch.cat([F.interpolate(mask.float(), rest.shape[2:], mode="area"), rest], 1)

    def layers(self) -> int:
        """One place."""
        return 1


class TransformerConcat(_Concat, Mixin):
    """A second patch embedding, whose tokens are added to the first's; see :func:`concat`."""

    host = TransformerHooks
    text_alike = True

    def __init__(self, inpaint: bool = False, *, base: BaseModel) -> None:
        super().__init__(inpaint)
        transformer_of(base, "concatenated channels")
        dim, channels, self.patch = (int(getattr(base.network, n)) for n in ("dim", "channels", "patch"))
        self.zeros = zero(nn.Linear((channels + inpaint) * self.patch**2, dim, bias=False))

    def places(self) -> Mapping[str, Mixin]:
        """On the transformer."""
        return {"transformer": self}

    @wraps("position")
    def position(self, inner: Position, ctx: Context) -> Tensor | None:
        table, text = inner(ctx), sum(ctx.segments[:-1])
        for own in ctx.controls:
            if own.name == self.label:
                tokens = self.zeros(patches(own.value, self.patch).to(dtype_of(self.zeros)))
                tokens = weighted(tokens, own.weight(0, tokens))  # (B, N, D)
                tokens = F.pad(tokens, (0, 0, text, 0))  # text gets none
                table = tokens if table is None else table + tokens
        return table


class UNetConcat(_Concat, Mixin):
    """A second first convolution, whose map is added to the first's; see :func:`concat`."""

    host = UNetHooks

    def __init__(self, inpaint: bool = False, *, base: BaseModel) -> None:
        super().__init__(inpaint)
        unet = cast(CogView3UNet, base.network)
        self.zeros = zero(nn.Conv2d(unet.channels + inpaint, unet.width, 3, padding=1, bias=False))

    def places(self) -> Mapping[str, Mixin]:
        """On the UNet itself."""
        return {"": self}

    @wraps("prepare")
    def prepare(
        self, inner: PrepareUNet, cond: Condition, size: tuple[int, int], timesteps: Sequence[float]
    ) -> Prepared:
        def own(control: ControlInput) -> Tensor:
            made = self.zeros(control.value.to(self.zeros.weight.dtype))  # type: ignore[arg-type]
            return weighted(made, control.weight(0, made))

        prepared = inner(cond, size, timesteps)
        controls = (replace(c, made=own(c)) if c.name == self.label else c for c in prepared.controls)
        return replace(prepared, controls=tuple(controls))

    @wraps("enter")
    def enter(self, inner: Enter, x: Tensor, prepared: Prepared) -> Tensor:
        out = inner(x, prepared)
        for own in prepared.controls:
            if own.name == self.label:
                out = out + cast(Tensor, own.made)
        return out
