"""Official engine files that are split over model-parallel ranks: merged as they are read, and written.

The cuts are those of the model's sharding (:mod:`sat.sharding`), carried over to the file's names by its key
rules. Layers whose outputs we gather (adaLN) are plain linears there, whole in every file. The
published networks are one file each; SwissArmyTransformer writes one a rank when it trains with
``model_parallel_size`` above 1: rows of fused projections part by part (:class:`sat.sharding.Column`).
Source: SwissArmyTransformer ``mpu/layers.py`` (``stride``); official ``dit.py`` (``adaln_modules``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sat.checkpoint.format import CheckpointError, LazyStateDict, TensorInfo, View
from sat.checkpoint.rules import Source, read_map, write_map
from sat.keys import Fuse, Rules, Split, SwapHalves
from sat.sharding import Cut, Row, Sharding, named_cuts


class RankFiles(View):
    """The files of all ranks under the file's names. Until :meth:`merged`, a tensor is the first rank's."""

    def __init__(self, files: Sequence[LazyStateDict], source: str) -> None:
        super().__init__(files[0])
        self.files, self.source = files, source
        self.digested = all(file.digested for file in files)
        self._compare([getattr(file, "facts", {}) for file in files])
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

    def _compare(self, told: Sequence[Mapping[str, int]]) -> None:
        """Raise if ``told``, facts beside each file's tensors, are not those of one moment, or in order.

        Each rank's own seed is one more than that of the rank before it. Swapped files make the same network
        with its heads in another order: adapters of the right one would not fit.
        """
        for key in ("iteration", "global_steps"):
            if len(values := {facts[key] for facts in told if key in facts}) > 1:
                raise CheckpointError(
                    f"{self.source}: its files are of different moments: {key} {sorted(values)}"
                )
        if (ranks := told[0].get("mp_world_size", 0)) > len(told):
            raise CheckpointError(
                f"{self.source}: {len(told)} files are there of {ranks} model-parallel ranks"
            )
        seeds = [facts.get("seed", -1) for facts in told]
        order = [seed - min(seeds) for seed in seeds]
        if order != sorted(order) == list(range(len(told))):
            odd = next(rank for rank, place in enumerate(order) if rank != place)
            raise CheckpointError(
                f"{self.files[odd].source}: is the file of rank {order[odd]} by its random state: swapped; "
                f"put the files back in order"
            )

    def release(self, key: str) -> None:
        """Pass the hint on."""
        for file in self.files:
            file.release(key)

    def verified(self) -> None:
        """Wait for the check of every file."""
        for file in self.files:
            file.verified()

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.close()

    def merged(
        self, expected: Mapping[str, TensorInfo], sharding: Sharding, rules: Rules, prefix: str
    ) -> LazyStateDict:
        """The tensors whole, for a network with the ``expected`` ones that names them by ``rules``.

        A tensor is joined if ``sharding`` cuts it and one rank's is smaller than the network's; any other
        must be the same on all ranks.
        """
        own = {name.removeprefix(prefix): name for name in self}
        ours = named_cuts(expected, _official(sharding))
        cuts: dict[str, Cut] = {}
        for name, source in read_map(list(own), rules).sources.items():
            if name not in ours:
                continue
            whole, rule = (
                expected[name].shape,
                source.rule,
            )  # shape of one of their tensors, from that of ours
            if isinstance(rule, Fuse):
                whole = (whole[0] // len(rule.theirs), *whole[1:])
            elif isinstance(rule, Split):
                whole = (whole[0] * len(rule.ours), *whole[1:])
            for theirs in source.names:
                if self.info(own[theirs]).shape[: len(whole)] != whole:
                    cuts[own[theirs]] = _their_cut(source, ours[name])
        self._refuse_copies(cuts)
        return MergedRanks(self, cuts)

    def _refuse_copies(self, cuts: Mapping[str, Cut]) -> None:
        """Raise if two ranks have the same shares of all tensors in ``cuts``: a copied file."""
        for rank, file in enumerate(self.files):
            for earlier, other in enumerate(self.files[:rank]):
                telling = False  # a share that is one number all over may well be equal
                for name in cuts:
                    share = other[name]
                    if not torch.equal(file[name], share):
                        break
                    telling = telling or bool((share != share.flatten()[0]).any())
                else:
                    if telling:
                        raise CheckpointError(
                            f"{self.source}: the files of ranks {earlier} and {rank} hold the same shares "
                            f"of every layer: one is a copy of the other; copy the right file again"
                        )


class MergedRanks(View):
    """The files of all ranks with the tensors in ``cuts`` put together."""

    def __init__(self, ranks: RankFiles, cuts: Mapping[str, Cut]) -> None:
        super().__init__(ranks)
        self._files, self._cuts = ranks.files, cuts

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of the whole ``key``."""
        info = self.inner.info(key)
        if key not in self._cuts:
            return info
        return TensorInfo(self._cuts[key].whole(info.shape, len(self._files)), info.dtype)

    def __getitem__(self, key: str) -> Tensor:
        first, *others = shares = [file[key] for file in self._files]
        if key in self._cuts:
            return self._cuts[key].join(shares)
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(
                f"{self.source}: {key!r}, which every rank holds whole, is not the same in all files"
            )
        return first


class RankShare(View):
    """The tensors that ``rank`` of ``size`` holds of ``whole``: its share of those in ``cuts``."""

    def __init__(self, whole: LazyStateDict, cuts: Mapping[str, Cut], rank: int, size: int) -> None:
        super().__init__(whole)
        self._cuts, self._rank, self._size = cuts, rank, size

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of the share of ``key``."""
        info = self.inner.info(key)
        if key not in self._cuts:
            return info
        return TensorInfo(self._cuts[key].part(info.shape, self._size), info.dtype)

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.inner[key]
        return tensor if key not in self._cuts else self._cuts[key].share(tensor, self._rank, self._size)


def their_cuts(ours: Mapping[str, TensorInfo], sharding: Sharding, rules: Rules, size: int) -> dict[str, Cut]:
    """Cuts of our tensors under their names; an error where one does not divide over ``size`` ranks."""
    cuts = named_cuts(ours, _official(sharding))
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


def _official(sharding: Sharding) -> Sharding:
    """The layers that the official code splits too: not those that gather outputs, plain linears there."""
    return {name: style for name, style in sharding.items() if isinstance(style, Row) or not style.gather}


def _their_cut(source: Source, cut: Cut) -> Cut:
    """``cut`` of our tensor, carried over to the tensors of theirs that belong to it."""
    rule = source.rule
    if cut.dim or not isinstance(rule, Fuse | Split | SwapHalves):
        return cut
    if isinstance(rule, SwapHalves) or (isinstance(rule, Fuse) and cut.parts % len(rule.theirs)):
        raise CheckpointError(
            f"{source.names[0]!r}: {rule} and the sharding of this tensor do not go together"
        )
    if isinstance(rule, Fuse):
        return replace(cut, parts=cut.parts // len(rule.theirs))
    return replace(cut, parts=cut.parts * len(rule.ours))
