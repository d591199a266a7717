"""Properties of the data order, the cut and the caption draw."""

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sat.data.batch import Sample
from sat.data.loader import Loader
from sat.data.records import Record
from sat.data.transforms import Augment, Draws, Transform

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
    fitted = transform.fit(PIL.Image.fromarray(np.full((h, w, 3), 7, np.uint8)))
    image, (top, left) = transform.place(fitted, Draws(*draws))
    assert fitted.original_size == (h, w)
    assert image.shape == (3, height, width)
    assert -1 <= image.min() <= image.max() <= 1
    tall, wide = fitted.pixels.shape[:2]
    assert 0 <= top <= tall - height
    assert 0 <= left <= wide - width
    assert (tall, wide) == (height, wide) or (tall, wide) == (tall, width)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda weights: sum(weights) > 0), unit)
def test_a_caption_of_weight_zero_is_never_drawn(weights, draw):
    record = Record(None, tuple(map(str, range(len(weights)))), tuple(weights))
    assert weights[int(record.caption(draw))] > 0
