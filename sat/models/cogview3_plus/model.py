"""The CogView3-Plus network: six mixins on the transformer base, and the time and size embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sat.mixin import Mixin
from sat.mixins.adaln import AdaLN
from sat.mixins.joint_attention import JointAttention
from sat.mixins.patch_embed import FinalLayer, PatchEmbed
from sat.mixins.qk_norm import QKNorm
from sat.mixins.sincos import SinCos2D
from sat.models.dit import JointDiT


class CogView3Plus(JointDiT):
    """Noisy latent (B, C, h, w), timestep, text (B, T, C_text), size vector (B, V) -> v (B, C, h, w).

    ``patch`` counts latent cells, ``table_size`` (rows, columns) patches. ``mixins`` are added to the
    standard ones (``patch_embed``, ``position``, ``joint_attention``, ``adaln``, ``qk_norm``,
    ``final_layer``) or take their place by name; null leaves one out. To rotate instead of adding a table:
    ``mixins: {position: null, rope: {target: sat.mixins.rope.RoPE, params: {…}}}``. ``zero_init``: fresh
    weights predict 0; without it they are random throughout, for tests. ``guidance_dim``: features of a
    guidance strength that the network takes as an input (distilled models). Defaults are those of the
    published 3 B model. Source: official ``dit.py``, ``configs/cogview3_plus.yaml``.
    """

    def __init__(  # noqa: PLR0913 - the numbers that make a model, each with the published value
        self,
        dim: int = 2560,
        heads: int = 64,
        depth: int = 30,
        channels: int = 16,
        patch: int = 2,
        text_dim: int = 4096,
        text_len: int = 224,
        emb_dim: int = 512,
        size_dim: int = 1536,
        table_size: Sequence[int] = (128, 128),
        double_norm: bool = True,
        zero_init: bool = True,
        guidance_dim: int | None = None,
        mixins: Mapping[str, Mixin | None] | None = None,
    ) -> None:
        if heads < 1 or dim % heads:
            raise ValueError(f"dim {dim} is not divisible by heads {heads}")
        if min(patch, channels, text_len) < 1:
            raise ValueError(
                f"patch {patch}, channels {channels} and text_len {text_len} must all be at least 1"
            )
        if len(table_size) != 2:
            raise ValueError(f"table_size is (rows, columns) in patches, got {list(table_size)}")
        standard: dict[str, Mixin | None] = {
            "patch_embed": PatchEmbed(channels, dim, patch, text_dim),
            "position": SinCos2D(dim, *table_size),
            "joint_attention": JointAttention(),
            "adaln": AdaLN(dim, emb_dim, depth),
            "qk_norm": QKNorm(dim // heads),
            "final_layer": FinalLayer(dim, emb_dim, patch, channels, double_norm),
        }
        super().__init__(
            {**standard, **(mixins or {})},
            dim=dim, heads=heads, depth=depth, channels=channels, patch=patch, text_len=text_len,
            emb_dim=emb_dim, size_dim=size_dim, zero_init=zero_init, guidance_dim=guidance_dim,
        )  # fmt: skip
