"""Order, resume, substitution of bad items, latent cache."""

import itertools
from pathlib import Path

import PIL.Image
import pytest
import torch

from sat.data.batch import Batch, Sample, collate
from sat.data.dataset import Dataset, LatentCache
from sat.data.loader import Loader, validation_batches
from sat.data.records import DataError, Record, RecordSet
from sat.data.sources import read_sources
from sat.data.transforms import Augment, Transform


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures, each of its own grey, captioned by its number in two ways."""
    for number in range(7):
        PIL.Image.new("RGB", (9, 6), (number * 30,) * 3).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(str(number))
    return tmp_path


def dataset(folder: Path, **options: float) -> Dataset:
    records = read_sources([(folder, 1)], max_bad_share=1)
    augmented = Transform(4, 4, "random", Augment(0.4, (0.8, 1.1)))
    return Dataset(records, augmented, **options)


def take(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(iter(loader), count))


def same(a: Batch, b: Batch) -> bool:
    tensors = (a.image, b.image), (a.crop, b.crop), (a.original_size, b.original_size)
    return a.caption == b.caption and all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_item_comes_once_in_an_epoch_over_all_ranks(folder, world):
    data = dataset(folder)
    steps = [take(Loader(data, 2, seed=5, rank=rank, world=world), 7) for rank in range(world)]
    stream = [caption for step in zip(*steps, strict=True) for batch in step for caption in batch.caption]
    for epoch in range(2 * world):
        assert sorted(stream[7 * epoch : 7 * epoch + 7]) == list("0123456")


def test_epochs_differ_in_order_caption_seeds_and_placement(folder):
    data = dataset(folder)
    first, second = take(Loader(data, 7, seed=1), 2)
    assert first.caption != second.caption
    picture = {caption: image for caption, image in zip(first.caption, first.image, strict=True)}
    moved = [
        not torch.equal(picture[c], image) for c, image in zip(second.caption, second.image, strict=True)
    ]
    assert sum(moved) >= 5  # plain pictures can look alike at other places


def test_the_world_size_does_not_change_the_stream(folder):
    data = dataset(folder)
    one = take(Loader(data, 4, seed=2), 3)
    two = [take(Loader(data, 2, seed=2, rank=rank, world=2), 3) for rank in range(2)]
    for whole, left, right in zip(one, *two, strict=True):
        assert whole.caption == left.caption + right.caption
        assert torch.equal(whole.image, torch.cat([left.image, right.image]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_exactly(folder, workers):
    data = dataset(folder)
    straight = take(Loader(data, 3, seed=4), 9)
    left = Loader(data, 3, seed=4, workers=workers)
    take(left, 5)
    again = Loader(dataset(folder), 3, seed=4, workers=workers)
    again.load_state_dict(left.state_dict())
    assert again.epoch == pytest.approx(15 / 7)
    assert all(itertools.starmap(same, zip(take(again, 4), straight[5:], strict=True)))


def test_iterating_again_goes_on(folder):
    loader = Loader(dataset(folder), 3, seed=4)
    straight = take(Loader(dataset(folder), 3, seed=4), 2)
    assert same(take(loader, 1)[0], straight[0])
    assert same(take(loader, 1)[0], straight[1])


def test_reading_ahead_changes_nothing(folder):
    plain, ahead = (take(Loader(dataset(folder), 3, seed=9, workers=workers), 8) for workers in (0, 3))
    assert all(itertools.starmap(same, zip(plain, ahead, strict=True)))


@pytest.mark.parametrize(("name", "value"), [("seed", 5), ("items", 8)])
def test_going_on_in_other_data_is_refused(folder, name, value):
    loader = Loader(dataset(folder), 3, seed=4)
    with pytest.raises(ValueError, match=rf"left with {name} {value}, now {name} is"):
        loader.load_state_dict({**loader.state_dict(), name: value})


def test_an_unreadable_picture_is_listed_once_and_replaced_by_the_next(folder):
    (folder / "3.png").write_bytes(b"not a picture")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:40])
    data = dataset(folder, max_bad_share=0.3)
    captions = sorted(itertools.chain(*(batch.caption for batch in take(Loader(data, 7, seed=0), 2))))
    assert captions == sorted("0125556" * 2)
    assert sorted(Path(bad.where).name for bad in data.bad) == ["3.png", "4.png"]


def test_too_many_unreadable_pictures_stop_the_run(folder):
    (folder / "3.png").write_bytes(b"not a picture")
    data = dataset(folder, max_bad_share=0.1)
    with pytest.raises(DataError, match=r"1 of 7 items.*max_bad_share.*3\.png"):
        take(Loader(data, 7), 1)


def test_an_empty_set_is_refused():
    with pytest.raises(DataError, match="empty"):
        Dataset(RecordSet(()), Transform(4, 4))


def test_nothing_kept_in_memory_gives_the_same(folder):
    kept, read = (take(Loader(dataset(folder, keep_bytes=size), 7, seed=1), 2) for size in (1 << 20, 0))
    assert all(itertools.starmap(same, zip(kept, read, strict=True)))


def test_a_batch_describes_its_pictures(folder):
    batch = take(Loader(dataset(folder), 2), 1)[0]
    assert batch.image.shape == (2, 3, 4, 4)
    assert batch.image.dtype == torch.float32
    assert batch.original_size.tolist() == [[6, 9]] * 2
    assert batch.target_size.tolist() == [[4, 4]] * 2
    assert batch.crop[:, 0].tolist() == [0, 0]
    assert len(batch) == 2
    assert same(batch.to("cpu"), batch)


def test_a_latent_cache_draws_from_its_views_and_keeps_captions(folder):
    data = dataset(folder)
    encoded = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        return images.mean(dim=(2, 3), keepdim=True).double()

    cache = LatentCache(data, encode, views=2, seed=3, batch_size=4)
    assert sum(encoded) == 14
    views = [[data.get(index, view, 3).image.mean() for view in range(2)] for index in range(7)]
    seen = set()
    for epoch in range(6):
        for index in range(7):
            sample, plain = cache.get(index, epoch, 3), data.get(index, epoch, 3)
            assert sample.image is None
            assert sample.caption == plain.caption
            assert sample.latent_moments.dtype == torch.float32
            distances = [abs(sample.latent_moments.mean() - view).item() for view in views[index]]
            assert min(distances) < 1e-6
            seen.add((index, distances.index(min(distances))))
    assert len(seen) > 10
    batch = take(Loader(cache, 7, seed=3), 1)[0]
    assert batch.image is None
    assert batch.latent_moments.shape == (7, 3, 1, 1)


def test_a_latent_cache_captions_what_stands_in_for_a_bad_picture(folder):
    (folder / "3.png").write_bytes(b"not a picture")
    cache = LatentCache(
        dataset(folder, max_bad_share=0.2, keep_bytes=0), lambda images: images, views=1, seed=0
    )
    (folder / "4.png").unlink()  # nothing is opened after the encoding
    assert cache.get(3, 0, 0).caption == "4"


def test_validation_batches_are_in_order_and_shared_over_ranks(folder, caplog):
    data = dataset(folder)
    assert [batch.caption for batch in validation_batches(data, 3)] == [["0", "1", "2"], ["3", "4", "5"]]
    assert "validation shows 6 pictures in whole batches; there are 7" in caplog.text
    assert [batch.caption for batch in validation_batches(data, 2, rank=1, world=2)] == [["2", "3"]]
    assert [batch.caption for batch in validation_batches(data, 9)] == [list("012345601")]
    assert all(
        itertools.starmap(same, zip(validation_batches(data, 3), validation_batches(data, 3), strict=True))
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batch_size": 0}, "train.batch_size 0"), ({"batch_size": 1, "rank": 2, "world": 2}, "rank 2 of 2")],
)
def test_impossible_loaders_are_refused(folder, options, words):
    with pytest.raises(ValueError, match=words):
        Loader(dataset(folder), **options)


def test_pictures_of_different_shapes_do_not_make_a_batch():
    samples = [Sample("x", (1, 1), (0, 0), (1, 1), torch.zeros(3, 1, side)) for side in (1, 2)]
    with pytest.raises(ValueError, match="one shape"):
        collate(samples)
    with pytest.raises(ValueError, match="at least one"):
        collate([])


def test_a_batch_of_unequal_parts_is_refused():
    two = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="2 of original_size for 1 captions"):
        Batch(["x"], two, two, two)


def test_a_record_without_caption_is_refused():
    with pytest.raises(ValueError, match="needs a caption"):
        Record(Path("x"), ())
