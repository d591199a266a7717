"""Parquet tables of pictures as bytes or paths."""

import builtins
import io

import PIL.Image
import pytest

from sat.data.dataset import Dataset
from sat.data.records import DataError
from sat.data.sources import read_source, read_sources
from sat.data.transforms import Transform

pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)  # there, but for another numpy


def png(grey: int) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), (grey,) * 3).save(out, "PNG")
    return out.getvalue()


def write(path, rows, group=2):
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.mark.parametrize("nested", [False, True], ids=["bytes", "Hugging Face"])
def test_pictures_are_read_by_row_over_row_groups(tmp_path, nested):
    rows = [
        {"image": {"bytes": png(n * 20), "path": f"{n}.png"} if nested else png(n * 20), "text": f"{n}"}
        for n in range(11)
    ]
    path = write(tmp_path / "a.parquet", rows)
    data = Dataset(read_sources([(path, 1)]), Transform(4, 6), keep_bytes=0)
    for index in (10, 0, 3, 7, 5, 10):
        sample = data.get(index, 0, 0)
        assert sample.caption == str(index)
        assert sample.image.mean().item() == pytest.approx(index * 20 / 127.5 - 1, abs=1e-6)
    assert data.records[4].name == f"{path}:row 5"


def test_paths_are_relative_to_the_table(tmp_path):
    (tmp_path / "x.png").write_bytes(png(9))
    path = write(tmp_path / "a.parquet", [{"path": "x.png", "caption": ["a", "b"], "weights": [1.0, 3.0]}])
    (record,) = read_source(tmp_path).records
    assert (record.path, record.captions, record.weights) == (tmp_path / "x.png", ("a", "b"), (1.0, 3.0))
    assert read_source(path).records == (record,)


def test_bad_rows_are_listed_with_row_and_field(tmp_path):
    path = write(tmp_path / "a.parquet", [{"path": "gone.png", "text": "x"}, {"path": None, "text": None}])
    assert [str(bad) for bad in read_source(path).bad] == [
        f"{path}:row 1: file_name: gone.png: no such file",
        f"{path}:row 2: file_name: None, expected the path of an image",
    ]
    path = write(tmp_path / "b.parquet", [{"image": png(1), "text": None}])
    assert "row 1: text: no caption" in str(read_source(path).bad[0])


def test_a_row_without_bytes_is_an_unreadable_picture(tmp_path):
    path = write(tmp_path / "a.parquet", [{"image": png(0), "text": "a"}, {"image": None, "text": "b"}])
    data = Dataset(read_sources([(path, 1)]), Transform(4, 6), max_bad_share=0.5)
    assert data.get(1, 0, 0).caption == "a"
    assert str(data.bad[0]) == f"{path}:row 2: image: no bytes in this row"


def test_a_table_without_pictures_names_its_columns(tmp_path):
    path = write(tmp_path / "a.parquet", [{"picture": b"", "text": "x"}])
    assert "image: no column file_name or path or image (there are: picture, text)" in str(
        read_source(path).bad[0]
    )
    path.write_bytes(b"PAR1 no")
    assert "not a parquet file" in str(read_source(path).bad[0])


def test_without_pyarrow_it_is_said_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [{"image": b"", "text": "x"}])
    real = builtins.__import__

    def no_pyarrow(name, *rest, **more):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(DataError, match="needs pyarrow: pip install -e"):
        read_source(path)
