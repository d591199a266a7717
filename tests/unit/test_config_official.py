"""Official configs: accepted as they are, translated key by key, what cannot be honoured is named."""
# ruff: noqa: E501 (tables of cases)

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sat.cli import sample
from sat.config.load import load, load_full
from sat.config.yaml_source import Source
from tests.configs import DEBUG, ROOT, refused

OFFICIAL = Path(__file__).parents[1] / "assets" / "official"
PLUS, BASE, RELAY, BASE_DISTILL, RELAY_DISTILL = (
    OFFICIAL / f"cogview3_{name}.yaml"
    for name in ("plus", "base", "relay", "base_distill_4step", "relay_distill_1step")
)
THREE = "model.first_stage_config.params.ddconfig.in_channels=3"
"""The correction of the official typo."""


@pytest.fixture
def official(tmp_path):
    """An official config with one key changed, or taken out by None, as a file."""

    def change(key: str = "", value: Any = None, of: Path = PLUS) -> Path:
        tree = yaml.safe_load(of.read_text())
        node, (*above, last) = tree, key.split(".")
        for name in above:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        if key and value is None:
            node.pop(last, None)
        elif key:
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
    assert e.conditioning.text.params == {
        "dim": 4096, "heads": 8, "head_dim": 4, "mlp_dim": 64, "depth": 2, "vocab": 256,
    }  # fmt: skip


NETWORK, DENOISER = "model.network_config.params", "model.denoiser_config.params"
ENCODER = "model.first_stage_config.params.encoder_config.params"
EMBEDDERS = "model.conditioner_config.params.emb_models"


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("model.network_config.target", "x.Other", "network x.Other is not supported yet"),
        ("args.relay_model", True,
         "args.relay_model: expected False, as the sampler is ZeroSNRDDIMSampler; got True (bool)"),
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
        ("model.sampler_config.target", "x.UniPCSampler", "sampler x.UniPCSampler is not supported yet"),
        ("model.loss_fn_config.target", "x.EDMLoss", "loss x.EDMLoss is not supported yet"),
        ("model.sampler_config.params.guider_config.params.dyn_thresh_config", {"target": "x.Clip"},
         "thresholding x.Clip is not supported yet"),
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
    assert Source(yaml.safe_load(PLUS.read_text()), {}).official
    assert Source({"args": {"load": "x"}}, {}).official
    assert not Source(yaml.safe_load(DEBUG.read_text()), {}).official
    assert not Source({"sampling": {"steps": 1}}, {}).official


UNETS = {
    "base": (BASE, []),
    "relay": (RELAY, []),
    "base_distill": (BASE_DISTILL, [THREE]),
    "relay_distill": (RELAY_DISTILL, []),
}


@pytest.mark.parametrize("name", UNETS)
def test_the_official_unet_configs_are_ours_with_their_own_paths(name):
    """Model, diffusion, sampler, guider, sizes: what ``configs/`` says, the official files say too."""
    path, overrides = UNETS[name]
    ours, theirs = load([ROOT / "configs" / f"{name}.yaml"]), load([path], overrides)
    attention = theirs.model.params["attention"]
    assert {**theirs.model.params, "attention": sorted(attention)} == dict(ours.model.params)
    assert theirs.model.target == ours.model.target
    assert theirs.diffusion.schedule.target == ours.diffusion.schedule.target
    assert theirs.diffusion.prediction.target == ours.diffusion.prediction.target
    assert (theirs.conditioning.size, theirs.conditioning.max_length) == (ours.conditioning.size, 225)
    for key in ("guider", "sampler", "steps", "dtype", "height", "width", "sizes"):
        assert getattr(theirs.sampling, key) == getattr(ours.sampling, key), key
    for key, value in ours.first_stage.params.items():
        assert theirs.first_stage.params[key] == value
    if name.startswith("relay"):
        mixin = theirs.diffusion.process.params["mixins"]["relay"]
        assert mixin["params"] == {**ours.diffusion.process.params["mixins"]["relay"]["params"], "factor": 2}
    else:
        assert theirs.diffusion.process == ours.diffusion.process


def test_relay_reads_pictures_and_base_does_not(official):
    assert str(load([RELAY]).sampling.input_dir) == "outputs/cogview3_base_512x512"
    loaded = load_full([official("args.input_dir", "outputs/x", of=BASE)])
    assert loaded.experiment.sampling.input_dir is None
    assert any("args.input_dir (only relay models enlarge pictures)" in notice for notice in loaded.notices)


def test_missing_inputs_of_relay_point_to_the_official_lines():
    keys = {m.key: m.where.rpartition(":")[2] for m in load_full([RELAY]).missing}
    text = RELAY.read_text().splitlines()
    named = {
        "checkpoint.model": "load:",
        "sampling.prompt_file": "input_file:",
        "sampling.input_dir": "input_dir:",
        "checkpoint.text": "model_dir:",
        "checkpoint.first_stage": "ckpt_path:",
    }
    assert set(keys) == set(named)
    for key, word in named.items():
        assert word in text[int(keys[key]) - 1]


def test_what_unet_configs_ask_in_vain_is_named():
    notices = "\n".join(load_full([RELAY_DISTILL]).notices)
    for key in ("use_checkpoint", "use_fp16", "force_inference", "sampler_config.params.verbose", "log_keys"):
        assert key in notices
    for key in ("use_spatial", "legacy", "cfg_cond", "partial_num_steps", "lr_scale", "attn_type", "input_dir",
                "sampling_image_size", "fp16,", "loss_fn_config", "embed_dim"):  # fmt: skip
        assert key not in notices.replace("use_fp16", "")


def test_the_training_loss_of_relay_is_taken():
    loss = load([RELAY]).diffusion.loss
    assert loss is not None
    assert (loss.target, dict(loss.params)) == ("sat.diffusion.loss.DenoisingLoss", {"offset_noise": 0.05})
    assert "weighting" not in "\n".join(load_full([RELAY]).notices)


def test_the_absolute_errors_of_an_official_loss_are_taken(official):
    loss = load([official("model.loss_fn_config.params.type", "l1", of=RELAY)]).diffusion.loss
    assert dict(loss.params) == {"offset_noise": 0.05, "kind": "l1"}


LOSS, SAMPLER = "model.loss_fn_config.params", "model.sampler_config.params"
UNET = "model.network_config.params"


@pytest.mark.parametrize(("key", "value", "what"), [
    (f"{LOSS}.partial_num_steps", 400, "training relays with partial 400, sampling with 500.0"),
    (f"{LOSS}.blurring_schedule", "exp", "training relays with blend exp, sampling with linear"),
])  # fmt: skip
def test_a_relay_that_training_and_sampling_see_differently_is_named(official, key, value, what):
    loaded = load_full([official(key, value, of=RELAY)])
    assert any(what in notice and "official.yaml:" in notice for notice in loaded.notices)


def test_without_a_sampler_the_loss_says_what_relay_is(official):
    tree = yaml.safe_load(official(f"{LOSS}.blurring_schedule", "exp", of=RELAY).read_text())
    del tree["model"]["sampler_config"]
    path = official()
    path.write_text(yaml.safe_dump(tree))
    e = load([path], ["sampling.steps=10"])
    assert e.diffusion.process.params["mixins"]["relay"]["params"] == {
        "partial": 500,
        "blend": "exp",
        "factor": 2,
    }


@pytest.mark.parametrize(
    ("num", "partial", "expected"), [(24, 12, 500), (5, 1, 200), (20, 4, 200), (50, 50, 1000)]
)
def test_relay_steps_are_those_that_are_taken(official, num, partial, expected):
    e = load([official(SAMPLER, {
        **yaml.safe_load(RELAY.read_text())["model"]["sampler_config"]["params"], "num_steps": num,
        "partial_num_steps": partial}, of=RELAY)])  # fmt: skip
    assert e.sampling.steps == partial
    assert e.diffusion.process.params["mixins"]["relay"]["params"]["partial"] == expected


@pytest.mark.parametrize(
    ("sampler", "params", "target", "ours"),
    [
        ("HeunEDMSampler", {"s_churn": 3, "s_noise": 1.1}, "Heun", {"churn": 3, "noise": 1.1}),
        ("EulerEDMSampler", {"s_tmin": 0.1, "s_tmax": 9}, "Euler", {"lowest": 0.1, "highest": 9}),
        ("DDIMSampler", {}, "DDIM", {"share": 0.1}),
        ("DDIMSampler", {"s_noise": 0.2}, "DDIM", {"share": 0.2}),
        ("EulerAncestralSampler", {"eta": 0.5}, "EulerAncestral", {"eta": 0.5}),
        ("DPMPP2SAncestralSampler", {"s_noise": 0.9}, "DPMSolver2SAncestral", {"noise": 0.9}),
        ("DPMPP2MSampler", {}, "DPMSolver2M", {}),
        ("LinearMultistepSampler", {"order": 3}, "LinearMultistep", {"order": 3}),
    ],
)
def test_every_official_sampler_and_its_options(official, sampler, params, target, ours):
    own = yaml.safe_load(BASE.read_text())["model"]["sampler_config"]["params"]
    e = load(
        [official("model.sampler_config", {"target": f"x.{sampler}", "params": {**own, **params}}, of=BASE)]
    )
    assert e.sampling.sampler.target == f"sat.diffusion.samplers.{target}"
    assert dict(e.sampling.sampler.params) == ours


def test_churn_of_relay_is_counted_over_the_whole_run(official):
    e = load([official(f"{SAMPLER}.s_churn", 4, of=RELAY)])
    assert e.sampling.sampler.params == {"churn": 2.0}


def test_a_guider_without_guidance_is_unguided(official):
    e = load([official(f"{SAMPLER}.cfg_cond_scale", None, of=RELAY_DISTILL)])
    assert e.sampling.guider.target == "sat.diffusion.guidance.Unguided"


def test_one_depth_stands_for_all_levels(official):
    assert load([official(f"{UNET}.transformer_depth", 2, of=BASE)]).model.params["depths"] == [2, 2, 2]


@pytest.mark.parametrize(
    ("of", "key", "value", "what"),
    [
        (BASE, f"{UNET}.use_spatial_transformer", None, "only True is supported, got False (bool)"),
        (BASE, f"{UNET}.use_linear_in_transformer", False, "only True is supported, got False (bool)"),
        (BASE, f"{UNET}.legacy", None, "only False is supported, got True (bool)"),
        (BASE, f"{UNET}.num_classes", 10, "only 'sequential' is supported, got 10 (int)"),
        (BASE, f"{UNET}.use_scale_shift_norm", True, "only False is supported, got True (bool)"),
        (BASE, f"{UNET}.spatial_transformer_attn_type", "linear", "expected one of softmax, softmax-xformers"),
        (BASE, f"{UNET}.out_channels", 8, f"expected 4 as in {UNET}.in_channels, got 8 (int)"),
        (BASE, f"{UNET}.transformer_depth_middle", 3, "only 10, the last depth, is supported, got 3"),
        (BASE, f"{UNET}.num_res_blocks", [2, 2], "blocks: expected int"),
        (BASE, f"{DENOISER}.quantize_c_noise", False, "only true is supported with this schedule"),
        (BASE, "args.relay_model", True, "args.relay_model: expected False, as the sampler is EulerEDMSampler"),
        (BASE, "args.sampling_image_size", 500, "height 500 is not a multiple of 32"),
        (BASE, "args.sampling_image_size", 2048, "height 2048 is not between 256 and 1024"),
        (BASE, f"{SAMPLER}.cfg_cond_scale", 7.5, "expected the guider IdentityGuider"),
        (RELAY, "args.relay_model", False, "args.relay_model: expected True, as the sampler is LinearRelayEDMSampler"),
        (RELAY, "args.sampling_image_size", 1056, "height 1056 is not a multiple of 64"),
        (RELAY, f"{SAMPLER}.partial_num_steps", 25, "expected 1 to num_steps of the num_steps, got 25 (int) of 24 (int)"),
        (RELAY, f"{SAMPLER}.partial_num_steps", "half", "got 'half' (str) of 24 (int)"),
        (RELAY, f"{LOSS}.type", "lpips", "got 'lpips' (str): its VGG takes pictures of three channels"),
        (RELAY, f"{LOSS}.type", "huber", "expected one of l2, l1, got 'huber' (str)"),
        (RELAY, f"{LOSS}.blurring_schedule", "cosine", "expected one of linear, sigma, exp, got 'cosine' (str)"),
        (RELAY, f"{LOSS}.sigma_sampler_config.target", "x.EDMSampling", "sigma sampler x.EDMSampling is not supported"),
        (RELAY, f"{DENOISER}.weighting_config.target", "x.VWeighting", "weighting x.VWeighting is not supported yet"),
        (RELAY_DISTILL, f"{SAMPLER}.cfg_cond_embed_dim", 512, f"expected 256 as in {UNET}.cfg_cond_embed_dim"),
        (RELAY_DISTILL, f"{UNET}.cfg_cond_embed_dim", None, f"the network takes none: there is no {UNET}.cfg_cond"),
    ],
)  # fmt: skip
def test_what_would_change_a_unet_is_refused_with_its_line(official, of, key, value, what):
    path = official(key, value, of=of)
    lines = refused([path])
    assert any(what in line for line in lines), lines
    assert all(line.startswith(f"{path}:") for line in lines)


def test_the_official_typo_is_read_as_meant_with_a_notice():
    loaded = load_full([BASE_DISTILL])
    assert loaded.experiment.first_stage.params["image_channels"] == 3
    (line,) = [notice for notice in loaded.notices if "known typo" in notice]
    number = line.removeprefix(f"{BASE_DISTILL}:").partition(":")[0]
    assert "in_channels: 3f" in BASE_DISTILL.read_text().splitlines()[int(number) - 1]
    assert line.endswith("'3f' is a known typo of the official file, read as 3")
    assert not any("known typo" in notice for notice in load_full([BASE_DISTILL], [THREE]).notices)


def test_official_keys_are_overridden_as_ours_are(official):
    e = load(
        [official()],
        ["args.batch_size=2", "model.sampler_config.params.num_steps=7", f"{EMBEDDERS}.0.params.model_dir=t6",
         "sampling.height=512", ("args.seed", 9)],
    )  # fmt: skip
    assert (e.sampling.batch_size, e.sampling.steps, e.sampling.height, e.sampling.seed) == (2, 7, 512, 9)
    assert str(e.checkpoint.text) == "t6"


def test_a_bad_override_of_an_official_key_is_named_as_one():
    assert refused([PLUS], [f"{EMBEDDERS}.9.params.model_dir=x"]) == [
        f"override: {EMBEDDERS}.9.params.model_dir: names no key of the official config"
    ]
    (line,) = refused([PLUS], ["args.sampling_image_size_x=1000"])
    assert line.startswith("override: ") and "height 1000 is not a multiple of 32" in line


def test_official_keys_name_nothing_in_our_files():
    (line,) = refused([DEBUG], ["args.batch_size=2"])
    assert "'args.batch_size' names no key" in line


@pytest.mark.parametrize("path", [PLUS, BASE, RELAY, RELAY_DISTILL], ids=lambda path: path.stem)
def test_sample_py_checks_official_files_as_they_are(path, capsys):
    assert sample.main(["--base", str(path), "--check"]) == 0
    out = capsys.readouterr().out
    assert "config ok" in out and "not honoured: " in out and "there is no 't5-v1_1-xxl'" in out
