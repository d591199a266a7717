"""Tensors by name, read when asked for: the interface of every checkpoint format, and its error."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

#: A checkpoint's parts: the denoising network, the image autoencoder, the text encoder.
Part: TypeAlias = Literal["model", "first_stage", "text"]
PARTS: tuple[Part, ...] = ("model", "first_stage", "text")

#: Prefixes of a part's names in official engine files, and in our own engine.
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
    """Shape and dtype of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


class LazyStateDict(Mapping[str, Tensor]):
    """Tensors by name: names, shapes and dtypes at once, values when asked for.

    A value may be a window on a mapped file: copy it to keep it, and do not write to it.
    """

    source: str  # file or folder of the tensors, for messages
    exact: frozenset[str] = frozenset()  # names that a native writer never narrows: buffers such as tables

    @abstractmethod
    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``, without reading it."""

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
        self.source, self.exact = source, frozenset(exact)
        self._tensors = tensors

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


class View(LazyStateDict):
    """The tensors of ``inner`` as they are; subclasses override the names, shapes or values they change."""

    def __init__(self, inner: LazyStateDict) -> None:
        self.inner = inner
        self.source = inner.source

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        return self.inner.info(key)

    def release(self, key: str) -> None:
        """Pass the hint on."""
        self.inner.release(key)

    def close(self) -> None:
        """Close the files behind the tensors."""
        self.inner.close()

    def __getitem__(self, key: str) -> Tensor:
        return self.inner[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


class Prefixed(View):
    """The tensors of ``inner`` whose names start with ``prefix``, without it."""

    def __init__(self, inner: LazyStateDict, prefix: str) -> None:
        super().__init__(inner)
        self._prefix = prefix
        self._names = [name[len(prefix) :] for name in inner if name.startswith(prefix)]

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of ``key``."""
        return self.inner.info(self._prefix + key)

    def release(self, key: str) -> None:
        """Pass the hint on."""
        self.inner.release(self._prefix + key)

    def __getitem__(self, key: str) -> Tensor:
        return self.inner[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Joined(LazyStateDict):
    """Several shards as one. A name in two shards is an error."""

    def __init__(self, shards: Mapping[str, LazyStateDict], source: str) -> None:
        self.source = source
        self._shards = shards
        self._owner: dict[str, LazyStateDict] = {}
        for file, shard in shards.items():
            for name in shard:
                if name in self._owner:
                    raise CheckpointError(f"{source}: {name!r} is in more than one shard, the last is {file}")
                self._owner[name] = shard

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
