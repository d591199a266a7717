"""Attention arithmetic: the one place that calls an attention kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale + bias) v, (B, H, L, d).

    ``mask`` (B, 1 or H, 1 or L, L) is true where a key may be seen. ``scale`` None is 1/sqrt(d). With neither
    bias nor mask no mask tensor is made, so the fast kernels apply.
    """
    if mask is not None:
        hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
        bias = hidden if bias is None else bias + hidden
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def key_mask(text_mask: Tensor, length: int) -> Tensor:
    """(B, T) text mask, true = real -> (B, 1, 1, L) key mask in which every image token is visible."""
    rest = length - text_mask.shape[1]
    return F.pad(text_mask, (0, rest), value=True)[:, None, None, :]
