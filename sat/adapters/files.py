"""Adapter files: their content, and reading them in any layout. Writing is in ``write.py``.

native     adapter.safetensors: names of our modules, fused parts numbered (``….qkv.lora_A.0.weight``)
peft       adapter_model.safetensors and adapter_config.json; names of the peer's model, unfused
diffusers  pytorch_lora_weights.safetensors: the same with ``transformer.`` or ``text_encoder.`` in front

Files of other names are read like the last two (``peers.py``), PyTorch's ``.bin`` as well. The header of
every file we write has its rank, alpha and targets, the rank and alpha of each layer, the model it was
trained on with norms of its weights, and digests of all this and of the tensors.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, Json
from torch import Tensor

from sat import compat
from sat.adapters.factors import AdapterError, Kron, LayerFactors, Pair, fitted
from sat.adapters.lokr import expanded, is_lokr
from sat.adapters.lora import check
from sat.adapters.names import Parts, Unfused, to_ours
from sat.adapters.peers import PeftConfig, checked, parse, place, refusal, split_header
from sat.checkpoint.files import SAFETENSORS, TORCH, open_file, weight_files
from sat.checkpoint.format import CheckpointError, listing
from sat.checkpoint.load import refuse_not_finite
from sat.checkpoint.verify import Verify, read_json

KIND = "cogview3-lora"
NATIVE_FILE, PEFT_FILE, PEFT_CONFIG = (
    "adapter.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
DIFFUSERS_FILE, DIFFUSERS_HEADER = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
_NAMED = (NATIVE_FILE, PEFT_FILE, DIFFUSERS_FILE)
_NAMES_ONLY = Verify("manifest")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterInfo:
    """Description in an adapter's header. ``base``: part -> the config component it was trained on.

    ``digests``: part -> fingerprint of the files of its weights. ``norms``: part -> layer -> norms of some
    rows of its weight, which tell other weights of the same shapes in whatever file they are. ``distilled``:
    sampling that it is for, if only in few steps.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    dora: bool = False
    base: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str | None] = field(default_factory=dict)
    norms: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    distilled: Distilled | None = None


@dataclass(frozen=True)
class Adapter:
    """A read adapter: its layers by full name (``model.…``, ``text.…``)."""

    layers: Mapping[str, LayerFactors]
    info: AdapterInfo
    layout: str  # native, peft, diffusers
    source: str

    def of(self, part: str) -> dict[str, LayerFactors]:
        """The layers of one part, by their name in it."""
        prefix = f"{part}."
        return {n.removeprefix(prefix): v for n, v in self.layers.items() if n.startswith(prefix)}


def is_adapter(path: Path) -> bool:
    """True if ``path`` holds an adapter, not a checkpoint; of a run's folder, if its checkpoints do."""
    try:
        file = locate(path)[0]
        if path.is_dir() and file.with_suffix(".safetensors").name in _NAMED:
            return True
        with open_file(file, verify=_NAMES_ONLY) as tensors:
            factors = any(found is not None and found.side in ("down", "up") for found in map(parse, tensors))
            return factors or any(map(is_lokr, tensors))
    except (AdapterError, CheckpointError):
        return False


def locate(path: Path) -> list[Path]:
    """The adapter files under ``path``: itself, a folder in any layout, or a training run's newest."""
    if path.exists() and not path.is_dir():
        return [path]
    if not path.is_dir():
        raise AdapterError(f"{path}: no such file or folder")
    for folder in (path, path / "native"):
        found = [file for name in _NAMED if (file := _either(folder / name)) is not None]
        inside = [
            file
            for part in ("transformer", "unet", "text_encoder")
            if (file := _either(path / part / PEFT_FILE)) is not None
        ]
        if len(found) > 1 or (found and inside):
            names = [file.relative_to(path).as_posix() for file in (*found, *inside)]
            raise AdapterError(f"{path}: holds several adapters, name one of {listing(names)}")
        if found or inside:
            return found or inside
    steps = sorted(marker.parent for marker in path.glob("checkpoints/step_*/COMPLETE"))
    if steps and (steps[-1] / "native" / NATIVE_FILE).is_file():
        return [steps[-1] / "native" / NATIVE_FILE]
    files = weight_files(path, SAFETENSORS) or weight_files(path, TORCH)
    if len(files) == 1:
        return files
    there = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    raise AdapterError(
        f"{path}: holds no adapter: expected {NATIVE_FILE} (ours, or in a run's checkpoints), {PEFT_FILE} "
        f"(PEFT), {DIFFUSERS_FILE} (diffusers) or one .safetensors file alone; it holds "
        f"{listing(there) or 'nothing'}"
    )


def _either(file: Path) -> Path | None:
    """``file``, a .safetensors, else the .bin of its name, else None."""
    return next((one for one in (file, file.with_suffix(".bin")) if one.is_file()), None)


def base_of(path: Path) -> dict[str, Any]:
    """Part -> the config component that the adapter at ``path`` was trained on; empty if it names none."""
    found: dict[str, Any] = {}
    for file in locate(path):
        with open_file(file, verify=_NAMES_ONLY) as opened:
            header = _header(file, getattr(opened, "metadata", {}))
        found |= {part: base.component for part, base in (header.base if header else {}).items()}
    return compat.today(found)


def distilled(path: Path) -> Distilled | None:
    """Sampling that the adapter at ``path`` is for, if it says so; only headers are read."""
    for file in locate(path):
        with open_file(file, verify=_NAMES_ONLY) as opened:
            header = _header(file, getattr(opened, "metadata", {}))
        if header is not None and header.distilled is not None:
            return header.distilled
    return None


def read(path: Path, parts: Parts, verify: Verify | None = None) -> Adapter:
    """The adapter at ``path`` for the modules ``parts``, which may be on the meta device.

    Names and shapes that do not fit them are refused; its files are checked as ``verify`` says.
    """
    files, steps = locate(path), sorted(path.glob("checkpoints/step_*"))
    if (used := files[0].parent.parent) in steps[:-1]:
        log.warning("%s is torn (no COMPLETE file): the adapter of %s is used", steps[-1], used.name)
    found = [_read(file, parts, verify or Verify()) for file in files]
    layers = {name: layer for one in found for name, layer in one.layers.items()}
    if len(layers) < sum(len(one.layers) for one in found):
        raise AdapterError(f"{path}: two of its files adapt the same layers: name one of them")
    dora = any(one.info.dora for one in found)
    adapter = Adapter(layers, replace(found[0].info, dora=dora), found[0].layout, str(path))
    for part, module in parts.items():
        mine, kind = adapter.of(part), type(module).__name__
        target = str((adapter.info.base.get(part) or {}).get("target", "")).rpartition(".")[2]
        if mine and target and target != kind:
            raise AdapterError(f"{path}: is a LoRA of {target}, this model is {kind}: another model")
        try:
            check(module, mine)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from None
        layers |= {f"{part}.{name}": fitted(one, module.get_submodule(name)) for name, one in mine.items()}
    adapter = replace(adapter, layers=layers)
    if strange := sorted({name.partition(".")[0] for name in layers} - set(parts)):
        raise AdapterError(f"{path}: adapts the {strange[0]} part, of which this model has none")
    _tell_vain(path, [pair for layer in layers.values() for pair in layer.parts if pair is not None])
    return adapter


def _tell_vain(path: Path, pairs: list[Pair]) -> None:
    """Say it where factors change nothing."""
    vain = sum(pair.alpha == 0 or not bool(pair.up.float().any()) for pair in pairs)
    if vain:
        log.warning(
            "%s: %d of %d pairs of factors change nothing: alpha or lora_B is 0", path, vain, len(pairs)
        )


def _read(file: Path, parts: Parts, verify: Verify) -> Adapter:
    """The adapter in one ``file``."""
    try:
        opened = open_file(file, verify=verify)
    except CheckpointError as error:  # no switch lets an adapter run code
        raise CheckpointError(str(error).partition("; if you trust")[0]) from error
    with opened as tensors:
        metadata: Mapping[str, str] = getattr(tensors, "metadata", {})
        header, configs = _header(file, metadata), _configs(file, metadata)
        native = header is not None and header.layout == "native"
        held = {name: tensors[name] for name in tensors}
        krons: Mapping[str, Kron] = {}
        if any(map(is_lokr, held)):
            held, krons = _without_lokr(held, configs, file, native)
            configs = {}
        factors = _factors(held, file, native)
        tensors.verified()
    places = {} if native else place(list(factors), parts, file)
    content = _Content(file, header, configs, {n: at.prefix + at.known for n, at in places.items()})
    unfused = {name: content.unfused(name, sides, krons.get(name)) for name, sides in factors.items()}
    if header is not None:
        if missing := [name for name in header.layers if name not in unfused]:
            share = f"{len(missing)} of its {len(header.layers)} layers"
            raise AdapterError(f"{file}: {share} are missing: {listing(missing, 3)}")
    elif (said := metadata.get("ss_network_alpha")) and not any(
        "alpha" in sides for sides in factors.values()
    ):
        log.warning("%s: its header says alpha %s, but no layer has one: each counts whole", file, said[:20])
    layers: dict[str, LayerFactors] = {}
    if native:
        assert header is not None, "or it were not native"
        for name, fused in header.counts(file).items():
            found = [unfused.get(f"{name}#{i}") for i in range(fused)]
            magnitude = next((one.magnitude for one in found if one is not None), None)
            layers[name] = LayerFactors(tuple(None if one is None else one.pair for one in found), magnitude)
    for part in parts:
        mine = {at.known: unfused[name] for name, at in places.items() if at.part == part}
        if mine:
            layout = next(at.layout for at in places.values() if at.part == part)
            layers |= {f"{part}.{name}": layer for name, layer in to_ours(mine, layout).items()}
    kind = "native" if native else "peft" if (file.parent / PEFT_CONFIG).is_file() else "diffusers"
    return Adapter(layers, _info(header, unfused), kind, str(file))


def _without_lokr(
    tensors: Mapping[str, Tensor], configs: Mapping[str, PeftConfig], file: Path, native: bool
) -> tuple[dict[str, Tensor], dict[str, Kron]]:
    """``tensors`` with Kronecker products as low-rank factors, scaled by PEFT's settings; the products."""
    names = {name.partition(".lokr_")[0] for name in tensors if is_lokr(name)}
    scales: dict[str, float | None] = {}
    for name in names:
        config = next((c for front, c in configs.items() if front and name.startswith(front)), None)
        config = config or configs.get("")
        inner = re.sub(r"^(base_model\.model|transformer|unet|text_encoder)\.", "", name)
        scales[name] = None if config is None else config.lokr_scale(inner)
    try:
        found = expanded(tensors, scales, native)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from None
    log.info("%s: a LoKr of %d layers", file, len(names))
    return found


def _factors(  # noqa: C901 - one check after another
    tensors: Mapping[str, Tensor], file: Path, native: bool
) -> dict[str, dict[str, Tensor]]:
    """Linear -> side -> tensor, each checked by itself; linears of native files have ``#`` and their part."""
    out: dict[str, dict[str, Tensor]] = defaultdict(dict)
    taken, strays, several = dict[tuple[str, str], str](), list[str](), dict[str, str]()
    for name, tensor in tensors.items():
        found = parse(name)
        if found is None:
            strays.append(name)
            continue
        linear, side, which = found
        if native and side in ("down", "up"):
            linear = f"{linear}#{which}"
        elif native and side == "magnitude":
            linear = f"{linear}#0"
        elif which:
            several[which] = name
        if (linear, side) in taken and len(several) < 2:
            raise AdapterError(f"{file}: {taken[linear, side]!r} and {name!r} are the same factor: name one")
        taken[linear, side] = name
        refuse_not_finite(tensor, name, str(file))
        if side == "alpha" and tensor.numel() != 1:
            raise AdapterError(f"{file}: {name!r} has {tensor.numel()} values, expected one number")
        if side != "alpha" and not tensor.is_floating_point():
            raise AdapterError(
                f"{file}: {name!r} is {str(tensor.dtype)[6:]}, expected floating-point factors"
            )
        if tensor.dim() == 4 and tensor.shape[2:] == (
            1,
            1,
        ):  # ``up`` of a convolution; or a linear as one of one point
            tensor = tensor[:, :, 0, 0]
        out[linear][side] = tensor.clone()
    if strays:
        raise AdapterError(f"{file}: {refusal(strays)}")
    if len(several) > 1:
        raise AdapterError(f"{file}: holds several adapters ({listing(sorted(several))}): save one alone")
    if not out:
        raise AdapterError(f"{file}: holds no tensors")
    return out


class _Content(NamedTuple):
    """Ranks and alphas that the header and the settings of a file say, by the name of a linear in it."""

    file: Path
    header: Header | None
    configs: Mapping[str, PeftConfig]  # by what is in front of the names they are for
    clean: Mapping[str, str]  # names without kohya's flattening and torch's wrappers

    def unfused(self, name: str, sides: Mapping[str, Tensor], kron: Kron | None = None) -> Unfused:
        """The factors of one linear, compared with all that is said of it."""
        if not {"down", "up"} <= sides.keys():
            there, no = [{"down": "lora_A", "up": "lora_B"}.get(s, s) for s in sides], "lora_B"
            no = "lora_A" if "down" not in sides else no
            raise AdapterError(f"{self.file}: {name!r} has {' and '.join(there)} but no {no}: incomplete")
        down, up = sides["down"], sides["up"]
        if down.dim() not in (2, 4) or up.dim() != 2:
            sizes = f"lora_A of {list(down.shape)} and lora_B of {list(up.shape)}"
            raise AdapterError(f"{self.file}: {name!r} has {sizes}, of no linear and no 2-D convolution")
        rank = down.shape[0]
        if not rank or rank != up.shape[1]:
            raise AdapterError(f"{self.file}: {name!r}: rank {rank} of lora_A, {up.shape[1]} of lora_B")
        magnitude = sides.get("magnitude")
        if magnitude is not None:
            if magnitude.dim() == 2 and magnitude.shape[1] == 1:  # kohya's
                magnitude = magnitude[:, 0]
            entry = None if self.header is None else self.header.layers.get(name)
            outputs = up.shape[0] * (1 if entry is None else entry.parts)
            if magnitude.shape != (outputs,):
                raise AdapterError(
                    f"{self.file}: {name!r}: {list(magnitude.shape)} magnitudes, expected one for each of "
                    f"{outputs} outputs"
                )
        kron = kron if magnitude is None else None  # DoRA is of the low-rank form
        return Unfused(Pair(down, up, self._alpha(name, sides, rank), kron), magnitude)

    def _alpha(self, name: str, sides: Mapping[str, Tensor], rank: int) -> float:
        """Alpha of a linear: of the file, its header, PEFT's settings, which must agree; else its rank."""
        said: dict[str, float] = {}
        if "alpha" in sides:
            said["its alpha"] = float(sides["alpha"])
        ranks: dict[str, int] = {}
        if self.header is not None and (entry := self.header.layers.get(name)) is not None:
            said["its header"], ranks["its header"] = entry.alpha, entry.rank
        elif self.header is not None:
            raise AdapterError(f"{self.file}: {name!r} is not among the layers in its header")
        clean = self.clean.get(name, name)
        config = next((c for front, c in self.configs.items() if front and clean.startswith(front)), None)
        config = config or self.configs.get("")
        if config is not None:
            inner = re.sub(r"^(base_model\.model|transformer|unet|text_encoder)\.", "", clean)
            said["its config"], ranks["its config"] = config.alpha(inner, rank), config.rank(inner)
            if config.use_dora != ("magnitude" in sides):
                what = "has magnitudes" if "magnitude" in sides else "has no magnitudes"
                raise AdapterError(
                    f"{self.file}: {name!r} {what}, its config says use_dora {config.use_dora}"
                )
        for who, wanted in ranks.items():
            if wanted != rank:
                raise AdapterError(f"{self.file}: {name!r} has rank {rank}, {who} says {wanted}: wrong rank")
        alphas = list(said.values()) or [float(rank)]
        if any(not math.isclose(alpha, alphas[0], rel_tol=1e-3) for alpha in alphas):
            told = ", ".join(f"{alpha:g} by {who}" for who, alpha in said.items())
            raise AdapterError(f"{self.file}: alpha of {name!r} is {told}: they contradict each other")
        return alphas[0]


def _info(header: Header | None, unfused: Mapping[str, Unfused]) -> AdapterInfo:
    """Description in the header; without one, that of the tensors."""
    dora = any(one.magnitude is not None for one in unfused.values())
    if header is None:
        pairs = Counter((one.pair.rank, one.pair.alpha) for one in unfused.values())
        (rank, alpha), _ = pairs.most_common(1)[0]
        return AdapterInfo(rank, alpha, dora=dora)
    base = header.base
    return AdapterInfo(
        header.rank,
        header.alpha,
        tuple(header.targets),
        dora,
        {part: one.component for part, one in base.items()},
        {part: one.digest for part, one in base.items()},
        {part: one.norms for part, one in base.items()},
        header.distilled,
    )


# -- headers and settings


_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, le=1 << 20)]


class LayerEntry(BaseModel):
    """A pair of factors in a header; ``parts`` of the linear that they are one of."""

    model_config = ConfigDict(strict=True)
    rank: _Count
    alpha: _Finite
    parts: Annotated[int, Field(ge=1, le=64)] = 1


class BaseEntry(BaseModel):
    """The model that an adapter was trained on, in a header; see :class:`AdapterInfo`."""

    model_config = ConfigDict(strict=True)
    component: dict[str, Any]
    digest: str | None = None
    norms: dict[str, list[_Finite]] = {}


_Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Distilled(BaseModel):
    """Sampling that distilled weights are for, beside them: in an adapter's header or a folder's manifest.

    ``steps`` are the numbers of steps that they were trained for, the usual first; ``levels`` the timesteps
    that the network sees at each. ``guidance`` is the strength in the weights, or the smallest and largest of
    one that the network takes as an input. ``prediction`` is their own in place of the config's
    (:class:`sat.diffusion.prediction.Preconditioned`).
    """

    model_config = ConfigDict(strict=True, frozen=True)
    method: str
    steps: Annotated[list[Annotated[int, Field(ge=1, le=1000)]], Field(min_length=1)]
    levels: dict[str, list[_Finite]]
    guidance: _Strength | Annotated[list[_Strength], Field(min_length=2, max_length=2)]
    prediction: Literal["x0", "v"] | None = None


class Header(BaseModel):
    """Our own part of a file's header, whose values are JSON."""

    model_config = ConfigDict(strict=True)
    layout: Literal["native", "peft", "diffusers"]
    rank: Json[_Count]
    alpha: Json[_Finite]
    targets: Json[list[str]]
    dora: Json[bool]
    layers: Json[dict[str, LayerEntry]]
    base: Json[dict[str, BaseEntry]]
    distilled: Json[Distilled] | None = None

    def counts(self, file: Path) -> dict[str, int]:
        """Linear -> number of fused parts, of a native file."""
        found: dict[str, int] = {}
        for name, entry in self.layers.items():
            linear, _, part = name.rpartition("#")
            good = part.isdecimal() and int(part) < entry.parts and found.setdefault(linear, entry.parts)
            if good != entry.parts:
                raise CheckpointError(f"{file}: its header is damaged at {name[:120]!r}; copy the file again")
        return found


def _header(file: Path, metadata: Mapping[str, str]) -> Header | None:
    """Our own part of the header, or None."""
    if metadata.get("kind") == "cogview3-control":
        raise AdapterError(f"{file}: is a control, not an adapter: --control FILE:IMAGE (sampling.controls)")
    if metadata.get("adapter") != KIND:
        return None
    if metadata.get("version") != "1":
        raise AdapterError(f"{file}: version {str(metadata.get('version'))[:20]}; this code reads version 1")
    return checked(Header, dict(metadata), f"{file}: its header")


def _configs(file: Path, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """PEFT's adapter_config.json beside the file, or diffusers' version of it in the header, by prefix."""
    side = file.parent / PEFT_CONFIG
    if side.exists():
        found = [("", read_json(side))]
    elif DIFFUSERS_HEADER in metadata:
        try:
            found = list(split_header(json.loads(metadata[DIFFUSERS_HEADER])))
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file}: its {DIFFUSERS_HEADER} is damaged ({error})") from error
    else:
        return {}
    where = str(side) if side.exists() else f"{file}: its {DIFFUSERS_HEADER}"
    configs = {front: checked(PeftConfig, content, where) for front, content in found}
    for config in configs.values():
        config.refuse(where)
    return configs
