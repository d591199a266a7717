"""Configs of ``CogView4Pipeline``'s components in both directions: transformer, scheduler, text encoder.

Source: the config.json files that diffusers and transformers write (tests/parity/test_cogview4_pipeline.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat.checkpoint.files import open_folder
from sat.checkpoint.format import CheckpointError, LazyStateDict, TensorInfo, View, whole_number
from sat.checkpoint.verify import Verify, read_json

PIPELINE, TRANSFORMER = "CogView4Pipeline", "CogView4Transformer2DModel"
CONTROL_PIPELINE = "CogView4ControlPipeline"
FIRST = "patch_embed.proj.weight"
"""diffusers' name of the layer that sees the noisy latent and, in CogView4-Control, a picture's behind it."""
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
COGVIEW4 = "sat.models.cogview4.CogView4"
GLM = "sat.models.glm.GLMEncoder"
SCHEDULE = "sat.diffusion.schedule.FlowMatching"
FLOW = "sat.diffusion.prediction.Flow"
TOKENS = 1024
"""The longest text of the published pipeline, which its files do not say."""

log = logging.getLogger(__name__)


def model(file: Path) -> dict[str, Any]:
    """Our network for a transformer's config.json; class defaults of diffusers, which are Plus's, apply."""
    config = read_json(file)
    heads = whole_number(file, config, "num_attention_heads", 64)
    inputs = whole_number(file, config, "in_channels", 16)
    channels = config.get("out_channels") or inputs
    if inputs not in (channels, 2 * channels):  # twice: CogView4-Control
        raise CheckpointError(
            f"{file}: in_channels {inputs} is neither out_channels {channels} nor twice as many, as for a "
            f"control's picture"
        )
    size = config.get("rope_axes_dim", [256, 256])
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise CheckpointError(f"{file}: rope_axes_dim is {size!r}, expected two positive whole numbers")
    params = {
        "dim": heads * whole_number(file, config, "attention_head_dim", 40),
        "heads": heads,
        "depth": whole_number(file, config, "num_layers", 30),
        "channels": channels,
        "patch": whole_number(file, config, "patch_size", 2),
        "text_dim": whole_number(file, config, "text_embed_dim", 4096),
        "emb_dim": whole_number(file, config, "time_embed_dim", 512),
        "size_dim": 6 * whole_number(file, config, "condition_dim", 256),
        "rope_size": size,
    }
    return {"target": COGVIEW4, "params": params}


def control_folder(path: Path) -> Path | None:
    """The transformer's folder of the CogView4-Control at ``path``, pipeline or transformer; else None."""
    for folder in (path / "transformer", path):
        config = read_json(file) if (file := folder / "config.json").is_file() else {}
        inputs, out = config.get("in_channels"), config.get("out_channels")
        if config.get("_class_name") == TRANSFORMER and inputs and out and inputs == 2 * out:
            return folder
    return None


def open_transformer(folder: Path, *, allow_pickle: bool, verify: Verify) -> LazyStateDict:
    """The network's tensors; of CogView4-Control without the columns that see the control's picture."""
    found = open_folder(folder, allow_pickle=allow_pickle, verify=verify)
    if control_folder(folder) != folder:
        return found
    log.info(
        "%s: CogView4-Control; its picture is given by --control %s:IMAGE, and none is without",
        folder,
        folder,
    )
    half = found.info(FIRST).shape[1] // 2
    return FirstLayer(found, half, lambda weight: weight[:, :half].contiguous())


class FirstLayer(View):
    """Tensors of diffusers' network, but of its first layer the ``change`` of it, ``columns`` wide."""

    def __init__(self, inner: LazyStateDict, columns: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inner)
        self._columns, self._change = columns, change

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        found = self.inner.info(key)
        return TensorInfo((found.shape[0], self._columns), found.dtype) if key == FIRST else found

    def __getitem__(self, key: str) -> Tensor:
        return self._change(self.inner[key]) if key == FIRST else self.inner[key]


def widened(network: LazyStateDict, control: Tensor) -> FirstLayer:
    """CogView4-Control of a ``network`` under diffusers' names and the weight of a concatenated control."""
    columns = network.info(FIRST).shape[1] + control.shape[1]
    return FirstLayer(network, columns, lambda weight: torch.cat([weight, control.to(weight.dtype)], 1))


def diffusion(file: Path) -> dict[str, Any]:
    """Our schedule and prediction for a scheduler_config.json whose linear shift grows with the size."""
    config = read_json(file)
    wanted = {"_class_name": SCHEDULER, "use_dynamic_shifting": True, "time_shift_type": "linear"}
    for key, value in wanted.items():
        if config.get(key) != value:
            raise CheckpointError(f"{file}: {key} is {config.get(key)!r}, only {value!r} is supported")
    params = {
        "base_shift": float(config.get("base_shift", 0.5)),
        "max_shift": float(config.get("max_shift", 1.15)),
        "base_tokens": whole_number(file, config, "base_image_seq_len", 256),
        "total": whole_number(file, config, "num_train_timesteps", 1000),
    }
    return {"schedule": {"target": SCHEDULE, "params": params}, "prediction": {"target": FLOW, "params": {}}}


def conditioning(tokenizer_config: Path) -> dict[str, Any]:
    """Length, padding and empty prompt: those of the pipeline; our writer leaves the length."""
    said = read_json(tokenizer_config).get("model_max_length") if tokenizer_config.is_file() else None
    length = said if isinstance(said, int) and 0 < said <= TOKENS else TOKENS
    return {"max_length": length, "padding": "as_diffusers", "empty_prompt": "encoded"}


# -- ours -> theirs


def transformer_config(params: Mapping[str, Any], *, control: bool = False) -> dict[str, Any]:
    """config.json of ``CogView4Transformer2DModel``; absent parameters are those of the 6 B model.

    ``control``: of CogView4-Control, which takes a picture's latent beside the noisy one.
    """
    if params.get("mixins") or params.get("guidance_dim") is not None:
        what = f"the mixins {sorted(params['mixins'])}" if params.get("mixins") else "a guidance strength"
        raise CheckpointError(f"diffusers' CogView4 has no place for {what}; write it as native or SAT")
    dim, heads, size_dim = params.get("dim", 4096), params.get("heads", 32), params.get("size_dim", 1536)
    if size_dim % 6:
        raise CheckpointError(
            f"diffusers needs size vectors of six equal parts, model.params.size_dim is {size_dim}"
        )
    channels = params.get("channels", 16)
    return {
        "_class_name": TRANSFORMER,
        "_diffusers_version": "0.33.0",
        "patch_size": params.get("patch", 2),
        "in_channels": channels * (1 + control),
        "out_channels": channels,
        "num_layers": params.get("depth", 28),
        "attention_head_dim": dim // heads,
        "num_attention_heads": heads,
        "text_embed_dim": params.get("text_dim", 4096),
        "time_embed_dim": params.get("emb_dim", 512),
        "condition_dim": size_dim // 6,
        "pos_embed_max_size": 128,
        "sample_size": 128,
        "rope_axes_dim": list(params.get("rope_size", (256, 256))),
    }


def scheduler_config(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json for flow matching; a network of another schedule is refused."""
    schedule = diffusion.get("schedule") or {"target": SCHEDULE, "params": {}}
    prediction = diffusion.get("prediction") or {"target": FLOW}
    params = schedule.get("params") or {}
    if schedule["target"] != SCHEDULE or prediction["target"] != FLOW or params.get("timestep_of"):
        raise CheckpointError(
            f"diffusers' CogView4 needs FlowMatching and Flow, the config has {schedule['target']} and "
            f"{prediction['target']}"
        )
    return {
        "_class_name": SCHEDULER,
        "_diffusers_version": "0.33.0",
        "base_shift": params.get("base_shift", 0.25),
        "max_shift": params.get("max_shift", 0.75),
        "base_image_seq_len": params.get("base_tokens", 256),
        "max_image_seq_len": 4096,
        "num_train_timesteps": params.get("total", 1000),
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
    }


def tokenizer_config(kind: str, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json beside a vocabulary of ``kind``, padding in front."""
    common = {"padding_side": "left", "model_max_length": max_length}
    if kind == ".json":
        pad = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        names = {"model_input_names": ["input_ids", "attention_mask"]}
        return {"tokenizer_class": "PreTrainedTokenizerFast", **pad, **names, **common}
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return {"tokenizer_class": "T5Tokenizer", **special, "extra_ids": 100, "legacy": True, **common}


def model_index(kind: str | None, *, control: bool = False) -> dict[str, Any]:
    """model_index.json of ``CogView4Pipeline``, or of its ``control``, with a tokenizer of ``kind``."""
    tokenizer = "T5Tokenizer" if kind == ".model" else "PreTrainedTokenizerFast"
    return {
        "_class_name": CONTROL_PIPELINE if control else PIPELINE,
        "_diffusers_version": "0.33.0",
        "scheduler": ["diffusers", SCHEDULER],
        "text_encoder": ["transformers", "GlmModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", TRANSFORMER],
        "vae": ["diffusers", "AutoencoderKL"],
    }
