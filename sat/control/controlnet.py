"""ControlNet: a trained copy of the network's first half whose outputs are added to the frozen network's.

Sources: arXiv:2302.05543 (copy, zero convolutions); the zero-initialised patch embedding of the picture and
the image stream alone for transformers with joint attention, as published for SD3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition
from sat.control.base import BaseModel, Control, ControlError, behind, patches, weighted, zero
from sat.control_input import ControlInput
from sat.diffusion.schedule import Scalar
from sat.first_stage.model import AutoencoderKL
from sat.mixin import Mixin, wraps
from sat.models.cogview3_unet.model import (
    CogView3UNet,
    Descend,
    Downsample,
    Enter,
    Prepared,
    ResBlock,
    UNetHooks,
    WayDown,
)
from sat.models.cogview3_unet.model import Prepare as PrepareUNet
from sat.transformer import Context, LayerModulation, Transformer, TransformerHooks
from sat.transformer.hooks import Layer, Modulate, Position, Prepare, Run
from sat.transformer.transformer import dtype_of


def controlnet(
    blocks: int | None = None,
    share_adaln: bool = False,
    hint: Sequence[int] = (16, 32, 96, 256),
    *,
    base: BaseModel,
) -> Control:
    """The ControlNet of a network: of a transformer's first ``blocks`` (None: a fifth), or a UNet's way down.

    ``share_adaln`` uses the base's modulations instead of a copy of their layers. ``hint`` are the widths of
    the convolutions that bring a UNet's picture to the size of its latent, the last of stride 2 each.
    """
    if isinstance(base.network, CogView3UNet):
        return UNetControlNet(hint, base=base)
    return TransformerControlNet(blocks, share_adaln, base=base)


# -- of a transformer


class _Picture(Mixin):
    """The control's latent (B, C, h, w), embedded in patches, beside the positions of the image tokens."""

    host = TransformerHooks
    text_alike = True

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = zero(nn.Linear(channels * patch**2, dim))

    @wraps("position")
    def position(self, inner: Position, ctx: Context) -> Tensor | None:
        (own,), table = ctx.controls, inner(ctx)  # (1, N, D)
        cells = patches(own.value, self.patch)
        tokens: Tensor = self.proj(cells.to(dtype_of(self.proj)))  # (B, N, D)
        return tokens if table is None else tokens + table


class _SharedModulation(Mixin):
    """Modulations of the base's layers of the same numbers."""

    host = TransformerHooks
    text_alike = True

    def __init__(self, base: Transformer) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple: not registered here too

    @wraps("modulate")
    def modulate(self, inner: Modulate, ctx: Context, layer: int) -> LayerModulation | None:
        return self._base[0].hooks.modulate(ctx, layer)


class TransformerControlNet(Control, Mixin):
    """Copies of the first N of L blocks, with own embeddings, on noisy latent, picture and text.

    After copy i a linear that starts at zero gives (B, N_image, D), which is added to the image tokens behind
    block j for all j with floor(j N / L) = i: every copy is used whatever N is. Text tokens stay as they are.
    """

    host = TransformerHooks
    text_alike = True

    def __init__(self, blocks: int | None = None, share_adaln: bool = False, *, base: BaseModel) -> None:
        super().__init__()
        whole = getattr(base.network, "transformer", None)
        if not isinstance(whole, Transformer):
            raise ControlError(f"a ControlNet copies blocks, and {type(base.network).__name__} has none")
        self.depth = len(whole.blocks)
        blocks = max(1, self.depth // 5) if blocks is None else blocks
        if not 1 <= blocks <= self.depth:
            raise ControlError(
                f"a ControlNet of {blocks} blocks: the base has {self.depth}, expected 1 to that"
            )
        network = base.smaller({"depth": blocks})
        side = cast(Transformer, network.transformer)
        side.remove(side.resolved.owners["final"][-1])
        dim, channels, patch = (int(getattr(network, name)) for name in ("dim", "channels", "patch"))
        self.shares = share_adaln
        if share_adaln:
            side.remove(side.resolved.owners["modulate"][-1])
            side.extend("adaln", _SharedModulation(whole))
        parts = dict(side.mixins.items())
        with torch.device(next(side.parameters()).device):
            picture = _Picture(channels, patch, dim)
            self.zeros = nn.ModuleList(zero(nn.Linear(dim, dim)) for _ in range(blocks))
        dtype = next(side.parameters()).dtype
        self.zeros.to(dtype)
        # Right behind the patch embedding, before joint attention puts the text in front of its tokens.
        first = side.resolved.owners["embed"][-1]
        order = {first: parts.pop(first), "picture": picture.to(dtype), **parts}
        side.mixins = nn.ModuleDict(order)
        side._resolve()
        self.transformer = side

    def places(self) -> Mapping[str, Mixin]:
        """On the transformer."""
        return {"transformer": self}

    def layers(self) -> int:
        """The base's layers."""
        return self.depth

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        def own(control: ControlInput) -> Context:
            return self.transformer.prepare(replace(ctx, controls=(control,)))

        return inner(ctx).controlled(self.label, own)

    @wraps("run")
    def run(self, inner: Run, ctx: Context) -> Tensor:
        def own(control: ControlInput) -> list[Tensor]:
            modulation = ctx.modulation if self.shares else None
            return self.residuals(
                replace(cast(Context, control.made), image=ctx.image, emb=ctx.emb, modulation=modulation)
            )

        return inner(ctx.controlled(self.label, own))

    def residuals(self, ctx: Context) -> list[Tensor]:
        """Addition of each copied block to the image tokens, (B, N_image, D)."""
        hooks, image, out = self.transformer.hooks, sum(ctx.segments[:-1]), []
        x = hooks.embed(ctx)
        x = x if ctx.table is None else x + ctx.table
        x = x.float() if x.dtype == torch.float16 else x
        for layer, leave in enumerate(self.zeros):
            x = hooks.layer(x, ctx, layer)  # (B, L, D)
            out.append(leave(x[:, image:].to(dtype_of(leave))))
        return out

    @wraps("layer")
    def layer(self, inner: Layer, x: Tensor, ctx: Context, layer: int) -> Tensor:
        out, image = inner(x, ctx, layer), sum(ctx.segments[:-1])
        for own in ctx.controls:
            if own.name == self.label:
                added = own.made[layer * len(self.zeros) // self.depth]
                out = behind(out, weighted(added, own.weight(layer, added)), image)
        return out


# -- of a UNet


class _Hint(Mixin):
    """The control's picture (B, 3, H, W) in [0, 1] as a map (B, width, H / f, W / f), added to the stem's."""

    host = UNetHooks

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in zip(widths, widths[1:], strict=False):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.leave = zero(nn.Conv2d(widths[-1], width, 3, padding=1))

    def map(self, pixels: Tensor) -> Tensor:
        """The picture's map, once per image."""
        x = F.silu(self.widen(pixels.to(self.widen.weight.dtype)))
        for block in self.blocks:
            x = F.silu(block(x))
        out: Tensor = self.leave(x)
        return out

    @wraps("enter")
    def enter(self, inner: Enter, x: Tensor, prepared: Prepared) -> Tensor:
        return inner(x, prepared) + cast(Tensor, prepared.controls[0].made)


class UNetControlNet(Control, Mixin):
    """A copy of the UNet's way down and middle, with the picture added to its first map.

    Each of its maps passes a 1x1 convolution that starts at zero and is added to the base's of the same
    place: to what the way up takes over, and to the middle's output. In guess mode the strengths rise from
    0.1 at the first map to 1 at the middle. diffusers' ``ControlNetModel`` with the names of ours.
    """

    host = UNetHooks
    takes = "pixels"

    def __init__(self, hint: Sequence[int] = (16, 32, 96, 256), *, base: BaseModel) -> None:
        super().__init__()
        network = base.smaller({})
        assert isinstance(network, CogView3UNet), "only a UNet has a way down"
        self.side, self.hint = network.without_way_up(), list(hint)
        device, dtype = network.stem.weight.device, network.stem.weight.dtype
        with torch.device(device):
            picture = _Hint(hint, network.width).to(dtype)
            convs = [zero(nn.Conv2d(wide, wide, 1)) for wide in _widths(network)]
        self.side.extend("picture", picture)
        *maps, middle = convs
        self.zeros, self.middle = nn.ModuleList(maps).to(dtype), middle.to(dtype)

    def encode(self, first_stage: AutoencoderKL, pictures: Tensor) -> Tensor:
        """The pictures in [0, 1]."""
        return pictures.add(1).div(2)

    def places(self) -> Mapping[str, Mixin]:
        """On the UNet itself."""
        return {"": self}

    def layers(self) -> int:
        """The maps that the way up takes over, and the middle's."""
        return len(self.zeros) + 1

    @wraps("prepare")
    def prepare(
        self, inner: PrepareUNet, cond: Condition, size: tuple[int, int], timesteps: Sequence[float]
    ) -> Prepared:
        def own(control: ControlInput) -> Prepared:
            strength = None if self.side.guidance is None else cond.guidance
            alone = replace(cond, controls=(control,), guidance=strength)
            picture = cast(_Hint, self.side.mixins["picture"]).map(control.value)
            if tuple(picture.shape[2:]) != tuple(size):
                raise ControlError(
                    f"the control's `hint` makes {list(picture.shape[2:])} of its picture, the latent is "
                    f"{list(size)}: it halves once for each width but the first, as often as the autoencoder"
                )
            made = self.side.prepare(alone, size, timesteps)
            return replace(made, controls=(replace(control, made=picture),))

        prepared = inner(cond, size, timesteps)
        controls = (replace(c, made=own(c)) if c.name == self.label else c for c in prepared.controls)
        return replace(prepared, controls=tuple(controls))

    @wraps("descend")
    def descend(
        self, inner: Descend, x: Tensor, timestep: Scalar, emb: Iterator[Tensor], prepared: Prepared
    ) -> WayDown:
        skips, middle = inner(x, timestep, emb, prepared)
        for own in prepared.controls:
            if own.name != self.label:
                continue
            made = cast(Prepared, own.made)
            maps, last = self.side.resolved.hooks.descend(
                x, timestep, self.side.embeddings(timestep, made), made
            )
            ramp = torch.logspace(-1, 0, len(maps) + 1).tolist() if own.guess else [1.0] * (len(maps) + 1)
            pairs = zip(self.zeros, maps, strict=True)
            added = [leave(h) for leave, h in pairs] + [self.middle(last)]
            added = [weighted(weighted(a, ramp[i]), own.weight(i, a)) for i, a in enumerate(added)]
            skips = [skip + a for skip, a in zip(skips, added, strict=False)]
            middle = middle + added[-1]
        return WayDown(skips, middle)


def _widths(side: CogView3UNet) -> list[int]:
    """Channels of the stem's map, of each place on the way down, and of the middle."""
    firsts = [next(layers.children()) for layers in (*list(side.down)[1:], side.middle)]
    convs = [
        first.conv2 if isinstance(first, ResBlock) else cast(Downsample, first).shrink for first in firsts
    ]
    return [side.width, *(conv.out_channels for conv in convs)]
