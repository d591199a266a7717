"""Checks of sinusoids and position tables: ``embeddings*``."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from sat.conditioning.conditioner import SizeConditioner
from sat.embeddings import guidance_sinusoid, sinusoid
from sat.mixins.joint_attention import JointAttention
from sat.mixins.sincos import SinCos2D, sincos_table
from sat.transformer.hooks import Context, Grid
from tests.golden.file import Golden
from tests.golden.report import Report

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check(golden: Golden, report: Report) -> None:
    """Every ``out.*``, recomputed from the numbers in its name and the file's inputs."""
    for name in golden.names("mid.", "out."):
        for pattern, make in _RULES.items():
            if found := re.fullmatch(rf"out\.{pattern}", name):
                ours = make(golden, *found.groups())
                if make in _LARGEST:
                    report.sinusoid(name, ours, golden[name], _LARGEST[make](golden))
                else:
                    report.table(name, ours, golden[name])
                break
        else:
            report.unknown(name)


def _timestep(golden: Golden, dim: str, half: str | None) -> Tensor:
    out = sinusoid(golden["in.timesteps"], int(dim))
    return out.to(_HALF[half]).float() if half else out


def _guidance(golden: Golden, dim: str) -> Tensor:
    return guidance_sinusoid(golden["in.guidance_w"], int(dim))


def _sizes(golden: Golden, dim: str) -> Tensor:
    """One pair of the size vector; the conditioner embeds three."""
    pair = golden["in.sizes_hw"]
    return SizeConditioner(int(dim))(pair, pair, pair)[:, : 2 * int(dim)]


def _table(golden: Golden, dim: str, height: str, width: str) -> Tensor:
    return sincos_table(int(height), int(width), int(dim))


def _position(golden: Golden, dim: str, text: str, height: str, width: str) -> Tensor:
    """The position mixin for an image in pixels, 16 to a patch; its table is just large enough."""
    grid = Grid(int(height) // 16, int(width) // 16)
    ctx = Context(grid=grid, segments=(int(text), grid.h * grid.w))
    out = JointAttention().position(SinCos2D(int(dim), *grid).position, ctx)
    assert out is not None, "the mixin adds a table"
    return out


_RULES: dict[str, Callable[..., Tensor]] = {
    r"timestep_embedding\.dim(\d+)(?:\.(bf16|fp16)_as_f32)?": _timestep,
    r"guidance_scale_embedding\.dim(\d+)": _guidance,
    r"concat_timestep_nd\.outdim(\d+)": _sizes,
    r"pos_embed_sincos\.dim(\d+)\.h(\d+)\.w(\d+)": _table,
    r"position_embedding_forward\.dim(\d+)\.text(\d+)\.target_(\d+)x(\d+)": _position,
}

_LARGEST: dict[Callable[..., Tensor], Callable[[Golden], float]] = {
    _timestep: lambda golden: float(golden["in.timesteps"].max()),
    _guidance: lambda golden: 1000 * float(golden["in.guidance_w"].max()),
    _sizes: lambda golden: float(golden["in.sizes_hw"].max()),
}
"""Largest angle of the sinusoids."""
