"""Trained state on disk, parameter by parameter, so that any ranks at any ZeRO stage can read it.

Each rank writes the flat pieces that it holds: float32 weights, averages, and the optimizer's state of each
element. A piece says where it begins in its parameter, so a reader takes from all files what its own share
needs; for parameters split over tensor ranks, the files say how they are cut. Other optimizer state (8-bit
blocks, factors of rows and columns) cannot be cut anew: it is written as it is, for the same layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat.checkpoint.format import CheckpointError, SafetensorsFile, TensorInfo, write_safetensors
from sat.checkpoint.verify import Written, digest_file
from sat.sharding import Cut
from sat.train.backend import Backend
from sat.train.optim import Ema

WEIGHT, AVERAGE, BUFFER = "weight", "average", "buffer"
_OPTIMIZER = "optimizer."  # before the optimizer's own name of what it keeps


@dataclass
class Share:
    """State that one rank writes.

    ``tensors``: flat pieces as ``kind/parameter``; ``starts``: index in the flat parameter at which they
    begin; ``cuts``: dimension and fused parts of parameters that are split over tensor ranks; ``numbers``:
    plain numbers of the optimizer for a parameter; ``uncut``: optimizer state that is not element by element,
    else None; ``scheduler``: state of a scheduler that a component makes; ``decays``: of the averages.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, tuple[int, int]] = field(default_factory=dict)
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)
    uncut: list[dict[str, Any]] | None = None
    scheduler: dict[str, Any] | None = None
    decays: list[float] = field(default_factory=list)

    def detached(self) -> Share:
        """Copy on the CPU that training does not change."""
        tensors = {name: _copied(value) for name, value in self.tensors.items()}
        uncut = None if self.uncut is None else [_copied_state(state) for state in self.uncut]
        return replace(self, tensors=tensors, uncut=uncut)

    def write(self, folder: Path, name: str) -> dict[str, Written]:
        """Write ``folder/shard_NAME.safetensors``, and ``optimizer_NAME.pt`` for state that is not cut.

        Beside them ``scheduler_NAME.pt``, if there is one. Returns the files by name.
        """
        notes = {
            "starts": self.starts, "cuts": self.cuts, "numbers": self.numbers, "scaler": self.scaler,
            "decays": self.decays,
        }  # fmt: skip
        file, whole = f"shard_{name}.safetensors", f"optimizer_{name}.pt"
        out: dict[str, Written] = {}
        out[file] = write_safetensors(
            folder / file,
            {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in self.tensors.items()},
            lambda key: self.tensors[key],
            {key: json.dumps(value) for key, value in notes.items()},
        )
        if self.uncut is not None:
            torch.save([_copied_state(state) for state in self.uncut], folder / whole)
            out[whole] = digest_file(folder / whole)
        if self.scheduler is not None:
            rates = f"scheduler_{name}.pt"
            torch.save(self.scheduler, folder / rates)
            out[rates] = digest_file(folder / rates)
        return out


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _copied_state(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def collect(engine: Backend, ema: Ema | None, *, cut: bool) -> Share:
    """State that this rank writes: views, nothing is copied. ``cut``: see :func:`cuttable`."""
    cuts = {name: (s.cut.dim, s.cut.parts) for name, s in engine.split.items() if name in engine.parameters}
    share = Share(scaler=engine.scaler, cuts=cuts, decays=[] if ema is None else ema.decays)
    first = engine.mesh.gradient.rank == 0
    if engine.config.zero == 0 and not first:  # all ranks have the same state
        return share
    for name, fragment in engine.fragments.items():
        share.tensors[f"{WEIGHT}/{name}"] = fragment.master
        share.starts[name] = fragment.start
        for place, average in enumerate([] if ema is None else ema.averages):
            share.tensors[f"{_average(place)}/{name}"] = average[name]
        for key, value in (engine.inner.state.get(fragment.key, {}) if cut else {}).items():
            if not isinstance(value, Tensor):
                share.numbers.setdefault(name, {})[key] = value
            elif value.ndim == 0:
                share.tensors[f"{_OPTIMIZER}{key}/{name}"] = value
            else:
                flat, end = value.detach().reshape(-1), fragment.offset + fragment.master.numel()
                share.tensors[f"{_OPTIMIZER}{key}/{name}"] = flat[fragment.offset : end]
    if not cut:
        share.uncut = [dict(engine.inner.state.get(key, {})) for key in _keys(engine)]
    if first:
        share.scheduler = None if engine.scheduler is None else engine.scheduler.state_dict()
        share.tensors |= {f"{BUFFER}/{name}": value for name, value in _buffers(engine)}
    return share


def _average(place: int) -> str:
    """Kind of the average of the decay at ``place``."""
    return f"{AVERAGE}_{place}" if place else AVERAGE


def cuttable(engine: Backend) -> bool:
    """True if this rank's optimizer keeps nothing but one number per element, or one for all elements."""
    for key in _keys(engine):
        for value in engine.inner.state.get(key, {}).values():
            if not isinstance(value, Tensor):
                fits = isinstance(value, (bool, int, float))
            else:
                plain = type(value) is Tensor and value.is_floating_point()
                fits = value.ndim == 0 or (plain and value.shape == key.shape)
            if not fits:
                return False
    return True


def _keys(engine: Backend) -> list[Tensor]:
    """Tensors that this rank's optimizer steps, each once."""
    return list({id(fragment.key): fragment.key for fragment in engine.fragments.values()}.values())


def _buffers(engine: Backend) -> Iterator[tuple[str, Tensor]]:
    """Buffers of the objective's state, by name."""
    for name, value in engine.objective.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
            yield name, value


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Piece:
    start: int
    length: int
    file: SafetensorsFile
    key: str


class Shards:
    """Files of one checkpoint written by all ranks with the tensor rank ``tensor_rank``."""

    def __init__(self, folder: Path, tensor_rank: int) -> None:
        self.folder = folder
        paths = sorted(folder.glob(f"shard_{tensor_rank:03d}_*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder} has no shard_{tensor_rank:03d}_*.safetensors: files are missing")
        self._pieces: dict[str, list[_Piece]] = {}
        self._kinds: dict[str, set[str]] = {}
        self.numbers: dict[str, dict[str, float]] = {}
        self.scaler: dict[str, float] = {}
        self.decays: list[float] = []  # none in older files, whose average has the kind of the first
        self.cuts: dict[str, Cut] = {}
        for path in paths:
            file = SafetensorsFile(path)
            starts = json.loads(file.metadata["starts"])
            self.cuts |= {
                name: Cut(*cut) for name, cut in json.loads(file.metadata.get("cuts", "{}")).items()
            }
            self.numbers |= json.loads(file.metadata["numbers"])
            self.decays = self.decays or json.loads(file.metadata.get("decays", "[]"))
            self.scaler = self.scaler or json.loads(file.metadata["scaler"])
            for key in file:
                kind, _, name = key.partition("/")
                self._kinds.setdefault(name, set()).add(kind)
                piece = _Piece(starts.get(name, 0), file.info(key).numel, file, key)
                self._pieces.setdefault(key, []).append(piece)

    def has(self, kind: str, name: str) -> bool:
        """True if the files hold ``kind`` for the parameter or buffer ``name``."""
        return kind in self._kinds.get(name, ())

    def kept(self, name: str) -> list[str]:
        """Names of the optimizer state kept for the parameter ``name``."""
        kinds = sorted(self._kinds.get(name, ()))
        return [kind.removeprefix(_OPTIMIZER) for kind in kinds if kind.startswith(_OPTIMIZER)]

    def first(self, kind: str, name: str) -> Tensor:
        """First piece, whole."""
        piece = self._pieces[f"{kind}/{name}"][0]
        return piece.file[piece.key]

    def fill(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """Read the values of the parameter ``name`` from ``start`` on into the flat ``target``."""
        end, filled = start + target.numel(), 0
        for piece in self._pieces.get(f"{kind}/{name}", ()):
            low, high = max(start, piece.start), min(end, piece.start + piece.length)
            if low < high:
                values = piece.file[piece.key].reshape(-1)[low - piece.start : high - piece.start]
                target[low - start : high - start].copy_(values)
                filled += high - low
        if filled < target.numel():
            raise CheckpointError(
                f"{self.folder} has {filled} of {target.numel()} values of {kind} {name!r}: files are missing"
            )


class Resplit(Shards):
    """Files of a checkpoint with another number of tensor ranks, or other layers split.

    Names and numbers are those of the first tensor rank; the others have the same.
    """

    def __init__(self, folder: Path, size: int, engine: Backend) -> None:
        super().__init__(folder, 0)
        self._ranks = [Shards(folder, rank) for rank in range(size)]
        self._split, self._whole = engine.split, engine.whole_shapes

    def fill(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """As :meth:`Shards.fill`, from this rank's share of the joined parameter."""
        cut, shard = self.cuts.get(name), self._split.get(name)
        if cut is None and shard is None:
            super().fill(target, kind, name, start)
            return
        shares = []
        for files in self._ranks if cut is not None else self._ranks[:1]:
            shape = self._whole[name] if cut is None else cut.part(self._whole[name], len(self._ranks))
            shares.append(torch.empty(shape, dtype=target.dtype))
            files.fill(shares[-1].view(-1), kind, name, 0)
        whole = shares[0] if cut is None else cut.join(shares)
        own = whole if shard is None else shard.take(whole)
        target.copy_(own.reshape(-1)[start : start + target.numel()])


@torch.no_grad()
def restore(engine: Backend, ema: Ema | None, folder: Path, *, cut: bool) -> list[int]:
    """Read weights, optimizer, averages and buffers from ``folder``; places of decays that it does not hold.

    A single average goes on with another decay; that of older files, which name none, is the first.
    """
    # By other tensor ranks, or with other layers split, the parameters are joined and cut anew.
    tensor_ranks = len({path.name.split("_")[1] for path in folder.glob("shard_*.safetensors")})
    own_cuts = {name: s.cut for name, s in engine.split.items() if name in engine.parameters}
    shards = Shards(folder, engine.mesh.tensor.rank if tensor_ranks == engine.mesh.tensor.size else 0)
    if tensor_ranks != engine.mesh.tensor.size or shards.cuts != own_cuts:
        shards = Resplit(folder, tensor_ranks, engine)

    for name, fragment in engine.fragments.items():
        shards.fill(fragment.master, WEIGHT, name, fragment.start)
    if cut:
        _restore_optimizer(engine, shards)
    else:
        path = folder / f"optimizer_{engine.shard_name}.pt"
        states = torch.load(path, map_location="cpu", weights_only=True)
        for key, state in zip(_keys(engine), states, strict=True):
            engine.inner.state[key] = {
                name: value.to(key.device) if isinstance(value, Tensor) and value.ndim else value
                for name, value in state.items()
            }
    for name, value in _buffers(engine):
        if shards.has(BUFFER, name):
            value.copy_(shards.first(BUFFER, name))
    engine.scaler = shards.scaler
    absent, known = list[int](), shards.decays
    for place, decay in enumerate([] if ema is None else ema.decays):
        assert ema is not None, "there are decays"
        kind = _average(known.index(decay) if decay in known else place)
        goes_on = place == 0 and (not known or len(known) == len(ema.decays) == 1)
        if not (decay in known or goes_on) or not all(shards.has(kind, name) for name in engine.parameters):
            absent.append(place)
            continue
        for name, average in ema.averages[place].items():
            shards.fill(average, kind, name, engine.fragments[name].start)
    engine.publish()
    return absent


def _restore_optimizer(engine: Backend, shards: Shards) -> None:
    """Fill the optimizer's state with this rank's share of what was kept for each parameter."""
    state = engine.inner.state
    # A count of steps lies beside the weights where a fused kernel reads it there, else on the CPU.
    beside = any(group.get("fused") or group.get("capturable") for group in engine.inner.param_groups)
    for key in _keys(engine):
        state[key] = {}
    for name, fragment in engine.fragments.items():
        key = fragment.key
        state[key] |= shards.numbers.get(name, {})
        for what in shards.kept(name):
            kind = f"{_OPTIMIZER}{what}"
            like = shards.first(kind, name)
            if like.ndim == 0:
                state[key][what] = like.to(key.device if beside else "cpu", copy=True)
                continue
            if what not in state[key]:
                state[key][what] = torch.zeros(key.shape, dtype=like.dtype, device=key.device)
            flat = state[key][what].view(-1)[fragment.offset : fragment.offset + fragment.master.numel()]
            shards.fill(flat, kind, name, fragment.start)
