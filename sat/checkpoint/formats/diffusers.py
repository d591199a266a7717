"""diffusers pipelines, their components, and folders of text encoders; their configs in both directions.

    DIR/model_index.json  DIR/transformer/  DIR/vae/  DIR/text_encoder/  DIR/tokenizer/  DIR/scheduler/

Each of the first folders holds config.json and safetensors or .bin shards; a T5 folder of its own has
spiece.model beside them. Source: the config.json files of ``CogView3PlusPipeline``'s components (checked in
tests/parity/test_checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat.checkpoint.files import open_folder, vocabulary
from sat.checkpoint.format import PARTS, CheckpointError, LazyStateDict, Part, whole_number
from sat.checkpoint.formats import cogview4
from sat.checkpoint.verify import Verify, read_json
from sat.models.glm.model import from_huggingface as glm_params
from sat.models.t5.model import from_huggingface as t5_params

_FULL = Verify()
FOLDERS: dict[Part, str] = {"model": "transformer", "first_stage": "vae", "text": "text_encoder"}
CLASSES: dict[str, Part] = {
    "CogView3PlusTransformer2DModel": "model",
    cogview4.TRANSFORMER: "model",
    "AutoencoderKL": "first_stage",
}
PIPELINE = "CogView3PlusPipeline"
SCHEDULER = "CogVideoXDDIMScheduler"

PLUS = "sat.models.cogview3_plus.CogView3Plus"
AUTOENCODER = "sat.first_stage.model.AutoencoderKL"
SCHEDULE = "sat.diffusion.schedule.ZeroSNR"
V = "sat.diffusion.prediction.V"
T5 = "sat.models.t5.T5Encoder"


class DiffusersPipeline:
    """Reads pipeline folders; :func:`sat.checkpoint.save.save_diffusers` writes them."""

    name = "diffusers"

    def detects(self, path: Path) -> bool:
        """A folder with model_index.json."""
        return (path / "model_index.json").is_file()

    def parts(self, path: Path, *, allow_pickle: bool = False) -> list[Part]:
        """The components that are there."""
        return [part for part in PARTS if (path / FOLDERS[part]).is_dir()]

    def locate(self, path: Path, part: Part, *, allow_pickle: bool = False) -> Path:
        """The component's folder."""
        folder = path / FOLDERS[part]
        if not folder.is_dir():
            raise CheckpointError(f"{path}: holds no {part} weights: {FOLDERS[part]}/ is missing")
        return folder

    def open(
        self, path: Path, part: Part, *, allow_pickle: bool = False, verify: Verify = _FULL
    ) -> LazyStateDict:
        """The tensors under diffusers' (text encoder: Hugging Face) names."""
        reader = cogview4.open_transformer if part == "model" else open_folder
        return reader(self.locate(path, part), allow_pickle=allow_pickle, verify=verify)

    def config(self, path: Path) -> Mapping[str, Any]:
        """The sections that the component configs give."""
        name = read_json(path / "model_index.json").get("_class_name")
        fourth = name in (cogview4.PIPELINE, cogview4.CONTROL_PIPELINE)
        if name != PIPELINE and not fourth:
            known = f"{PIPELINE} and {cogview4.PIPELINE}"
            raise CheckpointError(f"{path}: is a diffusers {name}, only {known} can be read")
        config: dict[str, Any] = {}
        if (transformer := path / "transformer" / "config.json").is_file():
            config["model"] = _model(transformer)
        if (vae := path / "vae" / "config.json").is_file():
            config["first_stage"] = _first_stage(vae)
        if (scheduler := path / "scheduler" / "scheduler_config.json").is_file():
            config["diffusion"] = _diffusion(scheduler)
        if (path / "text_encoder" / "config.json").is_file():
            config["conditioning"] = {"text": text_component(path / "text_encoder")}
            if "model" in config:
                config["conditioning"]["size"] = size_component(config["model"]["params"]["size_dim"])
            said = path / "tokenizer" / "tokenizer_config.json"
            if fourth:
                config["conditioning"] |= cogview4.conditioning(said)
            elif "model" in config:
                config["model"]["params"]["text_len"] = _tokens(said)
                config["conditioning"]["max_length"] = config["model"]["params"]["text_len"]
        return config

    def tokenizer(self, path: Path) -> Path | None:
        """``tokenizer/spiece.model``, or the ``tokenizer.json`` of GLM and of transformers 5."""
        return vocabulary(path / "tokenizer")


class DiffusersComponent:
    """Reads one component's folder: a transformer or an autoencoder."""

    name = "diffusers component"

    def detects(self, path: Path) -> bool:
        """A folder whose config.json names a known class."""
        return self._part(path) is not None

    def parts(self, path: Path, *, allow_pickle: bool = False) -> list[Part]:
        """The one part it is."""
        part = self._part(path)
        return [] if part is None else [part]

    def locate(self, path: Path, part: Part, *, allow_pickle: bool = False) -> Path:
        """The folder itself."""
        if self._part(path) != part:
            raise CheckpointError(f"{path}: holds {self._part(path)} weights, not {part}")
        return path

    def open(
        self, path: Path, part: Part, *, allow_pickle: bool = False, verify: Verify = _FULL
    ) -> LazyStateDict:
        """The tensors under diffusers' names."""
        reader = cogview4.open_transformer if part == "model" else open_folder
        return reader(self.locate(path, part), allow_pickle=allow_pickle, verify=verify)

    def config(self, path: Path) -> Mapping[str, Any]:
        """The one section it gives."""
        file = path / "config.json"
        return {"model": _model(file)} if self._part(path) == "model" else {"first_stage": _first_stage(file)}

    def tokenizer(self, path: Path) -> Path | None:
        """None: no text encoder here."""
        return None

    def _part(self, path: Path) -> Part | None:
        file = path / "config.json"
        return CLASSES.get(str(read_json(file).get("_class_name"))) if file.is_file() else None


class HuggingFaceText:
    """Reads folders of text encoders, T5 and GLM, as ``save_pretrained`` writes them."""

    name = "huggingface"

    def detects(self, path: Path) -> bool:
        """A folder whose config.json says T5 or GLM."""
        file = path / "config.json"
        return file.is_file() and read_json(file).get("model_type") in ("t5", "glm")

    def parts(self, path: Path, *, allow_pickle: bool = False) -> list[Part]:
        """The text encoder only."""
        return ["text"]

    def locate(self, path: Path, part: Part, *, allow_pickle: bool = False) -> Path:
        """The folder itself."""
        if part != "text":
            raise CheckpointError(f"{path}: is a text encoder, it holds no {part} weights")
        return path

    def open(
        self, path: Path, part: Part, *, allow_pickle: bool = False, verify: Verify = _FULL
    ) -> LazyStateDict:
        """The tensors under Hugging Face names."""
        return open_folder(self.locate(path, part), allow_pickle=allow_pickle, verify=verify)

    def config(self, path: Path) -> Mapping[str, Any]:
        """``conditioning.text`` from config.json."""
        return {"conditioning": {"text": text_component(path)}}

    def tokenizer(self, path: Path) -> Path | None:
        """``spiece.model`` or ``tokenizer.json`` in the folder."""
        return vocabulary(path)


# -- their configs -> ours


def text_component(folder: Path) -> dict[str, Any]:
    """Our T5 or GLM encoder with the sizes of a Hugging Face config.json."""
    config = read_json(folder / "config.json")
    try:
        if config.get("model_type") == "glm":
            return {"target": cogview4.GLM, "params": glm_params(config)}
        return {"target": T5, "params": t5_params(config)}
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _tokens(file: Path) -> int:
    """The text length that our writer leaves with the tokenizer, else the published model's."""
    length = read_json(file).get("model_max_length") if file.is_file() else None
    return length if isinstance(length, int) and 0 < length < 512 else 224


def size_component(size_dim: int) -> dict[str, Any]:
    """The size embedding whose six numbers make vectors of ``size_dim``."""
    return {"target": "sat.conditioning.conditioner.SizeConditioner", "params": {"dim": size_dim // 6}}


def _model(file: Path) -> dict[str, Any]:
    config = read_json(file)
    if config.get("_class_name") == cogview4.TRANSFORMER:
        return cogview4.model(file)
    if config.get("_class_name") not in (None, "CogView3PlusTransformer2DModel"):
        raise CheckpointError(
            f"{file}: is a {config['_class_name']}, expected CogView3PlusTransformer2DModel"
        )
    heads = whole_number(file, config, "num_attention_heads", 64)
    channels = whole_number(file, config, "in_channels", 16)
    if config.get("out_channels", channels) != channels:
        raise CheckpointError(
            f"{file}: out_channels {config['out_channels']} differs from in_channels {channels}"
        )
    table = whole_number(file, config, "pos_embed_max_size", 128)
    params = {
        "dim": heads * whole_number(file, config, "attention_head_dim", 40),
        "heads": heads,
        "depth": whole_number(file, config, "num_layers", 30),
        "channels": channels,
        "patch": whole_number(file, config, "patch_size", 2),
        "text_dim": whole_number(file, config, "text_embed_dim", 4096),
        "text_len": 224,  # not in the file: see DiffusersPipeline.config
        "emb_dim": whole_number(file, config, "time_embed_dim", 512),
        "size_dim": 6 * whole_number(file, config, "condition_dim", 256),
        "table_size": [table, table],
    }
    return {"target": PLUS, "params": params}


def _first_stage(file: Path) -> dict[str, Any]:
    config = read_json(file)
    widths = config.get("block_out_channels")
    if (
        not isinstance(widths, list)
        or not widths
        or any(not isinstance(w, int) or w % widths[0] for w in widths)
    ):
        raise CheckpointError(
            f"{file}: block_out_channels is {widths!r}, expected whole multiples of the first"
        )
    if config.get("shift_factor") not in (None, 0, 0.0):
        raise CheckpointError(
            f"{file}: shift_factor is {config['shift_factor']}, only latents without a shift are read"
        )
    quant = bool(config.get("use_quant_conv", True))
    if bool(config.get("use_post_quant_conv", True)) != quant:
        raise CheckpointError(
            f"{file}: use_quant_conv and use_post_quant_conv differ, which is not supported"
        )
    params = {
        "width": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "res_blocks": whole_number(file, config, "layers_per_block"),
        "latent_channels": whole_number(file, config, "latent_channels"),
        "groups": whole_number(file, config, "norm_num_groups", 32),
        "mid_attention": bool(config.get("mid_block_add_attention", True)),
        "quant_convs": quant,
        "scale_factor": float(config.get("scaling_factor", 0.18215)),
    }
    return {"target": AUTOENCODER, "params": params}


def _diffusion(file: Path) -> dict[str, Any]:
    config = read_json(file)
    if config.get("_class_name") == cogview4.SCHEDULER:
        return cogview4.diffusion(file)
    wanted = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "beta_schedule": "scaled_linear",
    }
    for key, value in wanted.items():
        if config.get(key) != value:
            raise CheckpointError(f"{file}: {key} is {config.get(key)!r}, only {value!r} is supported")
    params = {
        "shift": float(config.get("snr_shift_scale", 4.0)),
        "total": whole_number(file, config, "num_train_timesteps", 1000),
        "spacing": config.get("timestep_spacing", "trailing"),
    }
    return {
        "schedule": {"target": SCHEDULE, "params": params},
        "prediction": {"target": V, "params": {}},
    }


# -- ours -> theirs


def transformer_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of ``CogView3PlusTransformer2DModel``; absent parameters are those of the 3 B model."""
    if params.get("mixins"):
        raise CheckpointError(
            f"diffusers' CogView3-Plus has no place for the mixins {sorted(params['mixins'])}; "
            f"only the standard network can be written as diffusers"
        )
    dim, heads = params.get("dim", 2560), params.get("heads", 64)
    channels, size_dim = params.get("channels", 16), params.get("size_dim", 1536)
    rows, columns = params.get("table_size", (128, 128))
    if rows != columns:
        raise CheckpointError(
            f"diffusers' position table is square, model.params.table_size is {[rows, columns]}"
        )
    if size_dim % 6:
        raise CheckpointError(
            f"diffusers needs size vectors of six equal parts, model.params.size_dim is {size_dim}"
        )
    return {
        "_class_name": "CogView3PlusTransformer2DModel",
        "_diffusers_version": "0.31.0",
        "patch_size": params.get("patch", 2),
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": params.get("depth", 30),
        "attention_head_dim": dim // heads,
        "num_attention_heads": heads,
        "text_embed_dim": params.get("text_dim", 4096),
        "time_embed_dim": params.get("emb_dim", 512),
        "condition_dim": size_dim // 6,
        "pos_embed_max_size": rows,
        "sample_size": rows,
    }


def vae_config(params: Mapping[str, Any], sample_size: int = 1024) -> dict[str, Any]:
    """config.json of ``AutoencoderKL``; absent parameters are those of the 16-channel autoencoder."""
    width, multipliers = params.get("width", 128), params.get("multipliers", (1, 4, 8, 8))
    quant = params.get("quant_convs", False)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.31.0",
        "in_channels": params.get("image_channels", 3),
        "out_channels": params.get("image_channels", 3),
        "down_block_types": ["DownEncoderBlock2D"] * len(multipliers),
        "up_block_types": ["UpDecoderBlock2D"] * len(multipliers),
        "block_out_channels": [width * multiplier for multiplier in multipliers],
        "layers_per_block": params.get("res_blocks", 3),
        "act_fn": "silu",
        "latent_channels": params.get("latent_channels", 16),
        "norm_num_groups": params.get("groups", 32),
        "sample_size": sample_size,
        "scaling_factor": params.get("scale_factor", 1.0),
        "force_upcast": True,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
        "mid_block_add_attention": params.get("mid_attention", False),
    }


def scheduler_config(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json of ``CogVideoXDDIMScheduler`` for a zero-SNR schedule."""
    schedule = diffusion.get("schedule", {"target": SCHEDULE, "params": {}})
    if not str(schedule["target"]).endswith(".ZeroSNR"):
        raise CheckpointError(
            f"diffusers' CogView3-Plus needs the ZeroSNR schedule, the config has {schedule['target']}"
        )
    if (prediction := diffusion.get("prediction") or {"target": V})["target"] != V:
        raise CheckpointError(f"diffusers' CogView3-Plus predicts v, the config has {prediction['target']}")
    params = schedule.get("params") or {}
    return {
        "_class_name": SCHEDULER,
        "_diffusers_version": "0.31.0",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": params.get("total", 1000),
        "snr_shift_scale": params.get("shift", 4.0),
        "timestep_spacing": params.get("spacing", "trailing"),
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "sample_max_value": 1.0,
        "steps_offset": 0,
        "trained_betas": None,
    }


def model_index() -> dict[str, Any]:
    """model_index.json of ``CogView3PlusPipeline``."""
    return {
        "_class_name": PIPELINE,
        "_diffusers_version": "0.31.0",
        "scheduler": ["diffusers", SCHEDULER],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogView3PlusTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def t5_config(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of transformers' ``T5EncoderModel`` for our encoder's parameters; else T5-XXL's."""
    sizes = {
        "d_model": params.get("dim", 4096),
        "num_heads": params.get("heads", 64),
        "d_kv": params.get("head_dim", 64),
        "d_ff": params.get("mlp_dim", 10240),
        "num_layers": params.get("depth", 24),
        "vocab_size": params.get("vocab", 32128),
        "relative_attention_num_buckets": params.get("buckets", 32),
        "relative_attention_max_distance": params.get("max_distance", 128),
    }
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **sizes,
        "num_decoder_layers": sizes["num_layers"],
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": dtype,
    }


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """tokenizer_config.json beside spiece.model, as transformers' T5 tokenizer reads it."""
    return {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 100,
        "model_max_length": max_length,
        "legacy": True,
    }
