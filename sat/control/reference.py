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
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sat.checkpoint.eight_bits import Whole
from sat.checkpoint.format import as_lazy
from sat.checkpoint.load import load
from sat.checkpoint.rules import as_ours
from sat.config.build import without_init
from sat.control.base import BaseModel, Control, ControlError, transformer_of, weighted, zero
from sat.control_input import ControlInput, KeysValues
from sat.first_stage.model import AutoencoderKL
from sat.mixin import Mixin, wraps
from sat.mixins.cross_attention import CrossAttention, CrossLayer
from sat.models.cogview3_unet import CogView3UNet
from sat.models.vision.classifier import Card, Classifier
from sat.models.vision.tower import TOWER, Sizes, TowerError, VisionTower, from_huggingface, tower_name
from sat.parallel.tensor import copy_to_ranks
from sat.transformer import Context, Transformer, TransformerHooks
from sat.transformer.hooks import Attend, Cross, Embed, Layer, Prepare
from sat.transformer.transformer import Block, dtype_of
from sat.transformer.transformer import attend as attention


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
            return control.made if isinstance(control.made, _Collecting) else control.made[layer]

        return inner(x, ctx.controlled(self.label, own), layer)

    @wraps("attend")
    def attend(self, inner: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        out: Tensor | None = None
        for own in ctx.controls:
            if own.name != self.label:
                continue
            if isinstance(own.made, _Collecting):
                own.made.layers.append(KeysValues(k, v, len(own.made.layers)))
                continue
            more = cast(KeysValues, own.made)
            weight = own.weight(more.layer, q)
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


def image_prompt(encoder: str = "checkpoints/tiny_classifier", *, base: BaseModel) -> Control:
    """The image prompt (IP-Adapter) of a network: of a transformer with joint attention, or of a UNet.

    ``encoder`` is a folder with a frozen image encoder: the small classifier, whose last map gives 16 tokens
    for 64 pixels, or a CLIP or SigLIP vision tower as Hugging Face writes it.
    """
    kind = UNetImagePrompt if isinstance(base.network, CogView3UNet) else ImagePrompt
    return kind(encoder, base=base)


class _ImagePrompt(Control):
    """Tokens of a frozen encoder, and a layer norm of them.

    They are projected to each layer's keys and values, which start at zero. The unconditional half of
    guidance gets zeros for features.
    """

    takes = "features"
    blank = True

    def __init__(self, encoder: str, base: BaseModel) -> None:
        super().__init__()
        self._encoder = (Encoder(Path(encoder)),)
        self.width, self._tensor = self._encoder[0].width, base.tensor
        self.norm = nn.LayerNorm(self.width)

    def encode(self, first_stage: AutoencoderKL, pictures: Tensor) -> Tensor:
        """Tokens (B, R, width) of the encoder."""
        return self._encoder[0](pictures)

    def keys_values(
        self, value: Tensor, keys: nn.Module, values: nn.Module, layer: int, head: int
    ) -> KeysValues:
        """This tensor rank's heads of ``head`` outputs each, for the tokens (B, R, width)."""
        features, tensor = self.norm(value.to(dtype_of(keys))), self._tensor

        def heads(linear: nn.Module) -> Tensor:
            whole = copy_to_ranks(linear(features), tensor)
            share: Tensor = whole.chunk(tensor.size, -1)[tensor.rank]
            out: Tensor = rearrange(share, "b r (h d) -> b h r d", d=head)
            return out

        return KeysValues(heads(keys), heads(values), layer)


class ImagePrompt(_ImagePrompt, Mixin):
    """IP-Adapter: image tokens attend to tokens of a frozen image encoder, beside all else they attend to.

    The result is added to the image tokens' attention before the output projection.
    """

    host = TransformerHooks

    def __init__(self, encoder: str = "checkpoints/tiny_classifier", *, base: BaseModel) -> None:
        super().__init__(encoder, base)
        whole = transformer_of(base, "an image prompt")
        dim, self.head_dim = int(getattr(base.network, "dim")), cast(Block, whole.blocks[0]).attn.head_dim  # noqa: B009
        self.keys = nn.ModuleList(nn.Linear(self.width, dim, bias=False) for _ in whole.blocks)
        self.zeros = nn.ModuleList(zero(nn.Linear(self.width, dim, bias=False)) for _ in whole.blocks)

    def places(self) -> Mapping[str, Mixin]:
        """On the transformer."""
        return {"transformer": self}

    def layers(self) -> int:
        """The base's layers."""
        return len(self.zeros)

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        def own(control: ControlInput) -> list[KeysValues]:
            pairs = enumerate(zip(self.keys, self.zeros, strict=True))
            return [self.keys_values(control.value, k, v, n, self.head_dim) for n, (k, v) in pairs]

        return inner(ctx).controlled(self.label, own)

    @wraps("layer")
    def layer(self, inner: Layer, x: Tensor, ctx: Context, layer: int) -> Tensor:
        return inner(x, ctx.controlled(self.label, lambda own: own.made[layer]), layer)

    @wraps("attend")
    def attend(self, inner: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        out, image = inner(q, k, v, ctx), sum(ctx.segments[:-1])
        for own in ctx.controls:
            if own.name == self.label:
                more = cast(KeysValues, own.made)
                added = attention(q[:, :, image:], more.k, more.v)  # (B, H, N, d)
                added = weighted(added, own.weight(more.layer, added))
                out = torch.cat([out[:, :, :image], out[:, :, image:] + added], 2)
        return out


class UNetImagePrompt(_ImagePrompt):
    """IP-Adapter of a UNet: every cross-attention reads the picture's tokens too, with the same queries.

    The result is added to the attention to the text before the output projection.
    """

    def __init__(self, encoder: str = "checkpoints/tiny_classifier", *, base: BaseModel) -> None:
        super().__init__(encoder, base)
        self.paths, self.parts, count = list[str](), nn.ModuleList(), 0
        for path, module in base.network.named_modules():
            own = "mixins" not in path.split(".")  # and no other control's
            if own and isinstance(module, Transformer) and "cross" in module.mixins:
                part = _CrossPrompt(self, cast(CrossAttention, module.mixins["cross"]), count)
                self.paths.append(path)
                self.parts.append(part)
                count += len(part.keys)
        self.depth = count

    def places(self) -> Mapping[str, Mixin]:
        """On each transformer with cross-attention."""
        return dict(zip(self.paths, cast("list[Mixin]", list(self.parts)), strict=True))

    def layers(self) -> int:
        """The cross-attentions, on the way down, in the middle, and up."""
        return self.depth


class _CrossPrompt(Mixin):
    """Keys and values of the picture's tokens for the layers of one transformer, from number ``first`` on."""

    host = TransformerHooks

    def __init__(self, control: _ImagePrompt, cross: CrossAttention, first: int) -> None:
        super().__init__()
        self._held, self.first = (control, cross), first  # in a tuple: not registered here too
        layers = [cast(CrossLayer, layer) for layer in cross.layers]
        dims = [layer.q.out_features for layer in layers]  # whole on each tensor rank
        self.keys = nn.ModuleList(nn.Linear(control.width, dim, bias=False) for dim in dims)
        self.zeros = nn.ModuleList(zero(nn.Linear(control.width, dim, bias=False)) for dim in dims)

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        control, cross = self._held

        def own(given: ControlInput) -> list[KeysValues]:
            return [
                control.keys_values(given.value, k, v, n, cast(CrossLayer, cross.layers[n]).head_dim)
                for n, (k, v) in enumerate(zip(self.keys, self.zeros, strict=True))
            ]

        return inner(ctx).controlled(control.label, own)

    @wraps("cross")
    def cross(self, inner: Cross, x: Tensor, ctx: Context, layer: int) -> Tensor | None:
        control, cross = self._held
        out = inner(x, ctx, layer)
        for own in ctx.controls:
            if own.name == control.label and out is not None:
                kv = tuple((one.k, one.v) for one in cast("list[KeysValues]", own.made))
                # proj(a + s b) = proj(a) + s (proj(b) - bias)
                seen = inner(x, replace(ctx, text_kv=kv, text_mask=None, controls=()), layer)
                assert seen is not None, "it is not without the picture"
                added = seen - cast(CrossLayer, cross.layers[layer]).proj.bias
                out = out + weighted(added, own.weight(self.first + layer, added))
        return out


class Encoder:
    """The frozen image encoder in ``folder``: pictures (B, 3, H, W) in [-1, 1] -> tokens (B, R, ``width``).

    Weights are read when the first picture comes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._loaded = folder, cast("Classifier | VisionTower | None", None)
        self._sizes = _tower_sizes(folder) if (folder / "config.json").is_file() else None
        self.width = _card(folder).width if self._sizes is None else self._sizes.dim

    def model(self, device: torch.device) -> Classifier | VisionTower:
        """The encoder, on ``device``."""
        if self._loaded is None:
            sizes = self._sizes
            self._loaded = _classifier(self.folder) if sizes is None else _tower(self.folder, sizes)
        return self._loaded.to(device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        model = self.model(pictures.device)
        if isinstance(model, VisionTower):
            return model.tokens(pictures)
        side = model.card.size
        small = F.interpolate(pictures.float(), (side, side), mode="bilinear", antialias=True)
        tokens: Tensor = rearrange(model.body(small), "b c h w -> b (h w) c")
        return tokens


def _tower_sizes(folder: Path) -> Sizes:
    """Sizes of the vision tower in ``folder``; only its JSON files are read."""
    told, colours = json.loads((folder / "config.json").read_text()), folder / "preprocessor_config.json"
    try:
        return from_huggingface(told, json.loads(colours.read_text()) if colours.is_file() else None)
    except TowerError as error:
        raise ControlError(f"image prompt: {folder}: {error}") from error


def _tower(folder: Path, sizes: Sizes) -> VisionTower:
    """The vision tower in ``folder``, from safetensors as transformers writes them."""
    files, read = sorted(folder.glob("*.safetensors")), dict[str, Tensor]()
    if not files:
        raise ControlError(
            f"image prompt: {folder} holds no .safetensors: save its model with save_pretrained"
        )
    for file in files:
        with safe_open(file, "pt") as opened:
            for theirs in opened.keys():  # noqa: SIM118 - no mapping
                if name := tower_name(theirs, sizes):
                    read[name] = opened.get_tensor(theirs)
    with torch.device("meta"), without_init():
        tower = VisionTower(sizes)
    if not read:
        raise ControlError(f"image prompt: {folder} holds no tensors of a vision tower")
    dtype = torch.promote_types(next(iter(read.values())).dtype, torch.float32)
    load(tower, as_ours(as_lazy(read), TOWER), "model", dtype=dtype)
    return tower.eval().requires_grad_(False)


def _classifier(folder: Path) -> Classifier:
    with torch.device("cpu"):
        model = Classifier(_card(folder))
    file = folder / "classifier.safetensors"
    model.load_state_dict(dict(Whole(as_lazy(load_file(file), str(file)))))
    return model.float().eval().requires_grad_(False)


def _card(folder: Path) -> Card:
    """Sizes of the classifier in ``folder``."""
    try:
        return Card.of(json.loads((folder / "classifier.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ControlError(f"image prompt: {folder} holds no encoder ({error})") from error
