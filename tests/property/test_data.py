"""Properties of the data order, the cut and the caption draw."""

import itertools
import json
from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sat.data.batch import Sample, Share
from sat.data.batch import groups as order_groups
from sat.data.buckets import BucketRule, Buckets
from sat.data.loader import Loader
from sat.data.records import Record, RecordSet
from sat.data.transforms import KEPT, Augment, Placement, Transform

unit = st.floats(0, 1, exclude_max=True)


class Numbers:
    """Items that are their own number, epoch and seed."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def get(self, index: int, epoch: int, seed: int) -> Sample:
        return Sample(f"{index}/{epoch}/{seed}", (1, 1), (0, 0), (1, 1), image=torch.zeros(3, 1, 1))


@given(st.integers(1, 13), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**40), st.integers(0, 6))
def test_resuming_anywhere_gives_the_rest_of_the_stream(items, batch, world, seed, done):
    for rank in range(world):
        straight = Loader(Numbers(items), batch, seed, rank, world)
        captions = [next_.caption for next_ in itertools.islice(straight, done + 3)]
        left = Loader(Numbers(items), batch, seed, rank, world)
        list(itertools.islice(left, done))
        again = Loader(Numbers(items), batch, seed, rank, world)
        again.load_state_dict(left.state_dict())
        assert [next_.caption for next_ in itertools.islice(again, 3)] == captions[done:]


@given(st.integers(1, 13), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_each_epoch_is_a_permutation_of_the_items(items, batch, world, seed):
    loader = Loader(Numbers(items), batch, seed, 0, world)
    stream = [loader.index(place) for place in range(3 * items)]
    for epoch in range(3):
        assert sorted(stream[epoch * items : (epoch + 1) * items]) == list(range(items))


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24),
    st.sampled_from(["center", "random"]), st.floats(0, 0.5), st.floats(0.5, 2), st.tuples(*[unit] * 5),
)  # fmt: skip
def test_any_picture_becomes_the_target_size_and_the_cut_lies_inside(
    h, w, height, width, crop, shift, scale, draws
):
    import PIL.Image

    transform = Transform(height, width, crop, Augment(shift, (scale, scale)))
    resized = transform.resize(PIL.Image.fromarray(np.full((h, w, 3), 7, np.uint8)))
    image, (top, left), _ = transform.place(resized, Placement(*draws))
    assert resized.original_size == (h, w)
    assert image.shape == (3, height, width)
    assert -1 <= image.min() <= image.max() <= 1
    tall, wide = resized.pixels.shape[:2]
    assert 0 <= top - resized.start[0] <= tall - height
    assert 0 <= left - resized.start[1] <= wide - width
    assert tall * wide <= (KEPT + 1) * height * width + height + width
    assert (tall, wide) == (height, wide) or (tall, wide) == (tall, width)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda weights: sum(weights) > 0), unit)
def test_a_caption_of_weight_zero_is_never_drawn(weights, draw):
    record = Record(None, tuple(map(str, range(len(weights)))), tuple(weights))
    assert weights[int(record.caption(draw))] > 0


# ---------------------------------------------------------------------- groups (buckets, weights)


@st.composite
def grouped(draw):
    """Groups of one to three shares over distinct items, some with other draws than items."""
    start, made = 0, []
    for _ in range(draw(st.integers(2, 4))):
        shares = []
        for _ in range(draw(st.integers(1, 2))):
            count = draw(st.integers(1, 6))
            draws = draw(st.one_of(st.just(count), st.integers(1, 9)))
            shares.append(Share(np.arange(start, start + count), draws))
            start += count
        made.append(tuple(shares))
    return start, made


@given(grouped(), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**40), st.integers(0, 9))
def test_groups_resume_anywhere_and_no_batch_mixes_them(made, batch, world, seed, done):
    items, groups = made
    of = {int(item): g for g, group in enumerate(groups) for share in group for item in share.items}
    ranks = []
    for rank in range(world):
        straight = Loader(Numbers(items), batch, seed, rank, world, groups=groups)
        captions = [next_.caption for next_ in itertools.islice(straight, done + 3)]
        left = Loader(Numbers(items), batch, seed, rank, world, groups=groups)
        list(itertools.islice(left, done))
        again = Loader(Numbers(items), batch, seed, rank, world, groups=groups)
        again.load_state_dict(json.loads(json.dumps(left.state_dict())))
        assert [next_.caption for next_ in itertools.islice(again, 3)] == captions[done:]
        ranks.append(captions)
    for step in zip(*ranks, strict=True):
        seen = {of[int(caption.split("/")[0])] for captions in step for caption in captions}
        assert len(seen) == 1


@given(grouped(), st.integers(1, 4), st.integers(1, 60), st.integers(0, 99))
def test_within_a_group_every_item_comes_as_often_as_any_other(made, batch, steps, seed):
    items, groups = made
    groups = [tuple(Share(share.items, len(share.items)) for share in group) for group in groups]
    loader = Loader(Numbers(items), batch, seed, groups=groups)
    stream = [caption for next_ in itertools.islice(loader, steps) for caption in next_.caption]
    assert len(set(stream)) == len(stream)
    times = Counter(int(caption.split("/")[0]) for caption in stream)
    for group in groups:
        counts = [times[int(item)] for share in group for item in share.items]
        assert max(counts) - min(counts) <= 1
        size = sum(len(share.items) for share in group)
        assert abs(sum(counts) - len(stream) * size / items) < batch * len(groups) + size


@given(grouped(), st.integers(1, 5), st.integers(1, 5), st.integers(0, 12))
def test_a_change_of_the_batch_repeats_and_loses_nothing(made, before, after, done):
    items, groups = made
    loader = Loader(Numbers(items), before, 0, groups=groups)
    stream = [caption for next_ in itertools.islice(loader, done) for caption in next_.caption]
    other = Loader(Numbers(items), after, 0, groups=groups)
    other.load_state_dict(loader.state_dict())
    stream += [caption for next_ in itertools.islice(other, 12) for caption in next_.caption]
    assert len(set(stream)) == len(stream)


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=30),
       st.lists(st.integers(1, 9000), min_size=1, max_size=3), st.integers(1, 24), st.floats(1, 4),
       st.integers(1, 9))  # fmt: skip
def test_buckets_hold_every_picture_once_and_keep_the_rule(pictures, areas, step, ratio, least):
    areas = tuple(area + step**2 for area in areas)
    made = Buckets.of(pictures, BucketRule(areas, step, ratio, least))
    assert sorted(index for items in made.items for index in items) == list(range(len(pictures)))
    for (height, width), items in zip(made.sizes, made.items, strict=True):
        assert height % step == width % step == 0
        assert height * width <= max(areas)
        assert max(height, width) <= ratio * min(height, width) or height == width
        assert len(items) >= least or len(made.sizes) == 1


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 9)), min_size=1, max_size=4))
def test_weights_are_kept_in_a_stream_to_the_item(shares):
    total = sum(count for count, _ in shares)
    records = RecordSet(tuple(Record(None, ("x",)) for _ in range(total)), (), tuple(shares))
    (group,) = order_groups(records)
    weights = sum(weight for _, weight in shares)
    for share, (_, weight) in zip(group, shares, strict=True):
        assert abs(share.per_round - total * weight / weights) <= 1
