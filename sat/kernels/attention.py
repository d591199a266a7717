"""Attention kernels: the choice among them, and how one takes the place of a transformer's own attention."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sat.kernels.exp_attention import LARGEST_LOGIT, by_head, works
from sat.kernels.measured import SHORTEST, usual_attention
from sat.mixin import Mixin, replaces
from sat.mixins.cross_attention import CrossLayer
from sat.parallel.launch import capability
from sat.transformer import Context, Transformer, TransformerHooks
from sat.transformer.transformer import DotProduct, attend

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
    """Kernels of torch's in order of preference: each call goes to the first that takes it.

    A single kernel is a demand: torch raises where it does not take a call. Only those with a bias or a mask,
    which few take, go to others.
    """

    backends: tuple[SDPBackend, ...]

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
        others = _MASKED if len(self.backends) == 1 and (bias is not None or mask is not None) else []
        with sdpa_kernel([*self.backends, *others], **_ORDER):
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


def exp_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention :mod:`head by head <sat.kernels.exp_attention>`; torch's where that is not for it."""
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if k.shape[2] < SHORTEST or (trained and q.dtype != torch.float32):
        return attend(q, k, v, scale=scale)
    out: Tensor = by_head(q, k, v, scale)[0]
    return out


def choose(  # noqa: C901 - one case after the other
    name: Backend,
    device: torch.device,
    dtype: torch.dtype,
    bound: float | None,
    head_dim: int = 64,
    section: str = "sampling",
) -> tuple[Kernel, str]:
    """The kernel called ``name`` for heads of ``head_dim`` in ``dtype`` on ``device``, and its title.

    ``bound``: no logit is larger (None: not known). ``auto`` is a preference: on a CPU the usual one (what is
    faster has been measured by then: :func:`sat.kernels.apply.measured_speed`), on a GPU
    the kernels of :func:`preferred`, each call going to the first that takes it; the title names those that
    were refused, and why. Any other name is a demand. Raises ``ValueError`` where that kernel cannot work.
    """
    small = bound is not None and bound <= LARGEST_LOGIT
    if name == "auto" and device.type == "cpu":
        name = "exp" if small and usual_attention(dtype) == "exp" else "torch"
    elif name == "auto":
        reasons = {kind: refusal(kind, device, dtype, head_dim) for kind in preferred(device, dtype)}
        usable = [kind for kind, reason in reasons.items() if reason is None]
        refused = "".join(f"; {kind} refused: {reason}" for kind, reason in reasons.items() if reason)
        if usable:
            return Chosen(tuple(_SDPA[kind] for kind in usable)), f"{', else '.join(usable)}{refused}"
        return attend, f"torch's choice{refused}"
    if name == "torch":
        return attend, "torch's choice"
    if name == "exp":
        if not small:
            raise ValueError(
                f"{section}.attention=exp needs logits of at most {LARGEST_LOGIT:g}, which only "
                f"layer-normalised queries and keys promise; this network has none: use auto"
            )
        if device.type != "cpu" or not works(dtype):
            raise ValueError(f"{section}.attention=exp needs a CPU with oneDNN, in bf16 or fp32: use auto")
        return Plain(exp_attention, trains=True), f"exp per head (logits at most {bound:.3g})"
    if name in ("flash3", "sage"):
        return Plain(_optional(name, device, dtype)), name
    if name not in _SDPA:
        raise ValueError(f"sampling.attention is {name!r}, expected one of {', '.join(get_args(Backend))}")
    if device.type == "cpu" and name in ("cudnn", "efficient"):
        raise ValueError(f"sampling.attention={name} needs a GPU, but the network is on the CPU: use auto")
    if reason := refusal(name, device, dtype, head_dim):
        raise ValueError(f"sampling.attention={name} cannot work on {device}: {reason}; use auto")
    return Chosen((_SDPA[name],)), name


def preferred(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Kernels of torch's for ``device``, the fastest first; empty where torch's own choice stands.

    On NVIDIA's GPUs cuDNN's from Hopper on (compute capability 9), before that flash; on AMD's flash. The
    order is general experience until ``benchmarks/gpu.py`` has measured it.
    """
    major = capability(device)
    if major is None or dtype == torch.float32:
        return ()
    first = ("cudnn", "flash") if major >= 9 else ("flash", "cudnn") if major else ("flash",)
    return (*first, "efficient", "math")


def refusal(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Torch's reason for not running its kernel ``name`` here, or None; a small call tells."""
    return _refusal(name, device, dtype, head_dim, torch.are_deterministic_algorithms_enabled())


@cache
def _refusal(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> str | None:
    q = torch.zeros(1, 1, 16, head_dim, device=device, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        try:
            Chosen((_SDPA[name],))(q, q, q)
        except (RuntimeError, NotImplementedError) as error:
            told = [str(one.message).partition(" (Triggered")[0].strip() for one in caught]
            reasons = [text for text in told if not text.endswith(("because:", "runtime disabled."))]
            return " ".join(reasons) or str(error).splitlines()[0].rstrip(".")
    return None


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
