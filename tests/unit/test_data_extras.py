"""Further pictures of a record: found in every layout, cut as the picture is, cached with its latents."""

import io
import itertools
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from sat.config.schema import DataConfig, SourceConfig
from sat.config.schema.base import RuleError
from sat.config.schema.experiment import ExtraConfig
from sat.data.cache import CachedDataset, Store, Stores, fill_latents
from sat.data.dataset import Dataset, LatentCache
from sat.data.loader import Loader
from sat.data.records import DataError, ExtraRule
from sat.data.sources import Source, read_source, read_sources
from sat.data.transforms import Augment, Transform, opened
from sat.train.data import source_of
from tests.tolerances import EXACT

MASK = {"mask": ExtraRule("mask", required=False)}
CONTROL = {"control": ExtraRule("control")}


def ramp(height: int, width: int) -> PIL.Image.Image:
    """A grey picture of random pixels."""
    grey = np.random.default_rng(height).integers(0, 256, (height, width), np.uint8)
    return PIL.Image.fromarray(grey)


def data(picture: PIL.Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def pair(folder: Path, name: str, picture: PIL.Image.Image, **beside: PIL.Image.Image) -> None:
    picture.convert("RGB").save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(name)
    for ending, other in beside.items():
        other.save(folder / f"{name}.{ending}.png")


def batch(records, transform, **options):
    return next(iter(Loader(Dataset(records, transform), len(records), seed=3, **options)))


# -- where they lie


def test_a_picture_beside_belongs_to_its_own_and_is_no_pair(tmp_path):
    pair(tmp_path, "fox", ramp(6, 4), mask=ramp(6, 4))
    pair(tmp_path, "owl", ramp(6, 4))
    found = read_source(tmp_path, None, MASK)
    assert [record.captions[0] for record in found.records] == ["fox", "owl"]
    assert [sorted(record.extras) for record in found.records] == [["mask"], []]
    assert not found.bad
    assert found.notes == (f"1 pictures without a mask, which count as a whole: {tmp_path / 'owl.png'}",)


def test_a_required_picture_that_is_missing_skips_the_pair(tmp_path):
    pair(tmp_path, "fox", ramp(6, 4), control=ramp(6, 4))
    pair(tmp_path, "owl", ramp(6, 4))
    found = read_source(tmp_path, None, CONTROL)
    assert len(found) == 1
    assert str(found.bad[0]) == f"{tmp_path / 'owl.png'}: no picture control"


def test_a_source_without_any_is_refused(tmp_path):
    pair(tmp_path, "fox", ramp(6, 4))
    with pytest.raises(
        DataError, match=r"no picture has a mask under 'mask'; .* fox.mask.png beside fox.jpg"
    ):
        read_source(tmp_path, None, MASK)


@pytest.mark.parametrize("inside", [True, False])
def test_a_folder_of_the_same_names_is_no_source_of_pairs(tmp_path, inside):
    top = tmp_path / "pictures"
    (top / "a").mkdir(parents=True)
    masks = (top if inside else tmp_path) / "masks"
    (masks / "a").mkdir(parents=True)
    pair(top / "a", "fox", ramp(6, 4))
    ramp(6, 4).save(masks / "a" / "fox.webp")
    found = read_source(top, None, {"mask": ExtraRule(folder=masks)})
    assert [record.extras["mask"].path for record in found.records] == [masks / "a" / "fox.webp"]
    assert not found.bad


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_column_of_a_table_names_it(tmp_path, kind):
    ramp(6, 4).save(tmp_path / "fox.png")
    ramp(6, 4).save(tmp_path / "cut.png")
    rows = [
        {"file_name": "fox.png", "text": "x", "mask": "cut.png"},
        {"file_name": "fox.png", "text": "y", "mask": "none.png"},
    ]
    text = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else (
        "file_name,text,mask\n" + "\n".join(",".join(row.values()) for row in rows)
    )  # fmt: skip
    (tmp_path / f"metadata.{kind}").write_text(text)
    found = read_source(tmp_path, None, MASK)
    assert found.records[0].extras["mask"].path == tmp_path / "cut.png"
    assert "mask" not in found.records[0].labels
    assert [bad.reason for bad in found.bad] == ["mask: none.png: no such file"]


def test_a_member_of_a_shard_and_a_parquet_column_hold_it(tmp_path):
    fox, cut = ramp(6, 4).convert("RGB"), ramp(6, 4)
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, content in (("0.png", data(fox)), ("0.mask.png", data(cut)), ("0.txt", b"fox")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = {"image": [data(fox)], "text": ["fox"], "mask": [{"bytes": data(cut), "path": None}]}
    pq.write_table(pa.table(table), tmp_path / "b.parquet")
    for name in ("a.tar", "b.parquet"):
        found = read_source(tmp_path / name, None, MASK)
        assert not found.notes
        (record,) = found.records
        picture, extras = opened(record)
        assert np.array_equal(picture, fox)
        assert np.array_equal(extras["mask"], cut)


# -- cut and placed


@pytest.mark.parametrize("turned", [1, 6])
def test_an_extra_picture_is_cut_and_placed_exactly_as_the_picture(tmp_path, turned):
    picture = ramp(50, 20)
    exif = PIL.Image.Exif()
    exif[0x0112] = turned
    for name in ("fox.png", "fox.control.png"):
        picture.save(tmp_path / name, exif=exif)
    (tmp_path / "fox.txt").write_text("x")
    transform = Transform(8, 12, "random", Augment(0.1, (0.8, 1.2)))
    records = read_sources([Source(tmp_path, extras=CONTROL)])
    for made in itertools.islice(iter(Loader(Dataset(records, transform), 1, seed=1)), 4):
        torch.testing.assert_close(made.extras["control"], made.image, atol=EXACT, rtol=EXACT)


def test_a_mask_of_another_size_weighs_the_same_places(tmp_path):
    left = np.zeros((40, 80), np.uint8)
    left[:, :40] = 255
    mask = PIL.Image.fromarray(left)
    pair(tmp_path, "fox", mask.resize((160, 80)), mask=mask)
    made = batch(read_sources([Source(tmp_path, extras=MASK)]), Transform(8, 8))
    assert made.extras["mask"].shape == (1, 1, 8, 8)
    torch.testing.assert_close(made.extras["mask"], (made.image[:, :1] + 1) / 2, atol=0.1, rtol=0)  # kernels
    assert made.extras["mask"][0, 0, :, :3].min() == 1
    assert made.extras["mask"][0, 0, :, 5:].max() == 0


def test_another_aspect_ratio_is_refused_by_name(tmp_path):
    pair(tmp_path, "fox", ramp(40, 20), mask=ramp(20, 20))
    records = read_sources([Source(tmp_path, extras=MASK)])
    with pytest.raises(DataError, match=r"mask .*fox.mask.png: 20 x 20, another aspect ratio .* 40 x 20"):
        batch(records, Transform(8, 8))


def test_transparency_is_a_mask_and_an_opaque_picture_counts_whole(tmp_path):
    clear = PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 8, 4))
    clear.save(tmp_path / "0.png")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    for name in "01":
        (tmp_path / f"{name}.txt").write_text(name)
    rule = {"mask": ExtraRule(alpha=True, required=False)}
    made = batch(read_sources([Source(tmp_path, extras=rule)]), Transform(8, 8))
    masks = dict(zip(made.caption, made.extras["mask"], strict=True))
    assert masks["0"].mean((0, 2)).tolist() == [0] * 4 + [1] * 4
    assert masks["1"].min() == 1


def test_nothing_counts_where_augmentation_leaves_white(tmp_path):
    pair(tmp_path, "fox", ramp(8, 8), mask=PIL.Image.new("L", (8, 8), 255))
    transform = Transform(8, 8, augment=Augment(scale=(0.5, 0.5)))
    made = batch(read_sources([Source(tmp_path, extras=MASK)]), transform)
    assert made.extras["mask"][0, 0, 0].max() == 0
    assert made.extras["mask"][0, 0, 4, 4] == 1


# -- cached


def encode(images: torch.Tensor) -> torch.Tensor:
    small = F.avg_pool2d(images, 2)
    return torch.cat([small, small - 1], 1)


def folder_of(top: Path) -> Path:
    for number in range(3):
        pair(top, str(number), ramp(12 + number, 8), mask=ramp(12 + number, 8), control=ramp(12 + number, 8))
    pair(top, "3", ramp(9, 8), control=ramp(9, 8))  # without a mask
    return top


def cached(top: Path, where: str, views: int = 2) -> CachedDataset | LatentCache:
    records = read_sources([Source(top, extras={**MASK, **CONTROL})])
    dataset = Dataset(records, Transform(8, 4, "random"))
    if where == "memory":
        return LatentCache(dataset, encode, views, seed=0, batch_size=3)
    root = top.parent / "cache"
    extras = {name: Store(root, "extra", {"extra": name}) for name in ("mask", "control")}
    made = CachedDataset(dataset, Stores(latents=Store(root, "latents", {}), extras=extras), views)
    assert sum(fill_latents(made, made.missing(made.jobs()), encode, batch_size=3)) in (0, 2, 8)
    return made


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_cache_keeps_them_encoded_and_masks_as_means_over_cells(tmp_path, where):
    (tmp_path / "data").mkdir()
    items = cached(folder_of(tmp_path / "data"), where)
    for index in range(4):
        for epoch in range(3):
            sample = items.get(index, epoch, 5)
            moments = sample.latent_moments
            torch.testing.assert_close(sample.extras["control"], moments, atol=EXACT, rtol=EXACT)
            expected = torch.ones(1, 4, 2) if index == 3 else (moments[:1] + 1) / 2
            torch.testing.assert_close(sample.extras["mask"], expected, atol=0.05, rtol=0)  # of the resizing


def test_a_changed_mask_alone_is_made_again(tmp_path):
    (tmp_path / "data").mkdir()
    top = folder_of(tmp_path / "data")
    items = cached(top, "disk")
    assert not items.missing(items.jobs())
    PIL.Image.new("L", (8, 12), 0).save(top / "0.mask.png")
    records = read_sources([Source(top, extras={**MASK, **CONTROL})])
    later = CachedDataset(Dataset(records, items.dataset.transform(0)), items.stores, 2)
    assert {job.item for job in later.missing(later.jobs()).values()} == {0}
    assert cached(top, "disk").get(0, 0, 0).extras["mask"].max() == 0


def test_one_picture_in_two_rows_keeps_both_masks(tmp_path):
    top = tmp_path / "data"
    top.mkdir()
    ramp(8, 8).save(top / "fox.png")
    for name, value in (("a", 0), ("b", 255)):
        PIL.Image.new("L", (8, 8), value).save(top / f"{name}.png")
    rows = [{"file_name": "fox.png", "text": name, "mask": f"{name}.png"} for name in "ab"]
    (top / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = read_sources([Source(top, extras=MASK)])
    for place in (Dataset(records, Transform(8, 8)), None):
        if place is None:
            stores = Stores(Store(tmp_path, "latents", {}), extras={"mask": Store(tmp_path, "extra", {})})
            place = CachedDataset(Dataset(records, Transform(8, 8)), stores, 1)
            list(fill_latents(place, place.missing(place.jobs()), encode))
        assert [place.get(index, 0, 0).extras["mask"].mean() for index in (0, 1)] == [0, 1]


# -- from the config


def test_a_source_says_where_its_masks_are_in_one_way():
    rule = source_of(SourceConfig(Path("x"), mask=ExtraConfig(column="cut"))).extras["mask"]
    assert rule == ExtraRule("cut", required=False)
    with pytest.raises(RuleError, match="expected one of `column`, `folder` and `alpha`, got 2"):
        ExtraConfig(column="mask", alpha=True)
    assert replace(DataConfig([SourceConfig(Path("x"))], 8, 8).sources[0], mask=None).extras == {}


# -- captions by weight


def texts(found) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
    return [(record.captions, record.weights) for record in found.records]


def test_captions_of_several_names_are_drawn_by_their_weights(tmp_path):
    weights = {"short": 1.0, "long": 3.0}
    expected = [(("fox", "a red fox", "a fox in snow"), (1.0, 1.5, 1.5)), (("owl",), (1.0,))]
    ramp(6, 4).save(tmp_path / "0.png")
    rows = [
        {"file_name": "0.png", "short": "fox", "long": ["a red fox", "a fox in snow"]},
        {"file_name": "0.png", "short": "owl", "long": ""},
        {"file_name": "0.png", "text": "of another name"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_source(tmp_path / "rows.jsonl", weights)
    assert texts(found) == expected
    assert [bad.reason for bad in found.bad] == ["short: no caption, expected short or long"]
    draws = [found.records[0].caption((n + 0.5) / 100) for n in range(100)]
    assert [draws.count(text) for text in expected[0][0]] == [25, 37, 38]


def test_captions_by_weight_lie_beside_pictures_and_in_shards(tmp_path):
    weights = {"short": 1.0, "caption": 3.0}
    beside = {"fox.png": data(ramp(6, 4)), "fox.short.txt": b"fox", "fox.caption": b"a red fox"}
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, content in beside.items():
            (tmp_path / "folder" / name).write_bytes(content)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    for place in ("folder", "a.tar"):
        found = read_source(tmp_path / place, weights)
        assert texts(found) == [(("fox", "a red fox"), (1.0, 3.0))]
        assert not [*found.bad, *found.notes]
