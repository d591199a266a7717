"""Model FLOP use: the operations a step needs, over those that the device could do in its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sat.config.schema import TrainConfig
from sat.data.batch import Batch
from sat.engine import DiffusionEngine
from sat.estimate.trace import flops_of
from sat.parallel.launch import Runtime
from sat.train.objectives import Objective

PEAKS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0,
    "L40": 181.0, "L4": 121.0, "A10G": 70.0, "A10": 125.0,
}  # fmt: skip
"""Dense bf16 TFLOP/s by a part of the device's name, the longer ones first. Source: NVIDIA's data sheets."""


def peak_flops(config: TrainConfig, runtime: Runtime) -> float | None:
    """FLOP/s a rank could do: ``train.peak_tflops``, or those of a known device for bf16; or None."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if config.dtype == "fp32" and config.autocast is None:
        return None
    name = runtime.device_name
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), None)


def token_counter(engine: DiffusionEngine, objective: Objective) -> Callable[[Batch], int]:
    """Counts a batch's tokens: patches (latent cells without any), and text where the network trains."""
    patch = getattr(engine.network, "patch", 1)
    text = engine.conditioner.max_length if "model" in objective.parts() else 0

    def count(batch: Batch) -> int:
        if batch.latent_moments is not None:
            h, w = batch.latent_moments.shape[-2:]
        else:
            assert batch.image is not None, "a batch has one of the two"
            _, h, w = engine.latent_shape(*batch.image.shape[-2:])
        return len(batch) * (h * w // patch**2 + text)

    return count


class _Count(TorchDispatchMode):
    """Counts what runs, without what is only recomputed for the backward pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # Only a recomputed forward pass has gradients switched on inside the backward pass.
        if not (torch._C._current_graph_task_id() >= 0 and torch.is_grad_enabled()):
            self.flops += flops_of(func, args, kwargs or {}, out)
        return out


class Meter:
    """Sums the FLOPs of micro-batches on this rank. They are counted once for every shape, then known."""

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self._known: dict[tuple[object, ...], int] = {}
        self._total = 0

    @contextmanager
    def micro(self, batch: Batch) -> Iterator[None]:
        """Around the forward and backward pass of ``batch``."""
        held = (batch.image, batch.latent_moments, batch.low_moments, batch.text)
        shape = tuple(None if x is None else tuple(x.shape) for x in held)
        if shape in self._known:
            yield
        else:
            with _Count() as count:
                yield
            self._known[shape] = count.flops
        self._total += self._known[shape]

    def take(self, seconds: float) -> float:
        """The share of the peak that was used in ``seconds``; then start anew."""
        total, self._total = self._total, 0
        return total / seconds / self.peak
