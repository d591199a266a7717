"""A pretended accelerator on the CPU: torch as it looks with GPUs, for code that runs on real tensors.

Every tensor's storage carries a tag, the CPU's or the accelerator's; data and arithmetic stay on the CPU, so
values are real and autograd works. :class:`Watch` sees every operator and notes, each with the line of the
project that asked for it:

* ``mixing``    an operator over tensors of two devices, which a GPU refuses
* ``sync``      a wait of the host for the device: ``.item()``, boolean masks, copies out of ordinary memory
* ``transfer``  a copy between host and device that is neither pinned nor asynchronous
* ``race``      an asynchronous copy to the host, read without a wait
* ``hoistable`` an operator or allocation in a step whose inputs no step changes

and counts launches: operators of a step that make or change something on the device.

Limits: layouts of results are the CPU's, apart from attention's; streams run in the order of the program.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.trace_rules  # while torch is itself: it keeps torch's functions
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

ROOT = Path(__file__).parents[2]
HERE = str(Path(__file__).resolve())
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
_real_device = torch.Tensor.device  # type: ignore[attr-defined]

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount"}
INDEXED = {"index", "index_put_", "_index_put_impl_", "index_put"}
MAY_MIX = {"copy_", "_to_copy", "_foreach_copy_", "set_", "detach", "is_same_size", *INDEXED}
RANDOM = ("rand", "normal", "bernoulli", "native_dropout", "multinomial")
EMPTY = {"empty", "empty_like", "new_empty", "empty_strided"}
LARGE = 1 << 16
"""Bytes from which empty memory made anew in each step counts as an allocation."""


def _key(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None


class Tags:
    """Devices that storages pretend to be on, and which of them are pinned."""

    def __init__(self) -> None:
        self._on: dict[int | None, StorageWeakRef] = {}
        self._pinned: dict[int | None, StorageWeakRef] = {}

    def of(self, tensor: Tensor) -> torch.device:
        real = _real_device.__get__(tensor)
        if real.type != "cpu":
            return real
        found = self._on.get(_key(tensor))
        return CPU if found is None or found.expired() else GPU

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        if _real_device.__get__(tensor).type == "cpu":
            if device.type == "cpu":
                self._on.pop(_key(tensor), None)
            else:
                self._on[_key(tensor)] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def pin(self, tensor: Tensor) -> Tensor:
        self._pinned[_key(tensor)] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def pinned(self, tensor: Tensor) -> bool:
        found = self._pinned.get(_key(tensor))
        return found is not None and not found.expired()


def _device(x: Any) -> torch.device | None:
    if x is None:
        return None
    x = torch.device(x) if not isinstance(x, torch.device) else x
    return GPU if x.type == "cuda" else x


class Watch(TorchDispatchMode):
    """Tags the results of every operator, and notes what a GPU would mind.

    ``notes``: (kind, line of the project, what, in a step?) -> times. ``launches``: step -> number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tags = Tags()
        self.notes: Counter[tuple[str, str, str, bool]] = Counter()
        self.launches: Counter[int] = Counter()
        self.attention: Counter[str] = Counter()  # kernels asked for first, in steps
        self.step = -1  # -1: not in a step
        self.on = self.loop = False
        self._fixed: dict[int | None, StorageWeakRef] = {}
        self._varies: set[int | None] = set()

    def note(self, kind: str, what: str) -> None:
        if self.on:
            self.notes[kind, _where(), what, self.step >= 0] += 1

    def found(self, kind: str, *, in_step: bool = True) -> list[str]:
        """Lines about one kind of notes, in steps or outside of them."""
        return [
            f"{where}: {what}, {n} times"
            for (which, where, what, stepping), n in self.notes.items()
            if which == kind and stepping == in_step
        ]

    def begin(self, *varying: Tensor) -> None:
        """A loop begins: everything that is there now is fixed, but for ``varying``."""
        self.loop, self._varies, self._fixed = True, set(), {}
        self.vary(*varying)

    def vary(self, *tensors: Tensor) -> None:
        self._varies |= {_key(tensor) for tensor in tensors}

    def end(self) -> None:
        self.loop, self.step = False, -1

    def __torch_dispatch__(  # noqa: C901 - one check after the other
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        wanted = _device(kwargs.get("device"))
        if wanted == torch.device("meta") or any(_real_device.__get__(t).type == "meta" for t in tensors):
            if wanted != GPU:
                return func(*args, **kwargs)
            return self.tags.put(func(*args, **{**kwargs, "device": CPU}), GPU)  # memory like a meta tensor
        if tensors and wanted is not None and torch._C._current_graph_task_id() >= 0:
            wanted = self.tags.of(tensors[0])  # autograd names the device that data is really on
        if "device" in kwargs:
            kwargs["device"] = CPU
        pins = kwargs.get("pin_memory", False)
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        places = [self.tags.of(t).type for t in tensors]
        on = "cuda" in places or (wanted is not None and wanted.type == "cuda")
        if len(tensors) > 1 and name not in MAY_MIX:
            self._mixing(name, tensors, places)
        before = {_key(t) for t in tensors}
        if name == "copy_" and len(tensors) > 1:
            later = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self.transfer(tensors[1], tensors[0], later)
        if name == "_foreach_copy_":
            for to, source in zip(args[0], args[1], strict=True):
                self.transfer(source, to, False)
        if name in WAITS and "cuda" in places:
            self.note("sync", name)
        if on and name in INDEXED:
            indices = [i for i in (args[1] if len(args) > 1 else ()) if isinstance(i, Tensor)]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.note("sync", f"{name} by a boolean mask")
            elif any(self.tags.of(i).type == "cpu" for i in indices):
                self.note("sync", f"{name} by indices on the CPU")
        out = func(*args, **kwargs)
        target = wanted
        if target is None:  # scalars on the CPU may go with tensors of the device
            wide = [p for t, p in zip(tensors, places, strict=True) if t.dim()] or places
            target = GPU if "cuda" in wide else CPU
        outs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        for tensor in outs:
            if wanted is not None or _key(tensor) not in before:
                self.tags.put(tensor, target)
                if pins:
                    self.tags.pin(tensor)
        if name == "_to_copy" and wanted is not None and tensors:
            self.transfer(tensors[0], outs[0], kwargs.get("non_blocking", False))
        if on:
            written = [
                tensor
                for place, info in enumerate(func._schema.arguments)
                if info.alias_info is not None and info.alias_info.is_write
                for tensor in tree_flatten(args[place] if place < len(args) else kwargs.get(info.name))[0]
                if isinstance(tensor, Tensor)
            ]
            self._judge(name, tensors, written, [t for t in outs if _key(t) not in before])
        return out

    def _mixing(self, name: str, tensors: list[Tensor], places: list[str]) -> None:
        wide = {place for tensor, place in zip(tensors, places, strict=True) if tensor.dim()}
        scalars = wide == {"cpu"} and "cuda" in places
        if len(wide) > 1 or scalars or (name in ("cat", "stack") and len(set(places)) > 1):
            shapes = [f"{p} {list(t.shape)}" for t, p in zip(tensors, places, strict=True)][:4]
            self.note("mixing", f"{name} of {', '.join(shapes)}")

    def transfer(self, source: Tensor, to: Tensor, later: bool) -> None:
        """A copy; ``later``: asynchronous."""
        way, target = self.tags.of(source).type, self.tags.of(to).type
        if way == target:
            return
        what = f"{'' if later else 'blocking '}copy to {target} of {list(source.shape)}"
        if target == "cpu" and later:
            self.note("race", what)
        elif target == "cpu" or not (later and self.tags.pinned(source)):
            self.note("sync", f"{what}, {'pinned' if self.tags.pinned(source) else 'not pinned'}")
            self.note("transfer", what)

    def _judge(self, name: str, tensors: list[Tensor], written: list[Tensor], new: list[Tensor]) -> None:
        """Count a launch, and note results that are the same in every step."""
        if self.step >= 0 and (new or written) and name not in EMPTY:
            self.launches[self.step] += 1
        if not self.loop:
            return
        if written:
            for tensor in written:
                self._fixed.pop(_key(tensor), None)
                self._varies.add(_key(tensor))
            return
        fixed = not name.startswith(RANDOM) and all(map(self._is_fixed, tensors))
        size = sum(t.numel() * t.element_size() for t in new)
        if new and fixed and self.step >= 1 and (name not in EMPTY or size >= LARGE):
            self.note("hoistable", f"{name} of {[list(t.shape) for t in tensors]}")
        for tensor in new:
            if fixed and name not in EMPTY:
                self._varies.discard(_key(tensor))
                self._fixed[_key(tensor)] = StorageWeakRef(tensor.untyped_storage())
            else:
                self._varies.add(_key(tensor))

    def _is_fixed(self, tensor: Tensor) -> bool:
        if _key(tensor) in self._varies:
            return False
        entry = self._fixed.get(_key(tensor))
        return entry is None or not entry.expired()

    def move(self, tensor: Tensor, device: torch.device, later: bool, copy: bool = False) -> Tensor:
        """``tensor`` on another device, noted."""
        if self.tags.of(tensor) == device and not copy:
            return tensor
        with _disable_current_modes():
            out = (
                tensor.clone()
                if torch.is_grad_enabled() and tensor.requires_grad
                else tensor.detach().clone()
            )
        self.tags.put(out, device)
        self.transfer(tensor, out, later)
        if self.loop:
            self.vary(out)  # taken to be another at each step
        return out


def _where() -> str:
    """The project's line that is running, innermost first."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != HERE and name.startswith(f"{ROOT}/") and "site-packages" not in name:
            backward = "backward pass from " if torch._C._current_graph_task_id() >= 0 else ""
            return f"{backward}{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward pass"


def faults(watch: Watch, launches: int, allowed: Mapping[str, int] | None = None) -> list[str]:
    """Everything that a GPU would mind in the loop; empty if nothing.

    ``launches``: most a step. ``allowed``: hoistable operators a step, by the file that asks for them.
    """
    out = [f"{kind}: {line}" for kind in ("mixing", "race", "sync", "transfer") for line in watch.found(kind)]
    out += [f"mixing, outside of steps: {line}" for line in watch.found("mixing", in_step=False)]
    made: Counter[str] = Counter()
    for (kind, where, _, stepping), times in watch.notes.items():
        made[where.rpartition(" ")[2].partition(":")[0]] += times * (kind == "hoistable" and stepping)
    steps = len(watch.launches)
    over = {file for file, times in made.items() if times > (allowed or {}).get(file, 0) * steps}
    lines = watch.found("hoistable")
    out += [f"hoistable: {line}" for line in lines if any(f"{file}:" in line for file in over)]
    if (most := max(watch.launches.values())) > launches:
        out.append(f"launches: {most} a step, more than {launches}")
    return out


# -- torch as it looks with one GPU


class Event:
    """An event of a stream on which work runs in the order of the program."""

    def record(self, *_: Any) -> Event:
        return self

    def query(self) -> bool:
        return True

    def wait(self, *_: Any) -> None: ...


class Stream:
    """A stream; waiting for an event that was never recorded is refused."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event | None) -> None:
        assert event is not None, "waits for an event that was never recorded"

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


@contextmanager
def pretended(capability: tuple[int, int] = (9, 0)) -> Iterator[Watch]:  # noqa: C901 - one patch after the other
    """One accelerator inside the block, watched; torch is as before after it."""
    watch = Watch()
    stream, name = Stream(), "Pretended"
    about = types.SimpleNamespace(name=name, major=capability[0], minor=capability[1], total_memory=141 << 30)
    cuda = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "is_initialized": lambda: True,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda d: None,
        "get_device_capability": lambda d=None: capability, "get_device_name": lambda d=None: name,
        "get_device_properties": lambda d=None: about, "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda d=None: watch.note("sync", "torch.cuda.synchronize"),
        "max_memory_allocated": lambda d=None: 0, "reset_peak_memory_stats": lambda d=None: None,
        "max_memory_reserved": lambda d=None: 0, "mem_get_info": lambda d=None: (100 << 30, 141 << 30),
        "manual_seed": lambda s: None, "manual_seed_all": lambda s: None,
        "is_bf16_supported": lambda *a, **k: True, "Stream": Stream, "Event": Event,
        "current_stream": lambda d=None: stream, "default_stream": lambda d=None: stream,
        "stream": lambda s: nullcontext(), "device": lambda d: nullcontext(),
    }  # fmt: skip
    to, tolist, numpy = torch.Tensor.to, torch.Tensor.tolist, torch.Tensor.numpy
    attention = F.scaled_dot_product_attention
    asked: list[Any] = []

    @functools.wraps(to)
    def moved(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            device, dtype, later, layout = watch.tags.of(args[0]), args[0].dtype, False, None
            later = kwargs.get("non_blocking", False)
        else:
            device, dtype, later, layout = torch._C._nn._parse_to(*args, **kwargs)
        if "meta" in (_real_device.__get__(t).type, device and device.type):
            return to(t, *args, **kwargs)
        out = t
        if layout is not None or dtype not in (None, t.dtype):
            out, copy = (
                to(out, dtype or t.dtype, **({} if layout is None else {"memory_format": layout})),
                False,
            )
        if device is not None:
            out = watch.move(out, _device(device) or CPU, later, copy)
        return out.clone() if copy and out is t else out

    def made(make: Any) -> Any:
        @functools.wraps(make)
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            device = _device(kwargs.pop("device", None))
            out: Tensor = make(*args, **kwargs)
            if watch.loop and out is not (args or (None,))[0]:
                watch.vary(out)
            return out if device is None or device.type == "meta" else watch.move(out, device, False)

        return wrapped

    def read(method: Any, what: str) -> Any:
        def wrapped(t: Tensor, *args: Any, **kwargs: Any) -> Any:
            if watch.tags.of(t).type == "cuda":
                watch.note("sync", what)
            return method(t, *args, **kwargs)

        return wrapped

    @contextmanager
    def kernels(backends: Any, set_priority: bool = False) -> Iterator[None]:
        asked.append(backends)
        yield
        asked.pop()

    def attend(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        """Results lie as a GPU's kernels lay them out: (B, L, H, d) in memory."""
        if watch.tags.of(q).type == "cpu":
            return attention(q, k, v, **kwargs)
        names = [one.name for one in asked[-1]] if asked else ["torch's choice"]
        if watch.step >= 0:
            watch.attention[f"{names[0]} {str(q.dtype)[6:]}"] += 1
        out = attention(q, k, v, **kwargs)
        with _disable_current_modes():
            turned = out.detach().transpose(1, 2).contiguous().transpose(1, 2)
        if out.requires_grad:
            return out
        if not watch._is_fixed(out):
            watch.vary(turned)
        return watch.tags.put(turned, GPU)

    import sat.kernels.attention as ours

    newer: Any = nullcontext()
    if hasattr(torch, "accelerator"):  # since torch 2.6
        newer = patch.object(torch.accelerator, "current_stream", lambda d=None: stream)
    with patch.multiple(torch.cuda, **cuda), \
         newer, \
         patch.object(torch.Tensor, "device", property(watch.tags.of)), \
         patch.object(torch.Tensor, "is_cuda", property(lambda t: watch.tags.of(t).type == "cuda")), \
         patch.object(torch.Tensor, "is_cpu", property(lambda t: watch.tags.of(t).type == "cpu")), \
         patch.object(torch.Tensor, "to", moved), \
         patch.object(torch.Tensor, "cpu", lambda t, *a, **k: watch.move(t, CPU, False)), \
         patch.object(torch.Tensor, "cuda", lambda t, *a, **k: watch.move(t, GPU, False)), \
         patch.object(torch.Tensor, "pin_memory", lambda t, *a, **k: watch.tags.pin(t.clone())), \
         patch.object(torch.Tensor, "is_pinned", lambda t, *a, **k: watch.tags.pinned(t)), \
         patch.object(torch.Tensor, "tolist", read(tolist, "tolist")), \
         patch.object(torch.Tensor, "numpy", read(numpy, "numpy")), \
         patch.object(torch, "get_device_module", lambda d=None: torch.cuda), \
         patch.multiple(torch, tensor=made(torch.tensor), as_tensor=made(torch.as_tensor)), \
         patch.object(F, "scaled_dot_product_attention", attend), \
         patch.object(ours, "sdpa_kernel", kernels), watch:  # fmt: skip
        ours._refusal.cache_clear()
        try:
            yield watch
        finally:
            ours._refusal.cache_clear()
            torch._dynamo.trace_rules.clear_lru_cache()
