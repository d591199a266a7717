"""A control of CogView3-Plus for diffusers, which needs nothing but diffusers: hooks on a transformer.

Written beside a pipeline by ``convert.py CONTROL OUT --to diffusers --model MODEL``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import CogView3PlusTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import CogView3PlusPatchEmbed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_cogview3plus import CogView3PlusTransformerBlock
from torch import Tensor, nn


class CogView3PlusControl(ModelMixin, ConfigMixin):
    """Additions to the image tokens of a transformer of ``base_layers`` blocks, by a picture.

    ``kind`` controlnet: copies of its first ``layers`` blocks, one linear behind each. blockwise: an MLP of
    ``hidden`` a block. concat: a second patch embedding. ``cell`` 0 takes the picture's latent; else its
    pixels in [0, 1], as many of them a side of a latent's cell.
    """

    @register_to_config
    def __init__(
        self,
        kind: str = "controlnet",
        base_layers: int = 30,
        layers: int = 6,
        hidden: int = 2560,
        patch_size: int = 2,
        in_channels: int = 16,
        attention_head_dim: int = 40,
        num_attention_heads: int = 64,
        text_embed_dim: int = 4096,
        time_embed_dim: int = 512,
        pos_embed_max_size: int = 128,
        cell: int = 0,
    ) -> None:
        super().__init__()
        heads, head_dim = num_attention_heads, attention_head_dim
        dim, cells = heads * head_dim, 3 * (cell * patch_size) ** 2 if cell else in_channels * patch_size**2
        if kind == "controlnet":
            self.patch_embed = CogView3PlusPatchEmbed(
                in_channels, dim, patch_size, text_embed_dim, pos_embed_max_size
            )
            self.picture = nn.Linear(cells, dim)
            self.transformer_blocks = nn.ModuleList(
                CogView3PlusTransformerBlock(dim, heads, head_dim, time_embed_dim) for _ in range(layers)
            )
            self.zeros = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        elif kind == "blockwise":
            self.picture = nn.Linear(cells, dim)
            self.norm_c = nn.RMSNorm(dim, 1e-6)
            self.norms = nn.ModuleList(nn.RMSNorm(dim, 1e-6) for _ in range(base_layers))
            self.up = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(base_layers))
            self.zeros = nn.ModuleList(nn.Linear(hidden, dim) for _ in range(base_layers))
        elif kind == "concat":
            self.zeros = nn.Linear(cells, dim, bias=False)
        else:
            raise ValueError(f"kind is {kind!r}, expected controlnet, blockwise or concat")

    def patches(self, picture: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, C p p), in the model's type."""
        p = self.config.patch_size * (self.config.cell or 1)
        b, c, h, w = picture.shape
        cells = picture.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        return cells.reshape(b, h // p * (w // p), c * p * p).to(self.dtype)

    def residuals(self, latents: Tensor, text: Tensor, emb: Tensor, control: Tensor) -> list[Tensor]:
        """Additions of the copied blocks, (B, N, D) each."""
        both, out = self.patch_embed(latents.to(self.dtype), text.to(self.dtype)), []
        length = text.shape[1]
        words, image = both[:, :length], both[:, length:] + self.picture(self.patches(control))
        for block, leave in zip(self.transformer_blocks, self.zeros, strict=True):
            image, words = block(hidden_states=image, encoder_hidden_states=words, emb=emb)
            out.append(leave(image))
        return out

    @contextmanager
    def attached(
        self, transformer: CogView3PlusTransformer2DModel, control: Tensor, scale: Tensor, acts: object
    ) -> Iterator[None]:
        """A context in which ``transformer`` is steered by ``control`` (B, C, h, w), latents or pixels.

        ``scale`` (B, 1, 1) counts per row; ``acts(timestep)`` says at which steps.
        """
        kind, depth, now = self.config.kind, self.config.base_layers, {}

        def before(_: nn.Module, args: tuple, given: dict) -> None:
            now.clear()
            if acts(given["timestep"]):
                now.update(latents=given["hidden_states"], text=given["encoder_hidden_states"])
                if kind == "blockwise":
                    now["c"] = self.norm_c(self.picture(self.patches(control)))

        def embedded(_: nn.Module, args: tuple, tokens: Tensor) -> Tensor | None:
            if not now or kind != "concat":
                return None
            length = now["text"].shape[1]
            added = (scale * self.zeros(self.patches(control))).to(tokens.dtype)
            return torch.cat([tokens[:, :length], tokens[:, length:] + added], 1)

        def timed(_: nn.Module, args: tuple, emb: Tensor) -> None:
            if now and kind == "controlnet":
                now["added"] = self.residuals(now["latents"], now["text"], emb, control)

        def behind(layer: int) -> object:
            def hook(_: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                image, text = output
                if now and kind == "controlnet":
                    added = now["added"][layer * len(self.zeros) // depth]
                elif now and kind == "blockwise":
                    h = self.norms[layer](image.to(self.dtype)) + now["c"]
                    h = nn.functional.gelu(self.up[layer](h), approximate="tanh")
                    added = self.zeros[layer](h)
                else:
                    return output
                return image + (scale * added).to(image.dtype), text

            return hook

        held = [
            transformer.register_forward_pre_hook(before, with_kwargs=True),
            transformer.patch_embed.register_forward_hook(embedded),
            transformer.time_condition_embed.register_forward_hook(timed),
        ]
        held += [
            block.register_forward_hook(behind(layer))
            for layer, block in enumerate(transformer.transformer_blocks)
        ]
        try:
            yield
        finally:
            for one in held:
                one.remove()
