"""Launch of a process, and its place in the mesh data x guidance x sequence x tensor.

The only file that names devices. Works the same under plain ``python`` (one process) and under ``torchrun``
(``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` in the environment).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout, _world

from sat.errors import LostRankError, UserError
from sat.parallel.heartbeat import current, unwatch, watch
from sat.util.host import trim_heap

log = logging.getLogger(__name__)

DeviceKind = Literal["auto", "cpu", "cuda"]

PATIENCE = timedelta(days=30)
"""Wait of a collective: the watch over the ranks ends a run sooner where one is lost."""

_ONE_EACH = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Variables by which launchers such as ``srun --gpus-per-task=1`` show a process one GPU alone."""

# glibc <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


@dataclass(frozen=True)
class Runtime:
    """This process: ``rank`` of ``world`` over all machines, ``local_rank`` on this one.

    ``timeout`` is in seconds: the wait for all ranks to join.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    timeout: float = 600.0

    @cached_property
    def is_main(self) -> bool:
        """True on rank 0, the one that logs and writes."""
        return self.rank == 0

    @property
    def pins(self) -> bool:
        """True when copies to the device are faster out of pinned memory."""
        return self.device.type == "cuda"

    @property
    def device_name(self) -> str:
        """The device's own name, empty on the CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""

    @property
    def grouped(self) -> bool:
        """True when a process group is up (always with more than one process)."""
        return dist.is_initialized()

    def synchronize(self) -> None:
        """Wait for the device's queued work (for timing); nothing to wait for on the CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free_memory(self) -> None:
        """Collect garbage, and give the allocator's unused memory back to the device."""
        free_memory()

    def peak_memory(self) -> float:
        """Peak memory in GB: of tensors on the device, or of the process's resident set on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9

    def reserved_memory(self) -> float | None:
        """Peak in GB that the device's allocator held, near what nvidia-smi shows; None on the CPU."""
        return torch.cuda.max_memory_reserved(self.device) / 1e9 if self.device.type == "cuda" else None

    def finish(self) -> None:
        """Wait until every rank has come here, as long as they live; raises where one does not."""
        if self.world > 1:
            current().finish()

    def close(self) -> None:
        """Stop the watch over the ranks, and leave the process group if there is one.

        After the loss of a rank neither is done: its connections may never close, and the watch ends this
        process where it does not end by itself.
        """
        if current().error is not None:
            return
        unwatch()
        if dist.is_initialized():
            dist.destroy_process_group()


def launch(  # noqa: C901 - the environment and the group, in order
    device: DeviceKind = "auto", timeout: float = 600.0, stall: float = 600.0, *, group: bool = False
) -> Runtime:
    """Pick this process's device, join the process group and start the watch over the ranks.

    A group is made for more than one process, or when ``group`` asks for one (DeepSpeed needs it).
    ``timeout`` is in seconds: the wait for all ranks to join, and for a silent one (15 s at most);
    ``stall``: for one that lives and makes no progress (:mod:`sat.parallel.heartbeat`). Collectives wait for
    any time.
    """
    if timeout <= 0:
        raise ValueError(f"parallel.timeout is {timeout}: expected seconds > 0")
    # Who this process is: from the launcher's environment, or alone without one.
    values = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    rank, world, local_rank = 0, 1, 0
    if values["RANK"] is not None or values["WORLD_SIZE"] is not None:
        if missing := [name for name, value in values.items() if value is None]:
            raise RuntimeError(
                f"the environment sets only some of RANK, WORLD_SIZE, LOCAL_RANK; {', '.join(missing)} "
                f"missing: start with torchrun, or unset them for one process"
            )
        try:
            rank, world, local_rank = (int(str(value)) for value in values.values())
        except ValueError as error:
            raise RuntimeError(f"RANK, WORLD_SIZE, LOCAL_RANK must be whole numbers, got {values}") from error
        if not 0 <= rank < world:
            raise RuntimeError(f"RANK is {rank} with WORLD_SIZE {world}: expected 0 <= RANK < WORLD_SIZE")
    picked = pick_device(device, local_rank)
    if picked.type == "cpu":
        torch.set_flush_denormal(True)

    # The process group: nccl for GPUs, gloo for CPUs.
    backend, wait = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo", timedelta(seconds=timeout)
    if dist.is_initialized() or (world == 1 and not group):
        return Runtime(rank, world, local_rank, picked, timeout)
    if world == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=wait)
        return Runtime(rank, world, local_rank, picked, timeout)
    try:
        dist.init_process_group(backend, timeout=wait)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"rank {rank} of {world} could not join the process group within {timeout:g} s "
            f"(parallel.timeout): {str(error).splitlines()[0]}"
        ) from error
    watch(rank, world, _get_default_store(), timeout, stall)
    be_patient()
    return Runtime(rank, world, local_rank, picked, timeout)


def be_patient() -> None:
    """Let the collectives of all groups wait for any time: a rank that is lost is found by the watch."""
    for group in list(_world.pg_map):
        with contextlib.suppress(Exception):  # a backend without time limits
            _set_pg_timeout(PATIENCE, group)


def free_memory() -> None:
    """Give what nothing refers to any more back, to the device's allocator and beyond."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing happens where no GPU is in use


def keep_freed_memory(top_pad: int = 512 << 20) -> bool:
    """Ask glibc to keep large freed buffers instead of giving them back to the system; true if it agreed.

    What is free by now goes back first: loading leaves holes where weights were. A CPU training step frees
    and allocates the same large buffers each time; with glibc's defaults half of the step can go into page
    faults. ``top_pad`` is in bytes. Does nothing with another C library.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version.restype = ctypes.c_char_p  # only glibc has it
        libc.gnu_get_libc_version()
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    trim_heap()
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, top_pad))
    return all(mallopt(option, value) == 1 for option, value in settings)


def accelerators() -> tuple[str, list[dict[str, Any]]]:
    """torch's build, and of each accelerator it sees ``name``, ``total`` and ``free`` bytes, and ``bf16``."""
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else kind
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        about = {"name": torch.cuda.get_device_name(index), "total": total, "free": free}
        found.append({**about, "bf16": fast_half(torch.device("cuda", index)) == "bf16"})
    return f"{torch.__version__}, {kind}", found


class NoDeviceError(UserError, RuntimeError):
    """The device that was asked for is not there."""


def pick_device(device: DeviceKind, local_rank: int = 0) -> torch.device:
    """Device of this process: one GPU for each local rank, or the CPU."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"parallel.device is {device!r}: expected auto, cpu or cuda")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise NoDeviceError("parallel.device is cuda, but torch sees no GPU: use parallel.device=cpu")
    if device == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and any(os.environ.get(name) for name in _ONE_EACH):
        local_rank = 0  # the launcher shows each process a GPU of its own
    if local_rank >= count:
        raise RuntimeError(
            f"local rank {local_rank} has no GPU: torch sees {count}; start at most {count} processes here"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def ranks_together(runtime: Runtime) -> Iterator[None]:
    """Work of all ranks: an error of this one is told to the others, a broken exchange explained.

    Leaves the process group behind; a process alone keeps it for another run, as DeepSpeed does.
    """
    try:
        yield
    except LostRankError:
        raise
    except BaseException as error:
        watch = current()
        if watch.error is not None:
            raise watch.error from error
        end = error
        try:
            if (lost := lost_rank_message(error)) is not None:
                watch.abort(lost)
        except KeyboardInterrupt as stop:
            end = stop
        if isinstance(end, KeyboardInterrupt):
            watch.explain()
        watch.fail(end)
        if end is not error:
            raise end from error
        raise
    finally:
        if runtime.world > 1:
            runtime.close()


def lost_rank_message(error: BaseException) -> str | None:
    """A line for the log if ``error`` comes from a lost rank, else None."""
    words = ("Connection closed by peer", "Connection reset", "Timed out waiting", "timed out", "Broken pipe",
             "ncclRemoteError", "Watchdog caught collective")  # fmt: skip
    if (not dist.is_initialized() or dist.get_world_size() == 1) and not isinstance(error, dist.DistError):
        return None
    text = str(error)
    if isinstance(error, RuntimeError) and any(word.lower() in text.lower() for word in words):
        return (
            f"the connection to another rank broke off, so this one stops: "
            f"{text.strip().splitlines()[0][:200]}"
        )
    return None


def exact(device: torch.device | str) -> torch.device:
    """``device`` with its number, so that it equals those of its tensors."""
    found = torch.device(device)
    number: int | None = getattr(found, "index", None)  # None in "cuda", whatever its type says
    if found.type != "cuda" or number is not None or not torch.cuda.is_available():
        return found
    return torch.device("cuda", torch.cuda.current_device())


def capability(device: torch.device) -> int | None:
    """Major compute capability of an NVIDIA GPU, 0 for an AMD one, None for any other device."""
    if device.type != "cuda":
        return None
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def fast_half(device: torch.device | None) -> Literal["bf16", "fp16"]:
    """The 16-bit type that a GPU computes in by itself: bf16, and fp16 before NVIDIA's Ampere.

    ``device`` None: a GPU that is not here.
    """
    if device is None or device.type != "cuda":
        return "bf16"
    with torch.cuda.device(device):  # torch asks the current one, and counts emulation unless told otherwise
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# -- the mesh of all ranks: data x guidance x sequence x tensor. Also DeepSpeed's ``mpu``


AXES = ("data", "guidance", "sequence", "tensor")


class LayoutError(UserError, ValueError):
    """The number of processes does not fit the layout that is asked for."""


@dataclass(frozen=True)
class Axis:
    """Ranks along one direction of the mesh; this rank is number ``rank`` of ``size``.

    ``group`` is None for an axis of one rank, along which nothing is sent.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        """The same: a copied model talks to the same ranks."""
        return self


ALONE = Axis()
"""An axis of this rank only."""


class Mesh:
    """Ranks laid out as (data, guidance, sequence, tensor), tensor ranks adjacent.

    ``guidance``, ``sequence`` and ``tensor`` are this rank's axes, ``team`` all three together: the ranks
    that work on the same images. ``gradient`` is data x guidance x sequence. ``data_ranks`` teams work on
    different images; this one is number ``data_rank``, and its first rank ``leads``: it writes the images.

    DeepSpeed takes it as ``mpu``. Its "data parallel" group is ``gradient``, because gradients are averaged
    over all of it; the sequence methods that DeepSpeed probes for are left out: they would scale gradients
    wrongly.
    """

    def __init__(self, runtime: Runtime, *, tensor: int = 1, sequence: int = 1, guidance: int = 1) -> None:
        data = data_ranks(runtime.world, tensor=tensor, sequence=sequence, guidance=guidance)
        shape = (data, guidance, sequence, tensor)
        self.sizes = dict(zip(AXES, shape, strict=True))
        ranks = torch.arange(runtime.world).view(shape)

        def axis(*names: str) -> Axis:
            """The ranks that differ from this one along ``names`` alone; every rank makes all such groups."""
            dims = [AXES.index(name) for name in names]
            size = math.prod(shape[dim] for dim in dims)
            lines = ranks.movedim(dims, list(range(-len(dims), 0))).reshape(-1, size).tolist()
            own = next(line for line in lines if runtime.rank in line)
            if not dist.is_initialized():
                return ALONE
            if size == runtime.world:
                return Axis(size, runtime.rank, dist.group.WORLD)
            group, _ = dist.new_subgroups_by_enumeration(lines, timeout=PATIENCE)  # type: ignore[no-untyped-call]
            return Axis(size, own.index(runtime.rank), group)

        self.guidance, self.sequence, self.tensor = axis("guidance"), axis("sequence"), axis("tensor")
        self.team, self.gradient = axis(*AXES[1:]), axis(*AXES[:3])
        self.rank, self.data_ranks = runtime.rank, data
        self.data_rank = runtime.rank // (runtime.world // data)
        self.leads = self.team.rank == 0

    def __str__(self) -> str:
        """The axes longer than 1, as ``data 2 x sequence 2``."""
        return " x ".join(f"{name} {size}" for name, size in self.sizes.items() if size > 1) or "one rank"

    # DeepSpeed's mpu: the seven methods the engine calls.
    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks over which gradients are averaged and optimizer state is sharded."""
        return self.gradient.group

    def get_data_parallel_world_size(self) -> int:
        """Size of the gradient group."""
        return self.gradient.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Tensor ranks of one model."""
        return self.tensor.group

    def get_model_parallel_world_size(self) -> int:
        """Number of tensor ranks."""
        return self.tensor.size

    def get_model_parallel_rank(self) -> int:
        """This rank's place among the tensor ranks; names the checkpoint file."""
        return self.tensor.rank

    def get_tensor_model_parallel_rank(self) -> int:
        """The same under its newer name."""
        return self.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """The same under its newer name."""
        return self.tensor.size


def data_ranks(world: int, *, tensor: int = 1, sequence: int = 1, guidance: int = 1) -> int:
    """Number of teams of tensor x sequence x guidance ranks in ``world``; they must fill it."""
    inner = tensor * sequence * guidance
    if min(tensor, sequence, guidance) < 1 or world % inner:
        raise LayoutError(
            f"parallel.tensor {tensor} x sequence {sequence} x guidance {guidance} needs {inner} processes a "
            f"model, and this run has {world}: start {inner}, {2 * inner}, {3 * inner} or a multiple of "
            f"{inner}, as torchrun --standalone --nproc_per_node {inner} does, or change the layout"
        )
    return world // inner


# -- one rank of a team without the others, to measure the memory of each


@contextmanager
def fake_group(*, tensor: int = 1, sequence: int = 1) -> Iterator[Mesh]:
    """Mesh of one team as its first rank sees it; collectives inside the block send nothing.

    For tensors without data, in a process that has not joined others.
    """
    world = math.prod((tensor, sequence))
    runtime = Runtime(0, world, 0, torch.device("cpu"))
    if world == 1:
        yield Mesh(runtime)
        return
    if dist.is_initialized():
        raise RuntimeError("a process that has joined others cannot measure a team of others")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # also makes the backend known

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield Mesh(runtime, tensor=tensor, sequence=sequence)
    finally:
        dist.destroy_process_group()
