"""Writing adapters: our own file, PEFT's folder, diffusers' file; ``files.py`` describes the layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat.adapters.factors import AdapterError, LayerFactors
from sat.adapters.files import (
    DIFFUSERS_FILE,
    DIFFUSERS_HEADER,
    KIND,
    NATIVE_FILE,
    PEFT_CONFIG,
    PEFT_FILE,
    About,
    Adapter,
    base_of,
    read,
)
from sat.adapters.names import Flat, layouts, to_theirs
from sat.adapters.select import Parts
from sat.checkpoint.files import atomic_folder
from sat.checkpoint.format import TensorInfo
from sat.checkpoint.formats.diffusers import PLUS
from sat.checkpoint.safetensors_file import write_safetensors
from sat.checkpoint.save import write_json

LAYOUTS = ("native", "peft", "diffusers")


def write(
    folder: Path, adapter: Adapter, layout: str, parts: Parts, dtype: torch.dtype | None = None
) -> list[Path]:
    """Write ``adapter`` into the new ``folder``; the files. ``dtype`` None keeps each tensor's.

    DoRA's magnitudes stay float32.
    """
    if layout == "native":
        with atomic_folder(folder) as place:
            write_native(place / NATIVE_FILE, adapter.layers, adapter.about, dtype)
        return [folder / NATIVE_FILE]
    flats = {part: _flats(adapter, part, parts) for part in parts if adapter.of(part)}
    with atomic_folder(folder) as place:
        files = (
            _write_diffusers(place, flats, adapter.about, dtype)
            if layout == "diffusers"
            else _write_peft(place, flats, adapter.about, dtype)
        )
    return [folder / file for file in files]


def write_native(
    file: Path, layers: Mapping[str, LayerFactors], about: About, dtype: torch.dtype | None = None
) -> None:
    """Our own layout: ``layers`` by full name."""
    tensors: dict[str, Tensor] = {}
    listed: dict[str, Any] = {}
    for name, layer in layers.items():
        for i, pair in enumerate(layer.parts):
            if pair is not None:
                tensors[f"{name}.lora_A.{i}.weight"] = _cast(pair.down, dtype)
                tensors[f"{name}.lora_B.{i}.weight"] = _cast(pair.up, dtype)
                listed[f"{name}#{i}"] = {"rank": pair.rank, "alpha": pair.alpha, "parts": len(layer.parts)}
        if layer.magnitude is not None:
            tensors[f"{name}.magnitude"] = layer.magnitude
    _save(file, tensors, _header("native", about, listed))


def _flats(adapter: Adapter, part: str, parts: Parts) -> dict[str, Flat]:
    """A part's layers under the names that other programs have for them."""
    choices = layouts(parts[part])
    if not choices:
        raise AdapterError(f"{type(parts[part]).__name__} has no names in other programs: write it as native")
    return to_theirs(adapter.of(part), choices[0])


def _write_peft(
    place: Path, flats: Mapping[str, Mapping[str, Flat]], about: About, dtype: torch.dtype | None
) -> list[str]:
    """One PEFT folder; of several parts, one for each."""
    files = []
    for part, layers in flats.items():
        folder = "" if len(flats) == 1 else {"text": "text_encoder"}.get(part, "transformer")
        (place / folder).mkdir(exist_ok=True)
        listed = {f"base_model.model.{name}": flat for name, flat in layers.items()}
        tensors = _tensors(listed, dtype, magnitude="lora_magnitude_vector")
        _save(place / folder / PEFT_FILE, tensors, _header("peft", about, _listed(listed)))
        write_json(place / folder / PEFT_CONFIG, peft_config(layers, about))
        files += [f"{folder}/{name}".lstrip("/") for name in (PEFT_FILE, PEFT_CONFIG)]
    return files


def _write_diffusers(
    place: Path, flats: Mapping[str, Mapping[str, Flat]], about: About, dtype: torch.dtype | None
) -> list[str]:
    """diffusers' one file, with its own kind of header beside ours."""
    listed: dict[str, Flat] = {}
    config: dict[str, Any] = {}
    for part, layers in flats.items():
        prefix = _prefix(part, about)
        listed |= {f"{prefix}.{name}": flat for name, flat in layers.items()}
        config |= {f"{prefix}.{key}": value for key, value in peft_config(layers, about).items()}
    header = _header("diffusers", about, _listed(listed))
    header[DIFFUSERS_HEADER] = json.dumps(config, sort_keys=True)
    _save(place / DIFFUSERS_FILE, _tensors(listed, dtype, magnitude="lora_magnitude_vector"), header)
    return [DIFFUSERS_FILE]


def _prefix(part: str, about: About) -> str:
    """What diffusers puts in front of a part's names."""
    if part == "text":
        return "text_encoder"
    return "unet" if str((about.base.get(part) or {}).get("target", "")).endswith("UNet") else "transformer"


def peft_config(layers: Mapping[str, Flat], about: About) -> dict[str, Any]:
    """PEFT's adapter_config.json for ``layers`` by their names."""
    dora = any(flat.magnitude is not None for flat in layers.values())
    return {
        "peft_type": "LORA",
        "r": about.rank,
        "lora_alpha": about.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(layers),
        "rank_pattern": {n: f.pair.rank for n, f in layers.items() if f.pair.rank != about.rank},
        "alpha_pattern": {n: f.pair.alpha for n, f in layers.items() if f.pair.alpha != about.alpha},
        "use_dora": dora,
        "use_rslora": False,
        "inference_mode": True,
    }


def _tensors(listed: Mapping[str, Flat], dtype: torch.dtype | None, magnitude: str) -> dict[str, Tensor]:
    out = {}
    for name, flat in listed.items():
        out[f"{name}.lora_A.weight"] = _cast(flat.pair.down, dtype)
        out[f"{name}.lora_B.weight"] = _cast(flat.pair.up, dtype)
        if flat.magnitude is not None:
            out[f"{name}.{magnitude}"] = flat.magnitude
    return out


def _listed(listed: Mapping[str, Flat]) -> dict[str, Any]:
    return {name: {"rank": flat.pair.rank, "alpha": flat.pair.alpha} for name, flat in listed.items()}


def _header(layout: str, about: About, layers: Mapping[str, Any]) -> dict[str, str]:
    base = {
        part: {"component": component, "digest": about.digests.get(part)}
        for part, component in about.base.items()
    }
    return {
        "format": "pt",
        "adapter": KIND,
        "version": "1",
        "layout": layout,
        "rank": json.dumps(about.rank),
        "alpha": json.dumps(about.alpha),
        "targets": json.dumps(list(about.targets)),
        "dora": json.dumps(about.dora),
        "layers": json.dumps(layers),
        "base": json.dumps(base),
    }


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype or tensor.dtype)


def _save(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_safetensors(file, infos, lambda name: tensors[name].contiguous(), header)


# -- an adapter from one layout to another


def convert_adapter(
    source: Path,
    folder: Path,
    layout: str,
    build: Callable[[Mapping[str, Any]], nn.Module],
    *,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Adapter, list[Path]]:
    """Write the adapter at ``source`` to the new ``folder`` in another ``layout``; what was read, and files.

    ``build`` makes the network of a config component on the meta device. ``config`` are sections of a YAML
    file; without it the components that the adapter names are used, else the published CogView3-Plus.
    """
    if layout not in LAYOUTS:
        raise AdapterError(f"an adapter is written as {', '.join(LAYOUTS)}, not as {layout}")
    if config is not None:
        base = {"model": config["model"], "text": config["conditioning"]["text"]}
    else:
        base = base_of(source) or {"model": {"target": PLUS, "params": {}}}
    parts = {part: build(component) for part, component in base.items()}
    try:
        adapter = read(source, parts)
    except AdapterError as error:
        advice = "" if config is not None else " (--base names the YAML of the model it belongs to)"
        raise AdapterError(f"{error}{advice}") from None
    used = {part: component for part, component in base.items() if adapter.of(part)}
    adapter = replace(adapter, about=replace(adapter.about, base=used))
    return adapter, write(folder, adapter, layout, parts, dtype)
