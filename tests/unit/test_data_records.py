"""What counts as a pair of picture and caption, and what is said of the rest."""

import json
from pathlib import Path

import PIL.Image
import pytest

from sat.data.records import DataError, Record
from sat.data.sources import read_source, read_sources


def picture(path: Path, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, "red").save(path)
    return path


def table(folder: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_text_files_of_the_same_name_are_captions_in_path_order(tmp_path):
    for name, text in (("b.png", "two\n words "), ("sub/a.jpg", "one"), ("a.PNG", "first")):
        picture(tmp_path / name).with_suffix(".txt").write_text(text, "utf-8")
    found = read_source(tmp_path)
    assert [record.captions for record in found.records] == [("first",), ("two words",), ("one",)]
    assert not found.bad


@pytest.mark.parametrize("key", ["text", "prompt", "caption"])
def test_a_table_names_its_caption_in_any_of_three_ways(tmp_path, key):
    picture(tmp_path / "a.png")
    table(tmp_path, {"file_name": "a.png", key: "an apple", "style": "flat"})
    (record,) = read_source(tmp_path).records
    assert record.captions == ("an apple",)
    assert record.labels == {"style": "flat"}


def test_a_table_stands_for_its_folder_alone(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png").with_suffix(".txt").write_text("not listed")
    table(tmp_path, {"file_name": "a.png", "text": ["one", "two"], "weights": [1, 3]})
    (record,) = read_source(tmp_path).records
    assert record.path == tmp_path / "a.png"
    assert record.captions == ("one", "two")


def test_a_jsonl_file_is_a_source_itself(tmp_path):
    picture(tmp_path / "a.png")
    table(tmp_path, {"file_name": "a.png", "text": "x"}).rename(tmp_path / "heldout.jsonl")
    assert len(read_source(tmp_path / "heldout.jsonl")) == 1


def test_every_bad_row_is_listed_with_its_line_and_cause(tmp_path):
    picture(tmp_path / "a.png")
    table(
        tmp_path,
        {"file_name": "a.png", "text": "good"},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "a.png"},
        "{broken",
        {"file_name": "a.png", "text": "  "},
        {"file_name": "a.png", "text": ["x", "y"], "weights": [1]},
        {"file_name": "a.png", "text": ["x"], "weights": [-1]},
        [1],
        {"text": "x"},
    )
    found = read_source(tmp_path)
    assert len(found) == 1
    reasons = [str(bad) for bad in found.bad]
    expected = (
        "gone.png: no such file", "no caption, expected one of text, prompt, caption",
        "Expecting property name", "expected a caption", "1 weights for 2 captions", "none negative",
        "expected an object", "file_name: None",
    )  # fmt: skip
    for number, (reason, words) in enumerate(zip(reasons, expected, strict=True), 2):
        assert f"metadata.jsonl:{number}: " in reason
        assert words in reason


def test_a_table_that_is_not_text_is_bad_lines_not_a_crash(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe{\n")
    assert len(read_source(tmp_path).bad) == 1


def test_pictures_without_caption_are_bad(tmp_path):
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("fine")
    picture(tmp_path / "b.png")
    picture(tmp_path / "c.png").with_suffix(".txt").write_text(" \n")
    assert [bad.reason for bad in read_source(tmp_path).bad] == ["no caption file b.txt", "empty caption"]


def test_too_large_a_bad_share_stops_and_shows_examples(tmp_path):
    for number in range(10):
        picture(tmp_path / f"{number}.png")
        if number:
            (tmp_path / f"{number}.txt").write_text("x")
    assert len(read_sources([(tmp_path, 1)], max_bad_share=0.1)) == 9
    with pytest.raises(DataError, match=r"1 of 10 items cannot be used.*0\.05.*max_bad_share.*0\.png"):
        read_sources([(tmp_path, 1)], max_bad_share=0.05)


def test_repeats_multiply_a_source(tmp_path):
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("x")
    assert len(read_sources([(tmp_path, 3), (tmp_path, 1)])) == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path / "none", "no such folder"),
        (lambda path: picture(path / "a.png"), r"expected a folder, a \.jsonl, \.csv, \.tar or \.parquet file"),
        (lambda path: path, "no pairs of image and caption"),
    ],
)
def test_a_source_that_is_none_says_what_is_expected(tmp_path, make, words):
    with pytest.raises(DataError, match=words):
        read_sources([(make(tmp_path), 1)])


def test_captions_are_drawn_by_weight():
    record = Record(Path("x"), ("a", "b", "c"), (1.0, 0.0, 3.0))
    drawn = [record.caption(step / 1000) for step in range(1000)]
    assert [drawn.count(caption) for caption in "abc"] == [250, 0, 750]
    alike = Record(Path("x"), ("a", "b"))
    assert [alike.caption(step / 4) for step in range(4)] == ["a", "a", "b", "b"]
