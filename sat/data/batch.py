"""Batches of a data set, and their order over epochs and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sat.data.buckets import Buckets
from sat.data.records import RecordSet


@dataclass(frozen=True)
class Sample:
    """One picture with its caption. Sizes are pixels, (height, width) or (top, left)."""

    caption: str
    original_size: tuple[int, int]  # of the file
    crop: tuple[int, int]  # where the target was cut from the resized picture
    target_size: tuple[int, int]  # of the picture as trained on
    image: Tensor | None = None  # (3, H, W) float32 in [-1, 1]
    latent_moments: Tensor | None = None  # (2C, h, w) float32: mean and log variance, unscaled
    low_moments: Tensor | None = None  # the same of the low-resolution image, enlarged, for relay
    text: Tensor | None = None  # (T, C_text) hidden states of the caption, from a cache
    loss_weight: float = 1.0  # factor of its loss
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # cut as the picture: Batch.extras of one


@dataclass(frozen=True)
class Batch:
    """B pictures with captions and size conditions; ``image`` or, from a latent cache, ``latent_moments``.

    ``extras`` are further pictures by name, cut and placed as the pictures are: beside ``image``
    (B, 3, H, W) in [-1, 1], of masks (B, 1, H, W) in [0, 1]; beside ``latent_moments`` their own moments
    (B, 2C, h, w), of masks means over latent cells (B, 1, h, w).
    """

    caption: list[str]
    original_size: Tensor  # (B, 2) int64 height, width
    crop: Tensor  # (B, 2) int64 top, left
    target_size: Tensor  # (B, 2) int64 height, width
    image: Tensor | None = None  # (B, 3, H, W) float32 in [-1, 1]
    latent_moments: Tensor | None = None  # (B, 2C, h, w) float32: mean and log variance, unscaled
    low_moments: Tensor | None = None  # the same of the low-resolution images, enlarged, for relay
    text: Tensor | None = None  # (B, T, C_text) hidden states of the captions in the encoder's dtype
    text_mask: Tensor | None = None  # (B, T) true = real token; None = all of them
    loss_weight: Tensor | None = None  # (B,) float32 factors of the pictures' losses; None: all 1
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    draws: Mapping[str, Tensor] = field(default_factory=dict)  # (B, …) random numbers of the training step

    def __post_init__(self) -> None:
        values = {name: value for name, value in vars(self).items() if name not in ("extras", "draws")}
        for name, value in {**values, **self.extras, **self.draws}.items():
            if value is not None and len(value) != len(self.caption):
                raise ValueError(f"batch: {len(value)} of {name} for {len(self.caption)} captions")

    def __len__(self) -> int:
        return len(self.caption)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in memory that a GPU copies from without waiting."""
        return self._each(Tensor.pin_memory)

    def _each(self, act: Callable[[Tensor], Tensor]) -> Batch:
        values: dict[str, Any] = dict(vars(self))
        values |= {name: act(value) for name, value in values.items() if isinstance(value, Tensor)}
        for held in ("extras", "draws"):
            values[held] = {name: act(value) for name, value in values[held].items()}
        return Batch(**values)


def collate(samples: Sequence[Sample]) -> Batch:
    """``samples``, all of one size, as a batch."""
    if not samples:
        raise ValueError("a batch needs at least one sample")

    def stacked(name: str, *, extra: bool = False) -> Tensor | None:
        given = (sample.extras.get(name) if extra else getattr(sample, name) for sample in samples)
        values = [value for value in given if value is not None]
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1 or len(values) not in (0, len(samples)):
            found = sorted(map(str, shapes))
            raise ValueError(
                f"samples of one batch must have one shape, got {found} in {len(values)} of {len(samples)} "
                f"({name})"
            )
        return torch.stack(values) if values else None

    text: Tensor | None
    texts = [sample.text for sample in samples if sample.text is not None]
    mask = None
    if len(texts) == len(samples) and len({len(text) for text in texts}) > 1:  # shorter ones begin later
        longest = max(len(text) for text in texts)
        mask = torch.stack([torch.arange(longest) >= longest - len(text) for text in texts])
        text = torch.stack([F.pad(text, (0, 0, longest - len(text), 0)) for text in texts])
    else:
        text = stacked("text")
    factors = [sample.loss_weight for sample in samples]
    return Batch(
        caption=[sample.caption for sample in samples],
        original_size=torch.tensor([sample.original_size for sample in samples]),
        crop=torch.tensor([sample.crop for sample in samples]),
        target_size=torch.tensor([sample.target_size for sample in samples]),
        image=stacked("image"),
        latent_moments=stacked("latent_moments"),
        low_moments=stacked("low_moments"),
        text=text,
        text_mask=mask,
        loss_weight=torch.tensor(factors) if any(one != 1 for one in factors) else None,
        extras={name: made for name in samples[0].extras if (made := stacked(name, extra=True)) is not None},
    )


# -- the order of items: endless streams of shuffles, and batches of one bucket at a time
#
# Everything depends on the seed and the place alone, so a place is all that resuming needs.


Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """Items of which ``per_round`` come in every round of a stream; as many as there are: each once."""

    items: Numbers
    per_round: int


Group = tuple[Share, ...]


def one_group(count: int) -> list[Group]:
    """One group in which each of ``count`` items comes once a round."""
    return [(Share(np.arange(count), count),)]


def groups(records: RecordSet, buckets: Buckets | None = None) -> list[Group]:
    """The group of each bucket (without buckets: one), shared out over the sources by their weights.

    A round is as long as there are records. The weights of sources hold within each bucket's rounds rounded
    to whole items, of which every source that is in a bucket has at least one.
    """
    members = [np.arange(len(records))] if buckets is None else [np.array(items) for items in buckets.items]
    if not records.shares:
        return [(Share(items, len(items)),) for items in members]
    total = sum(weight for _, weight in records.shares)
    starts = np.cumsum([0, *(count for count, _ in records.shares)])
    out: list[Group] = []
    for items in members:
        shares = []
        for start, (count, weight) in zip(starts, records.shares, strict=False):
            own = items[(items >= start) & (items < start + count)]
            if len(own) and weight:
                per_round = len(records) * weight / total * len(own) / count
                shares.append(Share(own, max(1, round(per_round))))
        if shares:
            out.append(tuple(shares))
    return out


class ItemStream:
    """Items of one group without end: round after round, each shuffled.

    A share of which not every item comes in every round goes through its own shuffles one after the other, so
    that none of its items comes twice before all have come once.
    """

    def __init__(self, group: Group, seed: int, number: int | None = None) -> None:
        self.group = group
        self.size = sum(share.per_round for share in group)
        self._key = [seed] if number is None else [seed, number]
        self._plain = all(share.per_round == len(share.items) for share in group)
        self._items = np.concatenate([share.items for share in group])
        self._round: tuple[int, Numbers, Numbers] | None = None

    def at(self, place: int) -> tuple[int, int]:
        """The item at ``place``, and the number of times it has come before."""
        number, offset = divmod(place, self.size)
        kept = self._round
        if kept is None or kept[0] != number:
            kept = self._round = (number, *self._make(number))
        return int(kept[1][offset]), int(kept[2][offset])

    def _make(self, number: int) -> tuple[Numbers, Numbers]:
        """The items of a round, and the number of times each has come before."""
        order = self._shuffled([*self._key, number], self.size)
        if self._plain:
            return self._items[order], np.full(self.size, number)
        items, times = [], []
        for source, share in enumerate(self.group):
            count = len(share.items)
            places = np.arange(number * share.per_round, (number + 1) * share.per_round)
            for again in range(int(places[0]) // count, int(places[-1]) // count + 1):
                own = share.items[self._shuffled([*self._key, 1 + source, again, 0], count)]
                items.append(own[places[places // count == again] % count])
                times.append(np.full(len(items[-1]), again))
        return np.concatenate(items)[order], np.concatenate(times)[order]

    @staticmethod
    def _shuffled(key: list[int], count: int) -> Numbers:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).permutation(count)


class BatchOrder:
    """The group that each global batch of ``batch`` items is taken from.

    Group g, with n items a round, gives floor((r + 1) n / batch) - floor(r n / batch) batches in round r,
    shuffled among those of the others: what does not fill a batch waits for the next round, so nothing is
    lost and no group runs ahead. ``key`` seeds the shuffles.
    """

    def __init__(self, sizes: Sequence[int], batch: int, key: Sequence[int]) -> None:
        self.sizes, self.batch, self.key = tuple(sizes), batch, list(key)
        self._round: tuple[int, int, list[int]] | None = None  # number, its first batch, group of each

    def at(self, number: int) -> tuple[int, int]:
        """(group, number of batches it has given before) of batch ``number``."""
        round_, first, order = self._at(number)
        group = order[number - first]
        before = round_ * self.sizes[group] // self.batch
        return group, before + order[: number - first].count(group)

    def given(self, number: int) -> list[int]:
        """Number of batches that each group has given before batch ``number``."""
        round_, first, order = self._at(number)
        return [
            round_ * size // self.batch + order[: number - first].count(group)
            for group, size in enumerate(self.sizes)
        ]

    def _at(self, number: int) -> tuple[int, int, list[int]]:
        """The round that batch ``number`` is in."""
        kept = self._round
        if kept is not None and kept[1] <= number < kept[1] + len(kept[2]):
            return kept
        low, high = 0, (number + len(self.sizes) + 1) * self.batch // sum(self.sizes) + 1
        while high - low > 1:  # the last round that begins at or before the batch
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle) <= number else (low, middle)
        counts = [(low + 1) * size // self.batch - low * size // self.batch for size in self.sizes]
        order = [group for group, count in enumerate(counts) for _ in range(count)]
        np.random.Generator(np.random.PCG64(np.random.SeedSequence([*self.key, low]))).shuffle(order)
        self._round = (low, self._before(low), order)
        return self._round

    def _before(self, round_: int) -> int:
        """Number of batches before a round."""
        return sum(round_ * size // self.batch for size in self.sizes)
