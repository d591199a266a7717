"""LoKr: PEFT's and LyCORIS's files read as low-rank factors with the same effect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoKrConfig, PeftModel, get_peft_model
from peft.tuners.lokr.layer import factorization
from safetensors.torch import save_file

from sat.adapters.factors import AdapterError, two_factors
from sat.adapters.files import AdapterInfo, is_adapter, read
from sat.adapters.lokr import expanded, kron_of
from sat.adapters.lora import KronFactors, attach, detach, extract, merge
from sat.adapters.write import write, write_native
from sat.config.schema import LoraConfig as LoraSection
from sat.train.lora import NAME, add_lora
from tests.adapters import adapter, noisy, start
from tests.parity.test_lora import WHOLE, Holder, both, compared
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
    pair = kron.pair(1.0)
    wanted = torch.kron(full["w1"], full["w2"])
    torch.testing.assert_close(pair.scale * pair.up @ pair.down, wanted, rtol=F64, atol=F64)
    assert kron.rank == (None if len(whole) == 2 else 2)
    made, _ = expanded({f"x.lokr_{key}": value for key, value in pieces.items()}, {"x": 0.5})
    scale = float(made["x.alpha"]) / made["x.lora_A.weight"].shape[0]
    assert scale == pytest.approx(0.5)


@pytest.mark.parametrize(("rank", "factor"), [(3, 4), (3, -1), (64, 8)])
def test_trained_here_peft_builds_and_reads_it(rank: int, factor: int, tmp_path: Path) -> None:
    """The layers as they train, the native file, PEFT's folder: one change of the network."""
    peer, ours = both()
    plain, _ = compared(peer, ours)
    section = LoraSection(rank=rank, alpha=2.0 * rank, targets=["attention", "mlp"], lokr=factor)
    add_lora(Holder(ours), section, seed=0)
    assert compared(peer, ours)[1] < F32  # nothing is changed at the start
    factors = [m for m in ours.modules() if isinstance(m, KronFactors)]
    assert (rank == 64) == all(one.b is None for one in factors)
    generator = torch.Generator().manual_seed(2)
    for one in factors:
        torch.nn.init.normal_(one.w1, std=0.2, generator=generator)
    layers = extract(ours, NAME)
    info = AdapterInfo(rank, 2.0 * rank)
    named = {f"model.{name}": layer for name, layer in layers.items()}
    (tmp_path / "run").mkdir()
    write_native(tmp_path / "run" / "adapter.safetensors", named, info)
    again = read(tmp_path / "run", {"model": ours})
    write(tmp_path / "peft", again, "peft", {"model": ours})
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert told["peft_type"] == "LOKR"
    wrapped = PeftModel.from_pretrained(peer, tmp_path / "peft")
    theirs, difference = compared(wrapped, ours)
    assert (theirs - plain).abs().max() / plain.std() > 0.1
    assert difference < F32
    held = {name: p for name, p in wrapped.named_parameters() if "lokr_" in name}
    assert held and all(p.any() for p in held.values())
    detach(ours, NAME)
    attach(ours, "again", again.of("model"))
    assert compared(wrapped, ours)[1] < F32
    merge(ours)
    assert compared(wrapped, ours)[1] < 10 * F32


def test_diffusers_gets_the_lora_of_the_same_change(tmp_path: Path, caplog) -> None:
    peer, ours = both()
    layers = noisy(start(ours, lokr=4))
    attach(ours, "style", layers)
    write(tmp_path / "out", adapter(layers), "diffusers", {"model": ours})
    assert "diffusers reads no LoKr: it is written as the LoRA of the same change" in caplog.text
    peer.load_lora_adapter(
        tmp_path / "out", weight_name="pytorch_lora_weights.safetensors", prefix="transformer"
    )
    assert compared(peer, ours)[1] < F32


@pytest.mark.parametrize(
    ("size", "factor"), [(s, f) for s in (7, 96, 128, 1920, 2560) for f in (-1, 4, 8, 6)]
)
def test_sizes_are_factored_as_pefts(size: int, factor: int) -> None:
    assert two_factors(size, factor) == factorization(size, factor)


@pytest.mark.parametrize(("pieces", "words"), [
    ({"w1": (2, 2)}, "needs lokr_w2, or lokr_w2_a and _b"),
    ({"w1": (2, 2), "w2_a": (2, 1)}, "needs lokr_w2, or"),
    ({"w1": (2, 2), "w2": (2, 2, 3, 3)}, "of a convolution"),
    ({"w1": (2, 2), "w2_a": (2, 1), "w2_b": (2, 2)}, "rank 1 of lokr_w2_a, 2 of lokr_w2_b"),
])  # fmt: skip
def test_what_is_no_whole_lokr_is_refused_by_name(pieces, words) -> None:
    with pytest.raises(AdapterError, match=words):
        kron_of({piece: torch.zeros(shape) for piece, shape in pieces.items()}, "x")
