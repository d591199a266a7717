"""The UNets of CogView3-Base and CogView3-Relay: residual blocks around transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition
from sat.control_input import Controls
from sat.diffusion.schedule import Scalar
from sat.embeddings import GuidanceEmbedding, embedded, mlp, one_row, sinusoid
from sat.mixin import Host
from sat.mixins.cross_attention import CrossAttention
from sat.mixins.patch_embed import FeatureMap
from sat.transformer import BlockSpec, Context, Transformer

TRANSFORMER = BlockSpec(affine=True, qkv_bias=False, mlp="geglu", gelu="none")
"""Affine norms with eps 1e-5, q, k and v without bias, GEGLU with exact GELU."""


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Affine group norm with eps 1e-5."""
    if channels % groups:
        raise ValueError(
            f"{channels} channels cannot be normalised in {groups} groups; width times every multiplier "
            f"must be a multiple of groups"
        )
    return nn.GroupNorm(groups, channels)


class ResBlock(nn.Module):
    """(B, C_in, h, w) and the activated embedding (B or 1, E) -> (B, C_out, h, w).

    The embedding, or in its place what :meth:`shift` makes of it, is added between two normalised 3x3
    convolutions; the input passes a 1x1 convolution where the widths differ. The second convolution starts at
    zero.
    """

    def __init__(self, channels: int, out_channels: int, emb_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def shift(self, emb: Tensor) -> Tensor:
        """(B or 1, E) -> (B or 1, C_out, 1, 1)."""
        out: Tensor = self.emb(emb)[:, :, None, None]
        return out

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift = emb if emb.ndim == 4 else self.shift(emb)
        h = self.conv1(F.silu(self.norm1(x))) + shift  # (B, C_out, h, w)
        out: Tensor = self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2): a 3x3 convolution of stride 2, padded alike on all sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shrink(x)
        return out


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2h, 2w): every cell repeated twice each way, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.grow = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.grow(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def spatial_transformer(channels: int, depth: int, head_dim: int, text_dim: int, groups: int) -> Transformer:
    """``depth`` blocks over the cells of a map, each attending to all cells and to the text."""
    if channels % head_dim:
        raise ValueError(f"a width of {channels} does not divide into heads of {head_dim}")
    heads = channels // head_dim
    mixins = {
        "map": FeatureMap(channels, channels, groups),
        "cross": CrossAttention(channels, heads, head_dim, text_dim, depth),
    }
    return Transformer(channels, heads, depth, mixins, TRANSFORMER)


# -- the UNet of CogView3-Base, CogView3-Relay and their distilled versions


@dataclass(frozen=True)
class Prepared:
    """Everything about a batch that no step changes; made by :meth:`CogView3UNet.prepare`."""

    contexts: Mapping[str, Context]  # a transformer's name -> the keys and values of its layers
    size_emb: Tensor  # (B, E), or (1, E) where all rows are alike
    guidance: Tensor | None  # (B or 1, D) features of the guidance strength
    steps: Mapping[float, Tensor]  # timestep -> (B or 1, E) its activated embedding
    shifts: Mapping[float, Sequence[Tensor]]  # timestep -> the shift of each residual block, in order
    controls: Controls = ()  # with what their own networks prepared


class WayDown(NamedTuple):
    """Maps that the way up takes over, the stem's first, and the middle's output."""

    skips: list[Tensor]
    middle: Tensor


class Prepare(Protocol):
    """-> what no step changes, for latents of ``size`` (h, w) cells; wrap it."""

    def __call__(self, cond: Condition, size: tuple[int, int], timesteps: Sequence[float]) -> Prepared: ...


class Enter(Protocol):
    """Noisy latent (B, C, h, w) -> the first map (B, width, h, w)."""

    def __call__(self, x: Tensor, prepared: Prepared) -> Tensor: ...


class Descend(Protocol):
    """The way down and the middle; ``emb`` gives each residual block's embedding or shift."""

    def __call__(self, x: Tensor, timestep: Scalar, emb: Iterator[Tensor], prepared: Prepared) -> WayDown: ...


@dataclass(frozen=True)
class UNetHooks:
    """The extension points of the UNet outside its transformers, which have their own."""

    prepare: Prepare
    enter: Enter
    descend: Descend


class CogView3UNet(Host[UNetHooks]):
    """Noisy latent (B, C, h, w), timestep, text (B, T, C_text), size vector (B, V) -> noise (B, C, h, w).

    Level i is ``width * multipliers[i]`` wide and holds ``blocks`` residual blocks on the way down, one more
    on the way up; levels whose downsampling factor is in ``attention`` have a transformer of ``depths[i]``
    layers after each, and the middle has one of the last depth. ``guidance_dim`` is the number of features
    of a guidance strength that the network takes as an input (distilled models); a checkpoint's own wins.
    ``zero_init``: fresh weights predict 0. Defaults are those of the published 3 B models.
    Source: official ``openaimodel.py``, ``configs/cogview3_base.yaml``.
    """

    def __init__(  # noqa: PLR0913, C901 - the numbers that make a model, each with the published value
        self,
        channels: int = 4,
        width: int = 320,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 2,
        attention: Sequence[int] = (2, 4),
        depths: Sequence[int] = (1, 2, 10),
        head_dim: int = 64,
        text_dim: int = 4096,
        text_len: int = 225,
        size_dim: int = 1536,
        groups: int = 32,
        guidance_dim: int | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if len(depths) != len(multipliers) or not multipliers:
            raise ValueError(
                f"depths {list(depths)} must give one number for each of the multipliers {list(multipliers)}"
            )
        if min(*multipliers, *depths) < 1:
            raise ValueError(f"multipliers {list(multipliers)} and depths {list(depths)} are at least 1")
        sizes = {"channels": channels, "width": width, "blocks": blocks, "head_dim": head_dim}
        for name, number in {**sizes, "text_len": text_len, "groups": groups}.items():
            if number < 1:
                raise ValueError(f"{name} is {number}, expected at least 1")
        self.width, self.channels, self.text_len = width, channels, text_len
        self.factor = 2 ** (len(multipliers) - 1)
        emb_dim = 4 * width
        self.time = mlp(width, emb_dim)
        self.size = mlp(size_dim, emb_dim)
        self.guidance = None if guidance_dim is None else GuidanceEmbedding(guidance_dim, width)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        widths = [width * multiplier for multiplier in multipliers]

        def residual(inputs: int, level: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(inputs, widths[level], emb_dim, groups)]
            if 2**level in attention:
                layers.append(spatial_transformer(widths[level], depths[level], head_dim, text_dim, groups))
            return layers

        # Down. The stem has place 0, so that ``down.{i}`` is the official ``input_blocks.{i}``.
        places: list[list[nn.Module]] = [[]]
        wide, skips = width, [width]  # ``skips``: the width that each place hands over to the way up
        for level in range(len(widths)):
            for _ in range(blocks):
                places.append(residual(wide, level))
                wide = widths[level]
                skips.append(wide)
            if level + 1 < len(widths):
                places.append([Downsample(wide)])
                skips.append(wide)
        self.down = nn.ModuleList(nn.ModuleList(layers) for layers in places)
        self.middle = nn.ModuleList(
            [
                ResBlock(wide, wide, emb_dim, groups),
                spatial_transformer(wide, depths[-1], head_dim, text_dim, groups),
                ResBlock(wide, wide, emb_dim, groups),
            ]
        )
        # Up. Takes over ``skips`` from the last to the first.
        places = []
        for level in reversed(range(len(widths))):
            for block in range(blocks + 1):
                places.append(residual(wide + skips.pop(), level))
                wide = widths[level]
                if level and block == blocks:
                    places[-1].append(Upsample(wide))
        self.up = nn.ModuleList(nn.ModuleList(layers) for layers in places)
        self.head = nn.Sequential(
            group_norm(width, groups), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
        )
        self.mixins = nn.ModuleDict()
        self._resolve()
        self._spatial = [name for name, module in self.named_modules() if isinstance(module, Transformer)]
        if zero_init:
            self._zero()

    @property
    def hooks(self) -> str:
        """The tables of hook owners: the UNet's, and its transformers', which are all alike; for printing."""
        return f"{self.resolved}\n{next(m.resolved for m in self.modules() if isinstance(m, Transformer))}"

    def _defaults(self) -> UNetHooks:
        return UNetHooks(self._prepare, self._enter, self._descend)

    def without_way_up(self) -> CogView3UNet:
        """The same without its second half, which a copy of the first half alone does not need."""
        self.up, self.head = nn.ModuleList(), nn.Sequential()
        self._spatial = [name for name in self._spatial if not name.startswith("up.")]
        return self

    def maps(self) -> tuple[list[int], list[int]]:
        """Channels, and number of halvings, of the maps that the way up takes over and of the middle's."""
        wide, level, out = self.width, 0, [(self.width, 0)]
        for layers in (*list(self.down)[1:], self.middle):
            first = next(layers.children())
            level += isinstance(first, Downsample)
            wide = first.conv2.out_channels if isinstance(first, ResBlock) else wide
            out.append((wide, level))
        return [channels for channels, _ in out], [halved for _, halved in out]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the convolutions and matrix products."""
        return self.stem.weight.dtype

    def _zero(self) -> None:
        """Every residual branch and the head start at zero."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)  # type: ignore[arg-type]
        for name, parameter in self.named_parameters():
            if ".mixins.map.leave." in name or name.startswith("head.2."):
                nn.init.zeros_(parameter)

    def prepare(self, cond: Condition, size: tuple[int, int], timesteps: Sequence[float] = ()) -> Prepared:
        """``size`` is the latent's (h, w) in cells; ``timesteps`` the timesteps of a sampling run, if any."""
        return self.resolved.hooks.prepare(cond, size, timesteps)

    def _prepare(self, cond: Condition, size: tuple[int, int], timesteps: Sequence[float]) -> Prepared:
        h, w = size
        if h % self.factor or w % self.factor:
            raise ValueError(
                f"a latent of {h} x {w} cells does not halve {self.factor.bit_length() - 1} times: "
                f"expected multiples of {self.factor} cells"
            )
        if cond.text.shape[1] != self.text_len:
            raise ValueError(f"the network takes {self.text_len} text tokens, got {cond.text.shape[1]}")
        context = Context(text=cond.text, text_mask=cond.text_mask, controls=cond.controls)
        contexts: dict[str, Context] = {
            name: cast(Transformer, self.get_submodule(name)).prepare(context) for name in self._spatial
        }
        vector, strength = cond.vector, cond.guidance
        if timesteps:
            vector, strength = one_row(vector), None if strength is None else one_row(strength)
        guidance = embedded(self.guidance, strength)
        prepared = Prepared(contexts, self.size(vector.to(self.dtype)), guidance, {}, {}, cond.controls)
        if not timesteps:
            return prepared
        times = torch.tensor(timesteps, dtype=torch.float32, device=prepared.size_emb.device)
        ways = (self.down, self.middle, self.up)
        blocks = [module for way in ways for module in way.modules() if isinstance(module, ResBlock)]
        pairs = zip(timesteps, times, strict=True)  # sent to the device at once
        steps = {float(timestep): self._embedding(t, prepared) for timestep, t in pairs}
        shifts = {timestep: [block.shift(emb) for block in blocks] for timestep, emb in steps.items()}
        return replace(prepared, steps=steps, shifts=shifts)

    def forward(self, x: Tensor, timestep: Scalar, prepared: Prepared) -> Tensor:
        emb = self.embeddings(timestep, prepared)
        skips, h = self.resolved.hooks.descend(x, timestep, emb, prepared)
        for place, layers in enumerate(self.up):
            h = self._run(torch.cat([h, skips.pop()], 1), emb, prepared, layers, f"up.{place}")
        out: Tensor = self.head(h)
        return out  # (B, C, h, w)

    def embeddings(self, timestep: Scalar, prepared: Prepared) -> Iterator[Tensor]:
        """For each residual block in order its shift or, for all, the embedding (B or 1, E)."""
        shifts = prepared.shifts.get(timestep) if isinstance(timestep, float) else None
        return repeat(self._embedding(timestep, prepared)) if shifts is None else iter(shifts)

    def _enter(self, x: Tensor, prepared: Prepared) -> Tensor:
        out: Tensor = self.stem(x.to(self.dtype))  # (B, width, h, w)
        return out

    def _descend(self, x: Tensor, timestep: Scalar, emb: Iterator[Tensor], prepared: Prepared) -> WayDown:
        h = self.resolved.hooks.enter(x, prepared)
        skips = [h]
        for place, layers in enumerate(self.down):
            if place:
                h = self._run(h, emb, prepared, layers, f"down.{place}")
                skips.append(h)
        return WayDown(skips, self._run(h, emb, prepared, self.middle, "middle"))

    def _run(
        self, h: Tensor, emb: Iterator[Tensor], prepared: Prepared, layers: nn.Module, name: str
    ) -> Tensor:
        """The layers of one place in order: residual block, transformer, change of resolution."""
        for j, layer in enumerate(layers.children()):
            if isinstance(layer, ResBlock):
                h = layer(h, next(emb))
            elif isinstance(layer, Transformer):
                h = layer(replace(prepared.contexts[f"{name}.{j}"], image=h))
            else:
                h = layer(h)
        return h

    def _embedding(self, timestep: Scalar, prepared: Prepared) -> Tensor:
        """(B or 1, E): timestep, guidance strength and size, activated for the residual blocks."""
        device = prepared.size_emb.device
        t = torch.as_tensor(timestep, dtype=torch.float32, device=device).reshape(-1)
        features = sinusoid(t, self.width).to(self.dtype)
        if prepared.guidance is not None:
            features = features + prepared.guidance
        return F.silu(self.time(features) + prepared.size_emb)
