"""What every checkpoint format speaks: tensors by name, read when asked for, and one error type."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

#: A checkpoint's parts: the denoising network, the image autoencoder, the text encoder.
Part: TypeAlias = Literal["model", "first_stage", "text"]
PARTS: tuple[Part, ...] = ("model", "first_stage", "text")

#: What an official engine file, and what our own engine, puts in front of a part's names.
ENGINE_PREFIXES: dict[Part, str] = {
    "model": "model.diffusion_model.",
    "first_stage": "first_stage_model.",
    "text": "conditioner.embedders.0.transformer.",
}
OWN_PREFIXES: dict[Part, str] = {
    "model": "network.",
    "first_stage": "first_stage.",
    "text": "conditioner.text.",
}

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, used or written. The message is one line a user can act on."""


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


class LazyStateDict(Mapping[str, Tensor]):
    """Tensors by name: names, shapes and dtypes at once, values when asked for.

    A value may be a window on a mapped file: copy it to keep it, and do not write to it.
    """

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the tensors come from, for messages."""

    @abstractmethod
    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``, without reading it."""

    @property
    def exact(self) -> frozenset[str]:
        """Names that a native writer never narrows: the buffers of their module, such as position tables."""
        return frozenset()

    def release(self, key: str) -> None:  # noqa: B027 (a hint; most sources hold nothing)
        """Hint that ``key`` has been used: memory that reading it took may go back to the system."""

    def close(self) -> None:  # noqa: B027
        """Close the files behind the tensors."""

    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        return {key: self.info(key) for key in self}

    def __enter__(self) -> LazyStateDict:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class InMemory(LazyStateDict):
    """A state dict that is already in memory."""

    def __init__(
        self, tensors: Mapping[str, Tensor], source: str = "memory", exact: Iterable[str] = ()
    ) -> None:
        self._tensors = tensors
        self._source = source
        self._exact = frozenset(exact)

    @property
    def source(self) -> str:
        """A name for messages."""
        return self._source

    @property
    def exact(self) -> frozenset[str]:
        """As given."""
        return self._exact

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        tensor = self._tensors[key]
        return TensorInfo(tuple(tensor.shape), tensor.dtype)

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Prefixed(LazyStateDict):
    """The tensors of ``inner`` whose names start with ``prefix``, without it."""

    def __init__(self, inner: LazyStateDict, prefix: str) -> None:
        self._inner = inner
        self._prefix = prefix
        self._names = [name[len(prefix) :] for name in inner if name.startswith(prefix)]

    @property
    def source(self) -> str:
        """The file the tensors come from."""
        return self._inner.source

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        return self._inner.info(self._prefix + key)

    def release(self, key: str) -> None:
        """Pass the hint on."""
        self._inner.release(self._prefix + key)

    def close(self) -> None:
        """Close the files behind."""
        self._inner.close()

    def __getitem__(self, key: str) -> Tensor:
        return self._inner[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Joined(LazyStateDict):
    """Several shards as one. A name in two shards is an error."""

    def __init__(self, shards: Mapping[str, LazyStateDict], source: str) -> None:
        self._source = source
        self._shards = shards
        self._owner: dict[str, LazyStateDict] = {}
        for file, shard in shards.items():
            for name in shard:
                if name in self._owner:
                    raise CheckpointError(f"{source}: {name!r} is in more than one shard, the last is {file}")
                self._owner[name] = shard

    @property
    def source(self) -> str:
        """The folder of the shards."""
        return self._source

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        return self._owner[key].info(key)

    def release(self, key: str) -> None:
        """Pass the hint on."""
        self._owner[key].release(key)

    def close(self) -> None:
        """Close every shard."""
        for shard in self._shards.values():
            shard.close()

    def __getitem__(self, key: str) -> Tensor:
        return self._owner[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)


def as_lazy(tensors: Mapping[str, Tensor], source: str = "memory") -> LazyStateDict:
    """``tensors`` as a :class:`LazyStateDict`; itself if it is one."""
    return tensors if isinstance(tensors, LazyStateDict) else InMemory(tensors, source)


def listing(names: list[str], most: int = 5) -> str:
    """The first names and how many more: ``'a', 'b' and 7 more``."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
