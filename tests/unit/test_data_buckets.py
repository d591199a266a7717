"""Which sizes there are, and which picture goes to which."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from sat.data.buckets import BucketRule, Buckets, measure, measure_all, measured, nearest
from sat.data.dataset import Dataset, LatentCache
from sat.data.loader import Loader, validation_batches
from sat.data.records import DataError, Record, RecordSet
from sat.data.sources import read_sources
from sat.data.transforms import Augment, Transform


def test_sizes_of_a_million_pixels_are_those_of_a_hand_count():
    sizes = BucketRule((1024 * 1024,), 64, 2.0).sizes(1024 * 1024)
    assert (1024, 1024) in sizes
    assert sizes[0] == (1408, 704)
    assert sizes[-1] == (704, 1408)
    expected = {
        (1408, 704),
        (1344, 768),
        (1216, 832),
        (1152, 896),
        (1088, 960),
    }  # w, then 2^20 / w rounded down
    assert set(sizes) == expected | {(w, h) for h, w in expected} | {(1024, 1024)}


def test_there_is_a_square_whatever_the_area():
    assert (8, 8) in BucketRule((128,), 4, 2.0).sizes(128)
    assert BucketRule((100,), 10, 1.0).sizes(100) == [(10, 10)]


def test_a_picture_goes_to_the_nearest_ratio_whichever_side_is_longer():
    sizes = [(64, 64), (64, 96), (96, 64)]
    assert nearest((100, 101), sizes) == (64, 64)
    assert nearest((100, 149), sizes) == (64, 96)
    assert nearest((149, 100), sizes) == (96, 64)
    assert nearest((10, 1000), sizes) == (64, 96)
    far = [(64, 64), (64, 128), (128, 64)]
    assert nearest((145, 100), far) == (128, 64)  # 1.45 is as much above 1 as 2 is above 1.38
    assert nearest((100, 145), far) == (64, 128)


def test_a_picture_goes_to_the_largest_area_that_it_fills():
    rule = BucketRule((32 * 32, 64 * 64, 128 * 128), 16)
    assert [rule.best((side, side)) for side in (20, 32, 63, 64, 127, 128, 999)] == [
        (32, 32), (32, 32), (32, 32), (64, 64), (64, 64), (128, 128), (128, 128),
    ]  # fmt: skip


def test_small_buckets_are_closed_and_nothing_is_lost():
    rule = BucketRule((64 * 64,), 16, 2.0, min_images=3)
    pictures = [(64, 64)] * 5 + [(64, 96)] * 2 + [(96, 64)] * 4 + [(64, 120)] * 1
    made = Buckets.of(pictures, rule)
    assert sorted(index for items in made.items for index in items) == list(range(12))
    assert min(map(len, made.items)) >= 3
    one = Buckets.of(pictures, BucketRule((64 * 64,), 16, min_images=99))
    assert len(one.sizes) == 1
    assert len(one.items[0]) == 12


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"areas": (64,), "step": 0}, "data.buckets.step 0"),
        ({"areas": (63,), "step": 8}, r"data.buckets.area \[63\]: expected at least step x step = 64"),
        ({"areas": (), "step": 8}, "data.buckets.area"),
        ({"areas": (64,), "step": 8, "max_ratio": 0.9}, "data.buckets.max_ratio 0.9"),
    ],
)
def test_impossible_rules_are_refused(rule, words):
    with pytest.raises(ValueError, match=words):
        BucketRule(**rule)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "size"), [(1, (4, 6)), (3, (4, 6)), (6, (6, 4)), (8, (6, 4))])
def test_a_picture_is_measured_as_it_is_shown(tmp_path, kind, orientation, size):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a"
    PIL.Image.new("RGB", (6, 4)).save(path, kind, exif=exif)
    assert measure(Record(path, ("x",))) == size
    shown = Transform(2, 2).load(path)
    assert shown.original_size == size


def folder(root: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    """Pictures of (height, width), each of its own grey, captioned by their names."""
    for number, (name, (height, width)) in enumerate(sizes.items()):
        PIL.Image.new("RGB", (width, height), (number * 20,) * 3).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(name)
    return root


SIZES = {"a": (8, 8), "b": (8, 16), "c": (16, 8), "d": (9, 9), "e": (8, 17), "f": (32, 32), "g": (15, 8)}


def sized(records: RecordSet, share: float) -> tuple[RecordSet, list[tuple[int, int]]]:
    return measured(records, measure_all(records.records), share)


def dataset(root: Path, **options) -> Dataset:
    records, sizes = sized(read_sources([(root, 1)], 1.0), 1.0)
    buckets = Buckets.of(sizes, BucketRule((64, 128), 4, 2.0))
    return Dataset(records, Transform(8, 8, **options), 1.0, buckets=buckets)


def test_pictures_get_the_size_and_the_conditions_of_their_bucket(tmp_path):
    data = dataset(folder(tmp_path, SIZES))
    seen = {}
    for index in range(len(data)):
        sample = data.get(index, 0, 0)
        assert sample.image.shape[1:] == sample.target_size
        seen[sample.caption] = (sample.original_size, sample.crop, sample.target_size)
    assert seen["a"] == ((8, 8), (0, 0), (8, 8))
    assert seen["b"] == ((8, 16), (0, 0), (8, 16))
    assert seen["c"] == ((16, 8), (0, 0), (16, 8))
    assert seen["e"] == ((8, 17), (0, 0), (8, 16))  # half a pixel off the middle is 0
    assert seen["f"] == ((32, 32), (0, 0), (8, 8))
    assert seen["g"] == ((15, 8), (3, 0), (8, 8))  # too small for the larger area


def test_batches_hold_one_size_which_is_the_same_on_all_ranks(tmp_path):
    data = dataset(folder(tmp_path, SIZES))
    loaders = [iter(Loader(data, 1, 3, rank, 2, groups=data.groups)) for rank in range(2)]
    for _ in range(20):
        left, right = (next(loader) for loader in loaders)
        assert left.target_size.tolist() == right.target_size.tolist()


def test_an_unreadable_picture_is_replaced_out_of_its_bucket(tmp_path):
    folder(tmp_path, {"a": (8, 8), "b": (8, 16), "c": (8, 8)})
    data = dataset(tmp_path)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    assert data.get(0, 0, 0).caption == "c"
    assert data.record(0).captions == ("c",)


def test_pictures_that_cannot_be_measured_are_left_out_with_their_weight(tmp_path):
    folder(tmp_path, {"a": (8, 8), "b": (8, 16)})
    (tmp_path / "b.png").write_bytes(b"no")
    found = read_sources([(tmp_path, 1)])
    records = RecordSet(found.records, (), ((1, 2.0), (1, 1.0)))
    with pytest.raises(DataError, match="no picture of one of data.sources"):
        sized(records, 1.0)
    left, sizes = sized(RecordSet(found.records, (), ((2, 1.0),)), 1.0)
    assert (len(left), sizes, left.shares) == (1, [(8, 8)], ((1, 1.0),))
    assert "not a picture in one of" in str(left.bad[0])
    with pytest.raises(DataError, match="1 of 2 items"):
        sized(found, 0.1)


def test_latents_are_cached_in_memory_for_each_bucket(tmp_path):
    data = dataset(folder(tmp_path, SIZES), crop="random", augment=Augment(0.1))
    shapes = []

    def encode(images):
        shapes.append(tuple(images.shape))
        return images[:, :2, ::4, ::4]

    cache = LatentCache(data, encode, views=2, seed=0, batch_size=2)
    assert sum(shape[0] for shape in shapes) == 14
    for batch, _ in zip(Loader(cache, 2, 0, groups=data.groups), range(9), strict=False):
        height, width = batch.target_size[0].tolist()
        assert batch.latent_moments.shape == (2, 2, height // 4, width // 4)


def test_validation_takes_whole_rounds_of_each_bucket(tmp_path):
    data = dataset(
        folder(tmp_path, {f"a{n}": (8, 8) for n in range(5)} | {f"b{n}": (8, 16) for n in range(3)})
    )
    batches = validation_batches(data, 2, groups=data.groups)
    assert sorted(tuple(batch.caption) for batch in batches) == [("a0", "a1"), ("a2", "a3"), ("b0", "b1")]
    (batch,) = validation_batches(data, 9, groups=data.groups)
    assert set(batch.caption) == {f"a{n}" for n in range(5)}


def test_measuring_does_not_decode(tmp_path, monkeypatch):
    data = io.BytesIO()
    PIL.Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(data, "PNG")
    (tmp_path / "a.png").write_bytes(data.getvalue())
    monkeypatch.setattr(PIL.Image.Image, "load", None)
    assert measure(Record(tmp_path / "a.png", ("x",))) == (5, 7)
