"""The CogView4 network: CogView3-Plus's parts with rotary positions, for text of any length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sat.mixin import Mixin
from sat.mixins.adaln import AdaLN
from sat.mixins.joint_attention import JointAttention
from sat.mixins.patch_embed import FinalLayer, PatchEmbed
from sat.mixins.qk_norm import QKNorm
from sat.mixins.rope import RoPE
from sat.models.dit import JointDiT

EPS = 1e-5
"""Of every norm; Plus has 1e-6 in its heads and at the end."""


class CogView4(JointDiT):
    """Noisy latent (B, C, h, w), time, text (B, T, C_text), size vector (B, V) -> flow (B, C, h, w).

    T is any number of tokens. ``rope_size`` (rows, columns) are the positions that every picture's grid of
    patches is spread over. ``mixins`` are added to the standard ones (``patch_embed``, ``rope``,
    ``joint_attention``, ``adaln``, ``qk_norm``, ``final_layer``) or take their place by name; null leaves one
    out. ``zero_init`` and ``guidance_dim`` as in :class:`sat.models.dit.JointDiT`. Defaults are those of the
    published 6 B model. Peer: ``CogView4Transformer2DModel`` of diffusers (tests/parity/test_cogview4.py).
    """

    def __init__(  # noqa: PLR0913 - the numbers that make a model, each with the published value
        self,
        dim: int = 4096,
        heads: int = 32,
        depth: int = 28,
        channels: int = 16,
        patch: int = 2,
        text_dim: int = 4096,
        emb_dim: int = 512,
        size_dim: int = 1536,
        rope_size: Sequence[int] = (256, 256),
        zero_init: bool = True,
        guidance_dim: int | None = None,
        mixins: Mapping[str, Mixin | None] | None = None,
    ) -> None:
        if heads < 1 or dim % heads or dim // heads % 4:
            raise ValueError(f"dim {dim} is not {heads} heads of a multiple of 4, as rotary positions need")
        if min(patch, channels) < 1:
            raise ValueError(f"patch {patch} and channels {channels} must both be at least 1")
        if len(rope_size) != 2:
            raise ValueError(f"rope_size is (rows, columns) of positions, got {list(rope_size)}")
        standard: dict[str, Mixin | None] = {
            "patch_embed": PatchEmbed(channels, dim, patch, text_dim),
            "rope": RoPE(dim // heads, *rope_size),
            "joint_attention": JointAttention(),
            "adaln": AdaLN(dim, emb_dim, depth, by_part=True),
            "qk_norm": QKNorm(dim // heads, EPS),
            "final_layer": FinalLayer(dim, emb_dim, patch, channels, double_norm=False, eps=EPS),
        }
        super().__init__(
            {**standard, **(mixins or {})},
            dim=dim, heads=heads, depth=depth, channels=channels, patch=patch, text_len=None,
            emb_dim=emb_dim, size_dim=size_dim, zero_init=zero_init, guidance_dim=guidance_dim,
        )  # fmt: skip
