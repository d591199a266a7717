"""Hugging Face folders of a T5 encoder: config.json, safetensors or .bin shards, spiece.model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat.checkpoint.files import open_folder, read_json
from sat.checkpoint.format import CheckpointError, LazyStateDict, Part
from sat.models.t5.model import from_huggingface

T5 = "sat.models.t5.T5Encoder"


class HuggingFaceT5:
    """Reads T5 folders as ``save_pretrained`` writes them."""

    name = "huggingface"

    def detects(self, path: Path) -> bool:
        """A folder whose config.json says T5."""
        file = path / "config.json"
        return file.is_file() and read_json(file).get("model_type") == "t5"

    def parts(self, path: Path, *, allow_pickle: bool = False) -> list[Part]:
        """The text encoder only."""
        return ["text"]

    def locate(self, path: Path, part: Part, *, allow_pickle: bool = False) -> Path:
        """The folder itself."""
        if part != "text":
            raise CheckpointError(f"{path}: is a T5 text encoder, it holds no {part} weights")
        return path

    def open(self, path: Path, part: Part, *, allow_pickle: bool = False) -> LazyStateDict:
        """The tensors under Hugging Face names."""
        return open_folder(self.locate(path, part), allow_pickle=allow_pickle)

    def config(self, path: Path) -> Mapping[str, Any]:
        """``conditioning.text`` from config.json."""
        return {"conditioning": {"text": text_component(path)}}

    def tokenizer(self, path: Path) -> Path | None:
        """``spiece.model`` in the folder."""
        file = path / "spiece.model"
        return file if file.is_file() else None


def text_component(folder: Path) -> dict[str, Any]:
    """Our T5 encoder with the sizes of a Hugging Face config.json."""
    try:
        return {"target": T5, "params": from_huggingface(read_json(folder / "config.json"))}
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


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
