"""Vision towers against transformers' CLIP and SigLIP, in float64, through their folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from sat.control.base import ControlError
from sat.control.reference import Encoder
from sat.models.vision.tower import TowerError, from_huggingface
from tests.small import fill
from tests.tolerances import F64

SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 20, "patch_size": 5,
}  # fmt: skip
PICTURES = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1


def peer(kind: str) -> torch.nn.Module:
    if kind == "clip of a pair":
        text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
        model = CLIPModel(CLIPConfig(vision_config=SIZES, text_config=text))
    elif kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**SIZES))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False))
    fill(model)
    return model.double().eval()


@pytest.mark.parametrize("kind", ["clip", "clip of a pair", "siglip"])
def test_tokens_are_the_states_before_the_last_block(kind: str, tmp_path: Path) -> None:
    model = peer(kind)
    model.save_pretrained(tmp_path)
    encoder = Encoder(tmp_path)
    sizes = from_huggingface(json.loads((tmp_path / "config.json").read_text()))
    assert (encoder.width, sizes.clip) == (24, kind != "siglip")
    tower = encoder.model(torch.device("cpu"))
    x = PICTURES * 1.5  # their colours, whatever they stand for
    with torch.no_grad():
        vision = getattr(model, "vision_model", model)
        wanted = vision(x, output_hidden_states=True).hidden_states[-2]
        assert (tower(x) - wanted).abs().max() < F64
        assert wanted.std() > 0.1
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (sizes.mean, sizes.std))
        found = encoder(PICTURES)  # of its own size: nothing is resampled
        wanted = tower(((PICTURES + 1) / 2 - mean) / std)
    assert (found - wanted).abs().max() < 1e-5, "colours are float32"
    assert encoder(PICTURES[:, :, :7, :12]).shape == found.shape


def test_folders_that_hold_no_tower_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="no encoder"):
        Encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises((TowerError, ControlError), match="model_type is bert, expected clip_vision_model or"):
        Encoder(tmp_path)
    peer("siglip").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ControlError, match="holds no .safetensors"):
        Encoder(tmp_path)(PICTURES)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "hidden_act": "swish"}))
    with pytest.raises((TowerError, ControlError), match="hidden_act is swish"):
        Encoder(tmp_path)
