"""LoKr: PEFT's and LyCORIS's files read as low-rank factors with the same effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoKrConfig, get_peft_model
from safetensors.torch import save_file

from sat.adapters.factors import AdapterError
from sat.adapters.files import is_adapter, read
from sat.adapters.lokr import expanded, kron_of
from sat.adapters.lora import attach, merge
from tests.parity.test_lora import WHOLE, both, compared
from tests.tolerances import F32, F64


@pytest.mark.parametrize("settings", [
    {}, {"decompose_both": True, "decompose_factor": 4, "r": 2}, {"r": 64, "alpha": 60},
    {"alpha_pattern": {"to_q": 3}, "rank_pattern": {"to_v": 3}},
])  # fmt: skip
def test_made_by_peft_it_changes_the_network_as_there(settings: dict[str, object], tmp_path: Path) -> None:
    peer, ours = both()
    plain, _ = compared(peer, ours)
    config = {"r": 4, "alpha": 6, "target_modules": WHOLE} | settings
    wrapped = get_peft_model(peer, LoKrConfig(**config))
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lokr_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path)
    assert is_adapter(tmp_path)
    attach(ours, "style", read(tmp_path, {"model": ours}).of("model"))
    theirs, difference = compared(wrapped, ours)
    assert (theirs - plain).abs().max() / plain.std() > 0.1
    assert difference < F32
    merge(ours)
    assert compared(wrapped, ours)[1] < 10 * F32  # weights rounded once more


def test_lycoris_files_count_alpha_over_the_rank_of_a_product(tmp_path: Path) -> None:
    peer, ours = both()
    generator = torch.Generator().manual_seed(0)
    name = "lycoris_transformer_blocks_0_attn1_to_q"
    w1, a, b = (torch.randn(*shape, generator=generator) for shape in ((4, 4), (8, 2), (2, 8)))
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}
    save_file({f"{name}.{key}": value for key, value in tensors.items()}, tmp_path / "style.safetensors")
    layer = read(tmp_path / "style.safetensors", {"model": ours}).of("model")["transformer.blocks.0.attn.qkv"]
    pair = layer.parts[0]
    assert pair is not None and layer.parts[1:] == (None, None)
    expected = 3 / 2 * torch.kron(w1, a @ b)
    torch.testing.assert_close(pair.scale * pair.up @ pair.down, expected, rtol=F32, atol=F32)


@pytest.mark.parametrize("whole", [(), ("w1",), ("w2",), ("w1", "w2")])
def test_a_kronecker_product_is_its_low_rank_form(whole: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"w1": (3, 5), "w2": (4, 7)}
    pieces: dict[str, torch.Tensor] = {}
    for side, (rows, columns) in shapes.items():
        if side in whole:
            pieces[side] = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        else:
            pieces[f"{side}_a"] = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
            pieces[f"{side}_b"] = torch.randn(2, columns, generator=generator, dtype=torch.float64)
    full = {side: pieces.get(side, pieces.get(f"{side}_a", torch.zeros(1, 1))) for side in shapes}
    full |= {s: pieces[f"{s}_a"] @ pieces[f"{s}_b"] for s in shapes if s not in whole}
    kron = kron_of(pieces, "x")
    torch.testing.assert_close(
        kron.up() @ kron.down(), torch.kron(full["w1"], full["w2"]), rtol=F64, atol=F64
    )
    assert kron.rank == (None if len(whole) == 2 else 2)
    made = expanded({f"x.lokr_{key}": value for key, value in pieces.items()}, {"x": 0.5})
    scale = float(made["x.alpha"]) / made["x.lora_A.weight"].shape[0]
    assert scale == pytest.approx(0.5)


@pytest.mark.parametrize(("pieces", "words"), [
    ({"w1": (2, 2)}, "needs lokr_w2, or lokr_w2_a and _b"),
    ({"w1": (2, 2), "w2_a": (2, 1)}, "needs lokr_w2, or"),
    ({"w1": (2, 2), "w2": (2, 2, 3, 3)}, "of a convolution"),
    ({"w1": (2, 2), "w2_a": (2, 1), "w2_b": (2, 2)}, "rank 1 of lokr_w2_a, 2 of lokr_w2_b"),
])  # fmt: skip
def test_what_is_no_whole_lokr_is_refused_by_name(pieces, words) -> None:
    with pytest.raises(AdapterError, match=words):
        kron_of({piece: torch.zeros(shape) for piece, shape in pieces.items()}, "x")
