"""Writing adapters: our own file, PEFT's folder, diffusers' file; ``files.py`` describes the layouts."""

from __future__ import annotations

import json
import logging
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
    Adapter,
    AdapterInfo,
    base_of,
    read,
)
from sat.adapters.lokr import PeftLokr, pieces_of
from sat.adapters.names import Parts, Unfused, layouts, to_theirs
from sat.checkpoint.files import atomic_folder
from sat.checkpoint.format import SEAL, TensorInfo, seal, write_safetensors
from sat.checkpoint.formats.diffusers import PLUS
from sat.checkpoint.save import write_json

log = logging.getLogger(__name__)

LAYOUTS = ("native", "peft", "diffusers")


def write(
    folder: Path, adapter: Adapter, layout: str, parts: Parts, dtype: torch.dtype | None = None
) -> list[Path]:
    """Write ``adapter`` into the new ``folder``; returns the files. ``dtype`` None keeps each tensor's.

    A PEFT folder holds one part; several get a folder each. diffusers' one file has all, and its own kind of
    header beside ours. DoRA's magnitudes stay float32.
    """
    info = adapter.info
    if layout == "native":
        with atomic_folder(folder) as place:
            write_native(place / NATIVE_FILE, adapter.layers, info, dtype)
        return [folder / NATIVE_FILE]
    unfused: dict[str, dict[str, Unfused]] = {}  # part -> its layers under other programs' names
    for part, module in parts.items():
        if mine := adapter.of(part):
            choices = layouts(module)
            if not choices:
                raise AdapterError(
                    f"{type(module).__name__} has no names in other programs: write it as native"
                )
            unfused[part] = to_theirs(mine, choices[0])
    with atomic_folder(folder) as place:
        if layout == "diffusers":
            if any(one.pair.kron is not None for layers in unfused.values() for one in layers.values()):
                log.warning("diffusers reads no LoKr: it is written as the LoRA of the same change")
            every: dict[str, Unfused] = {}
            config: dict[str, Any] = {}
            for part, layers in unfused.items():
                is_unet = str((info.base.get(part) or {}).get("target", "")).endswith("UNet")
                prefix = "text_encoder" if part == "text" else "unet" if is_unet else "transformer"
                every |= {f"{prefix}.{name}": one for name, one in layers.items()}
                config |= {f"{prefix}.{key}": value for key, value in peft_config(layers, info).items()}
            header = {DIFFUSERS_HEADER: json.dumps(config, sort_keys=True)}
            _save_unfused(place / DIFFUSERS_FILE, every, layout, info, dtype, header)
            return [folder / DIFFUSERS_FILE]
        files = []
        for part, layers in unfused.items():
            name = "" if len(unfused) == 1 else {"text": "text_encoder"}.get(part, "transformer")
            (place / name).mkdir(exist_ok=True)
            lokr = _lokr_of(layers)
            every = {f"base_model.model.{linear}": one for linear, one in layers.items()}
            _save_unfused(place / name / PEFT_FILE, every, layout, info, dtype, {}, lokr)
            write_json(place / name / PEFT_CONFIG, peft_config(layers, info, lokr))
            files += [folder / name / file for file in (PEFT_FILE, PEFT_CONFIG)]
    return files


def write_native(
    file: Path, layers: Mapping[str, LayerFactors], info: AdapterInfo, dtype: torch.dtype | None = None
) -> None:
    """Our own layout: ``layers`` by full name."""
    tensors: dict[str, Tensor] = {}
    listed: dict[str, Any] = {}
    for name, layer in layers.items():
        for i, pair in enumerate(layer.parts):
            if pair is not None:
                if pair.kron is None:
                    tensors[f"{name}.lora_A.{i}.weight"] = _cast(pair.down, dtype)
                    tensors[f"{name}.lora_B.{i}.weight"] = _cast(pair.up, dtype)
                else:
                    for piece, value in pieces_of(pair.kron).items():
                        tensors[f"{name}.{piece}.{i}"] = _cast(value, dtype)
                listed[f"{name}#{i}"] = {"rank": pair.rank, "alpha": pair.alpha, "parts": len(layer.parts)}
        if layer.magnitude is not None:
            tensors[f"{name}.magnitude"] = layer.magnitude
    _save(file, tensors, _header("native", info, listed))


def _lokr_of(layers: Mapping[str, Unfused]) -> PeftLokr | None:
    """PEFT's settings of a LoKr, if ``layers`` are one that it can build; a line where they are not."""
    krons = {name: one.pair.kron for name, one in layers.items() if one.pair.kron is not None}
    if not krons:
        return None
    found = PeftLokr.of(krons) if len(krons) == len(layers) else None
    if found is None:
        log.warning("the LoKr is written as a LoRA: PEFT builds no Kronecker factors of these shapes")
    return found


def peft_config(
    layers: Mapping[str, Unfused], info: AdapterInfo, lokr: PeftLokr | None = None
) -> dict[str, Any]:
    """PEFT's adapter_config.json for ``layers`` by their names."""
    if lokr is not None:
        ranks = lokr.ranks
        alphas = {name: one.pair.scale * ranks[name] for name, one in layers.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        return {
            "peft_type": "LOKR",
            "r": rank,
            "alpha": alpha,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "decompose_both": False,
            "decompose_factor": lokr.factor,
            "target_modules": list(layers),
            "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
            "inference_mode": True,
        }
    dora = any(one.magnitude is not None for one in layers.values())
    return {
        "peft_type": "LORA",
        "r": info.rank,
        "lora_alpha": info.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(layers),
        "rank_pattern": {n: f.pair.rank for n, f in layers.items() if f.pair.rank != info.rank},
        "alpha_pattern": {n: f.pair.alpha for n, f in layers.items() if f.pair.alpha != info.alpha},
        "use_dora": dora,
        "use_rslora": False,
        "inference_mode": True,
    }


def _save_unfused(
    file: Path,
    layers: Mapping[str, Unfused],
    layout: str,
    info: AdapterInfo,
    dtype: torch.dtype | None,
    extra: dict[str, str],
    lokr: PeftLokr | None = None,
) -> None:
    """Write ``layers`` by their full names, with our header and ``extra``; as a LoKr if it is one."""
    tensors: dict[str, Tensor] = {}
    for name, one in layers.items():
        if lokr is not None and one.pair.kron is not None:
            pieces = lokr.pieces(name.removeprefix("base_model.model."), one.pair.kron)
            tensors |= {f"{name}.{piece}": _cast(value, dtype) for piece, value in pieces.items()}
            continue
        down, up = _cast(one.pair.down, dtype), _cast(one.pair.up, dtype)
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = up if down.dim() == 2 else up[:, :, None, None].contiguous()
        if one.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = one.magnitude
    listed = {name: {"rank": one.pair.rank, "alpha": one.pair.alpha} for name, one in layers.items()}
    _save(file, tensors, _header(layout, info, listed) | extra)


def _header(layout: str, info: AdapterInfo, layers: Mapping[str, Any]) -> dict[str, str]:
    base = {
        part: {
            "component": component,
            "digest": info.digests.get(part),
            "norms": info.norms.get(part, {}),
        }
        for part, component in info.base.items()
    }
    return {
        "format": "pt",
        "adapter": KIND,
        "version": "1",
        "layout": layout,
        "rank": json.dumps(info.rank),
        "alpha": json.dumps(info.alpha),
        "targets": json.dumps(list(info.targets)),
        "dora": json.dumps(info.dora),
        "layers": json.dumps(layers),
        "base": json.dumps(base),
        **(
            {} if info.distilled is None else {"distilled": info.distilled.model_dump_json(exclude_none=True)}
        ),
    }


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype or tensor.dtype)


def _save(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    whole = {**header, SEAL: seal(infos, tensors.__getitem__, header)}
    write_safetensors(file, infos, tensors.__getitem__, whole)


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
    """Write the adapter at ``source`` to the new ``folder`` in another ``layout``; returns it and the files.

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
    adapter = replace(adapter, info=replace(adapter.info, base=used))
    return adapter, write(folder, adapter, layout, parts, dtype)
