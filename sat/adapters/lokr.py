"""LoKr of other programs as low-rank factors: changes that are Kronecker products, read without loss.

The change of a weight (O, I) is s w1 (x) w2, with w1 (o1, i1) and w2 (o2, i2), either whole or a product of
two factors. As (w1 (x) a) (1 (x) b) with w2 = a b of rank r it is a low-rank product of rank i1 r, which is
attached, merged and converted like every other.

Sources: LyCORIS, arXiv:2309.14859, section 3.2; PEFT's ``LoKrLayer``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sat.adapters.factors import AdapterError, widened

_NAME = re.compile(r"(.+)\.lokr_(w1|w2)(_a|_b)?(?:\.[^.]+)?(?:\.weight)?")


class Kron(NamedTuple):
    """``w1`` (x) ``a`` ``b``: w1 (o1, i1), a (o2, r), b (r, i2)."""

    w1: Tensor
    a: Tensor
    b: Tensor
    rank: int | None  # of the products in the file; None: no piece was one

    def up(self) -> Tensor:
        """w1 (x) a: (o1 o2, i1 r)."""
        return torch.kron(self.w1, self.a)

    def down(self) -> Tensor:
        """1 (x) b: (i1 r, i1 i2)."""
        return torch.kron(torch.eye(self.w1.shape[1], dtype=self.b.dtype), self.b)


def is_lokr(name: str) -> bool:
    """True for the name of a piece of a LoKr."""
    return _NAME.fullmatch(name) is not None


def kron_of(pieces: Mapping[str, Tensor], name: str) -> Kron:
    """The Kronecker factors of the linear ``name`` from ``pieces`` (``w1`` or ``w1_a`` and ``w1_b`` …)."""
    wide = {piece: widened(value) for piece, value in pieces.items()}
    for side in ("w1", "w2"):
        halves = {f"{side}_a", f"{side}_b"}
        if (side in wide) == bool(halves & wide.keys()) or len(halves & wide.keys()) == 1:
            raise AdapterError(f"{name!r} needs lokr_{side}, or lokr_{side}_a and _b: it is incomplete")
    if odd := [piece for piece, value in wide.items() if value.dim() != 2]:
        raise AdapterError(f"{name!r}: lokr_{odd[0]} is of a convolution, only linears have one here")
    w1 = wide["w1"] if "w1" in wide else wide["w1_a"] @ wide["w1_b"]
    if "w2" in wide:
        a, b = wide["w2"], torch.eye(wide["w2"].shape[1], dtype=w1.dtype)
        a, b = (a, b) if a.shape[1] <= a.shape[0] else (torch.eye(a.shape[0], dtype=w1.dtype), a)
    else:
        a, b = wide["w2_a"], wide["w2_b"]
    if a.shape[1] != b.shape[0]:
        raise AdapterError(f"{name!r}: rank {a.shape[1]} of lokr_w2_a, {b.shape[0]} of lokr_w2_b")
    rank = next((wide[piece].shape[0] for piece in ("w2_b", "w1_b") if piece in wide), None)
    return Kron(w1, a, b, rank)


def expanded(tensors: Mapping[str, Tensor], scales: Mapping[str, float | None]) -> dict[str, Tensor]:
    """``tensors`` with every LoKr in them as ``lora_A``, ``lora_B`` and ``alpha``; the others as they are.

    ``scales`` are those that PEFT's settings give by linear; without one, LyCORIS's rule: its ``alpha`` over
    the rank, 1 where no piece was a product or there is no alpha.
    """
    pieces: dict[str, dict[str, Tensor]] = defaultdict(dict)
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            out[name] = value
        else:
            pieces[found[1]][f"{found[2]}{found[3] or ''}"] = value
    for name, own in pieces.items():
        kron = kron_of(own, name)
        alpha = out.pop(f"{name}.alpha", None)
        scale = scales.get(name)
        if scale is None:
            whole = kron.rank is None or alpha is None
            scale = 1.0 if whole else float(alpha) / kron.rank  # type: ignore[arg-type, operator]
        down, up = kron.down(), kron.up()
        out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = down, up
        out[f"{name}.alpha"] = torch.tensor(scale * down.shape[0], dtype=torch.float64)
    return out
