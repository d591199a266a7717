"""Shards written and read by the webdataset library are to us what they are to it."""

import io

import PIL.Image
import pytest

from sat.data.sources import read_source

webdataset = pytest.importorskip("webdataset")


def test_samples_keys_and_captions_are_those_of_webdataset(tmp_path):
    pattern = str(tmp_path / "a-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:
        for number in range(7):
            picture = PIL.Image.new("RGB", (5, 4), (number, 0, 0))
            text = {"txt": f"caption {number}"} if number % 2 else {"json": {"text": f"caption {number}"}}
            writer.write({"__key__": f"sub/{number:04d}", "png": picture, **text})
    ours = read_source(tmp_path / "a-{000..002}.tar").records
    theirs = list(webdataset.WebDataset(str(tmp_path / "a-{000..002}.tar"), shardshuffle=False).decode("pil"))
    assert len(ours) == len(theirs) == 7
    for record, sample in zip(ours, theirs, strict=True):
        assert record.name.endswith(f":{sample['__key__']}.png")
        assert record.captions == (sample["txt"] if "txt" in sample else sample["json"]["text"],)
        with PIL.Image.open(record.file()) as picture:
            assert picture.tobytes() == sample["png"].tobytes()
        assert isinstance(record.file(), io.BytesIO)
