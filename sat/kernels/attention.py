"""Attention kernels: the choice among them, and how one takes the place of a transformer's own attention."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sat.kernels.exp_attention import LARGEST_LOGIT, by_head, pays, works
from sat.mixin import Mixin, replaces
from sat.mixins.cross_attention import CrossLayer
from sat.transformer import Context, Transformer, TransformerHooks
from sat.transformer.block import DotProduct, attend

Backend = Literal["auto", "torch", "cudnn", "flash", "efficient", "math", "exp", "flash3", "sage"]
"""Names of kernels: ``auto`` picks by device, ``torch`` leaves it to torch; see docs/performance.md."""

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_MASKED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels to try, in this order, where a mask is given that the chosen one may not take."""
_ORDER = {"set_priority": True} if "set_priority" in inspect.signature(sdpa_kernel).parameters else {}
"""Before torch 2.6 the order is torch's own."""


class Kernel(Protocol):
    """softmax(q k^T * scale + bias) v, (B, H, L, d) each; arguments as of :func:`attend`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Chosen:
    """One kernel of torch's; calls with a bias or a mask, which not all take, go to the next that does."""

    backend: SDPBackend

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        plain = bias is None and mask is None
        with sdpa_kernel(self.backend) if plain else sdpa_kernel([self.backend, *_MASKED], **_ORDER):
            return attend(q, k, v, bias=bias, mask=mask, scale=scale)


@dataclass(frozen=True)
class Plain:
    """A kernel for q, k, v and scale alone; calls with a bias or a mask go to torch's.

    So do those that gradients flow through, unless it ``trains``.
    """

    function: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    trains: bool = False

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        if bias is not None or mask is not None or (torch.is_grad_enabled() and not self.trains):
            return attend(q, k, v, bias=bias, mask=mask, scale=scale)
        return self.function(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


class AttentionKernel(Mixin):
    """A kernel in place of the transformer's own attention; holds no parameters. ``scale``: of the logits."""

    host = TransformerHooks

    def __init__(self, kernel: Kernel, scale: float | None) -> None:
        super().__init__()
        self.kernel, self.scale = kernel, scale

    @replaces("attend")
    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        return self.kernel(q, k, v, bias=ctx.bias, mask=ctx.key_mask, scale=self.scale)


class CrossKernel(DotProduct):
    """A kernel in place of a cross-attention's own."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.kernel(q, k, v, mask=mask)


def put_kernel(transformer: Transformer, kernel: Kernel) -> None:
    """Let ``transformer`` attend with ``kernel``, its cross-attention too; torch's own takes them off again.

    A transformer whose ``attend`` hook a mixin of the model's own replaces keeps that.
    """
    name, own = "attention_kernel", kernel is attend
    if name in transformer.mixins:
        transformer.remove(name)
    if not own and transformer.resolved.owners["attend"][-1] == "default":
        transformer.extend(name, AttentionKernel(kernel, transformer.spec.scale))
    for layer in [m for m in transformer.mixins.modules() if isinstance(m, CrossLayer)]:
        layer.attend = DotProduct() if own else CrossKernel(kernel)


# -- the choice


SHORTEST = 384
"""Keys below which starting two matrix products a head costs more than they save."""


def exp_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention :mod:`head by head <sat.kernels.exp_attention>`; torch's where that is not for it."""
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if k.shape[2] < SHORTEST or (trained and q.dtype != torch.float32):
        return attend(q, k, v, scale=scale)
    out: Tensor = by_head(q, k, v, scale)[0]
    return out


def choose(  # noqa: C901 - one case after the other
    name: Backend, device: torch.device, dtype: torch.dtype, bound: float | None
) -> tuple[Kernel, str]:
    """The kernel called ``name`` for tensors of ``dtype`` on ``device``, and its title for the log.

    ``bound``: no logit is larger (None: not known). ``auto`` is the fastest for heads of 40 and 64 channels,
    on a CPU as measured, elsewhere as is usual; ``benchmarks/run.py --suite gpu`` times every kernel beside
    it. Raises ``ValueError`` where the kernel cannot work.
    """
    small = bound is not None and bound <= LARGEST_LOGIT
    if name == "auto":
        if device.type == "cpu":
            name = "exp" if small and pays(dtype) else "torch"
        elif dtype == torch.float32:
            name = "torch"
        else:
            name = "cudnn" if torch.cuda.get_device_capability(device)[0] >= 9 else "flash"
    if name == "torch":
        return attend, "torch's choice"
    if name == "exp":
        if not small:
            raise ValueError(
                f"sampling.attention=exp needs logits of at most {LARGEST_LOGIT:g}, which only "
                f"layer-normalised queries and keys promise; this network has none: use auto"
            )
        if device.type != "cpu" or not works(dtype):
            raise ValueError("sampling.attention=exp needs a CPU with oneDNN, in bf16 or fp32: use auto")
        return Plain(exp_attention, trains=True), f"exp per head (logits at most {bound:.3g})"
    if name in ("flash3", "sage"):
        return Plain(_optional(name, device, dtype)), name
    if name not in _SDPA:
        raise ValueError(f"sampling.attention is {name!r}, expected one of {', '.join(get_args(Backend))}")
    if device.type == "cpu" and name in ("cudnn", "efficient"):
        raise ValueError(f"sampling.attention={name} needs a GPU, but the network is on the CPU: use auto")
    return Chosen(_SDPA[name]), name


def _optional(
    name: Literal["flash3", "sage"], device: torch.device, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """A kernel of a package that is not required."""
    module, package = {
        "flash3": ("flash_attn_interface", "flash-attn 3"),
        "sage": ("sageattention", "sageattention"),
    }[name]
    if device.type == "cpu" or dtype == torch.float32:
        raise ValueError(
            f"sampling.attention={name} needs a GPU and bf16 or fp16, got {device.type}: use auto"
        )
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"sampling.attention={name} needs the package {package}: see docs/performance.md for how to "
            f"install it, or use auto"
        ) from error

    def flash3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """flash-attn 3 wants (B, L, H, d)."""
        out = found.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    def sage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """SageAttention quantises q and k to int8: not exact."""
        return cast(Tensor, found.sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale))

    return flash3 if name == "flash3" else sage
