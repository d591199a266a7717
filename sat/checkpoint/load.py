"""Strict, streaming loading: every name is used exactly once, one tensor is in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from sat.checkpoint.format import (
    ENGINE_PREFIXES,
    CheckpointError,
    LazyStateDict,
    Part,
    TensorInfo,
    as_lazy,
    listing,
)
from sat.checkpoint.formats import open_part
from sat.checkpoint.ranks import RankFiles
from sat.checkpoint.rules import Matched, best_layout, family_rules
from sat.checkpoint.verify import Verify
from sat.sharding import Shard, Splits, family_sharding
from sat.util.host import trim_heap

logger = logging.getLogger(__name__)


@runtime_checkable
class Computes(Protocol):
    """A module with buffers that files may leave out, such as position tables."""

    def computed(self) -> dict[str, Tensor]:
        """Their values, by local name."""
        ...


@runtime_checkable
class Adopts(Protocol):
    """A layer that takes its size from the checkpoint it is filled with."""

    def adopt(self, shape: tuple[int, ...]) -> None:
        """Change to the ``shape`` of the weight that is found, before it is compared."""
        ...


class Replaces(Protocol):
    """Puts other modules in the place of some as they are filled, such as quantised layers."""

    def replaces(self, module: nn.Module, tensor: str) -> bool:
        """True if :meth:`placed` needs the values of ``tensor`` for a moment only."""
        ...

    def placed(self, module: nn.Module, tensor: str) -> None:
        """Told of each tensor of ``module`` that has just got its values, by name."""
        ...


TRIM = 1 << 27
"""Bytes that are read before what was freed on the way goes back to the system."""
GUIDANCE = "guidance.weight"
"""Tensor of distilled weights only."""


@dataclass(frozen=True)
class LoadReport:
    """Outcome of loading a part. Lists hold our names, except ``ignored``: names in the file."""

    source: str
    layout: str  # NATIVE, SAT, DIFFUSERS or HF
    loaded: int
    missing: list[str] = field(default_factory=list)  # absent and allowed to be
    computed: list[str] = field(default_factory=list)  # not in this layout: the module's own value stays
    unexpected: list[str] = field(default_factory=list)  # in the file without a place, and allowed to be
    ignored: list[str] = field(default_factory=list)  # of other parts, or dropped by a rule

    def __str__(self) -> str:
        extra = {name: len(getattr(self, name)) for name in ("missing", "computed", "unexpected", "ignored")}
        notes = "".join(f", {count} {name}" for name, count in extra.items() if count)
        return f"{self.source}: {self.loaded} tensors loaded ({self.layout}{notes})"


def load(  # noqa: PLR0913 - where from, where to, and what may be missing
    module: nn.Module,
    source: Path | str | Mapping[str, Tensor],
    part: Part,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    allow_pickle: bool = False,
    replacing: Replaces | None = None,
    verify: Verify | None = None,
) -> LoadReport:
    """Fill ``module`` with the weights of ``part`` at ``source`` (a path in any format, or tensors by name).

    The module may be on the meta device; each tensor is read, cast, moved to ``device`` and released before
    the next, so that host memory holds the result and one tensor. Of a layer that is split over tensor ranks
    (:class:`sat.sharding.Splits`) the file holds the whole tensor, and this rank's share is read. ``dtype``
    is for floating-point parameters; buffers keep their own. None keeps the module's (a meta module goes to
    the CPU). ``allow_missing`` and ``allow_unexpected`` are shell patterns over our names and the file's.
    ``replacing`` may put another module in a tensor's owner's place as soon as that has its values, which are
    not copied for it. ``verify`` says how files are checked (all of them, by this process); a damaged one is
    refused before the module is returned, and so are values that are not finite in files without digests.
    """
    verify = verify or Verify()
    with ExitStack() as stack:
        if verify.size > 1:
            stack.enter_context(verify.together())
        if isinstance(source, str | Path):
            theirs = stack.enter_context(open_part(source, part, allow_pickle=allow_pickle, verify=verify))
        else:
            theirs = as_lazy(source)
        try:
            found = match(
                module, theirs, part, allow_missing=allow_missing, allow_unexpected=allow_unexpected
            )
            target = _Target(module, device, dtype)
            target.fill(found.view, replacing, finite=verify.mode == "full" and not theirs.digested)
            target.finish(found.missing)
        except Exception:
            theirs.verified()  # damage explains whatever came of it
            raise
        theirs.verified()
    trim_heap()  # of what was cast and quantised on the way
    lists = (found.missing, found.computed, found.unexpected, found.ignored)
    report = LoadReport(theirs.source, found.layout, len(found.view), *lists)
    logger.debug("%s: %s", part, str(report))
    return report


def match(  # noqa: C901 - one problem after the other
    module: nn.Module,
    theirs: LazyStateDict,
    part: Part,
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Matched:
    """``theirs`` matched to ``module`` by names and shapes alone; an error lists all that is wrong."""
    expected, layouts = wanted(module), family_rules(type(module))
    if isinstance(theirs, RankFiles) and "SAT" in layouts:
        sharding = family_sharding(type(module))
        theirs = theirs.merged(expected, sharding, layouts["SAT"], ENGINE_PREFIXES[part])
    found = best_layout(theirs, expected, layouts, part)
    for name, layer in module.named_modules():
        if isinstance(layer, Adopts) and f"{name}.weight" not in found.missing:
            layer.adopt(found.view.info(f"{name}.weight").shape)
            expected = wanted(module)
    missing = [name for name in found.missing if not _any(name, allow_missing)]
    unexpected = [name for name in found.unexpected if not _any(name, allow_unexpected)]
    misshapen = [
        f"{name!r} is {list(shape)}, the model has {list(expected[name].shape)}"
        for name in found.view
        if (shape := found.view.info(name).shape) != expected[name].shape
    ]
    what = type(module).__name__
    if not len(found.view):
        raise CheckpointError(
            f"{theirs.source}: none of its {len(theirs)} names belongs to {what}, "
            f"the first are {listing(list(theirs))}; is it the {part} part of this model?"
        )
    problems = []
    odd = [
        f"{name!r} is {str(is_)[6:]}, the model has {str(has)[6:]}"
        for name in found.view
        if (has := expected[name].dtype).is_floating_point
        and not (is_ := found.view.info(name).dtype).is_floating_point
    ]
    if odd:
        problems.append(
            f"{len(odd)} of another kind of number: {'; '.join(odd[:3])}{' …' if odd[3:] else ''}"
        )
    if missing:
        problems.append(f"{len(missing)} missing: {listing([found.their_name(name) for name in missing])}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {listing(unexpected)}")
    if misshapen:
        more = " …" if len(misshapen) > 3 else ""
        problems.append(f"{len(misshapen)} misshapen: {'; '.join(misshapen[:3])}{more}")
    embedding = [name for name in unexpected if name.endswith((GUIDANCE, "w_proj.weight"))]
    if embedding and len(embedding) == len(unexpected) and not missing:
        advice = "distilled weights: use a distilled model's config (model.params.guidance_dim)"
        problems.append(f"these are {advice}")
    elif missing == [GUIDANCE] and not unexpected:
        advice = "not distilled: use the undistilled model's config (no guidance_dim)"
        problems.append(f"these weights are {advice}")
    elif unexpected and len(problems) == 1:
        first = unexpected[0].partition(".")[0] + "."
        if [name for name in theirs if name.startswith(first)] == unexpected:  # nothing else is called so
            what = "these are averages of a training: " if first == "model_ema." else ""
            problems.append(f"{what}checkpoint.allow_unexpected=['{first}*'] in the config leaves them out")
    if problems:
        names = f"({found.layout} names)"
        raise CheckpointError(f"{theirs.source}: does not fit {what} {names}: {'; '.join(problems)}")
    return found


def shards(module: nn.Module) -> dict[str, Shard]:
    """Shares in ``module`` by the full name of the tensor."""
    return {
        f"{path}.{name}" if path else name: shard
        for path, layer in module.named_modules()
        if isinstance(layer, Splits)
        for name, shard in layer.shards().items()
    }


def wanted(module: nn.Module) -> dict[str, TensorInfo]:
    """The tensors of ``module`` as a file holds them: whole, also where the module has a share."""
    split = shards(module)
    return {
        name: TensorInfo(split[name].whole(t.shape) if name in split else tuple(t.shape), t.dtype)
        for name, t in module.state_dict(keep_vars=True).items()
    }


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def refuse_not_finite(tensor: Tensor, name: str, source: str) -> None:
    """Raise if a value of ``tensor`` is NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise CheckpointError(
            f"{source}: {name!r} holds values that are not finite (NaN or infinite): damaged, or of a "
            f"training that diverged; copy or download it again"
        )


class Overflow:
    """Collects tensors whose values do not fit the wanted type, to refuse them together."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._dtype: torch.dtype | None = None

    def cast(self, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """``tensor`` as ``dtype``; finite values that became infinite are remembered under ``key``."""
        cast = tensor.to(dtype)
        if not dtype.is_floating_point or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
            return cast
        if tensor.numel():  # mostly the extremes tell, without maps of the tensor's size
            low, high = torch.aminmax(tensor)
            if max(-float(low), float(high)) <= torch.finfo(dtype).max:
                return cast
        lost = cast.isinf() & tensor.isfinite()
        if bool(lost.any()):
            self._dtype = dtype
            self._found.append(f"{key!r} ({float(tensor[lost].abs().max()):.4g})")
        return cast

    def check(self, source: str) -> None:
        """Raise if anything was remembered."""
        if self._dtype is None:
            return
        more = f" and {len(self._found) - 5} more" if len(self._found) > 5 else ""
        shown = ", ".join(self._found[:5]) + more
        raise CheckpointError(
            f"{source}: {len(self._found)} tensors hold values beyond the range of {str(self._dtype)[6:]} "
            f"(largest {torch.finfo(self._dtype).max:.0f}): {shown}; use bf16 or fp32"
        )


class _Target:
    """The module being filled."""

    def __init__(
        self, module: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        self._module = module
        self._device = None if device is None else torch.device(device)
        self._dtype = dtype
        self._shards = shards(module)
        # id of a replaced parameter -> its replacement, for tied ones, while something else keeps that
        self._shared: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def fill(
        self,
        view: LazyStateDict,
        replacing: Replaces | None = None,
        finite: bool = False,
    ) -> None:
        """Read, cast and place every tensor of ``view``; ``replacing`` is told of each.

        With ``finite``, parameters whose values are not are refused.
        """
        overflow, freed = Overflow(), 0
        for name in view:
            path, _, local = name.rpartition(".")
            owner = self._module.get_submodule(path)
            old: Tensor = getattr(owner, local)
            shard = self._shards.get(name)
            tensor = view[name] if shard is None else shard.take(view[name])
            if finite and isinstance(old, nn.Parameter):
                refuse_not_finite(tensor, name, view.source)
            cast = overflow.cast(name, tensor, self._wanted(old))
            fresh, tensor = cast.dtype != tensor.dtype, cast
            fresh |= replacing is not None and replacing.replaces(self._module, name)
            self._place(owner, local, old, tensor, fresh=fresh)
            freed += tensor.nbytes
            del tensor, cast  # with the window on the file, before more is made of the values
            if replacing is not None:
                replacing.placed(self._module, name)
            view.release(name)
            if freed > TRIM:  # glibc's holes of one aligned tensor are too small for the next
                trim_heap()
                freed = 0
        overflow.check(view.source)

    def finish(self, missing: Sequence[str]) -> None:
        """Give values to tensors that no file holds; one that still has none is an error."""

        def tensors(module: nn.Module, recurse: bool) -> list[tuple[str, Tensor]]:
            named = (module.named_parameters, module.named_buffers)
            return [pair for kind in named for pair in kind(recurse=recurse, remove_duplicate=False)]

        for owner in self._module.modules():
            if any(tensor.is_meta for _, tensor in tensors(owner, False)):
                self._initialise(owner)
            for local, tensor in tensors(owner, False):
                if not tensor.is_meta and self._moves(tensor):
                    self._place(owner, local, tensor, tensor.detach())
        left = [name for name, tensor in tensors(self._module, True) if tensor.is_meta]
        if left:
            why = "allowed to be missing, but" if set(left) & set(missing) else "not in the file, and"
            raise CheckpointError(
                f"{len(left)} tensors of {type(self._module).__name__} are {why} it cannot compute them "
                f"itself: {listing(left)}; build it on a real device or give the weights"
            )

    def _initialise(self, owner: nn.Module) -> None:
        """Let ``owner`` make its values: computed buffers, then parameters if none came from the file."""
        if isinstance(owner, Computes):
            for local, tensor in owner.computed().items():
                old = getattr(owner, local)
                if old.is_meta:
                    self._place(owner, local, old, tensor)
        parameters = dict(owner.named_parameters(recurse=False))
        reset = getattr(owner, "reset_parameters", None)
        if callable(reset) and parameters and all(p.is_meta for p in parameters.values()):
            device = self._device or torch.device("cpu")
            for local, old in parameters.items():
                self._place(owner, local, old, torch.empty_like(old, dtype=self._wanted(old), device=device))
            reset()

    def _wanted(self, old: Tensor) -> torch.dtype:
        cast = self._dtype is not None and isinstance(old, nn.Parameter) and old.dtype.is_floating_point
        return self._dtype if cast and self._dtype is not None else old.dtype

    def _moves(self, old: Tensor) -> bool:
        return (self._device is not None and old.device != self._device) or old.dtype != self._wanted(old)

    def _place(
        self, owner: nn.Module, local: str, old: Tensor, tensor: Tensor, *, fresh: bool = False
    ) -> None:
        """Copy into ``old`` where it can stay, else put a new tensor there; never keep a window on a file.

        A ``fresh`` tensor is nobody else's, or is wanted for a moment, and need not be copied.
        """
        if not old.is_meta and not self._moves(old):
            with torch.no_grad():
                old.copy_(tensor)
            return
        if (tied := self._shared.get(id(old))) is not None:
            setattr(owner, local, tied)
            return
        device = self._device or (torch.device("cpu") if old.is_meta else old.device)
        new = tensor.to(device=device, dtype=self._wanted(old), copy=not fresh).contiguous()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)  # marks such as tensor_model_parallel
            owner._parameters[local] = new
        else:
            owner._buffers[local] = new
        self._shared[id(old)] = new
