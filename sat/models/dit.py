"""A diffusion transformer of text and image tokens: the parts that CogView3-Plus and CogView4 share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition
from sat.diffusion.schedule import Scalar
from sat.embeddings import GuidanceEmbedding, embedded, mlp, one_row, sinusoid
from sat.mixin import Mixin
from sat.transformer import Context, Grid, Transformer


class Step(NamedTuple):
    """Embedding of one timestep, and all layers' modulations by it."""

    emb: Tensor  # (1, E)
    modulation: Tensor | None  # (depth, 6, 1, S, D)


@dataclass(frozen=True)
class Prepared:
    """Everything about a batch that no step changes; made by :meth:`JointDiT.prepare`."""

    context: Context
    size_emb: Tensor  # (B, E), or (1, E) where all rows are alike
    guidance: Tensor | None  # (B or 1, D) features of the guidance strength
    steps: Mapping[float, Step]  # timestep -> its embedding and modulations


class JointDiT(nn.Module):
    """Noisy latent (B, C, h, w), timestep, text (B, T, C_text), size vector (B, V) -> (B, C, h, w).

    A transformer with ``mixins``, and two small MLPs that embed the timestep and the size vector. ``patch``
    counts latent cells; ``text_len`` None takes text of any length. ``zero_init``: fresh weights predict 0;
    without it they are random throughout, for tests. ``guidance_dim``: features of a guidance strength that
    the network takes as an input (distilled models).
    """

    def __init__(  # noqa: PLR0913 - the numbers that make a model; its families have the values
        self,
        mixins: Mapping[str, Mixin | None],
        *,
        dim: int,
        heads: int,
        depth: int,
        channels: int,
        patch: int,
        text_len: int | None,
        emb_dim: int,
        size_dim: int,
        zero_init: bool,
        guidance_dim: int | None,
    ) -> None:
        super().__init__()
        self.dim, self.patch, self.channels, self.text_len = dim, patch, channels, text_len
        used = {name: mixin for name, mixin in mixins.items() if mixin is not None}
        self.transformer = Transformer(dim, heads, depth, used)
        self.time = mlp(dim, emb_dim)
        self.size = mlp(size_dim, emb_dim)
        self.guidance = None if guidance_dim is None else GuidanceEmbedding(guidance_dim, dim)
        self._initialise(zero_init)

    @property
    def hooks(self) -> str:
        """The table of hook owners, for printing."""
        return str(self.transformer.resolved)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the matrix products."""
        return self.time[0].weight.dtype  # type: ignore[return-value]

    def _initialise(self, zero: bool) -> None:
        """Weights for training from scratch: Glorot matrices, no biases, small embeddings.

        With ``zero``, adaLN and the head start at zero, so that every block is the identity and the output is
        0. Source: arXiv:2212.09748 (adaLN-zero).
        """
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear) or isinstance(module, GuidanceEmbedding):
                continue
            nn.init.zeros_(module.bias)
            if zero and (".adaln." in name or name.endswith("final_layer.linear")):
                nn.init.zeros_(module.weight)
            elif name.startswith(("time.", "size.")):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)

    def prepare(self, cond: Condition, size: tuple[int, int], timesteps: Sequence[float] = ()) -> Prepared:
        """``size`` is the latent's (h, w) in cells; ``timesteps`` the timesteps of a sampling run, if any."""
        h, w = size
        if h % self.patch or w % self.patch:
            raise ValueError(f"a latent of {h} x {w} cells does not divide into patches of {self.patch}")
        if self.text_len is not None and cond.text.shape[1] != self.text_len:
            raise ValueError(f"the network takes {self.text_len} text tokens, got {cond.text.shape[1]}")
        vector, strength = cond.vector, cond.guidance
        if timesteps:
            vector, strength = one_row(vector), None if strength is None else one_row(strength)
        size_emb = self.size(vector.to(self.dtype))  # (B or 1, E)
        guidance = embedded(self.guidance, strength)  # (B or 1, D)
        steps: dict[float, Step] = {}
        if timesteps and len(size_emb) == 1 and (guidance is None or len(guidance) == 1):
            times = torch.tensor(timesteps, dtype=torch.float32, device=size_emb.device)
            emb = self._time(times, guidance) + size_emb  # (steps, E)
            made = self.transformer.modulations(emb)
            for s, timestep in enumerate(timesteps):
                steps[float(timestep)] = Step(emb[s : s + 1], None if made is None else made[s])
        grid = Grid(h // self.patch, w // self.patch)
        context = Context(text=cond.text, text_mask=cond.text_mask, grid=grid, controls=cond.controls)
        if cond.controls:  # references are at timestep 0
            still = torch.zeros(1, dtype=torch.float32, device=size_emb.device)
            context = replace(context, emb=self._time(still, guidance) + size_emb)
        return Prepared(self.transformer.prepare(context), size_emb, guidance, steps)

    def forward(self, x: Tensor, timestep: Scalar, prepared: Prepared) -> Tensor:
        step = prepared.steps.get(timestep) if isinstance(timestep, float) else None
        if step is None:
            t = torch.as_tensor(timestep, dtype=torch.float32, device=x.device).reshape(-1)
            step = Step(self._time(t, prepared.guidance) + prepared.size_emb, None)
        context = replace(prepared.context, image=x.to(self.dtype), emb=step.emb, modulation=step.modulation)
        out: Tensor = self.transformer(context)
        return out  # (B, C, h, w)

    def _time(self, t: Tensor, guidance: Tensor | None) -> Tensor:
        """(B,) timesteps and (B or 1, D) guidance features -> (B, E)."""
        features = sinusoid(t, self.dim).to(self.dtype)
        out: Tensor = self.time(features if guidance is None else features + guidance)
        return out
