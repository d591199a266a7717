"""Records of a run: the resolved config, ``run.json``, and the label of each picture."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from sat.adapters.files import locate
from sat.adapters.merge import adapter_name
from sat.checkpoint import PARTS, digest
from sat.config.build import components
from sat.config.load import dump
from sat.config.schema import Experiment, plain
from sat.config.yaml_source import HOME
from sat.util.host import write_text

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


def settings_digest(settings: Mapping[str, object]) -> str:
    """16 hexadecimal digits that change with any value in ``settings`` (JSON-like, keys in any order)."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Label:
    """Settings that every picture of a run carries in its PNG text fields."""

    height: int  # pixels
    width: int  # pixels
    steps: int
    guidance: float | None  # None where the guider has no strength
    negative_prompt: str
    seed: int  # of image 0; image i has seed + i
    model: str
    digest: str  # of the settings that decide the pixels
    adapters: Mapping[str, float] = field(default_factory=dict)  # name -> strength

    def fields(self, prompt: str, seeds: str) -> dict[str, str]:
        """The text fields of one file, which shows the images of ``seeds``; ``lora`` if there is any."""
        lora = ", ".join(f"{name}:{strength:g}" for name, strength in self.adapters.items())
        return {
            "prompt": prompt,
            "negative_prompt": self.negative_prompt,
            "seed": seeds,
            "size": f"{self.height}x{self.width}",  # height x width
            "height": str(self.height),
            "width": str(self.width),
            "steps": str(self.steps),
            "guidance": "none" if self.guidance is None else f"{self.guidance:g}",
            "model": self.model,
            "config_digest": self.digest,
            **({"lora": lora} if lora else {}),
        }


def label(
    experiment: Experiment, given: Tensor | None = None, weights: Mapping[str, object] | None = None
) -> Label:
    """The label of the pictures of ``experiment``, which start from ``given`` latents or seeded noise.

    ``weights`` are its :func:`weight_digests` where they are known, so that no file is read again.
    """
    requested = experiment.sampling
    tree, quantize = plain(experiment), experiment.memory.quantize
    sampling = {key: value for key, value in tree["sampling"].items() if key not in _UNSEEN}
    settings = settings_digest(
        {
            "parts": {key: tree[key] for key in ("model", "diffusion", "first_stage")},
            "conditioning": {key: tree["conditioning"][key] for key in ("text", "size", "max_length")},
            "sampling": sampling,
            "weights": weight_digests(experiment) if weights is None else dict(weights),
            "decode_tile": experiment.memory.decode_tile,
            **({"quantize": plain(quantize)} if quantize.network or quantize.text_encoder else {}),
            "latents": None if given is None else hashlib.sha256(given.numpy().tobytes()).hexdigest(),
        }
    )
    adapters: dict[str, float] = {}  # by the names that the loaded model has for them
    for item in experiment.adapters.load:
        adapters[adapter_name(item.path, adapters)] = item.strength
    scale = getattr(components(experiment).guider, "scale", None)
    return Label(
        height=requested.height,
        width=requested.width,
        steps=requested.steps,
        guidance=None if scale is None else float(scale),
        negative_prompt=requested.negative_prompt,
        seed=requested.seed,
        model=model_name(experiment),
        digest=settings,
        adapters={name: strength for name, strength in adapters.items() if strength},
    )


def weight_digests(experiment: Experiment) -> dict[str, object]:
    """Digests that tell the weights of this run from others: of their contents, or their seed."""
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


# -- what a run leaves behind to be repeated and understood: ``resolved.yaml`` and ``run.json``


PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "sentencepiece", "pydantic", "pillow")
"""Distributions whose versions may change the numbers of a run."""


def record(
    folder: Path,
    experiment: Experiment,
    *,
    hooks: str = "",
    world: int = 1,
    seeds: Mapping[str, int] | None = None,
    weights: Mapping[str, Any] | None = None,
    device: str = "",
    command: Sequence[str] | None = None,
) -> None:
    """Write ``resolved.yaml`` (``--base`` reads it) and ``run.json`` into ``folder``; call it on one rank.

    ``hooks`` is the printed table of hook owners, ``weights`` a digest per checkpoint part, ``command`` the
    program with its arguments (None: this process's). A folder that another start has written keeps it: what
    it had otherwise is an entry of ``starts``, oldest first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "resolved.yaml", dump(experiment))
    facts: dict[str, Any] = {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(sys.argv if command is None else command),
        "code": commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "world": world,
        "parallel": experiment.parallel.sizes,
        **({"slurm": job} if (job := slurm_job()) else {}),
        "seeds": dict(seeds or {"sampling": experiment.sampling.seed}),
        "weights": dict(weights or {}),
        "hooks": hooks.splitlines(),
        "config": "resolved.yaml",
    }
    try:
        before = json.loads((folder / "run.json").read_text("utf-8"))
        starts: list[dict[str, Any]] = [*before.pop("starts", [])]
        different = [key for key in {**before, **facts} if before.get(key) != facts.get(key)]
        kept: dict[str, Any] = {key: before.get(key) for key in ["written", *different]}
        facts["starts"] = [*starts, kept]
    except (OSError, ValueError, TypeError, AttributeError):  # the first start, or a damaged record
        pass
    write_text(folder / "run.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def slurm_job() -> dict[str, Any]:
    """Number, nodes and restarts of the SLURM job that this process belongs to; {} outside of one."""
    told = os.environ
    if "SLURM_JOB_ID" not in told:
        return {}
    array, task = told.get("SLURM_ARRAY_JOB_ID"), told.get("SLURM_ARRAY_TASK_ID")
    return {
        "job": told["SLURM_JOB_ID"] if array is None else f"{array}_{task}",
        "nodes": told.get("SLURM_JOB_NODELIST", ""),
        "restarts": int(told.get("SLURM_RESTART_COUNT") or 0),
    }


def amend(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add what is known only at a run's end to its ``run.json``; call it on one rank."""
    path = folder / "run.json"
    written = json.loads(path.read_text("utf-8"))
    write_text(path, json.dumps({**written, **facts}, indent=2, ensure_ascii=False) + "\n")


def commit(root: Path = HOME) -> dict[str, Any] | None:
    """The commit of the code at ``root``, and whether tracked files were changed; None outside a checkout."""
    if not (root / ".git").exists():
        return None
    found = _git(root, "rev-parse", "HEAD")
    if found is None:
        return None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": found, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    """Output of git; None when there is no git, it fails, or it takes longer than ten seconds."""
    command = ["git", "-C", str(root), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Installed versions of this project and of :data:`PACKAGES`."""
    from sat import __version__

    found = {"sat": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
