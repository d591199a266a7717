"""Control files: safetensors of their own, whose header says the kind, the base and the picture they take.

The header has the component that builds the control, the component of the base it was trained on with norms
of some of its weights and a fingerprint of its files, the preprocessing of its picture, and digests of all
this and of every tensor. Tensors have the names of the control's own modules; matrices may be in 8 bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel as Record
from pydantic import ConfigDict, Json, ValidationError
from torch import Tensor, nn

from sat.adapters.factors import LinearLike, row_norms, some_norms, telling
from sat.adapters.merge import compare_norms
from sat.checkpoint.eight_bits import Whole, packed
from sat.checkpoint.files import open_file, open_folder
from sat.checkpoint.format import SEAL, CheckpointError, LazyStateDict, TensorInfo, seal, write_safetensors
from sat.checkpoint.formats import cogview4
from sat.checkpoint.load import Overflow, load
from sat.checkpoint.rules import KeyMap, Mapped, Source
from sat.checkpoint.verify import Verify
from sat.config.build import without_init
from sat.config.check import build, resolve, signature
from sat.config.schema import Component, plain
from sat.control.base import BaseModel, Control, ControlError
from sat.keys import Rename
from sat.transformer.transformer import Attention

KIND = "cogview3-control"
FILE = "control.safetensors"
_NAMES_ONLY = Verify("manifest")
_CONTROL = Rename(cogview4.FIRST, "zeros.weight")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControlInfo:
    """Description of a control. ``picture``: preprocessing that makes its picture of a plain one, or None.

    ``norms``: layer of the base -> norms of some rows of its weight.
    """

    control: Component
    base: Component
    picture: Component | None = None
    digest: str | None = None  # of the base's files
    norms: Mapping[str, list[float]] = field(default_factory=dict)
    imports: tuple[str, ...] = ()


class _Header(Record):
    """The header's own part, whose values are JSON."""

    model_config = ConfigDict(strict=True)
    control: Json[dict[str, Any]]
    base: Json[dict[str, Any]]
    picture: Json[dict[str, Any] | None]
    digest: Json[str | None]
    norms: Json[dict[str, list[float]]]
    imports: Json[list[str]]


def locate(path: Path) -> Path:
    """The control's file: ``path`` itself, of a folder the one in it, or of a training run the newest.

    Of diffusers' CogView4-Control the transformer's folder, half of whose first layer is the control.
    """
    if path.exists() and not path.is_dir():
        return path
    if published := cogview4.control_folder(path):
        return published
    if not path.is_dir():
        raise ControlError(f"{path}: no such control file or folder")
    for folder in (path, path / "native"):
        if (folder / FILE).is_file():
            return folder / FILE
    steps = sorted(marker.parent for marker in path.glob("checkpoints/step_*/COMPLETE"))
    if steps and (steps[-1] / "native" / FILE).is_file():
        return steps[-1] / "native" / FILE
    raise ControlError(f"{path}: holds no control: expected {FILE}, in it or in a run's checkpoints")


def is_control(path: Path) -> bool:
    """True if ``path`` holds a control alone: a file, its folder, or that of the run that trained it."""
    if cogview4.control_folder(path):
        return False
    try:
        with open_file(locate(path), verify=_NAMES_ONLY) as opened:
            return getattr(opened, "metadata", {}).get("kind") == KIND
    except (ControlError, CheckpointError):
        return False


def read_info(path: Path) -> ControlInfo:
    """The description in the header of a control file; no weights are read."""
    file = locate(path)
    if file.is_dir():
        network = Component(**cogview4.model(file / "config.json"))
        with open_folder(file, verify=_NAMES_ONLY) as theirs:
            own = theirs[cogview4.FIRST].chunk(2, 1)[0]  # of the network that it was trained with
            norms = {"transformer.mixins.patch_embed.proj": some_norms(row_norms(own))}
        return ControlInfo(Component("sat.control.light.concat", {}), network, norms=norms)
    with open_file(file, verify=_NAMES_ONLY) as opened:
        metadata: Mapping[str, str] = getattr(opened, "metadata", {})
    if "adapter" in metadata:
        raise ControlError(f"{file}: is an adapter, not a control: give it by --lora (adapters.load)")
    if metadata.get("kind") != KIND:
        raise ControlError(
            f"{file}: is no control file of this project: its header names no control (kind {KIND})"
        )
    if metadata.get("version") != "1":
        raise ControlError(f"{file}: version {str(metadata.get('version'))[:20]}; this code reads version 1")
    try:
        header = _Header.model_validate(dict(metadata))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(map(str, first["loc"]))[:80]
        raise CheckpointError(f"{file}: its header is damaged at {at!r}; copy the file again") from error
    picture = None if header.picture is None else _component(header.picture, file)
    control, base = _component(header.control, file), _component(header.base, file)
    return ControlInfo(control, base, picture, header.digest, header.norms, tuple(header.imports))


def _component(tree: Mapping[str, Any], file: Path) -> Component:
    target, params = tree.get("target"), tree.get("params") or {}
    if not isinstance(target, str) or not isinstance(params, dict):
        raise CheckpointError(f"{file}: its header is damaged at {str(tree)[:80]!r}; copy the file again")
    return Component(target, params)


def check_fits(info: ControlInfo, model: Component, path: Path, imports: Collection[str] = ()) -> None:
    """Refuse a control of another network than ``model``, by what both were built with; no weights needed."""
    theirs, ours = info.base.target.rpartition(".")[2], model.target.rpartition(".")[2]
    if theirs != ours:
        raise ControlError(f"{path}: is a control of {theirs}, this model is {ours}: another model")
    left = {"mixins": None, "guidance_dim": None, "zero_init": None}
    defaults = signature(resolve(model.target, imports)).defaults
    told, have = (plain({**defaults, **one.params, **left}) for one in (info.base, model))
    differ = [name for name in sorted({*told, *have}) if told.get(name) != have.get(name)]
    if differ:
        name = differ[0]
        raise ControlError(
            f"{path}: is a control of a model with {name} {told.get(name)}, this model has {have.get(name)}: "
            f"another model"
        )


def empty(path: Path, base: BaseModel) -> tuple[Control, ControlInfo]:
    """The control at ``path`` for ``base`` without its weights, from its header alone."""
    info = read_info(path)
    check_fits(info, base.component, path, base.imports)
    with torch.device("meta"), without_init():
        control: Control = build(info.control, imports=_allowed(info, base.imports, locate(path)), base=base)
    return control, info


def read(path: Path, base: BaseModel, verify: Verify | None = None) -> tuple[Control, ControlInfo]:
    """The control at ``path`` for ``base``, on its device and in its type; of a split base a rank's share."""
    file, here = locate(path), next(iter(base.network.parameters()))
    control, info = empty(path, base)
    with opened(file, verify or Verify()) as tensors:
        if not here.is_meta:
            load(control, tensors, "model", device=here.device, dtype=here.dtype)
    compare_norms(str(path), info.norms, base.network)
    return control, info


def opened(file: Path, verify: Verify) -> LazyStateDict:
    """Tensors of a control by the names of its modules, those of 8 bits made whole in float32."""
    if not file.is_dir():
        return Whole(open_file(file, verify=verify))
    theirs = open_folder(file, verify=verify)
    half = theirs.info(cogview4.FIRST).shape[1] // 2
    changed = cogview4.FirstLayer(theirs, half, lambda weight: weight[:, half:].contiguous())
    return Mapped(changed, KeyMap({"zeros.weight": Source((cogview4.FIRST,), _CONTROL)}), write=False)


def _allowed(info: ControlInfo, imports: Collection[str], file: Path) -> Collection[str]:
    """Modules that the control's class may lie in: the run's own; a file cannot allow itself code."""
    if missing := [name for name in info.imports if name not in imports]:
        raise ControlError(
            f"{file}: its control is a class outside this project: name its module in the config, "
            f"imports: [{', '.join(missing)}], if you trust it"
        )
    resolve(info.control.target, imports)
    return imports


def write(
    file: Path,
    tensors: Mapping[str, Tensor],
    info: ControlInfo,
    dtype: torch.dtype | None = None,
    exact: Collection[str] = (),
) -> None:
    """Write a control's ``tensors``, whole ones by the names of its modules, with all that is known of it.

    ``dtype`` None keeps theirs; int8 writes matrices in 8 bits (:mod:`sat.checkpoint.eight_bits`), vectors
    in bf16. Tensors named in ``exact``, such as tables, are written as they are.
    """
    cast = {n: t.detach() for n, t in tensors.items()}
    narrow = {n: t for n, t in cast.items() if n not in exact and t.is_floating_point()}
    if dtype == torch.int8:
        vectors = {n: t.bfloat16() for n, t in narrow.items() if t.ndim < 2}
        cast = {n: t for n, t in cast.items() if n not in narrow} | packed(narrow | vectors)
    elif dtype is not None:
        cast |= narrowed(narrow, dtype, str(file))
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in cast.items()}
    header = {
        "format": "pt",
        "kind": KIND,
        "version": "1",
        "control": json.dumps(plain(info.control)),
        "base": json.dumps(plain(info.base)),
        "picture": json.dumps(None if info.picture is None else plain(info.picture)),
        "digest": json.dumps(info.digest),
        "norms": json.dumps(info.norms),
        "imports": json.dumps(list(info.imports)),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(file, infos, cast.__getitem__, {**header, SEAL: seal(infos, cast.__getitem__, header)})


def narrowed(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, source: str) -> dict[str, Tensor]:
    """``tensors`` of ``source`` as ``dtype`` (None: as they are); values beyond its range are refused."""
    overflow = Overflow()
    made = {n: t if dtype is None else overflow.cast(n, t, dtype) for n, t in tensors.items()}
    overflow.check(source)
    return made


def telling_layers(network: nn.Module) -> Iterator[tuple[str, LinearLike]]:
    """A few layers of a network whose weights' norms tell it from others of the same shapes."""
    named = {
        f"{path}.qkv": module.qkv
        for path, module in network.named_modules()
        if isinstance(module, Attention) and ".mixins." not in f".{path}"
    }
    yield from ((name, named[name]) for name in telling(named))  # type: ignore[misc]


def fingerprint(network: nn.Module) -> dict[str, list[float]]:
    """Norms of some rows of some weights of ``network``, whole on this rank."""
    return {name: some_norms(row_norms(layer.weight)) for name, layer in telling_layers(network)}
