"""Official configs: accepted as they are, translated key by key, what cannot be honoured is named."""
# ruff: noqa: E501 (tables of cases)

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sat.config.load import load, load_full
from sat.config.official import is_official, t5_params
from tests.configs import DEBUG, ROOT, refused

PLUS = Path(__file__).parents[1] / "assets" / "official" / "cogview3_plus.yaml"


@pytest.fixture
def official(tmp_path):
    """The official config with one key changed, as a file."""

    def change(key: str = "", value: Any = None) -> Path:
        tree = yaml.safe_load(PLUS.read_text())
        node, (*above, last) = tree, key.split(".")
        for name in above:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        if key:
            node[last] = copy.deepcopy(value)
        path = tmp_path / "official.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return change


def test_the_official_config_is_configs_plus_with_its_own_sizes_and_paths():
    ours, theirs = load([ROOT / "configs" / "plus.yaml"]), load([PLUS])
    assert theirs.model == ours.model
    assert theirs.diffusion == ours.diffusion
    assert (theirs.conditioning.size, theirs.conditioning.max_length) == (ours.conditioning.size, 224)
    assert theirs.sampling.guider == ours.sampling.guider
    assert (theirs.sampling.steps, theirs.sampling.dtype) == (50, "bf16")
    for name, value in ours.first_stage.params.items():
        assert theirs.first_stage.params[name] == value


def test_x_is_the_height():
    e = load([PLUS])
    assert (e.sampling.height, e.sampling.width) == (1024, 2048)


def test_args_become_keys():
    e = load([PLUS])
    assert (e.sampling.batch_size, e.sampling.grid_columns) == (4, 2)
    assert str(e.sampling.prompt_file) == "configs/test.txt"
    assert str(e.output.dir) == "outputs/cogview3_plus"
    assert str(e.checkpoint.source("model")) == "cogview3-plus-3b/transformer"
    assert str(e.checkpoint.source("first_stage")) == "cogview3-plus-3b/vae/imagekl_ch16.pt"
    assert str(e.checkpoint.source("text")) == "t5-v1_1-xxl"


def test_missing_inputs_point_to_the_official_lines():
    lines = {
        str(m).rpartition("official/")[2].partition(": there is no")[0] for m in load_full([PLUS]).missing
    }
    assert lines == {
        "cogview3_plus.yaml:5: checkpoint.model",
        "cogview3_plus.yaml:9: sampling.prompt_file",
        "cogview3_plus.yaml:51: checkpoint.text",
        "cogview3_plus.yaml:61: checkpoint.first_stage",
    }


def test_what_is_not_honoured_is_named():
    notices = "\n".join(load_full([PLUS]).notices)
    for key in ("args.force_inference", "model.log_keys", "model.sampler_config.params.verbose",
                "model.disable_first_stage_autocast", "model.first_stage_config.params.monitor"):  # fmt: skip
        assert key in notices
    assert "list exceptions in checkpoint.allow_missing" in notices
    for key in ("hidden_size", "args.load", "shift_scale", "mid_attn", "outdim", "relay_model", "dropout"):
        assert key not in notices


def test_an_unknown_key_is_named_not_dropped(official):
    path = official("args.my_own_flag", 3)
    assert any(
        "args.my_own_flag" in notice and "without effect" in notice for notice in load_full([path]).notices
    )


def test_our_files_and_overrides_go_over_it(tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("sampling: {steps: 10}")
    e = load([PLUS, more], ["sampling.height=512", "sampling.prompt=a dog"])
    assert (e.sampling.steps, e.sampling.height, e.sampling.prompt_file) == (10, 512, None)


def test_official_files_compose_among_themselves(official, tmp_path):
    more = tmp_path / "args.yaml"
    more.write_text("args: {batch_size: 1, fp16: true, bf16: false, seed: 5, sampling_image_size_x: 512}")
    e = load([official(), more])
    assert (e.sampling.batch_size, e.sampling.dtype, e.sampling.seed, e.sampling.height) == (
        1,
        "fp16",
        5,
        512,
    )


def test_interactive_input_names_no_prompts(official):
    assert load([official("args.input_type", "cli")]).sampling.prompt_file is None


def test_every_allowed_official_size_is_allowed(official):
    e = load([official("args.sampling_image_size_x", 2048)])
    assert e.sampling.sizes.allows(2048, 2048)
    assert not e.sampling.sizes.allows(2048, 2080)


def test_weights_and_text_encoder_are_read_beside_the_official_file(official, tmp_path):
    (tmp_path / "t5").mkdir()
    config = {"d_model": 4096, "num_heads": 8, "d_kv": 4, "d_ff": 64, "num_layers": 2, "vocab_size": 256}
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config))
    e = load([official("model.conditioner_config.params.emb_models.0.params.model_dir", "t5")])
    assert e.checkpoint.text == tmp_path / "t5"
    assert e.conditioning.text.params == t5_params(config)
    assert e.conditioning.text.params["depth"] == 2


NETWORK, DENOISER = "model.network_config.params", "model.denoiser_config.params"
ENCODER = "model.first_stage_config.params.encoder_config.params"
EMBEDDERS = "model.conditioner_config.params.emb_models"


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("model.network_config.target", "sgm.modules.diffusionmodules.openaimodel.UNetModel",
         "model.network_config.target: the UNet models (CogView3-Base, CogView3-Relay and their distilled versions) "
         "are not supported yet; CogView3-Plus is"),
        ("model.network_config.target", "x.Other", "network x.Other is not supported yet"),
        ("args.relay_model", True, "args.relay_model: only False is supported, got True (bool)"),
        (f"{NETWORK}.out_channels", 4, f"expected 16 as in {NETWORK}.in_channels, got 4 (int)"),
        (f"{NETWORK}.block_size", 8, "expected 16 pixels (8 x patch_size 2), got 8"),
        (f"{NETWORK}.num_classes", 10, "only 'sequential' is supported, got 10 (int)"),
        (f"{NETWORK}.layernorm_order", "sandwich", "only 'pre' is supported"),
        (f"{NETWORK}.modules.attention_config.params.qk_ln", False, "only True is supported, got False (bool)"),
        (f"{NETWORK}.modules.pos_embed_config.target", "x.Rotary", "mixin x.Rotary is not supported yet"),
        (f"{DENOISER}.num_idx", 500, "only 1000 is supported, got 500 (int)"),
        (f"{DENOISER}.quantize_c_noise", True, "only false is supported with the zero-SNR schedule"),
        (f"{DENOISER}.scaling_config.target", "x.VScaling", "scaling x.VScaling is not supported yet"),
        (f"{DENOISER}.discretization_config.params.shift_scale", 3, "expected the discretization of denoiser_config"),
        (f"{DENOISER}.discretization_config.params.linear_start", 0.1, "only 0.00085 is supported, got 0.1 (float)"),
        ("model.sampler_config.target", "x.HeunEDMSampler", "sampler x.HeunEDMSampler is not supported yet"),
        ("model.sampler_config.params.guider_config.target", "x.LinearCFG", "guider x.LinearCFG is not supported yet"),
        (f"{EMBEDDERS}.1.params.outdim", 128, "expected one outdim for all three sizes, got [128, 256, 256]"),
        (f"{EMBEDDERS}.1.input_key", "aesthetic", "expected txt, then original_size_as_tuple"),
        (f"{ENCODER}.z_channels", 4, "expected 4 as in"),
        (f"{ENCODER}.double_z", False, "only True is supported, got False (bool)"),
        (f"{ENCODER}.attn_resolutions", [16], "only [] is supported"),
        ("model.first_stage_config.params.regularizer_config.target", "x.VQ", "regulariser x.VQ is not supported yet"),
        ("args.sampling_latent_dim", 4, f"expected 16 as in {NETWORK}.in_channels"),
        ("args.sampling_image_size_x", 1000, "height 1000 is not a multiple of 32"),
        ("args.batch_size", "4", "sampling.batch_size: expected int, got '4' (str)"),
    ],
)  # fmt: skip
def test_what_would_change_the_model_is_refused_with_its_line(official, key, value, what):
    path = official(key, value)
    lines = refused([path])
    assert any(what in line for line in lines), lines
    assert all(line.startswith(f"{path}:") for line in lines)


def test_several_refusals_are_told_together(official, tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text(
        "args: {relay_model: true, sdedit: true}\nmodel: {denoiser_config: {params: {num_idx: 10}}}"
    )
    assert len(refused([official(), more])) == 3


def test_the_four_channel_autoencoder(official):
    single = {
        "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
        "params": {
            "embed_dim": 4, "monitor": "val/rec_loss", "lossconfig": {"target": "torch.nn.Identity"},
            "ddconfig": {"attn_type": "vanilla-xformers", "double_z": True, "z_channels": 4, "resolution": 256,
                         "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
                         "attn_resolutions": [], "dropout": 0.0},
        },
    }  # fmt: skip
    tree = yaml.safe_load(official("model.first_stage_config", single).read_text())
    tree["model"]["scale_factor"] = 0.13025
    tree["model"]["network_config"]["params"] |= {"in_channels": 4, "out_channels": 4}
    tree["args"]["sampling_latent_dim"] = 4
    path = official()
    path.write_text(yaml.safe_dump(tree))
    params = load([path]).first_stage.params
    assert params["mid_attention"] is True
    assert params["quant_convs"] is True
    assert (params["latent_channels"], params["scale_factor"], params["multipliers"]) == (
        4,
        0.13025,
        [1, 2, 4, 4],
    )


def test_ours_are_not_taken_for_official_ones():
    assert is_official(yaml.safe_load(PLUS.read_text()))
    assert is_official({"args": {"load": "x"}})
    assert not is_official(yaml.safe_load(DEBUG.read_text()))
    assert not is_official({"sampling": {"steps": 1}})
