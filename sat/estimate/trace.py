"""Memory and FLOPs of a forward and backward pass, found by running it on tensors without data.

The tensors are torch's fake ones: they have shapes, types and lifetimes, but no memory, so that a model of
any size runs in seconds, by the same code that trains it. They claim to be on the CPU. Attention there keeps
the same for the backward pass as the fused attention of a GPU: q, k, v, the output and one number a row.
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
    """Stretch of a step in which ``gradients`` elements of the parameters' gradients are finished."""

    gradients: int
    live: int  # most bytes at a time, these gradients not counted


@dataclass(frozen=True)
class Trace:
    """One micro-batch. ``kept``: bytes at the end of the forward pass, which the backward pass needs.

    Weights are not counted, nor are finished gradients, which depend on the ZeRO stage.
    """

    kept: int
    segments: tuple[Segment, ...]
    flops: int

    def peak(self, per_gradient: float = 0.0) -> int:
        """Peak bytes, with ``per_gradient`` bytes for each finished element of a gradient."""
        return max(int(s.live + per_gradient * s.gradients) for s in self.segments)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of living storages, and the FLOPs of operations.

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
        """Make tensors without data inside the block, and count them."""
        with self._fake, self:
            yield

    def mark(self) -> None:
        """Start a new peak."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and count the storages it makes."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        self.flops += flops_of(func, args, kwargs or {}, out)
        if self._blocked and getattr(func, "_overloadpacket", None) in _CONVOLUTIONS:
            self.peak = max(self.peak, self.live + _in_blocks(out))
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Add ``storage`` to the living ones, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed() -> None:
            self._known.discard(key)
            self.live -= size

        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, freed)


def _in_blocks(out: Any) -> int:
    """Bytes of the first map (B, C, h, w) in ``out``, with C rounded up to blocks."""
    made = next((x for x in tree_iter(out) if isinstance(x, Tensor) and x.ndim == 4), None)
    if made is None or made.is_contiguous(memory_format=torch.channels_last):
        return 0
    return made.element_size() * made.numel() // made.shape[1] * (-(-made.shape[1] // _BLOCK) * _BLOCK)


def flops_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """FLOPs of one operation with its result; 0 for all but matrix products, convolutions and attention."""
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
    """Run a forward and backward pass of ``loss``, freeing each parameter's gradient as it is finished.

    Called inside :meth:`Ledger.without_data`, where the parameters of the trained ``module`` were made.
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
