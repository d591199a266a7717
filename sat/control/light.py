"""Controls without copied blocks: a small MLP a layer, and further input channels.

Sources: block-wise control as published for Qwen-Image (DiffSynth); channel concatenation as CogView4-Control
and the 33 channels of SD3's inpainting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition
from sat.control.base import (
    BaseModel,
    Control,
    ControlError,
    Input,
    Patches,
    behind,
    made_of,
    transformer_of,
    unshuffled,
    weighted,
    zero,
)
from sat.control_input import ControlInput, ImageTokens
from sat.diffusion.schedule import Scalar
from sat.first_stage.model import AutoencoderKL
from sat.mixin import Mixin, wraps
from sat.models.cogview3_unet.model import CogView3UNet, Descend, Enter, Prepared, UNetHooks, WayDown
from sat.models.cogview3_unet.model import Prepare as PrepareUNet
from sat.transformer import Context, TransformerHooks
from sat.transformer.hooks import Layer, Position, Prepare
from sat.transformer.transformer import RMSNorm, dtype_of


def blockwise(
    hidden: int | None = None, input: Input | None = None, cell: int = 8, *, base: BaseModel
) -> Control:
    """Block-wise control: a small MLP for each layer of a transformer, or map of a UNet's way down.

    ``input`` is the picture's latent or its pixels (None: a UNet's pixels, else the latent), of which
    ``cell`` are the side of a latent's cell.
    """
    if isinstance(base.network, CogView3UNet):
        return UNetBlockwise(hidden, input or "pixels", cell, base=base)
    return Blockwise(hidden, input or "latent", cell, base=base)


class Blockwise(Control, Mixin):
    """One small MLP a layer and no copied blocks: 2 D ``hidden`` weights a layer (None: D).

    c = W (patches of the picture's latent, or of its pixels), once. Behind layer l the image tokens get
    W2_l gelu(W1_l (rms(x) + rms(c))); W2_l starts at zero. The text plays no part. ``cell``: pixels of a
    latent's cell, see :class:`sat.control.base.Patches`.
    """

    host = TransformerHooks
    text_alike = True

    def __init__(
        self, hidden: int | None = None, input: Input = "latent", cell: int = 8, *, base: BaseModel
    ) -> None:
        super().__init__()
        whole = transformer_of(base, "block-wise control")
        self.takes, self.patches = input, Patches(base, input, cell)
        dim, depth = int(getattr(base.network, "dim")), len(whole.blocks)  # noqa: B009
        hidden = hidden or dim
        if hidden < 1:
            raise ControlError(f"block-wise control: hidden is {hidden}, expected at least 1")
        self.picture = nn.Linear(self.patches.width, dim)
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
            cells = self.patches(control.value, ctx.grid).to(dtype_of(self.picture))
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


class UNetBlockwise(Control, Mixin):
    """One small MLP for each map that the way up takes over, and the middle's; no copied blocks.

    The picture, cell by cell as channels, becomes a map c of each size by 3x3 convolutions. A map x gets
    W2 gelu(W1 [norm(x), norm(c)]) cell by cell, ``hidden`` wide (None: as x); W2 starts at zero. The stem
    gets a convolution of the picture that starts at zero, as with :func:`concat`.
    """

    host = UNetHooks

    def __init__(
        self, hidden: int | None = None, input: Input = "pixels", cell: int = 8, *, base: BaseModel
    ) -> None:
        super().__init__()
        if hidden is not None and hidden < 1:
            raise ControlError(f"block-wise control: hidden is {hidden}, expected at least 1")
        unet = cast(CogView3UNet, base.network)
        self.takes, self.cell = input, cell if input == "pixels" else 1
        channels = 3 * cell**2 if input == "pixels" else unet.channels
        widths, self.level = unet.maps()
        wide = [widths[self.level.index(level)] for level in range(max(self.level) + 1)]
        self.zeros = nn.ModuleList(zero(nn.Conv2d(hidden or w, w, 1)) for w in widths)
        self.stem = zero(nn.Conv2d(channels, unet.width, 3, padding=1, bias=False))
        pairs = zip([channels, *wide], wide, strict=False)
        self.picture = nn.ModuleList(
            nn.Conv2d(narrow, w, 3, padding=1, stride=1 + bool(level))
            for level, (narrow, w) in enumerate(pairs)
        )
        self.norms_c = nn.ModuleList(nn.GroupNorm(1, w) for w in wide)
        self.norms = nn.ModuleList(nn.GroupNorm(1, w) for w in widths)
        self.up = nn.ModuleList(
            nn.Conv2d(w + wide[i], hidden or w, 1) for w, i in zip(widths, self.level, strict=True)
        )

    def places(self) -> Mapping[str, Mixin]:
        """On the UNet itself."""
        return {"": self}

    def layers(self) -> int:
        """The maps that the way up takes over, and the middle's."""
        return len(self.zeros)

    @wraps("prepare")
    def prepare(
        self, inner: PrepareUNet, cond: Condition, size: tuple[int, int], timesteps: Sequence[float]
    ) -> Prepared:
        def own(control: ControlInput) -> list[Tensor]:
            cells = unshuffled(control.value.to(self.stem.weight.dtype), self.cell, size)  # type: ignore[arg-type]
            made, c = [self.stem(cells)], cells
            for level, (conv, norm) in enumerate(zip(self.picture, self.norms_c, strict=True)):
                c = conv(F.silu(c) if level else c)
                made.append(norm(c))
            return made

        prepared = inner(cond, size, timesteps)
        return replace(prepared, controls=made_of(prepared.controls, self.label, own))

    @wraps("enter")
    def enter(self, inner: Enter, x: Tensor, prepared: Prepared) -> Tensor:
        out = inner(x, prepared)
        for own in prepared.controls:
            if own.name == self.label:
                out = out + weighted(own.made[0], own.weight(0, out))
        return out

    @wraps("descend")
    def descend(
        self, inner: Descend, x: Tensor, timestep: Scalar, emb: Iterator[Tensor], prepared: Prepared
    ) -> WayDown:
        skips, middle = inner(x, timestep, emb, prepared)
        for own in prepared.controls:
            if own.name != self.label:
                continue
            maps = [*skips, middle]
            for place, (x, level) in enumerate(zip(maps, self.level, strict=True)):  # noqa: B020, PLR1704
                both = torch.cat([self.norms[place](x), own.made[1 + level]], 1)
                added = self.zeros[place](F.gelu(self.up[place](both), approximate="tanh"))
                maps[place] = x + weighted(added, own.weight(place, added))
            *skips, middle = maps
        return WayDown(skips, middle)


def concat(
    inpaint: bool = False,
    input: Input = "latent",
    cell: int = 8,
    *,
    base: BaseModel,
) -> Control:
    """Further input channels of a network: the picture's latent beside the noisy one.

    They are a second patch embedding (a UNet's second first convolution) that starts at zero and is added to
    the first: the same as one of more channels, [x_t, picture]. ``inpaint``: the mask and the latent of the
    rest, [x_t, mask, rest]. ``input`` pixels: ``cell`` x ``cell`` of them, which are a cell of the latent,
    are its further channels.
    """
    if isinstance(base.network, CogView3UNet):
        return UNetConcat(inpaint, input, cell, base=base)
    return TransformerConcat(inpaint, input, cell, base=base)


class _Concat(Control):
    """The picture's latent, or for inpainting the mask (1 is to be drawn anew) and the latent of the rest."""

    def __init__(self, inpaint: bool, input: Input) -> None:
        super().__init__()
        if inpaint and input == "pixels":
            raise ControlError("concat: inpainting takes the rest's latent: set `input` to latent")
        self.takes = "inpaint" if inpaint else input

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

    def __init__(
        self, inpaint: bool = False, input: Input = "latent", cell: int = 8, *, base: BaseModel
    ) -> None:
        super().__init__(inpaint, input)
        transformer_of(base, "concatenated channels")
        self.patches = Patches(base, input, cell, more=int(inpaint))
        dim = int(getattr(base.network, "dim"))  # noqa: B009
        self.zeros = zero(nn.Linear(self.patches.width, dim, bias=False))

    def places(self) -> Mapping[str, Mixin]:
        """On the transformer."""
        return {"transformer": self}

    @wraps("position")
    def position(self, inner: Position, ctx: Context) -> Tensor | None:
        table, text = inner(ctx), sum(ctx.segments[:-1])
        for own in ctx.controls:
            if own.name == self.label:
                tokens = self.zeros(self.patches(own.value, ctx.grid).to(dtype_of(self.zeros)))
                tokens = weighted(tokens, own.weight(0, tokens))  # (B, N, D)
                tokens = F.pad(tokens, (0, 0, text, 0))  # text gets none
                table = tokens if table is None else table + tokens
        return table


class UNetConcat(_Concat, Mixin):
    """A second first convolution, whose map is added to the first's; see :func:`concat`."""

    host = UNetHooks

    def __init__(
        self, inpaint: bool = False, input: Input = "latent", cell: int = 8, *, base: BaseModel
    ) -> None:
        super().__init__(inpaint, input)
        unet = cast(CogView3UNet, base.network)
        self.cell = cell if input == "pixels" else 1
        channels = 3 * cell**2 if input == "pixels" else unet.channels + inpaint
        self.zeros = zero(nn.Conv2d(channels, unet.width, 3, padding=1, bias=False))

    def places(self) -> Mapping[str, Mixin]:
        """On the UNet itself."""
        return {"": self}

    @wraps("prepare")
    def prepare(
        self, inner: PrepareUNet, cond: Condition, size: tuple[int, int], timesteps: Sequence[float]
    ) -> Prepared:
        def own(control: ControlInput) -> Tensor:
            cells = unshuffled(control.value.to(self.zeros.weight.dtype), self.cell, size)  # type: ignore[arg-type]
            made = self.zeros(cells)  # (B, width, h, w)
            return weighted(made, control.weight(0, made))

        prepared = inner(cond, size, timesteps)
        return replace(prepared, controls=made_of(prepared.controls, self.label, own))

    @wraps("enter")
    def enter(self, inner: Enter, x: Tensor, prepared: Prepared) -> Tensor:
        out = inner(x, prepared)
        for own in prepared.controls:
            if own.name == self.label:
                out = out + cast(Tensor, own.made)
        return out
