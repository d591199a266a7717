"""LoRA files of CogView4 to and from diffusers' CogView4LoraLoaderMixin, with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel
from diffusers.loaders import CogView4LoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from sat.adapters.files import read
from sat.adapters.lora import attach, detach
from sat.adapters.write import write
from sat.cli.convert import main as convert
from sat.config.load import load
from sat.config.schema import plain
from sat.models.cogview4 import CogView4
from tests.adapters import adapter, noisy, start
from tests.configs import ROOT
from tests.parity.test_cogview4 import inputs, pair
from tests.tolerances import F32


def both() -> tuple[CogView4Transformer2DModel, CogView4]:
    peer, ours = pair()
    return peer.float(), ours.float()


@torch.no_grad()
def compared(peer: nn.Module, ours: CogView4) -> tuple[torch.Tensor, float]:
    """The peer's output, and how far ours is from it, relative to its scale."""
    x, text, t, (original, crop, target), cond = inputs(12, 20, 16)
    theirs = peer(x.float(), text.float(), t, original, target, crop, return_dict=False)[0]
    mine = ours(x.float(), t.float(), ours.prepare(cond, (12, 20)))
    return theirs, float((mine - theirs).abs().max() / theirs.std())


def test_trained_here_the_pipelines_loader_reads_it(tmp_path: Path) -> None:
    assert issubclass(CogView4Pipeline, CogView4LoraLoaderMixin)
    peer, ours = both()
    plain, _ = compared(peer, ours)
    layers = noisy(start(ours))
    attach(ours, "style", layers)
    write(tmp_path / "out", adapter(layers), "diffusers", {"model": ours})
    state, metadata = CogView4Pipeline.lora_state_dict(tmp_path / "out", return_lora_metadata=True)
    CogView4Pipeline.load_lora_into_transformer(state, peer, metadata=metadata)
    theirs, difference = compared(peer, ours)
    assert (theirs - plain).abs().max() / plain.std() > 0.1
    assert difference < F32


@pytest.mark.parametrize(
    "targets", [["to_q", "to_v"], ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]]
)
def test_saved_by_the_pipeline_it_loads_here(targets: list[str], tmp_path: Path) -> None:
    peer, ours = both()
    plain, _ = compared(peer, ours)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    peer.add_adapter(config)
    CogView4Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(peer))
    attach(ours, "style", read(tmp_path, {"model": ours}).of("model"))
    theirs, difference = compared(peer, ours)
    assert (theirs - plain).abs().max() / plain.std() > 0.1
    assert difference < F32


def test_from_here_to_diffusers_and_back_changes_nothing(tmp_path: Path) -> None:
    _, ours = both()
    layers = noisy(start(ours))
    write(tmp_path / "out", adapter(layers), "diffusers", {"model": ours})
    back = read(tmp_path / "out", {"model": ours}).of("model")
    assert back.keys() == layers.keys()
    attach(ours, "style", layers)
    x, _, t, _, cond = inputs(12, 20, 16)
    with torch.no_grad():
        first = ours(x.float(), t.float(), ours.prepare(cond, (12, 20)))
        detach(ours, "style")
        attach(ours, "style", back)
        second = ours(x.float(), t.float(), ours.prepare(cond, (12, 20)))
    assert (first - second).abs().max() < F32


def test_convert_says_nothing_of_peft_for_a_pipeline_that_loads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load([ROOT / "configs" / "tiny_cogview4.yaml"]).model
    small = CogView4(**model.params)
    made = adapter(noisy(start(small)))
    made = replace(made, info=replace(made.info, base={"model": plain(model)}))
    write(tmp_path / "own", made, "native", {"model": small})
    assert convert([str(tmp_path / "own"), str(tmp_path / "theirs"), "--to", "diffusers"]) == 0
    assert "CogView3PlusPipeline" not in capsys.readouterr().err
