"""Controls by what a picture shows: reference tokens, and tokens of a frozen image encoder (IP-Adapter).

Both give attention further keys and values for its queries. Sources: reference latents as tokens at timestep
0 with their keys kept over the steps, as published for Kontext-like and GLM-Image models; decoupled attention
before the output projection, arXiv:2308.06721 and its form for joint attention in SD3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from sat.control.base import BaseModel, Control, ControlError, transformer_of, weighted, zero
from sat.control_input import ControlInput
from sat.first_stage.model import AutoencoderKL
from sat.mixin import Mixin, wraps
from sat.models.vision.classifier import Card, Classifier
from sat.transformer import Context, TransformerHooks
from sat.transformer.hooks import Attend, Embed, Layer, Prepare
from sat.transformer.transformer import Block, dtype_of
from sat.transformer.transformer import attend as attention


class KeysValues(NamedTuple):
    """Further keys and values of one layer, (B, H, R, d) each."""

    k: Tensor
    v: Tensor


@dataclass
class _Collecting:
    """Keys and values of each layer, as a pass over the reference goes by."""

    layers: list[KeysValues] = field(default_factory=list)


class Reference(Control, Mixin):
    """A reference picture as further tokens that all queries attend to; they have no loss and no output.

    Its latent goes through the base's own blocks once per image, at timestep 0 and without text, with a
    learned ``mark`` (D,) that tells its places from those of the picture; each layer's keys and values are
    kept for all steps. To be trained together with a LoRA of the base, which is to learn what to take over.
    A strength between 0 and 1 mixes attention with and without.
    """

    host = TransformerHooks
    in_tiles = False

    def __init__(self, *, base: BaseModel) -> None:
        super().__init__()
        whole = transformer_of(base, "a reference")
        self.mark = nn.Parameter(0.02 * torch.randn(int(getattr(base.network, "dim"))))  # noqa: B009
        self._host, self.depth = (whole,), len(whole.blocks)  # in a tuple: not registered here too

    def places(self) -> Mapping[str, Mixin]:
        """On the transformer."""
        return {"transformer": self}

    def layers(self) -> int:
        """The base's layers."""
        return self.depth

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        def own(control: ControlInput) -> list[KeysValues]:
            return self._kept(replace(ctx, image=control.value, controls=(control,)))

        if not any(c.name == self.label and not isinstance(c.made, _Collecting) for c in ctx.controls):
            return inner(ctx)
        return inner(ctx).controlled(self.label, own)

    def _kept(self, ctx: Context) -> list[KeysValues]:
        """Keys and values of every layer for the latent in ``ctx.image``."""
        (transformer,), (control,) = self._host, ctx.controls
        assert ctx.text is not None and ctx.image is not None, "the network gives both"
        if type(ctx) is not Context:
            raise ControlError("references do not go with parallel.sequence: set it to 1")
        collecting = _Collecting()
        alone = replace(
            ctx, text=ctx.text[:, :0], text_mask=None, image=ctx.image.to(self.mark.dtype),
            controls=(replace(control, made=collecting),),
        )  # fmt: skip
        transformer.hooks.run(transformer.prepare(alone))
        return collecting.layers

    @wraps("embed")
    def embed(self, inner: Embed, ctx: Context) -> Tensor:
        x = inner(ctx)
        collects = any(c.name == self.label and isinstance(c.made, _Collecting) for c in ctx.controls)
        return x + self.mark.to(x.dtype) if collects else x

    @wraps("layer")
    def layer(self, inner: Layer, x: Tensor, ctx: Context, layer: int) -> Tensor:
        def own(control: ControlInput) -> object:
            return control.made if isinstance(control.made, _Collecting) else (control.made[layer], layer)

        return inner(x, ctx.controlled(self.label, own), layer)

    @wraps("attend")
    def attend(self, inner: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        out: Tensor | None = None
        for own in ctx.controls:
            if own.name != self.label:
                continue
            if isinstance(own.made, _Collecting):
                own.made.layers.append(KeysValues(k, v))
                continue
            more, layer = own.made
            weight = own.weight(layer, q)
            mask = ctx.key_mask
            wide = (
                ctx if mask is None else replace(ctx, key_mask=F.pad(mask, (0, more.k.shape[2]), value=True))
            )
            seen = inner(q, torch.cat([k, more.k], 2), torch.cat([v, more.v], 2), wide)
            if isinstance(weight, float) and weight == 1 and out is None:
                out = seen
            else:
                plain = inner(q, k, v, ctx)
                out = (plain if out is None else out) + weighted(seen - plain, weight)
        return inner(q, k, v, ctx) if out is None else out


class ImagePrompt(Control, Mixin):
    """IP-Adapter: image tokens attend to tokens of a frozen image encoder, beside all else they attend to.

    ``encoder`` is a folder with the small classifier, whose last map gives (B, 16, width) tokens for 64
    pixels. They are normalised and projected to each layer's keys and values (D each); values start at zero.
    The result is added to the image tokens' attention before the output projection. The unconditional half
    of guidance gets zeros for features.
    """

    host = TransformerHooks
    takes = "features"
    blank = True

    def __init__(self, encoder: str = "checkpoints/tiny_classifier", *, base: BaseModel) -> None:
        super().__init__()
        whole = transformer_of(base, "an image prompt")
        self._encoder, dim = encoder, int(getattr(base.network, "dim"))  # noqa: B009
        self._loaded: tuple[Classifier, ...] = ()  # in a tuple: neither trained nor written
        width, self.head_dim = _card(Path(encoder)).width, cast(Block, whole.blocks[0]).attn.head_dim
        self.norm = nn.LayerNorm(width)
        self.keys = nn.ModuleList(nn.Linear(width, dim, bias=False) for _ in whole.blocks)
        self.zeros = nn.ModuleList(zero(nn.Linear(width, dim, bias=False)) for _ in whole.blocks)

    def encode(self, first_stage: AutoencoderKL, pictures: Tensor) -> Tensor:
        """Tokens (B, cells, width) of the encoder's last map."""
        if not self._loaded:
            with torch.device("cpu"):
                model = Classifier(_card(Path(self._encoder)))
            model.take(load_file(Path(self._encoder) / "classifier.safetensors"))
            self._loaded = (model.eval().requires_grad_(False),)
        (model,), side = self._loaded, self._loaded[0].card.size
        model.to(pictures.device)
        small = F.interpolate(pictures.float(), (side, side), mode="bilinear", antialias=True)
        with torch.no_grad():
            tokens: Tensor = rearrange(model.body(small), "b c h w -> b (h w) c")
        return tokens

    def places(self) -> Mapping[str, Mixin]:
        """On the transformer."""
        return {"transformer": self}

    def layers(self) -> int:
        """The base's layers."""
        return len(self.zeros)

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        def own(control: ControlInput) -> list[KeysValues]:
            features = self.norm(control.value.to(dtype_of(self.keys[0])))  # (B, R, width)

            def heads(linear: nn.Module) -> Tensor:
                made: Tensor = rearrange(linear(features), "b r (h d) -> b h r d", d=self.head_dim)
                return made

            return [KeysValues(heads(k), heads(v)) for k, v in zip(self.keys, self.zeros, strict=True)]

        return inner(ctx).controlled(self.label, own)

    @wraps("layer")
    def layer(self, inner: Layer, x: Tensor, ctx: Context, layer: int) -> Tensor:
        return inner(x, ctx.controlled(self.label, lambda own: (own.made[layer], layer)), layer)

    @wraps("attend")
    def attend(self, inner: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        out, image = inner(q, k, v, ctx), sum(ctx.segments[:-1])
        for own in ctx.controls:
            if own.name == self.label:
                (keys, values), layer = cast("tuple[KeysValues, int]", own.made)
                if keys.shape[1] != q.shape[1]:
                    raise ControlError(
                        "image prompts do not go with parallel.tensor or parallel.sequence: set them to 1"
                    )
                added = attention(q[:, :, image:], keys, values)  # (B, H, N, d)
                added = weighted(added, own.weight(layer, added))
                out = torch.cat([out[:, :, :image], out[:, :, image:] + added], 2)
        return out


def _card(folder: Path) -> Card:
    """Sizes of the classifier in ``folder``."""
    try:
        return Card.of(json.loads((folder / "classifier.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ControlError(f"image prompt: {folder} holds no classifier ({error})") from error
