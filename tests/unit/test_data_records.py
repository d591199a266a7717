"""What counts as a pair of picture and caption, and what is said of the rest."""

import json
from pathlib import Path

import PIL.Image
import pytest

from sat.data.records import CAPTION_KEYS, DataError, Record
from sat.data.sources import Source, read_source, read_sources


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
        "gone.png: no such file", "no caption, expected one of text, prompt, caption, captions, description",
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
    assert [bad.reason for bad in read_source(tmp_path).bad] == [
        "no caption file b.txt",
        "txt: empty caption",
    ]


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
        (
            lambda path: picture(path / "a.png"),
            r"expected a folder, a \.jsonl, \.csv, \.tsv, \.tar or \.parquet file",
        ),
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


# ---------------------------------------------------------------------- comma-separated tables


def csv_table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "metadata.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("key", ["text", "prompt", "caption"])
def test_a_csv_table_is_read_as_the_other_one(tmp_path, key):
    picture(tmp_path / "sub" / "a.png")
    csv_table(tmp_path, f'file_name,{key},style\nsub/a.png,"red, round\napple",flat\n', "utf-8-sig")
    (record,) = read_source(tmp_path).records
    assert (record.path, record.captions) == (tmp_path / "sub" / "a.png", ("red, round\napple",))
    assert record.labels == {"style": "flat"}
    assert len(read_source(tmp_path / "metadata.csv")) == 1


def test_bad_csv_rows_are_listed_with_line_and_field(tmp_path):
    picture(tmp_path / "a.png")
    csv_table(tmp_path, "file_name,text\na.png,fine\ngone.png,x\na.png,\n,x\n")
    found = read_source(tmp_path)
    assert len(found) == 1
    assert [str(bad) for bad in found.bad] == [
        f"{tmp_path}/metadata.csv:3: file_name: gone.png: no such file",
        f"{tmp_path}/metadata.csv:4: text: no caption, expected one of {', '.join(CAPTION_KEYS)}",
        f"{tmp_path}/metadata.csv:5: file_name: None, expected the path of an image",
    ]
    assert [bad.kind for bad in found.bad] == ["picture", "caption", "picture"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "name,text\na.png,x\n",
            "metadata.csv:1: file_name: no column file_name or path or image (there are: name, text)",
        ),
        ("file_name,words\na.png,x\n", "metadata.csv:1: text: no column text or prompt or caption"),
        (
            "file_name,text\na.png,\xff\n",
            "metadata.csv:2: text: '\\udcff': bytes or characters that are no text; save it as UTF-8",
        ),
    ],
)
def test_a_csv_table_without_its_columns_is_told_by_name(tmp_path, text, words):
    csv_table(tmp_path, text, "latin-1")
    assert words in str(read_source(tmp_path).bad[0])


def test_two_tables_in_one_folder_are_ambiguous(tmp_path):
    table(tmp_path, {})
    csv_table(tmp_path, "")
    with pytest.raises(DataError, match=r"metadata\.jsonl and metadata\.csv; name the one to read"):
        read_source(tmp_path)


def test_fields_are_named_in_complaints(tmp_path):
    picture(tmp_path / "a.png")
    table(
        tmp_path,
        {"file_name": "a.png", "prompt": [1]},
        {"file_name": "a.png", "text": "x", "weights": "heavy"},
        "{",
    )
    reasons = [bad.reason for bad in read_source(tmp_path).bad]
    assert reasons[0] == "prompt: [1], expected a caption or a list of captions"
    assert reasons[1] == "weights: 'heavy', expected a list of numbers"
    assert reasons[2].startswith("row: not JSON")


# ---------------------------------------------------------------------- weights of sources


def test_weights_of_sources_are_kept_beside_their_records(tmp_path):
    for name, count in (("a", 3), ("b", 1)):
        for number in range(count):
            picture(tmp_path / name / f"{number}.png").with_suffix(".txt").write_text("x")
    found = read_sources([Source(tmp_path / "a", weight=1.0), Source(tmp_path / "b", weight=2.0)])
    assert found.shares == ((3, 1.0), (1, 2.0))
    with pytest.raises(DataError, match="either every source has a weight or none"):
        read_sources([Source(tmp_path / "a", weight=1.0), Source(tmp_path / "b")])
