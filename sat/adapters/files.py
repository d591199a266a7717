"""Adapter files: their content, and reading them in any layout. Writing is in ``write.py``.

native     adapter.safetensors: names of our modules, fused parts numbered (``….qkv.lora_A.0.weight``)
peft       adapter_model.safetensors and adapter_config.json; names of the peer's model, unfused
diffusers  pytorch_lora_weights.safetensors: the same with ``transformer.`` or ``text_encoder.`` in front

The header of every file we write has its rank, alpha and targets, the rank and alpha of each layer, and the
model it was trained on.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sat.adapters.factors import AdapterError, LayerFactors, Pair
from sat.adapters.lora import check
from sat.adapters.names import Layout, Parts, Unfused, layouts, to_ours
from sat.checkpoint.format import CheckpointError, SafetensorsFile, listing

KIND = "cogview3-lora"
NATIVE_FILE, PEFT_FILE, PEFT_CONFIG = (
    "adapter.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
DIFFUSERS_FILE, DIFFUSERS_HEADER = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"

_FACTOR = re.compile(
    r"(?P<name>.+?)\.(?P<kind>lora_A|lora_B|lora_down|lora_up|lora_magnitude_vector|magnitude|alpha)"
    r"(?:\.(?P<which>(?!weight$)\w+))?(?:\.weight)?$"
)
_SIDES = {"lora_down": "lora_A", "lora_up": "lora_B", "lora_magnitude_vector": "magnitude"}
_WRAPPERS = ("base_model.model.", "transformer.", "unet.", "diffusion_model.", "text_encoder.", "model.")


@dataclass(frozen=True)
class AdapterInfo:
    """Description in an adapter's header. ``base``: part -> the config component it was trained on."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    dora: bool = False
    base: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str | None] = field(default_factory=dict)  # part -> fingerprint of its weights


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
        files = locate(path)
    except AdapterError:
        return False
    if path.is_dir():
        return True
    with SafetensorsFile(files[0]) as file:
        return any(_FACTOR.fullmatch(name) for name in file)


def locate(path: Path) -> list[Path]:
    """The adapter files under ``path``: itself, a folder in any layout, or a training run's newest."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise AdapterError(f"{path}: an adapter is a .safetensors file or a folder with one")
        return [path]
    if not path.is_dir():
        raise AdapterError(f"{path}: no such file or folder")
    for place in (path, path / "native"):
        for name in (NATIVE_FILE, PEFT_FILE, DIFFUSERS_FILE):
            if (place / name).is_file():
                return [place / name]
    inside = [path / part / PEFT_FILE for part in ("transformer", "unet", "text_encoder")]
    if found := [file for file in inside if file.is_file()]:
        return found
    steps = sorted(marker.parent for marker in path.glob("checkpoints/step_*/COMPLETE"))
    if steps and (steps[-1] / "native" / NATIVE_FILE).is_file():
        return [steps[-1] / "native" / NATIVE_FILE]
    raise AdapterError(
        f"{path}: holds no adapter: expected {NATIVE_FILE} (ours, or in a run's checkpoints), {PEFT_FILE} "
        f"(PEFT) or {DIFFUSERS_FILE} (diffusers)"
    )


def base_of(path: Path) -> dict[str, Any]:
    """Part -> the config component that the adapter at ``path`` was trained on; empty if it names none."""
    found: dict[str, Any] = {}
    for file in locate(path):
        opened = SafetensorsFile(file)
        with opened:
            base = _header(file, opened.metadata).get("base", {})
        found |= {part: base[part]["component"] for part in base}
    return found


def read(path: Path, parts: Parts) -> Adapter:
    """The adapter at ``path`` for the modules ``parts``, which may be on the meta device.

    Names and shapes that do not fit them are refused.
    """
    found = [_read(file, parts) for file in locate(path)]
    layers = {name: layer for one in found for name, layer in one.layers.items()}
    adapter = Adapter(layers, found[0].info, found[0].layout, str(path))
    for part, module in parts.items():
        mine, kind = adapter.of(part), type(module).__name__
        target = str((adapter.info.base.get(part) or {}).get("target", "")).rpartition(".")[2]
        if mine and target and target != kind:
            raise AdapterError(f"{path}: is a LoRA of {target}, this model is {kind}: another model")
        try:
            check(module, mine)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from None
    if strange := sorted({name.partition(".")[0] for name in layers} - set(parts)):
        raise AdapterError(f"{path}: adapts the {strange[0]} part, of which this model has none")
    return adapter


def _read(file: Path, parts: Parts) -> Adapter:
    try:
        opened = SafetensorsFile(file)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    with opened:
        content = _Content(file, dict(opened), opened.metadata)
    unfused = content.unfused()
    if content.header.get("layout") != "native":
        layout = "peft" if (file.parent / PEFT_CONFIG).is_file() else "diffusers"
        return Adapter(_placed(unfused, parts, file), content.info(unfused), layout, str(file))
    listed = content.header["layers"]  # native names are ours, with the number of the fused part
    fused = {name.partition("#")[0]: listed[name].get("parts", 1) for name in listed}
    layers = {}
    for linear, count in fused.items():
        found = [unfused.get(f"{linear}#{i}") for i in range(count)]
        magnitude = next((one.magnitude for one in found if one is not None), None)
        pairs = tuple(None if one is None else one.pair for one in found)
        layers[linear] = LayerFactors(pairs, magnitude)
    return Adapter(layers, content.info(unfused), "native", str(file))


class _Content:
    """Content of one file: tensors by linear and kind, with the ranks and alphas of its header or config."""

    def __init__(self, file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.file = file
        self.header = _header(file, metadata)
        self.config = _config(file, metadata)
        self.factors: dict[str, dict[str, Tensor]] = {}
        strays = []
        for name, tensor in tensors.items():
            found = _FACTOR.fullmatch(name)
            if found is None:
                strays.append(name)
                continue
            kind = _SIDES.get(found["kind"], found["kind"])
            which = found["which"] if (found["which"] or "").isdigit() else None
            linear = found["name"] if which is None else f"{found['name']}#{which}"
            self.factors.setdefault(linear, {})[kind] = tensor.clone()
        if strays:
            raise AdapterError(
                f"{file}: {len(strays)} tensors are no LoRA factors of linears: {listing(strays, 3)}"
            )
        if not self.factors:
            raise AdapterError(f"{file}: holds no tensors")

    def unfused(self) -> dict[str, Unfused]:  # noqa: C901 - one check after another
        """The factors of each linear; ``name#part`` in native files. Compared with the header's list."""
        out: dict[str, Unfused] = {}
        magnitudes = {n: k["magnitude"] for n, k in self.factors.items() if set(k) == {"magnitude"}}
        for name, kinds in self.factors.items():
            if name in magnitudes:
                continue
            for side, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
                if side not in kinds:
                    raise AdapterError(f"{self.file}: {name!r} has {other} but no {side}: incomplete")
            down, up = kinds["lora_A"], kinds["lora_B"]
            if down.dim() != 2 or up.dim() != 2:
                raise AdapterError(f"{self.file}: {name!r} is a LoRA of a convolution, only linears have one")
            if down.shape[0] != up.shape[1]:
                raise AdapterError(
                    f"{self.file}: {name!r}: rank {down.shape[0]} of lora_A, {up.shape[1]} of lora_B"
                )
            pair = Pair(down, up, self._alpha(name, kinds, down.shape[0]))
            out[name] = Unfused(pair, kinds.get("magnitude"))
        for name, magnitude in magnitudes.items():
            if f"{name}#0" not in out:
                raise AdapterError(f"{self.file}: {name!r} has a magnitude but no factors: incomplete")
            out[f"{name}#0"] = Unfused(out[f"{name}#0"].pair, magnitude)
        listed: dict[str, Any] = self.header.get("layers", {})
        if missing := [name for name in listed if name not in out]:
            raise AdapterError(
                f"{self.file}: {len(missing)} of its {len(listed)} layers are missing: {listing(missing, 3)}"
            )
        for name, entry in listed.items():
            if (rank := out[name].pair.rank) != entry["rank"]:
                raise AdapterError(
                    f"{self.file}: {name!r} has rank {rank}, its header says {entry['rank']}: wrong rank"
                )
        return out

    def _alpha(self, name: str, kinds: Mapping[str, Tensor], rank: int) -> float:
        """alpha of a linear: of the file, of its header, of PEFT's or diffusers' config; else its rank."""
        if "alpha" in kinds:
            return float(kinds["alpha"])
        if name in self.header.get("layers", {}):
            return float(self.header["layers"][name]["alpha"])
        if not self.config:
            return float(rank)
        wanted = _pattern(self.config.get("rank_pattern"), name, self.config.get("r", rank))
        if wanted != rank:
            raise AdapterError(f"{self.file}: {name!r} has rank {rank}, its config says {wanted}: wrong rank")
        alpha = float(_pattern(self.config.get("alpha_pattern"), name, self.config.get("lora_alpha", rank)))
        return alpha * rank**0.5 if self.config.get("use_rslora") else alpha

    def info(self, unfused: Mapping[str, Unfused]) -> AdapterInfo:
        """Description in the header; without one, that of the tensors."""
        ranks = Counter(one.pair.rank for one in unfused.values())
        rank = int(self.header.get("rank", ranks.most_common(1)[0][0]))
        alphas = Counter(one.pair.alpha for one in unfused.values() if one.pair.rank == rank)
        alpha = self.header.get("alpha", alphas.most_common(1)[0][0] if alphas else rank)
        base: dict[str, Any] = self.header.get("base", {})
        return AdapterInfo(
            rank,
            float(alpha),
            tuple(self.header.get("targets", ())),
            any(one.magnitude is not None for one in unfused.values()),
            {part: base[part]["component"] for part in base},
            {part: base[part].get("digest") for part in base},
        )


def _header(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Our own part of the header, or nothing."""
    if metadata.get("adapter") != KIND:
        return {}
    try:
        if int(metadata["version"]) != 1:
            raise AdapterError(f"{file}: version {metadata['version']}; this code reads version 1")
        return {
            "layout": metadata["layout"],
            **{
                key: json.loads(metadata[key])
                for key in ("rank", "alpha", "targets", "dora", "layers", "base")
            },
        }
    except (KeyError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{file}: its header is damaged: {error}") from error


def _config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's adapter_config.json beside the file, or diffusers' version of it in the header."""
    side = file.parent / PEFT_CONFIG
    try:
        if side.is_file():
            config: dict[str, Any] = json.loads(side.read_text())
        elif DIFFUSERS_HEADER in metadata:
            given = json.loads(metadata[DIFFUSERS_HEADER])
            prefixes = ("transformer.", "unet.", "text_encoder.")
            config = {}
            for key, value in given.items():
                prefix = next((p for p in prefixes if key.startswith(p)), "")
                config.setdefault(key.removeprefix(prefix), value)
        else:
            return {}
    except ValueError as error:
        raise AdapterError(f"{file}: its config is damaged: {error}") from error
    kind = config.get("peft_type", "LORA")
    extra = [key for key in ("modules_to_save", "layer_replication", "lora_bias") if config.get(key)]
    if kind != "LORA" or config.get("bias", "none") != "none" or extra:
        what = extra[0] if extra else f"bias {config.get('bias')!r}" if kind == "LORA" else str(kind)
        raise AdapterError(f"{file}: PEFT's {what} is not supported, only plain LoRA and DoRA")
    return config


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that ends the name, else ``default``."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _placed(unfused: Mapping[str, Unfused], parts: Parts, file: Path) -> dict[str, LayerFactors]:
    """Layers of a file in another program's names: each part's layout is the one that knows most of them."""
    best: dict[str, tuple[Layout, dict[str, str]]] = {}  # part -> layout, file's name -> layout's name
    for part, module in parts.items():
        for layout in layouts(module):
            hits: dict[str, str] = {}
            for name in unfused:
                known = next((one for one in _without_prefixes(name, part) if one in layout.places), None)
                if known is not None:
                    hits[name] = known
            if hits and (part not in best or len(hits) > len(best[part][1])):
                best[part] = layout, hits
    placed = {name for _, hits in best.values() for name in hits}
    if left := [name for name in unfused if name not in placed]:
        kinds = " or ".join(type(module).__name__ for module in parts.values())
        raise AdapterError(
            f"{file}: {len(left)} of its {len(unfused)} layers are none of {kinds}: {listing(left, 3)}; "
            f"it is a LoRA of another model"
        )
    return {
        f"{part}.{name}": layer
        for part, (layout, hits) in best.items()
        for name, layer in to_ours({known: unfused[name] for name, known in hits.items()}, layout).items()
    }


def _without_prefixes(name: str, part: str) -> Iterator[str]:
    """``name``, and its rest as programs' prefixes are taken off; one part's prefix hides it from others."""
    other = "text_encoder." if part == "model" else "transformer."
    while not name.startswith(other):
        yield name
        prefix = next((p for p in _WRAPPERS if name.startswith(p)), None)
        if prefix is None:
            return
        name = name.removeprefix(prefix)
