"""Tar shards: samples are read in place, and what is wrong is told by member and field."""

import io
import json
import tarfile
from pathlib import Path

import PIL.Image
import pytest

from sat.data.dataset import Dataset
from sat.data.formats import expand
from sat.data.records import DataError
from sat.data.sources import read_source, read_sources
from sat.data.transforms import Transform


def png(grey: int = 0, size: tuple[int, int] = (6, 4), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", size, (grey,) * 3).save(out, kind)
    return out.getvalue()


def shard(path: Path, *members: tuple[str, bytes | str], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as out:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def test_members_of_one_key_are_a_sample_in_order(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        ("x/002.png", png(20)), ("x/002.txt", "two\nwords"), ("x/002.json", "{}"),
        ("x/001.JPG", png(10, kind="JPEG")), ("x/001.caption", "one"),
        ("003.v1.png", png(30)), ("003.json", json.dumps({"prompt": ["a", "b"], "weights": [1, 3]})),
    )  # fmt: skip
    found = read_source(path)
    assert not found.bad
    assert [record.captions for record in found.records] == [("two words",), ("one",), ("a", "b")]
    assert found.records[2].weights == (1.0, 3.0)
    assert [record.name for record in found.records] == [
        f"{path}:x/002.png", f"{path}:x/001.JPG", f"{path}:003.v1.png",
    ]  # fmt: skip


def test_pictures_are_read_from_where_they_lie(tmp_path):
    members = [
        (f"{n}.{kind}", data) for n in range(5) for kind, data in (("png", png(n * 40)), ("txt", f"{n}"))
    ]
    path = shard(tmp_path / "a.tar", *members)
    data = Dataset(read_sources([(path, 1)]), Transform(2, 2), keep_bytes=0)
    for index in (3, 0, 4, 3):
        sample = data.get(index, 0, 0)
        assert sample.caption == str(index)
        assert sample.original_size == (4, 6)
        assert sample.image.mean().item() == pytest.approx(index * 40 / 127.5 - 1, abs=1e-6)


def test_a_folder_of_shards_is_read_in_order_of_names(tmp_path):
    for name in ("b", "a"):
        shard(tmp_path / f"{name}.tar", ("1.png", png()), ("1.txt", name))
    assert [record.captions for record in read_source(tmp_path).records] == [("a",), ("b",)]


def test_a_range_stands_for_numbered_shards(tmp_path):
    for number in (8, 9, 10):
        shard(tmp_path / f"a-{number:03d}.tar", ("1.png", png()), ("1.txt", f"{number}"))
    found = read_source(tmp_path / "a-{008..010}.tar")
    assert [record.captions for record in found.records] == [("8",), ("9",), ("10",)]
    with pytest.raises(DataError, match=r"a-011\.tar: no such folder or file"):
        read_source(tmp_path / "a-{008..011}.tar")


def test_ranges_expand_in_every_place():
    names = [path.name for path in expand(Path("d/a{0..1}-{08..09}.tar"))]
    assert names == ["a0-08.tar", "a0-09.tar", "a1-08.tar", "a1-09.tar"]
    assert expand(Path("d/a.tar")) == [Path("d/a.tar")]


def test_every_bad_sample_is_listed_with_member_and_field(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        ("0.png", png()),
        ("1.txt", "x"),
        ("2.png", png()), ("2.txt", " \n"),
        ("3.png", png()), ("3.json", "{"),
        ("4.png", png()), ("4.json", "[]"),
        ("5.png", png()), ("5.json", '{"text": 5}'),
        ("6.png", png()), ("6.txt", b"\xff"),
        ("7.png", png()), ("7.png", png()), ("7.txt", "x"),
        ("8.png", png()), ("8.txt", "good"),
    )  # fmt: skip
    found = read_source(path)
    assert [record.captions for record in found.records] == [("good",)]
    expected = (
        "txt: no caption, expected a member .txt, .text, .prompt, .caption or .json",
        "picture: no member .jpg, .png or the like beside .txt",
        "txt: empty caption", "json: not JSON", "json: expected an object, got list",
        "text: 5, expected a caption", "txt: not UTF-8", "png: two members of this name",
    )  # fmt: skip
    for number, (bad, words) in enumerate(zip(found.bad, expected, strict=True)):
        assert str(bad).startswith(f"{path}:{number}: {words}")


def test_a_compressed_shard_is_refused_with_the_reason(tmp_path):
    path = shard(tmp_path / "a.tar", ("1.png", png()), ("1.txt", "x"), mode="w:gz")
    (bad,) = read_source(path).bad
    assert "not a whole, uncompressed tar file (pictures are read in place)" in str(bad)


def test_a_cut_off_shard_gives_what_is_whole_and_says_so(tmp_path):
    members = [(f"{n}.{kind}", data) for n in range(3) for kind, data in (("txt", f"{n}"), ("png", png(n)))]
    path = shard(tmp_path / "a.tar", *members)
    with tarfile.open(path) as whole:
        end = whole.getmembers()[-1].offset
    path.write_bytes(path.read_bytes()[: end + 100])
    found = read_source(path)
    assert [record.captions for record in found.records][:2] == [("0",), ("1",)]
    assert any("not a whole, uncompressed tar file" in bad.reason for bad in found.bad)
