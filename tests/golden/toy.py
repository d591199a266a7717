"""The stand-in network of the sampler and loss files; its formula is in their metadata."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from sat.conditioning.conditioner import Condition
from sat.diffusion.schedule import Scalar
from sat.embeddings import guidance_sinusoid
from tests.golden.file import Golden, GoldenError
from tests.golden.options import option

_NUMBER = r"([0-9.]+)"
_FORMULA = re.compile(
    rf"tanh\({_NUMBER}\*x \+ {_NUMBER}\*t/{_NUMBER} \+ {_NUMBER}\*mean\(cond\['crossattn'\],dims\(1,2\)\)"
    rf" \+ {_NUMBER}\*mean\(cond\['vector'\],dim 1\)"
)
_STRENGTH = re.compile(rf"{_NUMBER}\*mean\(scale_emb,dim 1\)")


class Toy:
    """tanh(a x + b t / n + c mean(text) + d mean(vector)), the numbers read from the formula's text.

    A guidance strength adds e mean(its ``strength_dim`` features). Keeps what it was shown and what it
    answered, call by call.
    """

    def __init__(self, formula: str, strength_dim: int | None = None) -> None:
        found = _FORMULA.search(formula)
        if not found:
            raise GoldenError(f"the toy network's formula is not understood: {formula!r}")
        self.on_x, self.on_t, self.t_range, self.on_text, self.on_vector = map(float, found.groups())
        strength = _STRENGTH.search(formula)
        self.on_strength = float(strength[1]) if strength else None
        self.strength_dim = strength_dim
        self.features: Tensor | None = None
        self.strengths: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.times: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def prepare(self, cond: Condition, size: tuple[int, int], timesteps: Sequence[float] = ()) -> Tensor:
        """(B, 1, 1, 1): what the conditions add inside the tanh."""
        shift = self.on_text * cond.text.mean((1, 2)) + self.on_vector * cond.vector.mean(1)
        if cond.guidance is not None:
            if self.on_strength is None or self.strength_dim is None:
                raise GoldenError("a guidance strength needs scale_emb in the formula and cfg_cond_embed_dim")
            self.features = guidance_sinusoid(cond.guidance, self.strength_dim)
            shift = shift + self.on_strength * self.features.mean(1)
        return shift[:, None, None, None]

    def __call__(self, x: Tensor, timestep: Scalar, prepared: Tensor) -> Tensor:
        t = torch.as_tensor(timestep, dtype=torch.float32).expand(x.shape[0])
        out = torch.tanh(self.on_x * x + (self.on_t * t / self.t_range)[:, None, None, None] + prepared)
        self.inputs.append(x)
        self.times.append(t)
        self.outputs.append(out)
        if self.features is not None:
            self.strengths.append(self.features)
        return out


def toy_network(golden: Golden) -> Toy:
    """The toy network of a file."""
    formula = golden.metadata.get("toy_network")
    if formula is None:
        raise GoldenError(f"{golden.path}: its metadata has no 'toy_network'")
    dim = option(golden, "cfg_cond_embed_dim")
    return Toy(formula, 256 if dim is None else int(dim))  # 256 is the official default


def condition(golden: Golden, name: str) -> Condition:
    """``in.cond.*`` or ``in.uncond.*`` as a Condition."""
    return Condition(text=golden[f"in.{name}.crossattn"], vector=golden[f"in.{name}.vector"])
