"""LoRA and DoRA against PEFT on diffusers' transformer and transformers' T5: files made there and here."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogView3PlusTransformer2DModel
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import T5Config, T5EncoderModel

from sat.adapters.files import Distilled, distilled, read
from sat.adapters.lora import attach, detach, extract
from sat.adapters.names import layouts
from sat.adapters.write import write
from sat.checkpoint.load import load
from sat.conditioning.conditioner import Condition
from sat.config.schema import LoraConfig as LoraSection
from sat.embeddings import sinusoid
from sat.models.cogview3_plus import CogView3Plus
from sat.train.lora import add_lora
from sat.train.objectives import Objective
from tests.adapters import adapter, noisy, start, t5, unet
from tests.small import fill
from tests.tolerances import F32

GRID = (12, 20)


class Peer(CogView3PlusTransformer2DModel, PeftAdapterMixin):
    """The peer with the loader that diffusers gives its newer transformers."""


def both() -> tuple[Peer, CogView3Plus]:
    """The same random network twice."""
    peer = Peer(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        out_channels=4, text_embed_dim=16, time_embed_dim=24, condition_dim=8, pos_embed_max_size=16,
        sample_size=16,
    ).eval()  # fmt: skip
    fill(peer)
    ours = CogView3Plus(
        dim=32, heads=4, depth=2, channels=4, patch=2, text_dim=16, text_len=7, emb_dim=24, size_dim=48,
        table_size=(16, 16), double_norm=False,
    ).eval()  # fmt: skip
    load(ours, peer.state_dict(), "model")
    return peer, ours


def compared(peer: nn.Module, ours: CogView3Plus) -> tuple[torch.Tensor, float]:
    """The peer's output, and how far ours is from it, relative to its scale."""
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, *GRID, generator=g), torch.randn(2, 7, 16, generator=g)
    sizes = [
        torch.tensor([[96.0, 160.0]] * 2),
        torch.tensor([[0.0, 8.0]] * 2),
        torch.tensor([[96.0, 160.0]] * 2),
    ]
    vector = torch.cat([sinusoid(s.flatten(), 8).view(2, -1) for s in sizes], 1)
    t = torch.tensor([999, 17])
    with torch.no_grad():
        original, crop, target = sizes
        theirs = peer(x, text, t, original, target, crop, return_dict=False)[0]
        mine = ours(x, t.float(), ours.prepare(Condition(text, vector), GRID))
    return theirs, ((mine - theirs).abs().max() / theirs.std()).item()


@pytest.mark.parametrize("dora", [False, True])
def test_trained_here_peft_loads_it_into_diffusers(dora: bool, tmp_path: Path) -> None:
    peer, ours = both()
    plain, _ = compared(peer, ours)
    layers = noisy(start(ours, dora=dora))
    attach(ours, "style", layers)
    write(tmp_path / "peft", adapter(layers), "peft", {"model": ours})
    theirs, difference = compared(PeftModel.from_pretrained(peer, tmp_path / "peft"), ours)
    assert (theirs - plain).abs().max() / plain.std() > 0.1
    assert difference < F32


def test_trained_here_diffusers_own_loader_reads_it(tmp_path: Path) -> None:
    peer, ours = both()
    layers = noisy(start(ours))
    attach(ours, "style", layers)
    write(tmp_path / "out", adapter(layers), "diffusers", {"model": ours})
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        names = list(file.keys())
    assert "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight" in names
    peer.load_lora_adapter(
        tmp_path / "out", weight_name="pytorch_lora_weights.safetensors", prefix="transformer"
    )
    assert compared(peer, ours)[1] < F32


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_a_few_step_file_opens_in_peft_and_diffusers(layout: str, tmp_path: Path) -> None:
    peer, ours = both()
    few = Distilled(method="dmd2", steps=[1], levels={"1": [999.0]}, guidance=3.0)
    layers = noisy(start(ours))
    attach(ours, "turbo", layers)
    made = adapter(layers)
    turbo = replace(made, info=replace(made.info, distilled=few))
    write(tmp_path / "out", turbo, layout, {"model": ours})
    if layout == "peft":
        opened: nn.Module = PeftModel.from_pretrained(peer, tmp_path / "out")
    else:
        file = "pytorch_lora_weights.safetensors"
        peer.load_lora_adapter(tmp_path / "out", weight_name=file, prefix="transformer")
        opened = peer
    assert compared(opened, ours)[1] < F32  # type: ignore[arg-type]
    assert distilled(tmp_path / "out") == few


WHOLE = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm_out.linear"]


@pytest.mark.parametrize(("dora", "targets"), [(False, ["to_q", "to_v"]), (False, WHOLE), (True, WHOLE)])
def test_trained_by_peft_it_loads_here(dora: bool, targets: list[str], tmp_path: Path) -> None:
    """With ranks and alphas of their own for some layers; a fused layer may lack one of its parts."""
    peer, ours = both()
    plain, _ = compared(peer, ours)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_dora=dora, init_lora_weights=False,
        rank_pattern={"to_v": 2}, alpha_pattern={"transformer_blocks.1.attn1.to_q": 3},
    )  # fmt: skip
    wrapped = get_peft_model(peer, config)
    wrapped.save_pretrained(tmp_path)
    found = read(tmp_path, {"model": ours})
    assert (found.layout, found.info.dora) == ("peft", dora)
    attach(ours, "style", found.of("model"))
    theirs, difference = compared(wrapped, ours)
    assert (theirs - plain).abs().max() / plain.std() > 0.1
    assert difference < F32


def test_rank_stabilised_scales_of_peft_are_understood(tmp_path: Path) -> None:
    peer, ours = both()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], use_rslora=True, init_lora_weights=False)
    wrapped = get_peft_model(peer, config)
    wrapped.save_pretrained(tmp_path)
    attach(ours, "style", read(tmp_path, {"model": ours}).of("model"))
    assert compared(wrapped, ours)[1] < F32


class Holder(Objective):
    """An objective of one network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def parts(self) -> dict[str, nn.Module]:
        return {"model": self.network}


def test_rank_stabilised_factors_of_a_training_scale_as_pefts(tmp_path: Path) -> None:
    """alpha / sqrt(rank) in layers of every rank: our factors under PEFT's own ``use_rslora``."""
    peer, ours = both()
    section = LoraSection(rank=4, alpha=6.0, rslora=True, ranks={"model.*.attn.proj": 2})
    add_lora(Holder(ours), section, seed=0)
    layers = noisy(extract(ours, "trained"))
    detach(ours, "trained")
    attach(ours, "style", layers)
    write(tmp_path, adapter(layers), "peft", {"model": ours})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings |= {"use_rslora": True, "lora_alpha": 6.0, "alpha_pattern": {}}
    assert settings["rank_pattern"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert compared(PeftModel.from_pretrained(peer, tmp_path), ours)[1] < F32


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_factors_of_convolutions_are_pefts(layout: str, tmp_path: Path) -> None:
    """Every layer of the UNet under its published name: PEFT's output, and its own file read here."""
    ours, peer = unet(), nn.Module()
    section = LoraSection(
        rank=4, alpha=6.0, rslora=True, ranks={"model.*.conv2": 2}, targets=["convolution", "adaln"]
    )
    add_lora(Holder(ours), section, seed=0)
    layers = noisy(extract(ours, "trained"))
    detach(ours, "trained")
    for theirs, source in layouts(ours)[0].places.items():
        if source.names[0] in layers:
            holder, (*parents, leaf) = peer, theirs.split(".")
            for parent in parents:
                if not hasattr(holder, parent):
                    holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.add_module(leaf, ours.get_submodule(source.names[0]))
    peer = copy.deepcopy(peer)
    write(tmp_path / layout, adapter(layers), layout, {"model": ours})
    if (
        layout == "diffusers"
    ):  # whose files PEFT's folder differs from in the names' beginnings and its settings
        made = load_file(tmp_path / layout / "pytorch_lora_weights.safetensors")
        assert {tuple(v.shape[2:]) for n, v in made.items() if ".in_layers.2.lora_B" in n} == {(1, 1)}
        assert {tuple(v.shape[2:]) for n, v in made.items() if ".in_layers.2.lora_A" in n} == {(3, 3)}
        folder = tmp_path / layout
    else:
        wrapped = PeftModel.from_pretrained(peer, tmp_path / layout)
        wrapped.save_pretrained(folder := tmp_path / "there")
    found = read(folder, {"model": ours})
    attach(ours, "style", found.of("model"))
    g = torch.Generator().manual_seed(1)
    for theirs, source in layouts(ours)[0].places.items():
        if layout == "peft" and (name := source.names[0]) in layers:
            layer = ours.get_submodule(name)
            kernel = layer.weight.shape[2:]  # type: ignore[union-attr, index]
            x = torch.randn(2, layer.weight.shape[1], *(6 for _ in kernel), generator=g)  # type: ignore[union-attr, index, misc]
            with torch.no_grad():
                difference = layer(x) - wrapped.base_model.model.get_submodule(theirs)(x)
            assert difference.abs().max() < F32
    for name, layer_ in layers.items():
        pair, kept = layer_.parts[0], found.of("model")[name].parts[0]
        assert pair is not None and kept is not None and pair.down.shape == kept.down.shape
        assert torch.allclose(pair.scale * pair.up, kept.scale * kept.up)


def test_saved_by_diffusers_it_loads_here(tmp_path: Path) -> None:
    """A file without prefixes, with alpha in diffusers' header."""
    peer, ours = both()
    peer.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k"], init_lora_weights=False))
    peer.save_lora_adapter(tmp_path)
    found = read(tmp_path, {"model": ours})
    assert found.layout == "diffusers"
    attach(ours, "style", found.of("model"))
    assert compared(peer, ours)[1] < F32


def test_the_text_encoder_both_ways(tmp_path: Path) -> None:
    """transformers' T5 with PEFT on one side, ours on the other."""
    config = T5Config(
        d_model=24, num_heads=3, d_kv=8, d_ff=40, num_layers=2, vocab_size=50, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8, relative_attention_max_distance=16, tie_word_embeddings=False,
    )  # fmt: skip
    peer = T5EncoderModel(config).eval()
    fill(peer, std=0.2)
    ours = t5()
    load(ours, dict(peer.state_dict()), "text")
    ids = torch.randint(0, 50, (2, 9))

    def difference(theirs: nn.Module) -> float:
        with torch.no_grad():
            a, b = theirs(input_ids=ids).last_hidden_state, ours(ids)
        return ((a - b).abs().max() / a.std()).item()

    assert difference(peer) < F32
    layers = noisy(start(ours, ["text_encoder"], part="text"))
    write(tmp_path / "here", adapter(layers, "text"), "peft", {"text": ours})
    wrapped = PeftModel.from_pretrained(peer, tmp_path / "here")
    assert difference(wrapped) > 0.01
    attach(ours, "style", layers)
    assert difference(wrapped) < F32
    wrapped.save_pretrained(tmp_path / "there")
    detach(ours, "style")
    attach(ours, "again", read(tmp_path / "there", {"text": ours}).of("text"))
    assert difference(wrapped) < F32
