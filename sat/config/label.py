"""What a picture says about how it was made, and what tells its settings and weights apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sat.adapters.files import locate
from sat.adapters.merge import adapter_name
from sat.checkpoint import PARTS, digest
from sat.config.build import build_guider
from sat.config.schema import Experiment, plain
from sat.sampling.generator import strength
from sat.sampling.output import Label, settings_digest

_UNSEEN = frozenset(
    {
        "prompt",
        "prompt_file",
        "share",
        "negative_prompt",
        "seed",
        "batch_size",
        "at_once",
        "latents",
        "grid_columns",
        "sizes",
        "input_dir",
    }
)
"""Keys of the sampling section that leave a picture's pixels alone or have a PNG field of their own."""


def label(
    experiment: Experiment, given: Tensor | None = None, weights: Mapping[str, object] | None = None
) -> Label:
    """The label of the pictures of ``experiment``, which start from ``given`` latents or seeded noise.

    ``weights`` are its :func:`weight_digests` where they are known, so that no file is read again.
    """
    asked = experiment.sampling
    tree = plain(experiment)
    sampling = {key: value for key, value in tree["sampling"].items() if key not in _UNSEEN}
    settings = settings_digest(
        {
            "parts": {key: tree[key] for key in ("model", "diffusion", "first_stage")},
            "conditioning": {key: tree["conditioning"][key] for key in ("text", "size", "max_length")},
            "sampling": sampling,
            "weights": weight_digests(experiment) if weights is None else dict(weights),
            "decode_tile": experiment.memory.decode_tile,
            **_kept(experiment),
            "latents": None if given is None else hashlib.sha256(given.numpy().tobytes()).hexdigest(),
        }
    )
    return Label(
        height=asked.height,
        width=asked.width,
        steps=asked.steps,
        guidance=strength(build_guider(experiment)),
        negative_prompt=asked.negative_prompt,
        seed=asked.seed,
        model=model_name(experiment),
        digest=settings,
        adapters=_adapters(experiment),
    )


def _adapters(experiment: Experiment) -> dict[str, float]:
    """Adapters that count, by the names that the loaded model has for them."""
    found: dict[str, float] = {}
    for item in experiment.adapters.load:
        found[adapter_name(item.path, found)] = item.strength
    return {name: strength for name, strength in found.items() if strength}


def _kept(experiment: Experiment) -> dict[str, object]:
    """How weights are kept, where not all are plain."""
    quantize = experiment.memory.quantize
    return {"quantize": plain(quantize)} if quantize.network or quantize.text_encoder else {}


def weight_digests(experiment: Experiment) -> dict[str, object]:
    """What tells the weights of this run from others: their contents, or the seed of random ones."""
    known: dict[Path, str] = {}
    found: dict[str, object] = {"random": experiment.checkpoint.random}
    for part in PARTS:
        source = experiment.checkpoint.source(part)
        if source is not None and source not in known:
            known[source] = digest(source)
        found[part] = None if source is None else known[source]
    if loaded := experiment.adapters.load:
        found["adapters"] = [[adapter_digest(item.path), item.strength] for item in loaded]
    return found


def adapter_digest(path: Path) -> str:
    """A fingerprint of the files of an adapter; of a run's folder, of its newest."""
    return " ".join(digest(file) for file in locate(path))


def model_name(experiment: Experiment) -> str:
    """The class of the network and the name of the folder its weights are from."""
    kind = experiment.model.target.rpartition(".")[2]
    source = experiment.checkpoint.source("model")
    return kind if source is None else f"{kind} {source.name}"
