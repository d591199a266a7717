"""Latents and embeddings on disk: whole or absent, renamed by every cause, made again when gone."""

import json
import os
from pathlib import Path

import PIL.Image
import pytest
import torch

from sat.data.batch import Batch, Sample, collate
from sat.data.cache import (
    CachedDataset,
    CacheError,
    Job,
    Stamps,
    Store,
    Stores,
    caption_key,
    fill_latents,
    fill_text,
    missing,
    prune,
)
from sat.data.dataset import Dataset
from sat.data.loader import Loader
from sat.data.records import DataError, Record
from sat.data.sources import read_sources
from sat.data.transforms import Augment, Transform
from tests.tolerances import EXACT

KEY = "ab" + "0" * 30


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", "latents", {"weights": "x"})


def test_what_is_written_is_read_in_its_type(store):
    tensor = torch.arange(6.0).bfloat16().view(2, 3)
    store.write(KEY, {"moments": tensor})
    assert store.complete(KEY)
    read = store.read(KEY)["moments"]
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, tensor)


def test_other_facts_have_another_place_and_facts_can_be_read(tmp_path, store):
    assert Store(tmp_path / "cache", "latents", {"weights": "x"}).folder == store.folder
    assert Store(tmp_path / "cache", "latents", {"weights": "y"}).folder != store.folder
    assert Store(tmp_path / "cache", "low", {"weights": "x"}).folder != store.folder
    store.write_facts()
    assert json.loads((store.folder / "made_from.json").read_text()) == {"weights": "x"}


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_half_file_is_not_there(store, cut):
    store.write(KEY, {"moments": torch.zeros(8)})
    path = store.path(KEY)
    path.write_bytes(path.read_bytes()[:cut])
    assert not store.complete(KEY)
    assert missing([store], [KEY]) == [KEY]
    with pytest.raises(CacheError, match=r"cannot be read .* starting again makes it anew"):
        store.read(KEY)


@pytest.mark.parametrize("moment", ["write_bytes", "replace"])
def test_a_writer_that_dies_leaves_nothing_that_counts(store, monkeypatch, moment):
    def die(self, data):
        self.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, moment, die)
    with pytest.raises(KeyboardInterrupt):
        store.write(KEY, {"moments": torch.zeros(8)})
    assert not store.complete(KEY)
    assert not any(store.path(KEY).parent.iterdir())


def test_what_dead_writers_left_is_cleared_but_not_what_is_being_written(store):
    store.write(KEY, {"moments": torch.zeros(1)})
    old, new = (store.path(KEY).with_name(f".{name}.part") for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    store.write_facts()
    assert not old.exists()
    assert new.exists()


def test_a_stamp_changes_with_the_file_its_time_and_the_member(tmp_path):
    from sat.data.formats import Member

    path = tmp_path / "a.png"
    path.write_bytes(b"1")
    stamps = {Stamps().of(Record(path, ("x",)))}
    path.write_bytes(b"22")
    stamps.add(Stamps().of(Record(path, ("x",))))
    os.utime(path, ns=(1, 1))
    stamps.add(Stamps().of(Record(path, ("x",))))
    stamps.add(Stamps().of(Record(path, ("x",), inside=Member("b", 0, 1))))
    stamps.add(Stamps().of(Record(path.with_name("./a.png"), ("another caption",))))  # pictures only
    assert len(stamps) == 4


# ---------------------------------------------------------------------- whole data sets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(5):
        size = (12, 8) if number < 3 else (8, 12)
        PIL.Image.radial_gradient("L").resize(size).point(lambda v, n=number: (v + 31 * n) % 256).convert(
            "RGB"
        ).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"number {number}")
    return root


def dataset(folder: Path, *, moving: bool = False, share: float = 1.0) -> Dataset:
    transform = Transform(8, 8, "random", Augment(0.3)) if moving else Transform(8, 8)
    return Dataset(read_sources([(folder, 1)], share), transform, share)


def stores(root: Path, *, low: bool = False) -> Stores:
    return Stores(
        Store(root, "latents", {}), Store(root, "low", {}) if low else None, Store(root, "text", {})
    )


def encode(images: torch.Tensor) -> torch.Tensor:
    return images[:, :2, ::4, ::4]


def degrade(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(2, 3), keepdim=True).expand_as(images)


def embed(captions) -> torch.Tensor:
    return torch.tensor([[float(len(text)), float(ord(text[-1]))] for text in captions])[:, None]


def fill(cached: CachedDataset) -> int:
    jobs = cached.missing(cached.jobs())
    made = sum(fill_latents(cached, jobs, encode, degrade if cached.stores.low else None, batch_size=2))
    text = cached.stores.text
    captions = cached.captions()
    absent = missing([text], captions)
    return made + sum(fill_text(text, {key: captions[key] for key in absent}, embed, batch_size=2))


def test_a_cached_item_is_the_one_it_was_made_from(folder, tmp_path):
    data = dataset(folder)
    cached = CachedDataset(data, stores(tmp_path / "c", low=True), views=1)
    assert fill(cached) == 10
    for index in range(5):
        ours, theirs = cached.get(index, 3, 1), data.get(index, 3, 1)
        assert ours.image is None
        for name in ("caption", "original_size", "crop", "target_size"):
            assert getattr(ours, name) == getattr(theirs, name)
        image = theirs.image[None]
        assert (ours.latent_moments - encode(image)[0]).abs().max() <= EXACT
        assert (ours.low_moments - encode(degrade(image))[0]).abs().max() <= EXACT
        assert torch.equal(ours.text, embed([ours.caption])[0])
    batch = next(iter(Loader(cached, 5, workers=2)))
    assert batch.text.shape == (5, 1, 2)
    assert batch.low_moments.shape == batch.latent_moments.shape == (5, 2, 2, 2)


def test_views_differ_and_are_drawn_by_epoch(folder, tmp_path):
    cached = CachedDataset(dataset(folder, moving=True), stores(tmp_path / "c"), views=3)
    assert fill(cached) == 15 + 5
    seen = {tuple(cached.get(0, epoch, 0).latent_moments.flatten().tolist()) for epoch in range(30)}
    assert len(seen) == 3


def test_views_do_not_change_when_other_pictures_come(folder, tmp_path):
    before = CachedDataset(dataset(folder, moving=True), stores(tmp_path / "c"), views=2)
    fill(before)
    (folder / "00.txt").write_text("another")
    (folder / "0.png").rename(folder / "00.png")
    PIL.Image.new("RGB", (9, 9)).save(folder / "0.png")
    after = CachedDataset(dataset(folder, moving=True), stores(tmp_path / "c"), views=2)
    assert fill(after) == 2 * 2 + 1
    anew = CachedDataset(dataset(folder, moving=True), stores(tmp_path / "d"), views=2)
    fill(anew)
    for index in range(6):
        assert torch.equal(after.get(index, 0, 0).latent_moments, anew.get(index, 0, 0).latent_moments)


def test_only_what_changed_is_made_again(folder, tmp_path):
    cached = CachedDataset(dataset(folder), stores(tmp_path / "c"), views=1)
    assert fill(cached) == 10
    assert fill(CachedDataset(dataset(folder), stores(tmp_path / "c"), views=1)) == 0
    PIL.Image.new("RGB", (8, 8), "red").save(folder / "2.png")
    (folder / "3.txt").write_text("new words")
    again = CachedDataset(dataset(folder), stores(tmp_path / "c"), views=1)
    assert len(again.missing(again.jobs())) == 1
    assert fill(again) == 2
    assert again.get(2, 0, 0).latent_moments[0].mean() == 1
    assert again.get(3, 0, 0).caption == "new words"


def test_a_moved_folder_keeps_its_latents(folder, tmp_path):
    before = CachedDataset(dataset(folder, moving=True), stores(tmp_path / "c"), views=2)
    assert fill(before) == 10 + 5
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "data")
    after = CachedDataset(dataset(moved, moving=True), stores(tmp_path / "c"), views=2)
    assert fill(after) == 0
    other = dataset(moved.rename(tmp_path / "other"), moving=True)
    renamed = CachedDataset(other, stores(tmp_path / "c"), views=2)
    assert fill(renamed) == 10


def test_a_source_is_named_alike_as_folder_and_as_table(tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    places = {read_sources([(path, 1)]).records[0].place for path in (tmp_path, tmp_path / "metadata.jsonl")}
    assert places == {f"{tmp_path.name}/a.png"}


def test_pictures_that_a_cache_cannot_tell_apart_are_named(tmp_path):
    for place, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        folder = tmp_path / place / "data"
        folder.mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8), colour).save(folder / "1.bmp")
        (folder / "1.txt").write_text("x")
        os.utime(folder / "1.bmp", ns=(1, 1))

    def jobs(*places: str) -> int:
        found = read_sources([(tmp_path / place / "data", 1) for place in places])
        return len(CachedDataset(Dataset(found, Transform(8, 8)), stores(tmp_path / "cache"), views=1).jobs())

    assert jobs("a", "b") == 1
    with pytest.raises(CacheError, match=r"b/data/1.bmp and .*c/data/1.bmp are alike .* differ: .*rename"):
        jobs("b", "c")


def test_a_lost_low_resolution_latent_is_made_again(folder, tmp_path):
    cached = CachedDataset(dataset(folder), stores(tmp_path / "c", low=True), views=1)
    fill(cached)
    key = cached.key(Job(0, 0))
    cached.stores.low.path(key).unlink()
    assert list(cached.missing(cached.jobs())) == [key]
    fill(cached)
    assert cached.stores.low.complete(key)


def test_an_unreadable_picture_is_known_without_opening_it_again(folder, tmp_path):
    (folder / "1.png").write_bytes(b"no picture")
    first = CachedDataset(dataset(folder), stores(tmp_path / "c"), views=2)
    assert fill(first) == 2 * 5 + 5
    later = CachedDataset(dataset(folder), stores(tmp_path / "c"), views=2)
    jobs = later.jobs()
    later.reject_unreadable(jobs)
    assert [Path(bad.where).name for bad in later.dataset.bad] == ["1.png"]
    assert later.get(1, 0, 0).caption == "number 2"
    assert not later.missing(jobs)
    with pytest.raises(DataError, match=r"1 of 5 items.*max_bad_share"):
        strict = CachedDataset(dataset(folder, share=0.1), stores(tmp_path / "c"), views=2)
        strict.reject_unreadable(strict.jobs())


def test_a_picture_that_was_unreadable_for_a_moment_is_made_later(folder, tmp_path):
    first = CachedDataset(dataset(folder), stores(tmp_path / "c"), views=1)
    key = first.key(Job(1, 0))
    first.stores.latents.reject(key, "OSError: the disk was away")
    later = CachedDataset(dataset(folder), stores(tmp_path / "c"), views=1)
    assert key in later.missing(later.jobs())
    fill(later)
    later.reject_unreadable(later.jobs())
    assert not later.dataset.bad
    assert later.stores.latents.rejected(key) is None


def test_either_half_can_be_cached_alone(folder, tmp_path):
    whole = stores(tmp_path / "c")
    fill(CachedDataset(dataset(folder), whole, views=1))
    text = CachedDataset(dataset(folder), Stores(text=whole.text), views=1).get(0, 0, 0)
    assert text.image is not None
    assert text.text is not None
    latents = CachedDataset(dataset(folder), Stores(latents=whole.latents), views=1).get(0, 0, 0)
    assert latents.text is None
    assert latents.latent_moments is not None
    with pytest.raises(ValueError, match="data.cache_views 0"):
        CachedDataset(dataset(folder), whole, views=0)


def test_captions_are_kept_once_and_by_their_words(folder, tmp_path):
    (folder / "1.txt").write_text("number 0")
    cached = CachedDataset(dataset(folder), stores(tmp_path / "c"), views=1)
    assert sorted(cached.captions().values()) == ["number 0", "number 2", "number 3", "number 4"]
    assert caption_key("a") != caption_key("A")


def test_pruning_keeps_what_is_used(folder, tmp_path):
    root = tmp_path / "c"
    cached = CachedDataset(dataset(folder), stores(root), views=1)
    fill(cached)
    other = Store(root, "latents", {"weights": "old"})
    other.write(KEY, {"moments": torch.zeros(1)})
    for store in (cached.stores.latents, cached.stores.text, other):
        store.write_facts()
    foreign = root / "not-ours"
    (foreign / "ab").mkdir(parents=True)
    (foreign / "ab" / "x.safetensors").touch()
    used = {
        cached.stores.latents.folder: frozenset(list(cached.jobs())[1:]),
        cached.stores.text.folder: frozenset(cached.captions()),
    }
    assert prune(root, used) == 2
    assert not other.folder.exists()
    assert len(cached.missing(cached.jobs())) == 1
    assert foreign.exists()


def test_samples_of_unequal_halves_make_no_batch():
    one = Sample("x", (1, 1), (0, 0), (1, 1), latent_moments=torch.zeros(2, 1, 1))
    with pytest.raises(ValueError, match=r"one shape.*1 of 2 \(image\)"):
        collate([one, Sample("x", (1, 1), (0, 0), (1, 1), image=torch.zeros(3, 1, 1))])
    other = Sample("x", (1, 1), (0, 0), (1, 1), latent_moments=torch.zeros(2, 2, 1))
    with pytest.raises(ValueError, match="one shape"):
        collate([one, other])


@pytest.mark.gpu
def test_a_pinned_batch_lies_in_pinned_memory():
    two = torch.zeros(1, 2, dtype=torch.int64)
    batch = Batch(["x"], two, two, two, image=torch.zeros(1, 3, 2, 2)).pinned()
    assert batch.image.is_pinned()
    assert batch.crop.is_pinned()
