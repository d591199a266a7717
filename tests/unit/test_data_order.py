"""Weighted sources, and schedules of groups."""

from collections import Counter

import numpy as np
import pytest

from sat.data.batch import BatchOrder, ItemStream, Sample, Share, groups, one_group
from sat.data.buckets import Buckets
from sat.data.loader import Loader
from sat.data.records import Record, RecordSet


def record_set(*shares: tuple[int, float]) -> RecordSet:
    return RecordSet(tuple(Record(None, ("x",)) for count, _ in shares for _ in range(count)), (), shares)


def test_a_stream_without_weights_is_the_shuffle_of_each_round():
    stream = ItemStream(one_group(5)[0], seed=3)
    for round_ in range(3):
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([3, round_]))).permutation(5)
        assert [stream.at(5 * round_ + place) for place in range(5)] == [(i, round_) for i in order]


def test_weights_are_shares_of_the_stream_and_no_item_comes_twice_before_all_came():
    (group,) = groups(record_set((90, 1.0), (10, 3.0)))
    assert [share.per_round for share in group] == [25, 75]
    stream = ItemStream(group, seed=0)
    drawn = [stream.at(place) for place in range(10 * 100)]
    large = Counter(item for item, _ in drawn if item < 90)
    small = Counter(item for item, _ in drawn if item >= 90)
    assert (large.total(), small.total()) == (250, 750)
    assert set(small.values()) == {75}
    assert set(large.values()) <= {2, 3}
    assert len(set(drawn)) == len(drawn)  # an item is never the same twice: its epoch differs


def test_weights_hold_in_buckets():
    buckets = Buckets(
        ((8, 8), (8, 16)), (tuple(range(0, 60)) + (100, 101), tuple(range(60, 100)) + (102, 103))
    )
    made = groups(record_set((100, 1.0), (4, 1.0)), buckets)
    assert [[share.per_round for share in group] for group in made] == [[31, 26], [21, 26]]
    assert [list(group[1].items) for group in made] == [[100, 101], [102, 103]]


def test_a_schedule_gives_each_group_its_batches_and_loses_nothing():
    schedule = BatchOrder((10, 3, 1), 4, [0])
    given = [schedule.at(number) for number in range(3 * 14)]
    counts = Counter(group for group, _ in given)
    assert counts[0] + counts[1] + counts[2] == 42
    for group, size in enumerate((10, 3, 1)):
        assert [k for g, k in given if g == group] == list(range(counts[group]))
        assert abs(counts[group] - 42 * size / 14) < 3
    assert schedule.given(42) == [counts[0], counts[1], counts[2]]
    assert BatchOrder((10, 3, 1), 4, [0]).at(37) == given[37]


class Numbers:
    """Items that are their own number and epoch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def get(self, index: int, epoch: int, seed: int) -> Sample:
        return Sample(f"{index}/{epoch}", (1, 1), (0, 0), (1, 1))


def two_groups() -> list[tuple[Share, ...]]:
    return [(Share(np.arange(7), 7),), (Share(np.arange(7, 12), 5),)]


def test_a_change_of_the_batch_goes_on_without_loss_or_repeat():
    first = Loader(Numbers(12), 2, 0, groups=two_groups())
    seen = [caption for _, batch in zip(range(5), first, strict=False) for caption in batch.caption]
    ranks = [Loader(Numbers(12), 1, 0, rank, 3, groups=two_groups()) for rank in range(3)]
    for loader in ranks:
        loader.load_state_dict(first.state_dict())
        assert loader.position == 10
    for _, *batches in zip(range(14), *ranks, strict=False):
        seen += [caption for batch in batches for caption in batch.caption]
    assert len(set(seen)) == len(seen) == 10 + 42
    times = Counter(int(caption.split("/")[0]) for caption in seen)
    for low, high in ((0, 7), (7, 12)):
        counts = [times[item] for item in range(low, high)]
        assert max(counts) - min(counts) <= 1
    again = Loader(Numbers(12), 3, 0, groups=two_groups())
    again.load_state_dict(ranks[0].state_dict())
    follow = next(iter(again)).caption
    assert follow == [
        caption for batch in (next(iter(loader)) for loader in ranks) for caption in batch.caption
    ]


def test_going_on_with_other_weights_or_buckets_is_refused():
    left = Loader(Numbers(12), 2, 0, groups=two_groups())
    with pytest.raises(
        ValueError, match=r"weights and buckets \[\[7\], \[5\]\], now weights and buckets are None"
    ):
        Loader(Numbers(12), 2, 0).load_state_dict(left.state_dict())


def test_a_plain_state_is_as_it_was_before_there_were_groups():
    assert Loader(Numbers(3), 2).state_dict() == {"position": 0, "seed": 0, "items": 3}
