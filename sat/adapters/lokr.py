"""LoKr in files: changes that are Kronecker products, in the names of PEFT, LyCORIS and our own.

The change of a weight (O, I) is s w1 (x) w2, with w1 (o1, i1) and w2 (o2, i2), either whole or a product of
two factors.

Sources: LyCORIS, arXiv:2309.14859, section 3.2; PEFT's ``LoKrLayer``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sat.adapters.factors import AdapterError, Kron, two_factors, widened

_NAME = re.compile(r"(.+)\.lokr_(w1|w2)(_a|_b)?(?:\.([^.]+))??(?:\.weight)?")


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
    a, b = (wide["w2"], None) if "w2" in wide else (wide["w2_a"], wide["w2_b"])
    if b is not None and a.shape[1] != b.shape[0]:
        raise AdapterError(f"{name!r}: rank {a.shape[1]} of lokr_w2_a, {b.shape[0]} of lokr_w2_b")
    rank = next((wide[piece].shape[0] for piece in ("w2_b", "w1_b") if piece in wide), None)
    return Kron(w1, a, b, rank)


def expanded(
    tensors: Mapping[str, Tensor], scales: Mapping[str, float | None], native: bool = False
) -> tuple[dict[str, Tensor], dict[str, Kron]]:
    """``tensors`` with every LoKr in them as ``lora_A``, ``lora_B`` and ``alpha``, and those by name.

    ``scales`` are those that PEFT's settings give by linear; without one, LyCORIS's rule: its ``alpha`` over
    the rank, 1 where no piece was a product or there is no alpha. ``native``: names end in the number of a
    fused part (``#`` and it in the answer), and the header has the scales.
    """
    pieces: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            out[name] = value
        else:
            which = f".{found[4]}" if native else ""
            pieces[found[1], which][f"{found[2]}{found[3] or ''}"] = value
    krons = {}
    for (name, which), own in pieces.items():
        kron = kron_of(own, name)
        krons[f"{name}{which.replace('.', '#')}"] = kron
        alpha = out.pop(f"{name}.alpha", None)
        scale = scales.get(name)
        if scale is None:
            whole = kron.rank is None or alpha is None
            scale = 1.0 if whole else float(alpha) / kron.rank  # type: ignore[arg-type, operator]
        pair = kron.pair(scale)
        out[f"{name}.lora_A{which}.weight"], out[f"{name}.lora_B{which}.weight"] = pair.down, pair.up
        if not native:
            out[f"{name}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float64)
    return out, krons


# -- written


def pieces_of(kron: Kron, whole: bool = False) -> dict[str, Tensor]:
    """Tensors by the ends of their names; ``whole``: w2 as one, whatever it is made of."""
    if kron.b is None or whole:
        return {"lokr_w1": kron.w1, "lokr_w2": kron.a if kron.b is None else kron.a @ kron.b}
    return {"lokr_w1": kron.w1, "lokr_w2_a": kron.a, "lokr_w2_b": kron.b}


@dataclass(frozen=True)
class PeftLokr:
    """Settings that make PEFT build ``krons``, by name: it finds shapes by ``factor`` and a layer's rank."""

    factor: int
    ranks: Mapping[str, int]

    @classmethod
    def of(cls, krons: Mapping[str, Kron]) -> PeftLokr | None:
        """Those settings; None if no factor gives all of the shapes."""
        sizes = [(*k.w1.shape, *_second(k)) for k in krons.values()]
        for factor in dict.fromkeys([*(n for o1, i1, *_ in sizes for n in (o1, i1) if n > 1), -1]):
            if all(
                two_factors(o1 * o2, factor) == (o1, o2) and two_factors(i1 * i2, factor) == (i1, i2)
                for o1, i1, o2, i2 in sizes
            ):
                return cls(factor, {name: cls._rank(kron) for name, kron in krons.items()})
        return None

    @staticmethod
    def _rank(kron: Kron) -> int:
        """The rank of the product, or one from which PEFT has w2 whole."""
        least = -(-max(_second(kron)) // 2)
        if kron.b is not None:
            return min(kron.b.shape[0], least)
        return least

    def pieces(self, name: str, kron: Kron) -> dict[str, Tensor]:
        """The tensors of one layer, w2 whole where PEFT has it so."""
        return pieces_of(kron, whole=self.ranks[name] >= max(_second(kron)) / 2)


def _second(kron: Kron) -> tuple[int, int]:
    """(o2, i2)."""
    return kron.a.shape[0], (kron.a if kron.b is None else kron.b).shape[1]
