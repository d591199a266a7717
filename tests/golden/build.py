"""Models from the official-style configs and the weights of golden files, by the code that users run.

Configs go through ``sat.config.official``; weights are written to disk in the official layouts and read back
by ``sat.checkpoint.load``, strictly.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from sat.checkpoint import load
from sat.checkpoint.format import ENGINE_PREFIXES, Part
from sat.checkpoint.formats.diffusers import t5_config
from sat.config.check import build
from sat.config.load import load_full
from sat.config.official import translate
from sat.config.schema import Experiment
from sat.config.yaml_source import Source
from sat.engine import DiffusionEngine
from sat.first_stage.model import AutoencoderKL
from sat.models.cogview3_plus import CogView3Plus
from sat.models.cogview3_unet import CogView3UNet
from sat.models.t5 import T5Encoder
from sat.parallel.launch import Axis
from sat.parallel.tensor import apply_sharding
from sat.sharding import family_sharding

TENSOR = Axis()
"""The ranks that the models are split over; tests/distributed/tensor_ranks.py names its own."""


def native(model: Mapping[str, Any], text: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The native tree of an official ``model`` section; ``text`` is a Hugging Face T5 config."""
    return translate([Source({"model": dict(model)}, {})], text).source.tree


def network(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> CogView3Plus:
    """The transformer of a ``DiffusionTransformer`` config; weights without the engine's prefix."""
    target = "sgm.modules.diffusionmodules.dit.DiffusionTransformer"
    net = build(native({"network_config": {"target": target, "params": dict(config)}})["model"])
    prefix = ENGINE_PREFIXES["model"]
    return fill(net, {prefix + name: tensor for name, tensor in weights.items()}, "model")


def unet(config: Mapping[str, Any], weights: Mapping[str, Tensor], text_len: int) -> CogView3UNet:
    """The network of a ``UNetModel`` config, which does not say how long the text is."""
    target = "sgm.modules.diffusionmodules.openaimodel.UNetModel"
    component = native({"network_config": {"target": target, "params": dict(config)}})["model"]
    component["params"]["text_len"] = text_len
    prefix = ENGINE_PREFIXES["model"]
    return fill(build(component), {prefix + name: tensor for name, tensor in weights.items()}, "model")


def first_stage(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> AutoencoderKL:
    """The autoencoder of a ``first_stage_config``, its weights in a file of their own as officially."""
    vae = build(native({"first_stage_config": dict(config)})["first_stage"])
    with tempfile.TemporaryDirectory() as folder:
        load(vae, write_first_stage(Path(folder), config, weights), "first_stage", dtype=torch.float32)
    return vae.eval()


def text_encoder(weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> T5Encoder:
    """The T5 encoder from a Hugging Face folder; without ``config`` its shape is that of the weights."""
    config = dict(config) if config is not None else infer_t5(weights)
    component = native({"conditioner_config": conditioner_config(16)}, config)["conditioning"]["text"]
    encoder = split(build(component))
    with tempfile.TemporaryDirectory() as folder:
        write_t5(Path(folder), weights, config)
        load(encoder, folder, "text", dtype=torch.float32)
    return encoder.eval()


def engine(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[DiffusionEngine, Experiment]:
    """Everything of an official config: as a YAML file on disk, loaded and checked like a user's.

    The three parts lie where the official loader expects them: the network in an engine checkpoint, the
    autoencoder in its own file, the text encoder in a Hugging Face folder. There is no tokenizer: golden
    files hold token ids.
    """
    from sat.conditioning.conditioner import Conditioner

    parts = {part: _under(weights, prefix) for part, prefix in ENGINE_PREFIXES.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "engine").mkdir()
        prefix = ENGINE_PREFIXES["model"]
        write_engine(folder / "engine", {prefix + key: tensor for key, tensor in parts["model"].items()})
        autoencoder = write_first_stage(folder, config["first_stage_config"], parts["first_stage"])
        write_t5(folder / "t5", parts["text"], infer_t5(parts["text"]))
        model = json.loads(json.dumps(config))
        model["first_stage_config"]["params"]["ckpt_path"] = str(autoencoder)
        for embedder in model["conditioner_config"]["params"]["emb_models"]:
            if embedder["input_key"] == "txt":
                embedder["params"]["model_dir"] = str(folder / "t5")
        official = {"args": {"load": str(folder / "engine")}, "model": model}
        (folder / "official.yaml").write_text(yaml.safe_dump(official))
        experiment = load_full([folder / "official.yaml"]).experiment
        made = {}
        for part, component in (
            ("model", experiment.model),
            ("first_stage", experiment.first_stage),
            ("text", experiment.conditioning.text),
        ):
            source = experiment.checkpoint.source(part)
            assert source is not None, "the official config names all three"
            made[part] = split(build(component))
            load(made[part], source, part, dtype=torch.float32)
    conditioning, diffusion = experiment.conditioning, experiment.diffusion
    whole = DiffusionEngine(
        made["model"],
        Conditioner(made["text"], build(conditioning.size), None, conditioning.max_length),
        made["first_stage"],
        build(diffusion.schedule),
        build(diffusion.prediction),
        build(diffusion.process),
    )
    return whole.eval(), experiment


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def write_first_stage(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """An autoencoder's own file, in the format it is published in."""
    if str(config["target"]).endswith("AutoencodingEngine"):
        path = folder / "imagekl_ch16.pt"
        torch.save({"state_dict": dict(weights)}, path)
    else:
        path = folder / "sdxl_vae.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def write_t5(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """A Hugging Face folder of a text encoder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


def fill(module: Any, weights: Mapping[str, Tensor], part: Part) -> Any:
    """``module`` with its part of an official engine checkpoint."""
    split(module)
    with tempfile.TemporaryDirectory() as folder:
        write_engine(Path(folder), weights)
        load(module, folder, part, dtype=torch.float32)
    assert isinstance(module, nn.Module), "parts are modules"
    return module.eval()


def split(module: nn.Module) -> nn.Module:
    """``module`` with this rank's share of its layers, if it has a plan."""
    plan = family_sharding(type(module))
    return apply_sharding(module, plan, TENSOR) if plan else module


def write_engine(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """An official engine checkpoint: ``latest`` and ``1/mp_rank_00_model_states.pt``."""
    (folder / "1").mkdir()
    (folder / "latest").write_text("1")
    torch.save({"module": dict(weights)}, folder / "1" / "mp_rank_00_model_states.pt")


def infer_t5(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """A Hugging Face config for T5 weights that come without one; the largest distance is T5's usual 128."""
    vocab, dim = weights["shared.weight"].shape
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = weights[f"{attention}.relative_attention_bias.weight"].shape
    sizes = {
        "dim": dim,
        "heads": heads,
        "head_dim": weights[f"{attention}.q.weight"].shape[0] // heads,
        "mlp_dim": weights["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "depth": len({name.split(".")[2] for name in weights if name.startswith("encoder.block.")}),
        "vocab": vocab,
        "buckets": buckets,
    }
    return t5_config(sizes, "float32")


def conditioner_config(outdim: int) -> dict[str, Any]:
    """An official ``conditioner_config`` whose text encoder's weights lie nowhere."""
    modules = "sgm.modules.encoders.modules"
    text = {"input_key": "txt", "target": f"{modules}.FrozenT5Embedder", "params": {"max_length": 16}}
    names = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    sizes = [
        {"input_key": name, "target": f"{modules}.ConcatTimestepEmbedderND", "params": {"outdim": outdim}}
        for name in names
    ]
    return {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [text, *sizes]}}


def size_dim(config: Mapping[str, Any]) -> int:
    """``outdim`` of a ``conditioner_config``, as translated."""
    return int(native({"conditioner_config": dict(config)})["conditioning"]["size"]["params"]["dim"])
