"""The full-size key lists of the published weights map completely, on the meta device."""

import pytest
import torch

from sat.checkpoint import InMemory, match
from sat.checkpoint.format import CheckpointError
from sat.checkpoint.rules import as_theirs, family_rules
from sat.first_stage import AutoencoderKL
from sat.models.cogview3_plus import CogView3Plus
from sat.models.cogview3_unet import CogView3UNet
from sat.models.t5 import T5Encoder
from tests.checkpoints import spec

VAE4 = {
    "multipliers": (1, 2, 4, 4), "res_blocks": 2, "latent_channels": 4, "mid_attention": True,
    "quant_convs": True,
}  # fmt: skip

CASES = [
    ("plus_sat", 317, "model", "SAT", CogView3Plus, {}),
    ("plus_diffusers", 436, "model", "DIFFUSERS", CogView3Plus, {}),
    ("unet_sat", 1680, "model", "SAT", CogView3UNet, {}),
    ("vae16_sat", 288, "first_stage", "SAT", AutoencoderKL, {}),
    ("vae16_diffusers", 288, "first_stage", "DIFFUSERS", AutoencoderKL, {}),
    ("vae4_sat", 248, "first_stage", "SAT", AutoencoderKL, VAE4),
    ("t5_xxl_hf", 220, "text", "HF", T5Encoder, {}),
]


@pytest.mark.parametrize(
    ("name", "count", "part", "layout", "kind", "params"), CASES, ids=[c[0] for c in CASES]
)
def test_published_names_map_completely(name, count, part, layout, kind, params):
    """Every published name is used once, every shape fits, and writing gives the published list again."""
    theirs = spec(name)
    assert len(theirs) == count
    with torch.device("meta"):
        module = kind(**params)
    found = match(module, theirs, part)
    rules = family_rules(kind)[layout]
    assert found.rules == rules
    assert (found.missing, found.unexpected, found.ignored) == ([], [], [])
    assert found.computed == (
        ["transformer.mixins.position.table"] if layout == "DIFFUSERS" and part == "model" else []
    )

    back = as_theirs(InMemory(module.state_dict()), rules).infos()
    prefix = "model.diffusion_model." if name in ("plus_sat", "unet_sat") else ""
    prefix = "conditioner.embedders.0.transformer." if part == "text" else prefix
    tied = {"encoder.embed_tokens.weight"} if part == "text" else set()
    wanted = {key.removeprefix(prefix): theirs.info(key).shape for key in theirs}
    assert {key: info.shape for key, info in back.items()} == {
        k: s for k, s in wanted.items() if k not in tied
    }


def test_the_prefixed_first_stage_list_of_an_engine_file_maps_too():
    theirs = spec("vae16_sat")
    prefixed = InMemory({f"first_stage_model.{name}": theirs[name] for name in theirs})
    with torch.device("meta"):
        module = AutoencoderKL()
    assert len(match(module, prefixed, "first_stage").view) == 288


def test_the_published_unets_have_the_published_number_of_parameters():
    """CogView3-Base and CogView3-Relay have the same 1680 names and shapes."""
    with torch.device("meta"):
        module = CogView3UNet()
    assert sum(p.numel() for p in module.parameters()) == 2_906_612_484


@pytest.mark.parametrize(("features", "count"), [(512, 2_906_776_324), (256, 2_906_694_404)])
def test_distilled_unets_have_one_name_more_and_bring_its_width(features, count):
    """Four-step Base takes 512 features of the guidance strength, one-step Relay 256; either loads."""
    base = spec("unet_sat")
    extra = {"model.diffusion_model.w_proj.weight": torch.empty(320, features, device="meta")}
    theirs = InMemory({**{key: base[key] for key in base}, **extra})
    with torch.device("meta"):
        module = CogView3UNet(guidance_dim=256)
    found = match(module, theirs, "model")
    assert len(theirs) == 1681
    assert (found.missing, found.unexpected, found.ignored) == ([], [], [])
    assert sum(p.numel() for p in module.parameters()) == count
    back = as_theirs(InMemory(module.state_dict()), family_rules(CogView3UNet)["SAT"]).infos()
    wanted = {key.removeprefix("model.diffusion_model."): theirs.info(key).shape for key in theirs}
    assert {key: info.shape for key, info in back.items()} == wanted


def test_a_plain_unet_refuses_a_distilled_checkpoint():
    base = spec("unet_sat")
    extra = {"model.diffusion_model.w_proj.weight": torch.empty(320, 512, device="meta")}
    with torch.device("meta"):
        module = CogView3UNet()
    with pytest.raises(CheckpointError, match="1 unexpected: 'model.diffusion_model.w_proj.weight'"):
        match(module, InMemory({**{key: base[key] for key in base}, **extra}), "model")
