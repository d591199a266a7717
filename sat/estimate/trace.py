"""What a forward and backward pass allocates and computes, found by running it on tensors without data.

The tensors are torch's fake ones: they have shapes, types and lifetimes, but no memory, so that a model of
any size is run in seconds, by the same code that trains it. They claim to be on the CPU. Its attention keeps
for the backward pass what the fused attention of a GPU keeps: q, k, v, the output and one number a row.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from sat.kernels import exp_attention

_ATEN = torch.ops.aten
_ATTENTION = (_ATEN._scaled_dot_product_flash_attention_for_cpu, exp_attention.forward)
_ATTENTION_BACKWARD = (
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
    exp_attention.backward,
)

_PACKED = "mkldnn::_linear_pointwise"
_CONVOLUTIONS = (_ATEN.convolution, _ATEN.convolution_backward)
_BLOCK = 16


@dataclass(frozen=True)
class Segment:
    """A stretch of a step in which ``gradients`` elements of the parameters' gradients are finished."""

    gradients: int
    live: int  # most bytes at a time, these gradients not counted


@dataclass(frozen=True)
class Trace:
    """One micro-batch. ``kept``: bytes at the end of the forward pass, which the backward pass needs.

    Weights are in no number, nor are finished gradients, whose fate depends on the ZeRO stage.
    """

    kept: int
    segments: tuple[Segment, ...]
    flops: int

    def peak(self, per_gradient: float = 0.0) -> int:
        """The most bytes at a time, each finished element of a gradient counting ``per_gradient`` bytes."""
        return max(int(s.live + per_gradient * s.gradients) for s in self.segments)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps account of the storages that live, and of the FLOPs of what runs.

    ``blocked``: convolutions make their output twice, as they do on a CPU: oneDNN writes it with channels in
    blocks of 16, and torch copies that (so the peaks of processes showed). Not so for channels-last.
    """

    def __init__(self, *, blocked: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()
        self._blocked = blocked

    @contextmanager
    def without_data(self) -> Iterator[None]:
        """Inside the block tensors that are made have no data, and are counted."""
        with self._fake, self:
            yield

    def mark(self) -> None:
        """Forget the peak: from now on it is that of what follows."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and enter what it made."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._enter(value)
        self.flops += flops_of(func, args, kwargs or {}, out)
        if self._blocked and getattr(func, "_overloadpacket", None) in _CONVOLUTIONS:
            self.peak = max(self.peak, self.live + _in_blocks(out))
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _in_blocks(out: Any) -> int:
    """Bytes of a map (B, C, h, w), the first of ``out``, with C rounded up to blocks."""
    made = next((x for x in tree_iter(out) if isinstance(x, Tensor) and x.ndim == 4), None)
    if made is None or made.is_contiguous(memory_format=torch.channels_last):
        return 0
    return made.element_size() * made.numel() // made.shape[1] * (-(-made.shape[1] // _BLOCK) * _BLOCK)


def flops_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """FLOPs of one operation with its result; 0 if it is no product of matrices, convolution or attention."""
    packet = getattr(func, "_overloadpacket", None)
    packet = _ATEN.addmm if packet is _ATEN.addmm_ else packet
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet in _ATTENTION:
        return int(sdpa_flop_count(*(x.shape for x in args[:3])))  # type: ignore[no-untyped-call]
    if packet in _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(x.shape for x in args[:4])))  # type: ignore[no-untyped-call]
    if getattr(func, "name", str)().partition(".")[0] == _PACKED:
        return int(2 * args[0].numel() * out.shape[-1])
    return 0


def trace(ledger: Ledger, module: nn.Module, loss: Callable[[], Tensor]) -> Trace:
    """One forward and backward pass of ``loss``, the parameters' gradients taken away as they are finished.

    Called inside :meth:`Ledger.without_data`, where the parameters of ``module``, what is trained, were made.
    """
    segments: list[Segment] = []
    base, flops, done = ledger.live, ledger.flops, 0
    ledger.mark()

    def finished(parameter: Tensor) -> None:
        nonlocal done
        segments.append(Segment(done, ledger.peak - base))
        done += parameter.numel()
        parameter.grad = None
        ledger.mark()

    trained = [p for p in module.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(finished) for p in trained]  # type: ignore[no-untyped-call]
    try:
        value = loss()
        kept = ledger.live - base
        value.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    segments.append(Segment(done, ledger.peak - base))
    return Trace(kept, tuple(segments), ledger.flops - flops)
