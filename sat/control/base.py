"""A control as a thing put on a network: modules of its own, and the hooks of the network that they fill."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sat.config.build import build_empty
from sat.config.schema import Component
from sat.control_input import ControlInput
from sat.errors import UserError
from sat.first_stage.model import AutoencoderKL
from sat.mixin import Host, Mixin
from sat.parallel.launch import ALONE, Axis
from sat.parallel.tensor import apply_sharding
from sat.sharding import Sharding, family_sharding
from sat.transformer import Transformer
from sat.transformer.hooks import Grid

Takes = Literal["latent", "pixels", "inpaint", "features"]
"""Encodings of a control's picture: its latent, the picture itself, the latent of all outside a mask and the
mask, or features of a frozen encoder."""
Input = Literal["latent", "pixels"]
"""Choice of a design that can take either: an autoencoder may lose what a picture of lines says."""


class ControlError(UserError, ValueError):
    """A control that does not fit the model, or a file that holds none. One line a user can act on."""


@dataclass(frozen=True)
class BaseModel:
    """The network that a control is made for, with the component that built it."""

    network: nn.Module
    component: Component
    imports: Collection[str] = ()
    tensor: Axis = ALONE

    def smaller(self, params: Mapping[str, object]) -> nn.Module:
        """A network of the same class with other parameters, split over tensor ranks as the base is.

        Its tensors are copies of the base's of the same names, or without values where the base has none.
        """
        component = replace(self.component, params={**self.component.params, **params})
        made = build_empty(component, self.imports)
        made = apply_sharding(made, _present(family_sharding(type(made)), made), self.tensor)
        here = next(iter(self.network.parameters()))
        if here.is_meta or torch.empty(0).is_meta:  # a file fills it
            return made
        with torch.no_grad():
            for path, owner in made.named_modules():
                theirs = self.network.get_submodule(path)
                for leaf, own in [*owner._parameters.items(), *owner._buffers.items()]:
                    if own is None:
                        continue
                    dtype = here.dtype if isinstance(own, nn.Parameter) else own.dtype
                    copied = torch.empty_like(own, device=here.device, dtype=dtype)
                    copied.copy_(cast(Tensor, getattr(theirs, leaf)))
                    if isinstance(own, nn.Parameter):
                        owner._parameters[leaf] = nn.Parameter(copied)
                    else:
                        owner._buffers[leaf] = copied
        return made


def _present(sharding: Sharding, module: nn.Module) -> Sharding:
    """The patterns that name a layer of ``module``."""
    names = [name for name, _ in module.named_modules()]
    return {p: style for p, style in sharding.items() if any(fnmatchcase(name, p) for name in names)}


class Control(nn.Module):
    """A branch beside a network, with weights of its own; see docs/control.md.

    A subclass takes its sizes from the keyword-only ``base``. Its untrained output is nothing: layers that
    lead into the network start at zero. ``label`` is the name under which it is attached, by which its hooks
    find their inputs in ``ctx.controls``.
    """

    takes: Takes = "latent"
    blank: ClassVar[bool] = False
    """The unconditional half of guidance gets zeros instead of the picture."""
    in_tiles: ClassVar[bool] = True
    """Goes with denoising by tiles: each sees its part of a map, and any other value whole."""
    label = ""

    def encode(self, first_stage: AutoencoderKL, pictures: Tensor) -> Tensor:
        """Values for ``ControlInput`` of pictures (B, 3, H, W) in [-1, 1]: their latents' means, scaled.

        They have the base's own scale, as x_t has, and no randomness. Pixels: the pictures in [0, 1].
        """
        if self.takes == "pixels":
            return pictures.add(1).div(2)
        return first_stage.encode(pictures.to(first_stage.dtype)).mode().float() * first_stage.scale_factor

    def places(self) -> Mapping[str, Mixin]:
        """The mixins by the part of the network that each is put on; the empty path is the network itself."""
        raise NotImplementedError

    def layers(self) -> int:
        """Number of places in the base that ``ControlInput.layers`` has weights for."""
        raise NotImplementedError


OUTERMOST = ("sequence", "recorded", "folding")
"""Mixins that stay around a control: they share out or repeat what it does."""


def attach(network: nn.Module, name: str, control: Control) -> None:
    """Put ``control`` on ``network`` under ``name``: around the hooks there are, weights untouched."""
    if not name.isidentifier():
        raise ControlError(f"a control's name is letters, digits and _, got {name!r}")
    places = control.places()
    hosts = {path: cast("Host[object]", network.get_submodule(path)) for path in places}
    if taken := next((path for path, host in hosts.items() if name in host.mixins), None):
        raise ControlError(f"the model has a {name!r} at {taken} already")
    control.label = name
    for path, mixin in places.items():
        mixin.train(network.training)
        host = hosts[path]
        around = {known: cast(Mixin, host.mixins[known]) for known in host.mixins if known in OUTERMOST}
        for known in around:
            host.remove(known)
        host.extend(name, mixin)
        for known, outer in around.items():
            host.extend(known, outer)


def detach(network: nn.Module, control: Control) -> None:
    """Take ``control`` off again: the network is what it was."""
    for path in control.places():
        cast("Host[object]", network.get_submodule(path)).remove(control.label)


# -- pieces that designs share


def zero(layer: nn.Module) -> nn.Module:
    """``layer`` with every weight 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Patches:
    """A control's picture (B, C, h, w) in patches (B, N, C p p), one an image token, in the base's own order.

    Of its latent as the base's, or of its pixels, of which ``cell`` are the side of a latent's cell.
    ``more`` counts further channels; ``width`` is C p p.
    """

    def __init__(self, base: BaseModel, given: Input = "latent", cell: int = 8, more: int = 0) -> None:
        self.side, channels = (int(getattr(base.network, name)) for name in ("patch", "channels"))
        if given == "pixels":
            self.side, channels = self.side * cell, 3
        self.width = (channels + more) * self.side**2

    def __call__(self, value: Tensor, grid: Grid) -> Tensor:
        p, (h, w) = self.side, value.shape[2:]
        if (h, w) != (p * grid.h, p * grid.w):
            raise ControlError(
                f"the control's picture makes {h / p:g} x {w / p:g} patches of {p}, the model has {grid.h} x "
                f"{grid.w}: set the control's `cell` to the pixels of a latent's cell"
            )
        return patches(value, p)


def patches(latent: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) -> (B, N, C p p), the order of the base's own patches."""
    return rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unshuffled(value: Tensor, cell: int, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, C cell cell, h, w), a latent's ``size``: the pixels of a cell as its channels."""
    if tuple(value.shape[2:]) != (cell * size[0], cell * size[1]):
        raise ControlError(
            f"the control's picture has {list(value.shape[2:])} pixels, the latent {list(size)} cells, which "
            f"are not {cell} pixels each: set the control's `cell`"
        )
    return F.pixel_unshuffle(value, cell)


def behind(x: Tensor, added: Tensor, start: int) -> Tensor:
    """``x`` (B, L, D) with ``added`` (B, L - start, D) on its tokens from ``start`` on."""
    return torch.cat([x[:, :start], x[:, start:] + added], 1)


def made_of(
    controls: Sequence[ControlInput], label: str, make: Callable[[ControlInput], object]
) -> tuple[ControlInput, ...]:
    """``controls``, of which the one named ``label`` keeps what ``make`` makes of it once for all steps."""
    return tuple(replace(c, made=make(c)) if c.name == label else c for c in controls)


def weighted(added: Tensor, weight: float | Tensor) -> Tensor:
    """``added`` times ``weight``."""
    return added if isinstance(weight, float) and weight == 1 else added * weight


def transformer_of(base: BaseModel, what: str) -> Transformer:
    """The transformer that the network consists of."""
    found = getattr(base.network, "transformer", None)
    if not isinstance(found, Transformer):
        kind = type(base.network).__name__
        raise ControlError(f"{what} is for a network that is one transformer, and {kind} is not")
    return found
