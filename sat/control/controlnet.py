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
from sat.control.base import (
    BaseModel,
    Control,
    ControlError,
    Input,
    Patches,
    behind,
    made_of,
    unshuffled,
    weighted,
    zero,
)
from sat.control_input import ControlInput
from sat.diffusion.schedule import Scalar
from sat.mixin import Mixin, wraps
from sat.models.cogview3_unet.model import (
    CogView3UNet,
    Descend,
    Enter,
    Prepared,
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
    input: Input | None = None,
    cell: int = 8,
    *,
    base: BaseModel,
) -> Control:
    """The ControlNet of a network: of a transformer's first ``blocks`` (None: a fifth), or a UNet's way down.

    ``share_adaln`` uses the base's modulations instead of a copy of their layers. ``input`` is the picture's
    latent or its pixels (None: a UNet's pixels, else the latent): in a transformer patches of ``cell`` pixels
    a cell of the latent; in a UNet convolutions of the widths ``hint``, each but the first of stride 2, or
    for an empty ``hint`` the pixels of a cell as its channels.
    """
    if isinstance(base.network, CogView3UNet):
        return UNetControlNet(hint, input or "pixels", cell, base=base)
    return TransformerControlNet(blocks, share_adaln, input or "latent", cell, base=base)


# -- of a transformer


class _Picture(Mixin):
    """The control's picture, embedded in patches, beside the positions of the image tokens."""

    host = TransformerHooks
    text_alike = True

    def __init__(self, patches: Patches, dim: int) -> None:
        super().__init__()
        self.patches = patches
        self.proj = zero(nn.Linear(patches.width, dim))

    @wraps("position")
    def position(self, inner: Position, ctx: Context) -> Tensor | None:
        (own,), table = ctx.controls, inner(ctx)  # (1, N, D)
        cells = self.patches(own.value, ctx.grid)
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

    def __init__(
        self,
        blocks: int | None = None,
        share_adaln: bool = False,
        input: Input = "latent",
        cell: int = 8,
        *,
        base: BaseModel,
    ) -> None:
        super().__init__()
        self.takes = input
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
        dim = int(getattr(network, "dim"))  # noqa: B009
        self.shares = share_adaln
        if share_adaln:
            side.remove(side.resolved.owners["modulate"][-1])
            side.extend("adaln", _SharedModulation(whole))
        parts = dict(side.mixins.items())
        with torch.device(next(side.parameters()).device):
            picture = _Picture(Patches(base, input, cell), dim)
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


class Hint(Mixin):
    """The control's picture as a map (B, width, h, w) that starts at zero, added to the stem's.

    Of pixels (B, 3, H, W) in [0, 1] by convolutions of ``widths``, all but the first of which halve the
    sides; without any by one convolution of the ``cell`` x ``cell`` pixels of each cell of the latent, which
    are its channels; of a latent by one convolution.
    """

    host = UNetHooks

    def __init__(self, given: Input, widths: Sequence[int], cell: int, unet: CogView3UNet) -> None:
        super().__init__()
        deep = given == "pixels" and bool(widths)
        self.cell = 1 if deep or given == "latent" else cell
        self.widen = nn.Conv2d(3, widths[0], 3, padding=1) if deep else None
        self.blocks = nn.ModuleList()
        widths = widths if deep else [unet.channels if given == "latent" else 3 * cell**2]
        for narrow, wide in zip(widths, widths[1:], strict=False):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.leave = zero(nn.Conv2d(widths[-1], unet.width, 3, padding=1))

    def forward(self, value: Tensor, size: tuple[int, int]) -> Tensor:
        """The picture's map, of the latent's ``size``; once per image."""
        x = value.to(self.leave.weight.dtype)  # type: ignore[arg-type]
        x = unshuffled(x, self.cell, size) if self.widen is None else F.silu(self.widen(x))
        for block in self.blocks:
            x = F.silu(block(x))
        out: Tensor = self.leave(x)
        if tuple(out.shape[2:]) != tuple(size):
            raise ControlError(
                f"the control's `hint` makes {list(out.shape[2:])} of its picture, the latent is "
                f"{list(size)}: it halves once for each width but the first, as often as the autoencoder"
            )
        return out

    @wraps("enter")
    def enter(self, inner: Enter, x: Tensor, prepared: Prepared) -> Tensor:
        return inner(x, prepared) + cast(Tensor, prepared.controls[0].made)


class UNetControlNet(Control, Mixin):
    """A copy of the UNet's way down and middle, with the picture added to its first map.

    Each of its maps passes a 1x1 convolution that starts at zero and is added to the base's of the same
    place: to what the way up takes over, and to the middle's output. In guess mode the strengths rise from
    0.1 at the first map to 1 at the middle. Of pixels it is diffusers' ``ControlNetModel`` with the names of
    ours.
    """

    host = UNetHooks

    def __init__(
        self,
        hint: Sequence[int] = (16, 32, 96, 256),
        input: Input = "pixels",
        cell: int = 8,
        *,
        base: BaseModel,
    ) -> None:
        super().__init__()
        self.takes = input
        network = base.smaller({})
        assert isinstance(network, CogView3UNet), "only a UNet has a way down"
        self.side, self.hint = network.without_way_up(), list(hint)
        device, dtype = network.stem.weight.device, network.stem.weight.dtype
        with torch.device(device):
            picture = Hint(input, hint, cell, network).to(dtype)
            convs = [zero(nn.Conv2d(wide, wide, 1)) for wide in network.maps()[0]]
        self.side.extend("picture", picture)
        *maps, middle = convs
        self.zeros, self.middle = nn.ModuleList(maps).to(dtype), middle.to(dtype)

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
            picture = self.side.mixins["picture"](control.value, size)
            made = self.side.prepare(alone, size, timesteps)
            return replace(made, controls=(replace(control, made=picture),))

        prepared = inner(cond, size, timesteps)
        return replace(prepared, controls=made_of(prepared.controls, self.label, own))

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
