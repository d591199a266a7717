"""Grids of pictures: the settings that an axis may vary, and a request for each value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from sat.apps.web.request import GenerationRequest, RequestError
from sat.sampling.output import GridAxis

if TYPE_CHECKING:
    from sat.apps.web.service import GenerationService

AXES = ("seed", "steps", "guidance", "sampler", "prompt", "strength", "control")
"""Settings that an axis may vary, beside the strengths of LoRA files by name."""


def parse(name: str, values: str, most: int) -> GridAxis:
    """The axis that a person typed: values with commas between, or ``0..3``; at most ``most``."""
    ends = re.fullmatch(r"\s*(\d{1,10})\s*\.\.\s*(\d{1,10})\s*", values or "")
    if ends is not None and int(ends[2]) - int(ends[1]) >= most:
        raise RequestError(f"grid: {name} has {int(ends[2]) - int(ends[1]) + 1} values, more than {most}")
    listed = ",".join(part.strip() for part in (values or "").split(",") if part.strip())
    axis = GridAxis.of(f"{name}={f'{ends[1]}..{ends[2]}' if ends else listed}")
    if not listed or not axis.values:
        raise RequestError(f"grid: {name} has no values: write some such as 1,3,5 or 0..3")
    return axis


def changed(
    service: GenerationService, request: GenerationRequest, axis: GridAxis, index: int
) -> GenerationRequest:
    """``request`` with value ``index`` of ``axis``; of ``prompt``, the first value replaced by that one."""
    value, name = axis.values[index], axis.name
    if name == "prompt":
        if (words := str(axis.values[0])) not in request.prompt:
            raise RequestError(f"grid: the first value of prompt, {words!r}, is not in the prompt")
        return replace(request, prompt=request.prompt.replace(words, str(value)))
    if name == "sampler":
        return replace(request, sampler=str(value))
    if isinstance(value, str) or not math.isfinite(value) or (name in ("steps", "seed") and value % 1):
        kind = "whole numbers" if name in ("steps", "seed") else "numbers"
        raise RequestError(f"grid: {name}: expected {kind} such as 1,3,5 or 0..3, got {value!r}")
    ways: dict[str, Callable[[], GenerationRequest]] = {
        "steps": lambda: replace(request, steps=int(value)),
        "seed": lambda: replace(request, seed=int(value)),
    }
    if service.guidance is not None:
        ways["guidance"] = lambda: replace(request, guidance=float(value))
    if request.image is not None:
        ways["strength"] = lambda: replace(request, strength=float(value))
    if (use := request.control) is not None:
        ways["control"] = lambda: replace(request, control=replace(use, scale=float(value)))
    if name in service.adapters:
        return replace(request, adapters={**request.adapters, name: float(value)})
    if name not in ways:
        raise RequestError(f"grid: {name} has no effect on this request")
    return ways[name]()
