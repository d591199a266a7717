"""Vision towers of CLIP and SigLIP on the transformer base: frozen encoders of pictures.

Source: arXiv:2103.00020, arXiv:2303.15343; peers ``CLIPVisionModel`` and ``SiglipVisionModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.errors import UserError
from sat.keys import Fuse, Rename, Rules
from sat.mixin import Mixin, replaces
from sat.transformer import BlockSpec, Context, Transformer, TransformerHooks


class TowerError(UserError, ValueError):
    """A folder that holds no vision tower that can be read."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a tower; ``size`` and ``patch`` in pixels. ``clip``: with a class token and a norm in front.

    ``mean`` and ``std`` are those of the colours it was trained on, of pictures in [0, 1].
    """

    dim: int
    heads: int
    depth: int
    mlp_dim: int
    size: int
    patch: int
    eps: float
    clip: bool
    gelu: Literal["tanh", "none", "quick"]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


_GELU: dict[str, Literal["tanh", "none", "quick"]] = {
    "quick_gelu": "quick",
    "gelu_pytorch_tanh": "tanh",
    "gelu_new": "tanh",
    "gelu": "none",
}
_USUAL: dict[str, dict[str, Any]] = {  # what a config.json leaves out
    "clip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
_CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def from_huggingface(config: Mapping[str, Any], colours: Mapping[str, Any] | None = None) -> Sizes:
    """Sizes for the content of a ``config.json``, of a vision model or of one that has one.

    ``colours``: the content of its ``preprocessor_config.json``.
    """
    told, kind = config, str(config.get("model_type"))
    if kind in ("clip", "siglip"):
        told, kind = config.get("vision_config") or {}, f"{kind}_vision_model"
    if kind not in _USUAL:
        raise TowerError(f"model_type is {kind}, expected {' or '.join(_USUAL)}")
    values = {**_USUAL[kind], **{k: v for k, v in told.items() if v is not None}}
    if values["hidden_act"] not in _GELU:
        raise TowerError(f"hidden_act is {values['hidden_act']}, expected one of {', '.join(_GELU)}")
    mean, std = _CLIP_COLOURS if kind.startswith("clip") else ((0.5,) * 3, (0.5,) * 3)
    own = colours or {}
    return Sizes(
        dim=values["hidden_size"],
        heads=values["num_attention_heads"],
        depth=values["num_hidden_layers"],
        mlp_dim=values["intermediate_size"],
        size=values["image_size"],
        patch=values["patch_size"],
        eps=values["layer_norm_eps"],
        clip=kind.startswith("clip"),
        gelu=_GELU[values["hidden_act"]],
        mean=tuple(own.get("image_mean") or mean),
        std=tuple(own.get("image_std") or std),
    )


class _Picture(Mixin):
    """Pictures (B, 3, size, size) -> tokens (B, N, D), CLIP's class token in front; a position each."""

    host = TransformerHooks

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        count = (sizes.size // sizes.patch) ** 2 + sizes.clip
        self.proj = nn.Conv2d(3, sizes.dim, sizes.patch, sizes.patch, bias=not sizes.clip)
        self.start = nn.Parameter(torch.zeros(sizes.dim)) if sizes.clip else None
        self.table = nn.Parameter(torch.zeros(count, sizes.dim))
        self.norm = nn.LayerNorm(sizes.dim, sizes.eps) if sizes.clip else nn.Identity()

    @replaces("embed")
    def embed(self, ctx: Context) -> Tensor:
        assert ctx.image is not None, "the tower gives the picture"
        x = self.proj(ctx.image).flatten(2).transpose(1, 2)  # (B, N, D)
        if self.start is not None:
            x = torch.cat([self.start.expand(len(x), 1, -1), x], 1)
        out: Tensor = self.norm(x + self.table)
        return out


class VisionTower(nn.Module):
    """Pictures -> tokens after all blocks but the last, as image prompts take them; see :meth:`tokens`."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        spec = BlockSpec(eps=sizes.eps, affine=True, mlp_dim=sizes.mlp_dim, gelu=sizes.gelu)
        depth = sizes.depth - 1  # the last one's output is of no use here
        self.transformer = Transformer(sizes.dim, sizes.heads, depth, {"picture": _Picture(sizes)}, spec)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) of pictures (B, 3, size, size), their colours as the tower was trained on."""
        out: Tensor = self.transformer(Context(image=x))
        return out

    def tokens(self, pictures: Tensor) -> Tensor:
        """Tokens (B, N, D) of pictures (B, 3, H, W) in [-1, 1], brought to the tower's size."""
        side, like = self.sizes.size, next(self.parameters())
        x = F.interpolate(pictures.float(), (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        colours = (self.sizes.mean, self.sizes.std)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in colours)
        out: Tensor = self((((x + 1) / 2 - mean) / std).to(like.dtype))
        return out


_OURS, _THEIRS, _PICTURE = "transformer.blocks.{}.", "encoder.layers.{}.", "transformer.mixins.picture."

#: ``vision_model.`` of transformers' CLIP and SigLIP, without the last block and what comes after it.
TOWER: Rules = [
    Rename("embeddings.patch_embedding.*", _PICTURE + "proj.*"),
    Rename("embeddings.position_embedding.weight", _PICTURE + "table"),
    Rename("embeddings.class_embedding", _PICTURE + "start"),
    Rename("pre_layrnorm.*", _PICTURE + "norm.*"),
    Rename(_THEIRS + "layer_norm1.*", _OURS + "norm1.*"),
    Fuse([_THEIRS + f"self_attn.{name}_proj.*" for name in "qkv"], _OURS + "attn.qkv.*"),
    Rename(_THEIRS + "self_attn.out_proj.*", _OURS + "attn.proj.*"),
    Rename(_THEIRS + "layer_norm2.*", _OURS + "norm2.*"),
    Rename(_THEIRS + "mlp.fc1.*", _OURS + "mlp.up.*"),
    Rename(_THEIRS + "mlp.fc2.*", _OURS + "mlp.down.*"),
]


def tower_name(name: str, sizes: Sizes) -> str | None:
    """The name that :data:`TOWER` knows a tensor by; None for one of another part or of no use here."""
    if name.startswith(("text_model.", "logit_", "text_projection", "visual_projection")):
        return None
    name = name.removeprefix("vision_model.")
    used = ("embeddings.", "pre_layrnorm.", *(f"encoder.layers.{n}." for n in range(sizes.depth - 1)))
    return name if name.startswith(used) and not name.endswith("position_ids") else None
