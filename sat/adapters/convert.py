"""An adapter from one layout to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sat.adapters.factors import AdapterError
from sat.adapters.files import Adapter, base_of, read
from sat.adapters.write import LAYOUTS, write
from sat.checkpoint.formats.diffusers import PLUS


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
