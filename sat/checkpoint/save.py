"""Writing checkpoints: native, official SAT and diffusers folders, streamed and whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat.checkpoint.files import SAFETENSORS, TORCH, atomic_folder
from sat.checkpoint.format import (
    ENGINE_PREFIXES,
    PARTS,
    CheckpointError,
    LazyStateDict,
    Part,
    TensorInfo,
    View,
    Written,
    as_lazy,
    write_safetensors,
)
from sat.checkpoint.formats import FORMAT, VERSION, cogview4
from sat.checkpoint.formats.diffusers import (
    FOLDERS,
    T5,
    model_index,
    scheduler_config,
    t5_config,
    tokenizer_config,
    transformer_config,
    vae_config,
)
from sat.checkpoint.formats.sat import SIDECAR, rank_file
from sat.checkpoint.load import Overflow, refuse_not_finite
from sat.checkpoint.ranks import RankShare, their_cuts
from sat.checkpoint.rules import as_theirs, family_rules
from sat.checkpoint.torch_file import write_torch
from sat.checkpoint.verify import DIGESTS, MANIFEST, digest_file
from sat.models.glm.model import to_huggingface as glm_config
from sat.sharding import Cut, family_sharding

Parts = Mapping[Part, Mapping[str, Tensor]]
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Options:
    """Options of a writer. ``dtype`` None keeps each tensor's; ``advance`` is called with the bytes done.

    ``ranks``: model-parallel ranks that an official engine file is split over. ``finite`` refuses values that
    are not. ``control`` is the weight of a concatenated control, with which diffusers has CogView4-Control.
    """

    dtype: torch.dtype | None = None
    max_shard_bytes: int = SHARD_BYTES
    ranks: int = 1
    advance: Callable[[int], None] | None = None
    finite: bool = False
    control: Tensor | None = None


def save_native(
    folder: Path | str,
    parts: Parts,
    config: Mapping[str, Any],
    *,
    tokenizer: Path | None = None,
    options: Options | None = None,
) -> Path:
    """Write a native folder: ``parts`` are tensors under our names, ``config`` the sections they belong to.

    ``config`` holds ``model``, ``diffusion``, ``conditioning`` and ``first_stage`` as plain mappings; it goes
    into the manifest, so that the folder can be converted and checked without a YAML file.
    """
    options = options or Options()
    with atomic_folder(Path(folder), _bytes(parts, options)) as place:
        files: dict[str, Any] = {}
        for part in PARTS:
            if part in parts:
                tensors = as_lazy(parts[part])
                written = write_shards(place, part, tensors, options, index=False)
                files[part] = {
                    "files": [w.record(name) for name, w in written.items()],
                    "tensors": len(tensors),
                    "elements": sum(info.numel for info in tensors.infos().values()),
                    "dtypes": sorted({str(_info(tensors, name, options).dtype)[6:] for name in tensors}),
                }
        manifest = {"format": FORMAT, "version": VERSION, "parts": files, "config": dict(config)}
        if copied := _copy_tokenizer(tokenizer, place / "tokenizer"):
            manifest["tokenizer"] = [digest_file(copied).record(f"tokenizer/{copied.name}")]
        write_json(place / MANIFEST, manifest)
    return Path(folder)


def save_sat(
    folder: Path | str,
    parts: Parts,
    config: Mapping[str, Any],
    *,
    tokenizer: Path | None = None,
    options: Options | None = None,
) -> Path:
    """Write the official layout: ``latest``, the engine files, the autoencoder's .pt and a T5 folder.

    Source: the layout of the published CogView3 weights. The engine file holds the network only, as
    published.
    """
    options = options or Options()
    with atomic_folder(Path(folder), _bytes(parts, options)) as place:
        if "model" in parts:
            tensors = _theirs(parts["model"], "model", "SAT", config)
            (place / "1").mkdir()
            cuts: dict[str, Cut] = {}  # of the network's tensors over model-parallel ranks, by official name
            if options.ranks > 1:
                kind = _class(str(config["model"]["target"]), "model")
                sharding, rules = family_sharding(kind), family_rules(kind)["SAT"]
                cuts = their_cuts(as_lazy(parts["model"]).infos(), sharding, rules, options.ranks)
            for rank in range(options.ranks):
                share = RankShare(tensors, cuts, rank, options.ranks) if cuts else tensors
                write_torch_file(
                    place / "1" / rank_file(rank), share, "module", ENGINE_PREFIXES["model"], options
                )
            (place / "latest").write_text("1")
            write_digests(place / "1")
        if "first_stage" in parts:
            tensors = _theirs(parts["first_stage"], "first_stage", "SAT", config)
            (place / "vae").mkdir()
            channels = _params(config, "first_stage").get("latent_channels", 16)
            write_torch_file(place / "vae" / f"imagekl_ch{channels}.pt", tensors, "state_dict", "", options)
            write_digests(place / "vae")
        if "text" in parts:
            text = place / ("glm" if _is_glm(config) else "t5-v1_1-xxl")
            written = _write_text(text, parts["text"], config, options)
            _copy_tokenizer(tokenizer, text)
            write_digests(text, written)
        write_json(place / SIDECAR, dict(config))
    return Path(folder)


def save_diffusers(
    folder: Path | str,
    parts: Parts,
    config: Mapping[str, Any],
    *,
    tokenizer: Path | None = None,
    options: Options | None = None,
) -> Path:
    """Write a folder that diffusers' pipeline of CogView3-Plus, CogView4 or CogView4-Control opens."""
    options = options or Options()
    process = (config.get("diffusion") or {}).get("process") or {}
    if mixins := (process.get("params") or {}).get("mixins"):
        raise CheckpointError(
            f"diffusers has no place for the noising process of this model ({', '.join(mixins)}): "
            f"write it as native or SAT"
        )
    fourth = (config.get("model") or {}).get("target") == cogview4.COGVIEW4
    images: tuple[Part, ...] = ("model", "first_stage")
    theirs = {part: _theirs(parts[part], part, "DIFFUSERS", config) for part in images if part in parts}
    if (control := options.control) is not None:
        if not fourth or "model" not in theirs:
            raise CheckpointError("only a CogView4 network is written together with a control")
        theirs["model"] = cogview4.widened(theirs["model"], control)
    params = _params(config, "model")
    configs = {
        "model": cogview4.transformer_config(params, control=control is not None)
        if fourth
        else transformer_config(params),
        "first_stage": vae_config(_params(config, "first_stage")),
    }
    scheduler = (cogview4.scheduler_config if fourth else scheduler_config)(config.get("diffusion", {}))
    kind = None if tokenizer is None else tokenizer.suffix
    with atomic_folder(Path(folder), _bytes(parts, options)) as place:
        for part, tensors in theirs.items():
            target = place / FOLDERS[part]
            target.mkdir()
            written = write_shards(target, "diffusion_pytorch_model", tensors, options, index=True)
            write_digests(target, written)
            write_json(target / "config.json", configs[part])
        if "text" in parts:
            encoder = place / FOLDERS["text"]
            written = _write_text(encoder, parts["text"], config, options, with_tokenizer_config=False)
            write_digests(encoder, written)
            if tokenizer is not None:
                _copy_tokenizer(tokenizer, place / "tokenizer")
                write_digests(place / "tokenizer")
                write_json(place / "tokenizer" / "tokenizer_config.json", _tokenizer_config(config, kind))
        (place / "scheduler").mkdir()
        write_json(place / "scheduler" / "scheduler_config.json", scheduler)
        index = cogview4.model_index(kind, control=control is not None) if fourth else model_index()
        write_json(place / "model_index.json", index)
    return Path(folder)


WRITERS: dict[str, Callable[..., Path]] = {
    "native": save_native,
    "sat": save_sat,
    "diffusers": save_diffusers,
}


# -- parts


def _bytes(parts: Parts, options: Options) -> int:
    """Bytes of all tensors as they will be written."""
    if not parts:
        raise CheckpointError("nothing to write: no parts given")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise CheckpointError(f"unknown parts {unknown}, known are {list(PARTS)}")
    lazy = [as_lazy(tensors) for tensors in parts.values()]
    return sum(_info(tensors, name, options).nbytes for tensors in lazy for name in tensors)


def _params(config: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    params: Mapping[str, Any] = (config.get(section) or {}).get("params") or {}
    return params


def _tokens(config: Mapping[str, Any]) -> int:
    """The text length in tokens."""
    length: int = (config.get("conditioning") or {}).get("max_length", 224)
    return length


def _theirs(
    tensors: Mapping[str, Tensor], part: Part, layout: str, config: Mapping[str, Any]
) -> LazyStateDict:
    """``tensors`` under the names of ``layout``, by the rules of the class that ``config`` names."""
    component = (config.get("conditioning") or {}).get("text") if part == "text" else config.get(part)
    target = str((component or {}).get("target", T5 if part == "text" else ""))
    rules = family_rules(_class(target, part))
    if layout not in rules:
        known = " or ".join(sorted(name.lower() for name in rules))
        raise CheckpointError(f"{target} has no {layout.lower()} names; it can be written as {known} only")
    return as_theirs(as_lazy(tensors), rules[layout])


def _class(target: str, part: Part) -> type[nn.Module]:
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"the config of the {part} part names {target!r}, which cannot be imported"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(f"the config of the {part} part names {target!r}, which is no network")
    return found


def _is_glm(config: Mapping[str, Any]) -> bool:
    return ((config.get("conditioning") or {}).get("text") or {}).get("target") == cogview4.GLM


def _tokenizer_config(config: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    if _is_glm(config):
        return cogview4.tokenizer_config(kind or ".json", _tokens(config))
    return tokenizer_config(_tokens(config))


def _write_text(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    options: Options,
    *,
    with_tokenizer_config: bool = True,
) -> dict[str, Written]:
    """Write the text encoder as a Hugging Face folder; returns the weight files by name."""
    folder.mkdir()
    theirs = _theirs(tensors, "text", "HF", config)
    text = (config.get("conditioning") or {}).get("text") or {}
    params = text.get("params") or {}
    if _is_glm(config):
        theirs = _WithLastLayer(theirs)
    written = write_shards(folder, "model", theirs, options, index=True)
    dtype = str(_info(theirs, next(iter(theirs)), options).dtype)[6:]
    write_json(folder / "config.json", (glm_config if _is_glm(config) else t5_config)(params, dtype))
    if with_tokenizer_config:
        write_json(folder / "tokenizer_config.json", _tokenizer_config(config, None))
    return written


class _WithLastLayer(View):
    """A GLM encoder's tensors with the last layer and norm that ours has no use for: zeros, and ones.

    ``hidden_states[-2]`` of transformers, which CogView4 takes, is what goes into that layer.
    """

    def __init__(self, inner: LazyStateDict) -> None:
        super().__init__(inner)
        last = max(int(name.split(".")[1]) for name in inner if name.startswith("layers."))
        self._of = {
            name.replace(f"layers.{last}.", f"layers.{last + 1}."): name
            for name in inner
            if name.startswith(f"layers.{last}.")
        }
        self._of["norm.weight"] = f"layers.{last}.input_layernorm.weight"

    def info(self, key: str) -> TensorInfo:
        return self.inner.info(self._of.get(key, key))

    def release(self, key: str) -> None:
        if key not in self._of:
            self.inner.release(key)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._of:
            return self.inner[key]
        info = self.info(key)
        return torch.full(info.shape, float("norm" in key), dtype=info.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter([*self.inner, *self._of])

    def __len__(self) -> int:
        return len(self.inner) + len(self._of)


def _info(tensors: LazyStateDict, name: str, options: Options) -> TensorInfo:
    """Shape and dtype of ``name`` when written: floating-point tensors in the wanted type."""
    info = tensors.info(name)
    if options.dtype is None or not info.dtype.is_floating_point or name in tensors.exact:
        return info
    return TensorInfo(info.shape, options.dtype)


class _Reader:
    """Reads one tensor at a time as it is to be written, and reports the bytes that passed."""

    def __init__(self, tensors: LazyStateDict, options: Options) -> None:
        self._tensors, self._options = tensors, options
        self._overflow = Overflow()
        self._last: str | None = None

    def __call__(self, name: str) -> Tensor:
        self.done()
        self._last = name
        tensor = self._tensors[name]
        if self._options.finite:
            refuse_not_finite(tensor, name, self._tensors.source)
        wanted = _info(self._tensors, name, self._options).dtype
        return self._overflow.cast(name, tensor, wanted)

    def done(self) -> None:
        """Release the tensor read last."""
        if self._last is not None:
            self._tensors.release(self._last)
            if self._options.advance is not None:
                self._options.advance(self._tensors.info(self._last).nbytes)
        self._last = None

    def check(self) -> None:
        """Raise if a value did not fit the wanted type, or a file that was read is damaged."""
        self._tensors.verified()
        self._overflow.check(self._tensors.source)


def shards(infos: Mapping[str, TensorInfo], most: int) -> list[list[str]]:
    """Names in order, cut into groups of at most ``most`` bytes (a larger tensor is a group of its own)."""
    if most < 1:
        raise ValueError(f"a shard needs at least 1 byte, got {most}")
    groups: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if groups[-1] and size + info.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += info.nbytes
    return groups


def write_shards(
    folder: Path, stem: str, tensors: LazyStateDict, options: Options, *, index: bool
) -> dict[str, Written]:
    """Write ``stem.safetensors``, or numbered shards (with an ``index``); returns the files by name."""
    infos = {name: _info(tensors, name, options) for name in tensors}
    groups = shards(infos, options.max_shard_bytes)
    read = _Reader(tensors, options)
    written: dict[str, Written] = {}
    places: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        tail = "" if len(groups) == 1 else f"-{number:05}-of-{len(groups):05}"
        file = f"{stem}{tail}.safetensors"
        written[file] = write_safetensors(folder / file, {n: infos[n] for n in group}, read, {"format": "pt"})
        places.update(dict.fromkeys(group, file))
    read.done()
    read.check()
    if index and len(groups) > 1:
        total = sum(info.nbytes for info in infos.values())
        content = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / f"{stem}.safetensors.index.json", content)
    return written


def write_torch_file(path: Path, tensors: LazyStateDict, root: str, prefix: str, options: Options) -> None:
    """Write ``{root: {prefix + name: tensor}}`` as a PyTorch file."""
    infos = {prefix + name: _info(tensors, name, options) for name in tensors}
    read = _Reader(tensors, options)
    write_torch(path, infos, lambda name: read(name[len(prefix) :]), root)
    read.done()
    read.check()


def _copy_tokenizer(tokenizer: Path | None, folder: Path) -> Path | None:
    """Copy of ``tokenizer`` in ``folder``, under the name of its kind."""
    if tokenizer is None:
        return None
    folder.mkdir(exist_ok=True)
    try:
        kind = "tokenizer.json" if tokenizer.suffix == ".json" else "spiece.model"
        return Path(shutil.copyfile(tokenizer, folder / kind))
    except OSError as error:
        raise CheckpointError(f"{tokenizer}: cannot copy the tokenizer: {error.strerror or error}") from error


def write_digests(folder: Path, written: Mapping[str, Written] | None = None) -> None:
    """Write digests.json of the weights and the vocabulary in ``folder``; reads those not in ``written``."""
    kinds = (*SAFETENSORS, *TORCH, ".model")
    files = sorted(p for p in folder.iterdir() if p.suffix in kinds or p.name == "tokenizer.json")
    known = written or {}
    content = [(known.get(file.name) or digest_file(file)).record(file.name) for file in files]
    write_json(folder / DIGESTS, {"files": content})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """``content`` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
