"""Official keys and class names beside ours, as data, and the reader of an official tree."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sat.config.yaml_source import ConfigError, Key, Mark, Marks, Problem, dotted, shown, where

NETWORKS = {
    "DiffusionTransformer": "sat.models.cogview3_plus.CogView3Plus",
    "UNetModel": "sat.models.cogview3_unet.CogView3UNet",
}
TRANSFORMER = {
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

AUTOENCODERS = {
    "AutoencodingEngine": "pair",
    "AutoencoderKLInferenceWrapper": "single",
    "AutoencoderKL": "single",
}
"""Official autoencoder -> encoder and decoder are a ``pair`` of configs, or share a ``single`` one."""

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
LOSSES = ("StandardDiffusionLoss", "ZeroSNRDiffusionLoss", "LinearRelayDiffusionLoss")
BLENDS = ("linear", "sigma", "exp")
GUIDERS = {
    "VanillaCFG": "sat.diffusion.guidance.ClassifierFree",
    "IdentityGuider": "sat.diffusion.guidance.Unguided",
}

ARGS = {
    "load": "checkpoint.model",
    "batch_size": "sampling.batch_size",
    "grid_num_columns": "sampling.grid_columns",
    "output_dir": "output.dir",
    "seed": "sampling.seed",
}
"""Official key of ``args`` -> our key."""

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

# Values with a reason why they are refused.
REFUSED = {"lpips": ": its VGG takes pictures of three channels, and this loss is of latents"}

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

MIXINS = {
    "pos_embed": "PositionEmbeddingMixin",
    "patch_embed": "ImagePatchEmbeddingMixin",
    "attention": "AdalnAttentionMixin",
    "final_layer": "FinalLayerMixin",
}


class Official:
    """An official tree being read: remembers the keys used, collects the native tree and the problems."""

    def __init__(self, tree: Mapping[str, Any], marks: Marks) -> None:
        self.tree = tree
        self.marks = marks
        self.used: set[str] = set()
        self.out: dict[str, Any] = {}
        self.out_marks: Marks = {}
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    @property
    def folder(self) -> Path | None:
        """Folder of the last file."""
        return self.place("").folder

    def get(self, key: str) -> Any:
        """The value at ``key``, which does not count as used; None when absent."""
        node: Any = self.tree
        for part in key.split("."):
            if isinstance(node, list):
                node = node[int(part)] if int(part) < len(node) else None
            elif isinstance(node, Mapping):
                node = node.get(part)
            else:
                return None
        return node

    def take(self, key: str, default: Any = None) -> Any:
        """The value at ``key``, counted as used."""
        self.used.add(key)
        found = self.get(key)
        return default if found is None else found

    def class_name(self, key: str) -> str:
        """The name of the official class at ``key``, without its module."""
        return str(self.get(f"{key}.target")).rpartition(".")[2]

    def put(self, native: str, value: Any, key: str) -> None:
        """Write ``value`` at the dotted ``native`` key; messages about it point to the official ``key``."""
        path: Key = tuple(native.split("."))
        node, mark = self.out, self.place(key)
        for end, part in enumerate(path[:-1], 1):
            node = node.setdefault(part, {})
            self.out_marks.setdefault(path[:end], mark)
        node[path[-1]] = value
        self.out_marks[path] = mark

    def move(self, key: str, native: str) -> None:
        """Translate ``key`` to ``native`` unchanged, when it is there."""
        value = self.take(key)
        if value is not None:
            self.put(native, value, key)

    def choose(self, key: str, choices: Collection[str], what: str) -> str:
        """Entry of ``choices`` (names, or a mapping of them) for the official class at ``key``, else ''."""
        self.used.add(f"{key}.target")
        name = self.class_name(key)
        if name not in choices:
            known, target = ", ".join(choices), self.get(f"{key}.target")
            self.refuse(f"{key}.target", f"{what} {target} is not supported yet (supported: {known})")
            return ""
        return str(choices[name]) if isinstance(choices, Mapping) else name

    def one_of(self, key: str, choices: Collection[str], default: str) -> str | None:
        """The text at ``key``, one of ``choices``; None when it is refused."""
        given = self.take(key, default)
        if given in choices:
            return str(given)
        why = REFUSED.get(str(given), "")
        self.refuse(key, f"expected one of {', '.join(choices)}, got {shown(given)}{why}")
        return None

    def only(self, key: str, value: Any, default: Any) -> None:
        """Refuse anything but ``value`` at ``key``."""
        if (given := self.take(key, default)) != value:
            self.refuse(key, f"only {value!r} is supported, got {shown(given)}")

    def same(self, key: str, as_key: str) -> None:
        """Refuse two official keys that differ and are one parameter here."""
        value, other = self.take(key), self.get(as_key)
        if None not in (value, other) and value != other:
            self.refuse(key, f"expected {other!r} as in {as_key}, got {shown(value)}")

    def place(self, key: str) -> Mark:
        """The place of the official ``key``."""
        return where(self.marks, tuple(key.split("."))) if key else self.marks.get((), Mark(""))

    def refuse(self, key: str, what: str) -> None:
        """Note why the official config cannot be translated."""
        self.problems.append(Problem(str(self.place(key)), key, what))

    def finish(self) -> None:
        """Check the fixed keys; raise when anything was refused."""
        for key in self._leaves():
            value = self.get(key)
            if any(fnmatch.fnmatch(key, p) and value == nothing for p, nothing in NOTHING.items()):
                self.used.add(key)
            for pattern, fixed in FIXED.items():
                if fnmatch.fnmatch(key, pattern):
                    self.only(key, fixed, None)
        if self.problems:
            raise ConfigError(self.problems)

    def notices(self) -> list[str]:
        """One line for each group of keys that is not honoured, by what happens instead."""
        groups: dict[str, list[str]] = {}
        for key in self._leaves():
            if not any(key == used or key.startswith(f"{used}.") for used in self.used):
                why = next((w for p, w in INSTEAD.items() if fnmatch.fnmatch(key, p)), "without effect here")
                groups.setdefault(why, []).append(key)
        file = str(self.place("")).rpartition(":")[0] or "official config"
        lines = [f"{file}: not honoured: {', '.join(keys)} ({why})" for why, keys in groups.items()]
        return [*self.notes, *lines]

    def _leaves(self) -> list[str]:
        """The keys of all values; a list of single values is one."""
        found: list[str] = []

        def walk(node: Any, key: Key) -> None:
            if isinstance(node, Mapping):
                for name, child in node.items():
                    walk(child, (*key, str(name)))
            elif isinstance(node, list) and any(isinstance(child, Mapping) for child in node):
                for index, child in enumerate(node):
                    walk(child, (*key, str(index)))
            elif node is not None:
                found.append(dotted(key))

        walk(self.tree, ())
        return found
