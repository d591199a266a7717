"""Official engine files that are split over model-parallel ranks: merged as they are read, and written.

Which tensors are cut, and how, is the model's plan (:mod:`sat.sharding`) carried over to the file's names by
its key rules. Layers whose outputs we gather (adaLN) are plain linears there, whole in every file. The
published networks are one file each; SwissArmyTransformer writes one a rank when it trains with
``model_parallel_size`` above 1: rows of fused projections part by part (:class:`sat.sharding.Column`).
Source: SwissArmyTransformer ``mpu/layers.py`` (``stride``); official ``dit.py`` (``adaln_modules``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sat.checkpoint.format import CheckpointError, LazyStateDict, TensorInfo
from sat.checkpoint.rules import Source, read_map, write_map
from sat.keys import Fuse, Rules, Split, SwapHalves
from sat.sharding import Cut, Row, Sharding, named_cuts


class RankFiles(LazyStateDict):
    """The files of all ranks under the file's names. Until :meth:`merged`, a tensor is the first rank's."""

    def __init__(self, files: Sequence[LazyStateDict], source: str) -> None:
        self.files, self._source = files, source
        first = files[0]
        for file in files[1:]:
            if odd := sorted(set(first) ^ set(file)):
                raise CheckpointError(f"{source}: {odd[0]!r} is not in the files of all ranks")
            for name in first:
                if file.info(name) != first.info(name):
                    raise CheckpointError(
                        f"{source}: {name!r} is {list(first.info(name).shape)} in {first.source} and "
                        f"{list(file.info(name).shape)} in {file.source}: they are not of one model"
                    )

    @property
    def source(self) -> str:
        """The folder of the files."""
        return self._source

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of one rank's ``key``."""
        return self.files[0].info(key)

    def release(self, key: str) -> None:
        """Pass the hint on."""
        for file in self.files:
            file.release(key)

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.close()

    def __getitem__(self, key: str) -> Tensor:
        return self.files[0][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files[0])

    def __len__(self) -> int:
        return len(self.files[0])

    def merged(
        self, expected: Mapping[str, TensorInfo], plan: Sharding, rules: Rules, prefix: str
    ) -> LazyStateDict:
        """The tensors whole, for a network with the ``expected`` ones that names them by ``rules``.

        A tensor is joined if the plan cuts it and one rank's is smaller than the network's; any other must be
        the same on all ranks.
        """
        own = {name.removeprefix(prefix): name for name in self}
        ours = named_cuts(expected, _official(plan))
        found: dict[str, Cut] = {}
        for name, source in read_map(list(own), rules).sources.items():
            if name in ours:
                for theirs in source.names:
                    shape = _their_shape(source, expected[name].shape)
                    if self.info(own[theirs]).shape[: len(shape)] != shape:
                        found[own[theirs]] = _their_cut(source, ours[name])
        return _Joined(self, found)


class _Joined(LazyStateDict):
    """``ranks`` with the tensors in ``cuts`` put together."""

    def __init__(self, ranks: RankFiles, cuts: Mapping[str, Cut]) -> None:
        self._ranks, self._cuts = ranks, cuts

    @property
    def source(self) -> str:
        """The folder of the files."""
        return self._ranks.source

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of the whole ``key``."""
        info = self._ranks.info(key)
        if key not in self._cuts:
            return info
        return TensorInfo(self._cuts[key].whole(info.shape, len(self._ranks.files)), info.dtype)

    def release(self, key: str) -> None:
        """Pass the hint on."""
        self._ranks.release(key)

    def close(self) -> None:
        """Close the files behind."""
        self._ranks.close()

    def __getitem__(self, key: str) -> Tensor:
        first, *others = shares = [file[key] for file in self._ranks.files]
        if key in self._cuts:
            return self._cuts[key].join(shares)
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(
                f"{self.source}: {key!r}, which every rank holds whole, is not the same in all files"
            )
        return first

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)


class ShareOf(LazyStateDict):
    """What ``rank`` of ``size`` holds of ``whole``, whose tensors in ``cuts`` are split."""

    def __init__(self, whole: LazyStateDict, cuts: Mapping[str, Cut], rank: int, size: int) -> None:
        self._whole, self._cuts, self._rank, self._size = whole, cuts, rank, size

    @property
    def source(self) -> str:
        """Where the whole tensors come from."""
        return self._whole.source

    @property
    def exact(self) -> frozenset[str]:
        """As inside."""
        return self._whole.exact

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of the share of ``key``."""
        info = self._whole.info(key)
        if key not in self._cuts:
            return info
        return TensorInfo(self._cuts[key].part(info.shape, self._size), info.dtype)

    def release(self, key: str) -> None:
        """Pass the hint on."""
        self._whole.release(key)

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._whole[key]
        return tensor if key not in self._cuts else self._cuts[key].share(tensor, self._rank, self._size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


def their_cuts(ours: Mapping[str, TensorInfo], plan: Sharding, rules: Rules, size: int) -> dict[str, Cut]:
    """How our tensors are cut under their names; an error where one does not divide over ``size`` ranks."""
    cuts = named_cuts(ours, _official(plan))
    for name, cut in cuts.items():
        length = ours[name].shape[cut.dim]
        if length % (cut.parts * size):
            raise CheckpointError(
                f"{name!r}: its {length // cut.parts} {'rows' if cut.dim == 0 else 'columns'} do not divide "
                f"over {size} model-parallel ranks"
            )
    sources = write_map(list(ours), rules).sources
    return {
        theirs: _their_cut(source, cuts[source.names[0]])
        for theirs, source in sources.items()
        if source.names[0] in cuts
    }


def _official(plan: Sharding) -> Sharding:
    """What the official code splits too: not the layers whose outputs we gather, plain linears there."""
    return {name: style for name, style in plan.items() if isinstance(style, Row) or not style.gather}


def _their_cut(source: Source, cut: Cut) -> Cut:
    """``cut`` of our tensor, of those of theirs that it is made of or that are made of it."""
    rule = source.rule
    if cut.dim or not isinstance(rule, Fuse | Split | SwapHalves):
        return cut
    if isinstance(rule, SwapHalves) or (isinstance(rule, Fuse) and cut.parts % len(rule.theirs)):
        raise CheckpointError(f"{source.names[0]!r}: {rule} and the plan of this tensor do not go together")
    if isinstance(rule, Fuse):
        return replace(cut, parts=cut.parts // len(rule.theirs))
    return replace(cut, parts=cut.parts * len(rule.ours))


def _their_shape(source: Source, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one of their tensors, from that of ours."""
    rule = source.rule
    if isinstance(rule, Fuse):
        return (shape[0] // len(rule.theirs), *shape[1:])
    if isinstance(rule, Split):
        return (shape[0] * len(rule.ours), *shape[1:])
    return shape
