"""Official keys and class names beside ours, as data; ``official.py`` applies them."""

from __future__ import annotations

from typing import Any

NETWORK = {
    "hidden_size": "dim",
    "num_attention_heads": "heads",
    "num_layers": "depth",
    "in_channels": "channels",
    "patch_size": "patch",
    "modules.patch_embed_config.params.text_hidden_size": "text_dim",
    "text_length": "text_len",
    "time_embed_dim": "emb_dim",
    "adm_in_channels": "size_dim",
}
"""Official key of the transformer -> our parameter."""

UNET = {
    "in_channels": "channels",
    "model_channels": "width",
    "channel_mult": "multipliers",
    "num_res_blocks": "blocks",
    "attention_resolutions": "attention",
    "num_head_channels": "head_dim",
    "context_dim": "text_dim",
    "adm_in_channels": "size_dim",
    "cfg_cond_embed_dim": "guidance_dim",
}
"""Official key of the UNet -> our parameter. ``transformer_depth`` may be one number for all levels."""

UNET_FIXED: dict[str, tuple[Any, Any]] = {
    "num_classes": ("sequential", None),
    "use_spatial_transformer": (True, False),
    "use_linear_in_transformer": (True, False),
    "legacy": (False, True),
    "dims": (2, 2),
    "conv_resample": (True, True),
    "num_heads": (-1, -1),
    "use_scale_shift_norm": (False, False),
    "resblock_updown": (False, False),
    "use_new_attention_order": (False, False),
    "disable_middle_self_attn": (False, False),
    "disable_self_attentions": (None, None),
    "num_attention_blocks": (None, None),
    "n_embed": (None, None),
}
"""Official key of the UNet -> its only supported value, and the official default."""

FIRST_STAGE = {
    "ch": "width",
    "ch_mult": "multipliers",
    "num_res_blocks": "res_blocks",
    "z_channels": "latent_channels",
    "in_channels": "image_channels",
}
"""Official key of an autoencoder's encoder -> our parameter."""

T5 = {
    "d_model": "dim",
    "num_heads": "heads",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "num_layers": "depth",
    "vocab_size": "vocab",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "max_distance",
}
"""Key of a Hugging Face T5 ``config.json`` -> our parameter."""

SCHEDULES = {
    "ZeroSNRDDPMDiscretization": "sat.diffusion.schedule.ZeroSNR",
    "LegacyDDPMDiscretization": "sat.diffusion.schedule.Discrete",
}
PREDICTIONS = {
    "ZeroSNRScaling": "sat.diffusion.prediction.V",
    "EpsScaling": "sat.diffusion.prediction.Eps",
}
RELAY = "LinearRelayEDMSampler"
SAMPLERS = {
    "ZeroSNRDDIMSampler": "sat.diffusion.samplers.DDIM",
    "EulerEDMSampler": "sat.diffusion.samplers.Euler",
    RELAY: "sat.diffusion.samplers.Euler",
    "HeunEDMSampler": "sat.diffusion.samplers.Heun",
    "DDIMSampler": "sat.diffusion.samplers.DDIM",
    "EulerAncestralSampler": "sat.diffusion.samplers.EulerAncestral",
    "DPMPP2SAncestralSampler": "sat.diffusion.samplers.DPMSolver2SAncestral",
    "DPMPP2MSampler": "sat.diffusion.samplers.DPMSolver2M",
    "LinearMultistepSampler": "sat.diffusion.samplers.LinearMultistep",
}
CHURN = {"s_churn": "churn", "s_tmin": "lowest", "s_tmax": "highest", "s_noise": "noise"}
SAMPLER_PARAMS: dict[str, dict[str, str]] = {
    "EulerEDMSampler": CHURN,
    RELAY: CHURN,
    "HeunEDMSampler": CHURN,
    "DDIMSampler": {"s_noise": "share"},
    "EulerAncestralSampler": {"eta": "eta", "s_noise": "noise"},
    "DPMPP2SAncestralSampler": {"eta": "eta", "s_noise": "noise"},
    "LinearMultistepSampler": {"order": "order"},
}
"""Official sampler -> its official option -> our parameter."""
LOSSES = {"StandardDiffusionLoss": "", "ZeroSNRDiffusionLoss": "", "LinearRelayDiffusionLoss": ""}
BLENDS = ("linear", "sigma", "exp")
GUIDERS = {
    "VanillaCFG": "sat.diffusion.guidance.ClassifierFree",
    "IdentityGuider": "sat.diffusion.guidance.Unguided",
}

# Keys whose only supported value is the official default; another one changes the model, so it is refused.
FIXED: dict[str, Any] = {
    "model.network_config.params.num_classes": "sequential",
    "model.network_config.params.layernorm_order": "pre",
    "model.network_config.params.elementwise_affine": False,
    "model.network_config.params.modules.attention_config.params.qk_ln": True,
    "model.network_config.params.modules.*.params.elementwise_affine": False,
    "model.network_config.params.modules.patch_embed_config.params.do_rearrange": True,
    "model.network_config.params.modules.final_layer_config.params.do_unpatchify": True,
    "model.denoiser_config.params.num_idx": 1000,
    "model.first_stage_config.params*.double_z": True,
    "model.first_stage_config.params*.attn_resolutions": [],
    "model.first_stage_config.params*.out_ch": 3,
    "model.first_stage_config.params*.tanh_out": False,
    "args.sampling_f": 8,
    "args.sdedit": False,
    "args.ip2p": False,
    "args.model_parallel_size": 1,
}

# Values that ask for what happens anyway.
NOTHING: dict[str, Any] = {
    "args.mode": "inference",
    "args.force_inference": False,
    "model.*.dropout": 0.0,
    "model.loss_fn_config.target": "torch.nn.Identity",
    "model.first_stage_config.params.loss*config.target": "torch.nn.Identity",
    "model.network_config.params.modules.pos_embed_config.params.max_length": 4096,  # officially unused
}

# Keys that are not honoured, with what happens instead.
INSTEAD = {
    "args.force_inference": "missing weights are an error here; list exceptions in checkpoint.allow_missing",
    "args.mode": "the command decides: sample.py samples, train.py trains",
    "args.input_dir": "only relay models enlarge pictures",
    "args.device": "parallel.device decides",
    "model.*.device": "parallel.device decides",
    "model.sampler_config.params.verbose": "progress is shown on a terminal",
    "model.sampler_config.params.*": "this sampler has no such option",
    "model.network_config.params.use_*": "memory and kernels are not part of the model here",
    "model.loss_fn_config.*": "this loss has no such option",
    "model.denoiser_config.params.weighting_config*": "only for training, which takes diffusion.loss",
    "model.first_stage_config.params.loss*config*": "only for training",
    "args.deepspeed_config*": "train.py writes DeepSpeed's settings from the train section",
    "deepspeed*": "train.py writes DeepSpeed's settings from the train section",
    "data*": "training data is named in the data section",
}

MIXINS: dict[str, dict[str, str]] = {
    "pos_embed": {"PositionEmbeddingMixin": ""},
    "patch_embed": {"ImagePatchEmbeddingMixin": ""},
    "attention": {"AdalnAttentionMixin": ""},
    "final_layer": {"FinalLayerMixin": ""},
}
