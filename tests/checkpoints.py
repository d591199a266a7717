"""Tiny random models of all three parts, their config, and a trained tokenizer, for tests of checkpoints."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat.checkpoint.format import InMemory, Part
from sat.first_stage import AutoencoderKL
from sat.models.cogview3_plus import CogView3Plus
from sat.models.t5 import T5Encoder
from tests.small import fill

ASSETS = Path(__file__).parent / "assets" / "spec"

MODEL: dict[str, Any] = {
    "dim": 32, "heads": 4, "depth": 2, "channels": 4, "text_dim": 24, "text_len": 16, "emb_dim": 20,
    "size_dim": 48, "table_size": [12, 12],
}  # fmt: skip
FIRST_STAGE: dict[str, Any] = {
    "width": 8, "multipliers": [1, 2, 3], "res_blocks": 1, "latent_channels": 4, "groups": 4,
    "scale_factor": 0.7,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "dim": 24, "heads": 2, "head_dim": 8, "mlp_dim": 40, "depth": 2, "vocab": 120, "buckets": 8,
    "max_distance": 16,
}  # fmt: skip

CONFIG: dict[str, Any] = {
    "model": {"target": "sat.models.cogview3_plus.CogView3Plus", "params": MODEL},
    "first_stage": {"target": "sat.first_stage.model.AutoencoderKL", "params": FIRST_STAGE},
    "conditioning": {
        "text": {"target": "sat.models.t5.T5Encoder", "params": TEXT},
        "size": {"target": "sat.conditioning.conditioner.SizeConditioner", "params": {"dim": 8}},
        "max_length": 16,
    },
    "diffusion": {
        "schedule": {"target": "sat.diffusion.schedule.ZeroSNR", "params": {"shift": 2.5}},
        "prediction": {"target": "sat.diffusion.prediction.V", "params": {}},
    },
}


def build(part: Part, *, meta: bool = False) -> nn.Module:
    """The tiny model of a part, on the meta device or with noise in every parameter."""
    kinds: dict[Part, tuple[Any, dict[str, Any]]] = {
        "model": (CogView3Plus, MODEL),
        "first_stage": (AutoencoderKL, FIRST_STAGE),
        "text": (T5Encoder, TEXT),
    }
    kind, params = kinds[part]
    with torch.device("meta" if meta else "cpu"):
        module: nn.Module = kind(**params)
    if not meta:
        fill(module, seed=len(part))
    return module


def tensors(dtype: torch.dtype = torch.float32) -> dict[Part, dict[str, Tensor]]:
    """State dicts of all three parts."""
    out: dict[Part, dict[str, Tensor]] = {}
    for part in ("model", "first_stage", "text"):
        out[part] = {name: t.to(dtype) for name, t in build(part).state_dict().items()}
    return out


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Equal names, types and bits."""
    return found.keys() == wanted.keys() and all(
        found[n].dtype == wanted[n].dtype and torch.equal(found[n], wanted[n]) for n in wanted
    )


def spec(name: str) -> InMemory:
    """A full-size key list as tensors without values."""
    shapes = json.loads((ASSETS / f"{name}.json").read_text())
    return InMemory({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, name)


def tokenizer(path: Path) -> Path:
    """A sentencepiece model of about 100 pieces with T5's ids for padding, end and unknown."""
    import sentencepiece

    words = ["red", "green", "blue", "apple", "pear", "car", "ship", "cat", "dog", "tree", "house", "sun"]
    lines = [f"a {a} {b} with the {c}" for a in words for b in words for c in words[:4]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=100, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path
