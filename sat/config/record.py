"""Records of a run (resolved config, ``run.json``, labels of pictures), and the config beside weights."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sat.adapters.factors import AdapterError
from sat.adapters.files import base_of, locate
from sat.adapters.merge import adapter_name
from sat.checkpoint import PARTS, digest
from sat.checkpoint.format import CheckpointError, Part
from sat.checkpoint.formats import Weights, detect
from sat.checkpoint.formats.diffusers import FOLDERS, DiffusersPipeline
from sat.checkpoint.verify import read_json
from sat.config.build import components
from sat.config.check import TargetError, resolve, signature
from sat.config.few_steps import prediction_of_weights
from sat.config.load import dump
from sat.config.schema import CheckpointConfig, Experiment, plain
from sat.config.settle import CHOICES
from sat.config.yaml_source import Key, dotted
from sat.tokenizers import NEEDS
from sat.util.host import HOME, write_text

log = logging.getLogger(__name__)

_UNSEEN = frozenset(
    {
        "prompt",
        "prompt_file",
        "share",
        "trained_steps",
        "negative_prompt",
        "seed",
        "batch_size",
        "at_once",
        "latents",
        "grid_columns",
        "sizes",
        "input_dir",
        "init_image",
        "mask",
        "strength_map",
        "strength",
        "strength_by",
        "fit",
        "outpaint",
        "inpaint",
        "regions",
        "convolutions",  # one value of 200,000 by 1 of 255
    }
)
"""Keys of the sampling section that leave a picture's pixels alone or have a PNG field of their own."""
_LATER = frozenset({"controls", "back_projections", "trained_steps"})
"""Keys that came after 0.1: left out where they are empty, so that pictures of before count as finished."""


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
        """The text fields of one file, which shows the images of ``seeds``; ``lora`` if there is any.

        ``parameters`` says it again in the form that AUTOMATIC1111's web page writes and image viewers show.
        """
        lora = ", ".join(f"{name}:{strength:g}" for name, strength in self.adapters.items())
        scale = "" if self.guidance is None else f"CFG scale: {self.guidance:g}, "
        seed, size = seeds.partition("-")[0], f"{self.width}x{self.height}"
        told = f"Steps: {self.steps}, {scale}Seed: {seed}, Size: {size}, Model: {self.model}"
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else []
        return {
            "parameters": "\n".join([prompt, *negative, told]),
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


def _said(conditioning: Mapping[str, object]) -> list[str]:
    """Settings of the text beside the first ones, where they are not those of CogView3."""
    usual = {"padding": "as_diffusers", "empty_prompt": "zeros"}
    return [key for key, value in usual.items() if conditioning[key] != value]


def label(
    experiment: Experiment, given: Tensor | None = None, weights: Mapping[str, object] | None = None
) -> Label:
    """The label of the pictures of ``experiment``, which start from ``given`` latents or seeded noise.

    ``weights`` are its :func:`weight_digests` where they are known, so that no file is read again.
    """
    requested = experiment.sampling
    tree, quantize = plain(experiment), experiment.memory.quantize
    sampling = {
        key: value
        for key, value in tree["sampling"].items()
        if key not in _UNSEEN and (value or key not in _LATER)
    }
    settings = settings_digest(
        {
            "parts": {key: tree[key] for key in ("model", "diffusion", "first_stage")},
            "conditioning": {
                key: tree["conditioning"][key]
                for key in ("text", "size", "max_length", *_said(tree["conditioning"]))
            },
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
    sources = {part: experiment.checkpoint.source(part) for part in PARTS}
    known = {source: digest(source) for source in {*sources.values()} - {None} if source is not None}
    found: dict[str, object] = {"random": experiment.checkpoint.random}
    for part, source in sources.items():
        found[part] = None if source is None else known[source]
    if loaded := experiment.adapters.load:
        found["adapters"] = [[adapter_digest(item.path), item.strength] for item in loaded]
    if controls := experiment.sampling.controls:
        found["controls"] = [digest(item.path) for item in controls]
    if words := experiment.adapters.embeddings:
        from sat.adapters.tokens import find_words

        found["embeddings"] = [digest(find_words(path)) for path in words]
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
        "chosen": chosen(experiment),
        "world": world,
        "parallel": experiment.parallel.sizes,
        **({"slurm": job} if (job := slurm_job()) else {}),
        "seeds": dict(seeds or {"sampling": experiment.sampling.seed}),
        "weights": dict(weights or {}),
        "hooks": hooks.splitlines(),
        "config": "resolved.yaml",
    }
    try:
        before = read_json(folder / "run.json")
        starts: list[dict[str, Any]] = [*before.pop("starts", [])]
        different = [key for key in {**before, **facts} if before.get(key) != facts.get(key)]
        kept: dict[str, Any] = {key: before.get(key) for key in ["written", *different]}
        facts["starts"] = [*starts, kept]
    except (CheckpointError, TypeError) as error:
        if (folder / "run.json").exists():  # not the first start
            log.warning("the record of earlier starts is damaged and is written anew: %s", error)
    write_text(folder / "run.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def chosen(experiment: Experiment) -> dict[str, object]:
    """The ways of computing, by their keys, which may have been ``auto`` (:mod:`sat.config.settle`)."""
    sections = {"sampling": experiment.sampling, "train": experiment.train}
    return {
        f"{name}.{key}": getattr(section, key)
        for name, section in sections.items()
        for key in CHOICES
        if hasattr(section, key)
    }


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
    written = read_json(path)
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


# -- config that comes with weights, compared with the experiment's: what contradicts is told by its key


SECTIONS: dict[Part, tuple[Key, ...]] = {
    "text": (("conditioning", "text"),),
    "model": (
        ("model",),
        ("diffusion", "schedule"),
        ("diffusion", "prediction"),
        ("diffusion", "process"),
        ("conditioning", "size"),
    ),
    "first_stage": (("first_stage",),),
}
"""Components that belong to the weights of a part."""

SAMPLING = {"spacing", "rescale", "quantise"}
"""Parameters that change how is sampled and not what the weights mean: a difference is a notice."""

_OWN = {"guidance_dim"}  # the loader tells it from the tensors, with advice


class Difference(NamedTuple):
    """A key whose value the weights' own config contradicts; ``fatal`` unless it is a sampling setting."""

    key: Key
    what: str
    fatal: bool


def differences(  # noqa: C901 - one comparison a folder, from its format to its keys
    experiment: Experiment, weights: CheckpointConfig
) -> Iterator[Difference]:
    """Every difference between ``experiment`` and the configs in the folders of ``weights``.

    Keys that ``checkpoint.allow_config`` names are left out, and so are folders that carry no config.
    """
    ours = plain(experiment)
    ours["diffusion"]["prediction"] = prediction_of_weights(experiment)
    text = weights.source("text")
    if experiment.conditioning.tokenizer is None and text is not None and text.is_dir():
        with suppress(CheckpointError):
            file = detect(text).tokenizer(text)
            if file is not None and file.suffix == ".json" and find_spec("tokenizers") is None:
                yield Difference(("conditioning", "tokenizer"), NEEDS.format(file), True)
    for part, sections in SECTIONS.items():
        path = weights.source(part)
        if path is None or not path.is_dir():
            continue
        try:
            found = detect(path)
        except CheckpointError:
            continue  # told when it is read, with what it holds
        try:
            theirs = found.config(path)
        except CheckpointError as error:
            yield Difference(("checkpoint", part if path != weights.path else "path"), str(error), True)
            continue
        if isinstance(found, DiffusersPipeline | Weights):
            for file in _absent(path, part):
                what = f"the weights in {path} cannot be compared with this config: {file} is not there"
                yield Difference(("checkpoint", part if path != weights.path else "path"), what, False)
        # A diffusers folder says it with the tokenizer, if at all.
        unsaid = (
            {"text_len"}
            if (path / "model_index.json").is_file() or (path / "config.json").is_file()
            else set()
        )
        for key in sections:
            for at, here, there in _compare(key, _get(ours, key), _get(theirs, key), experiment.imports):
                if any(fnmatchcase(dotted(at), pattern) for pattern in weights.allow_config):
                    continue
                if at[-1] in unsaid:
                    continue
                added = there is None and _only_wraps(here, experiment.imports)
                fatal = at[-1] not in SAMPLING and not added
                advice = "; if that is meant, name the key in checkpoint.allow_config" if fatal else ""
                what = f"{_shown(here)}, but the weights in {path} are of {_shown(there)}{advice}"
                yield Difference(at, what, fatal)
    lora, load = experiment.adapters.lora, experiment.adapters.load
    adapters: list[tuple[Key, Path]] = [
        (("adapters", "load", str(i), "path"), item.path) for i, item in enumerate(load)
    ]
    adapters += [(("adapters", "lora", "start"), lora.start)] if lora is not None and lora.start else []
    parts = {"model": ours["model"], "text": ours["conditioning"]["text"]}
    for key, path in adapters:
        with suppress(CheckpointError, AdapterError):  # told when it is read
            for other in adapter_differences(path, parts, experiment.imports):
                place = dotted(other.key)
                if not any(fnmatchcase(place, pattern) for pattern in weights.allow_config):
                    advice = f"; if that is meant, name {place} in checkpoint.allow_config" * other.fatal
                    yield other._replace(key=key, what=other.what + advice)


def _absent(path: Path, part: Part) -> list[Path]:
    """Settings of ``part`` that diffusers and transformers write into such a folder, and are not there."""
    if (path / "model_index.json").is_file():
        files = [path / FOLDERS[part] / "config.json"]
        files += [path / "scheduler" / "scheduler_config.json"] if part == "model" else []
    else:
        named = any(path.glob("diffusion_pytorch_model*")) or (
            part == "text" and any(path.glob("*.safetensors"))
        )
        files = [path / "config.json"] if named else []
    return [file for file in files if not file.is_file()]


def adapter_differences(path: Path, ours: Mapping[str, Any], imports: Any) -> Iterator[Difference]:
    """Differences between ``ours`` (part -> component) and the model that the adapter at ``path`` is of."""
    keys: dict[str, Key] = {"model": ("model",), "text": ("conditioning", "text")}
    for part, component in base_of(path).items():
        for at, here, there in _compare(keys.get(part, (part,)), ours.get(part), component, imports):
            theirs, mine = _shown(there), _shown(here)
            what = f"{path}: is a LoRA of a model with {dotted(at)} {theirs}, here it is {mine}"
            if at[-1] == "target":
                theirs, mine = (name.rpartition(".")[2] for name in (theirs, mine))
                what = f"{path}: is a LoRA of {theirs}, this model is {mine}: another model"
            yield Difference(at, what, not (there is None and _only_wraps(here, imports)))


def _get(tree: Any, key: Key) -> Any:
    for name in key:
        tree = tree.get(name) if isinstance(tree, Mapping) else tree
    return tree


def _compare(key: Key, ours: Any, theirs: Any, imports: Any) -> Iterator[tuple[Key, Any, Any]]:
    """(key, here, there) of whatever differs between two components, defaults filled in."""
    if theirs is None or ours is None:
        return
    if not isinstance(theirs, Mapping) or not isinstance(theirs.get("target"), str):
        yield key, ours.get("target"), theirs
        return
    if ours["target"] != theirs["target"]:
        yield (*key, "target"), ours["target"], theirs["target"]
        return
    try:
        defaults = dict(signature(resolve(ours["target"], imports)).defaults)
    except TargetError:
        defaults = {}
    here, there = ours.get("params") or {}, theirs.get("params") or {}
    if not isinstance(there, Mapping):
        yield (*key, "params"), here, there
        return
    for name in sorted({*here, *there} - _OWN):
        one, other = plain(here.get(name, defaults.get(name))), plain(there.get(name, defaults.get(name)))
        if name == "mixins":
            yield from _mixins((*key, "params", name), one or {}, other or {}, imports)
        elif one != other:
            yield (*key, "params", name), one, other


def _mixins(key: Key, ours: Any, theirs: Any, imports: Any) -> Iterator[tuple[Key, Any, Any]]:
    for name in sorted({*ours, *theirs}):
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping) and "target" in one:
            yield from _compare((*key, name), one, other, imports)
        elif one != other:
            yield (*key, name), one, other


def _only_wraps(mixin: Any, imports: Any) -> bool:
    """True for a mixin around what the weights have, such as a probe, which takes nothing's place."""
    try:
        declared = resolve(mixin["target"], imports).declared.values()
    except (TargetError, TypeError, KeyError, AttributeError):
        return False
    return all(kind == "wraps" for _, kind in declared)


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
