"""Data as other tools and damaged disks leave it: read where that is possible, else named and counted."""

import io
import json
import os
import tarfile
from pathlib import Path

import PIL.Image
import pytest

from sat.cli import prepare
from sat.config.schema import DataConfig, SourceConfig
from sat.data.cache import CachedDataset, Job, Stores
from sat.data.dataset import Dataset
from sat.data.formats import LONGEST_TEXT, expand
from sat.data.records import BadRecord, DataError, DataPathError, RecordSet
from sat.data.sources import Source, read_source, read_sources
from sat.data.transforms import Transform
from sat.errors import UserError
from sat.parallel.launch import launch
from sat.train.data import open_data


def png(grey: int = 0, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), (grey,) * 3).save(out, kind)
    return out.getvalue()


def write(root: Path, **files: bytes | str) -> Path:
    """Files below ``root``; ``__`` in a name stands for a folder and ``_`` before the ending for a dot."""
    for name, data in files.items():
        folder, _, last = name.rpartition("__")
        path = root / folder.replace("__", "/") / ".".join(last.rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def shard(path: Path, *members: tuple[str, bytes | str], **settings: object) -> Path:
    with tarfile.open(path, "w", **settings) as out:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def captions(found: RecordSet) -> list[tuple[str, ...]]:
    return [record.captions for record in found.records]


def reasons(found: RecordSet) -> str:
    return "\n".join(map(str, (*found.bad, *found.notes)))


# ---------------------------------------------------------------------- captions beside pictures


@pytest.mark.parametrize("ending", ["txt", "TXT", "caption", "text", "prompt", "Caption", "json"])
def test_captions_beside_pictures_have_the_endings_that_tools_write(tmp_path, ending):
    data = json.dumps({"caption": "red apple"}) if ending == "json" else "red\r\napple\r\n"
    write(tmp_path, a_JPG=png(kind="JPEG"), **{f"a_{ending}": data})
    assert captions(read_source(tmp_path)) == [("red apple",)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("red apple".encode("utf-8-sig"), ""),
        ("rød æble".encode("latin-1"), "txt: not UTF-8 (byte 1); save it as UTF-8"),
        ("red apple".encode("utf-16"), "txt: UTF-16 or no text; save it as UTF-8"),
        ("red apple".encode("utf-16-le"), "txt: UTF-16 or no text; save it as UTF-8"),
        (b" \r\n\t", "txt: empty caption"),
        (b"", "txt: empty caption"),
    ],
)
def test_captions_in_other_encodings_are_told(tmp_path, data, said):
    found = read_source(write(tmp_path, a_png=png(), a_txt=data))
    assert captions(found) == ([] if said else [("red apple",)])
    assert reasons(found) == (f"{tmp_path}/a.txt: {said}" if said else "")


def test_a_caption_file_is_bounded_and_regular(tmp_path):
    write(tmp_path, a_png=png(), b_png=png(), c_png=png())
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(LONGEST_TEXT + 1)
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    said = reasons(read_source(tmp_path))
    assert f"a.txt: has {LONGEST_TEXT + 1} bytes, more than" in said
    assert "b.txt: no regular file" in said
    assert "c.txt: no regular file" in said


def test_pictures_and_captions_without_the_other_are_listed(tmp_path):
    write(tmp_path, a_png=png(), b_txt="x", c_heic=b"x", c_txt="x", d_jxl=b"x", e_py="", g_zip=b"", h_pdf=b"")
    write(tmp_path, fox_png=png(), fox_jpg=png(kind="JPEG"), fox_txt="fox", fox_caption="a fox")
    write(tmp_path, captions_csv="")
    found = read_source(tmp_path)
    assert captions(found) == [("fox",), ("fox",)]
    assert [str(bad).removeprefix(f"{tmp_path}/") for bad in found.bad] == [
        "a.png: no caption file a.txt",
        "c.heic: pictures of the format .heic are not read",
        "d.jxl: pictures of the format .jxl are not read",
    ]
    assert [note.replace(f"{tmp_path}/", "") for note in found.notes] == [
        "1 caption or .json files without a picture: b.txt",
        "2 pictures that share a caption file: fox.jpg, fox.png",
        "1 pictures with several caption files, read in the order .txt, .text, .prompt, .caption, .json: fox",
        "1 tables that are not read; name one as the source: captions.csv",
        "1 packed files that are not read; unpack them: g.zip",
        "2 other files left out: e.py, h.pdf",
    ]


def test_every_picture_format_that_is_documented_is_found_by_its_name(tmp_path):
    for name in ("a.jfif", "b.jpe", "c.jp2", "d.avif", "e.apng", "f.mpo"):
        (tmp_path / name).write_bytes(png())
        (tmp_path / name).with_suffix(".txt").write_text(name)
    assert len(read_source(tmp_path)) == 6


# ---------------------------------------------------------------------- folders


def test_hidden_files_and_clutter_are_left_out_and_counted(tmp_path):
    pair = {"0_png": png(), "0_txt": "x"}
    for place in ("", "__MACOSX/", ".ipynb_checkpoints/", "@eaDir/"):
        write(tmp_path / place, **pair)
    (tmp_path / "._0.png").write_bytes(b"x")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    found = read_source(tmp_path)
    assert captions(found) == [("x",)]
    assert not found.bad
    assert "5 hidden files and folders left out" in reasons(found)


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    write(tmp_path / "real", a_png=png(), a_txt="x")
    top = tmp_path / "top"
    write(top / "sub", b_png=png(), b_txt="y")
    (top / "away").symlink_to(tmp_path / "real")
    (top / "loop").symlink_to(top)
    (top / "all").symlink_to("/")
    (top / "sub" / "up").symlink_to("..")
    (top / "a_copy").symlink_to("sub")
    (top / "gone.png").symlink_to("none")
    (top / "self.png").symlink_to("self.png")
    os.mkfifo(top / "fifo.png")
    found = read_source(top)
    assert [record.path for record in found.records] == [top / "away" / "a.png", top / "sub" / "b.png"]
    said = reasons(found)
    assert "gone.png: a link to nothing" in said
    assert "self.png: a link to nothing" in said
    assert "fifo.png: no regular file" in said
    assert "4 links to folders that are read anyway or hold this one" in said


def test_a_name_that_is_not_utf8_is_told_in_a_printable_line(tmp_path):
    write(tmp_path, a_png=png(), a_txt="x")
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(png())
    found = read_source(tmp_path)
    assert str(found.bad[0]).isprintable()
    assert "its name is not in UTF-8" in str(found.bad[0])


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "metadata.tsv"])
def test_tables_of_subfolders_are_read(tmp_path, table):
    rows = {
        "metadata.jsonl": '{"file_name": "a.png", "text": "x"}\n',
        "metadata.csv": "file_name,text\na.png,x\n",
        "metadata.tsv": "file_name\ttext\na.png\tx\n",
    }
    for split in ("train", "test"):
        write(tmp_path / split, a_png=png())
        (tmp_path / split / table).write_text(rows[table])
    found = read_source(tmp_path)
    assert len(found) == 2
    assert f"{tmp_path}: the splits test, train are all read; name a file or folder" in reasons(found)


def test_shards_of_subfolders_are_read_as_the_hub_lays_them_out(tmp_path):
    pytest.importorskip("pyarrow", exc_type=ImportError)
    write(tmp_path, README_md="x")
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [{"image": png(), "text": "x"}])
    found = read_source(tmp_path)
    assert captions(found) == [("x",)]
    assert f"1 other files left out: {tmp_path}/README.md" in reasons(found)


def test_img2dataset_is_read_in_both_of_its_forms(tmp_path):
    pytest.importorskip("pyarrow", exc_type=ImportError)
    addresses = [{"url": "http://a/b.jpg", "caption": "x", "key": "000000000", "status": "success"}]
    files, tars = tmp_path / "files", tmp_path / "tars"
    write(files, **{"00000__000000000_jpg": png(kind="JPEG"), "00000__000000000_txt": "x",
                    "00000__000000000_json": "{}", "00000_stats_json": "{}"})  # fmt: skip
    tars.mkdir()
    shard(tars / "00000.tar", ("000000000.jpg", png(kind="JPEG")), ("000000000.txt", "x"))
    for folder in (files, tars):
        parquet(folder / "00000.parquet", addresses)
        found = read_source(folder)
        assert captions(found) == [("x",)]
        assert not found.bad
        assert "1 lists of addresses beside their pictures left out" in reasons(found)


def test_what_lies_packed_is_named_and_nothing_else_is_an_error(tmp_path, capsys):
    for name, said in (
        ("a.tar.gz", "is packed; unpack it"),
        ("data-00000-of-00001.arrow", "is of save_to_disk"),
    ):
        folder = write(tmp_path / name.partition(".")[0], state_json="{}")
        (folder / name).write_bytes(b"x")
        with pytest.raises(DataError, match=said):
            read_sources([(folder, 1)])
        with pytest.raises(DataPathError, match=said):
            read_sources([(folder / name, 1)])
        assert prepare.main(["inspect", str(folder)]) == 1
        out, err = capsys.readouterr()
        assert said in out
        assert "no pair of picture and caption that can be used" in err


def test_an_empty_folder_is_the_users_mistake_everywhere(tmp_path, capsys):
    write(tmp_path / "notes", a_md="x")
    for folder in (tmp_path / "none", tmp_path / "notes"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(UserError, match="no pairs of image and caption"):
            read_sources([(folder, 1)])
        assert prepare.main(["inspect", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: {folder}: no pair of picture and caption that can be used"
    with pytest.raises(UserError, match=r"1 other files left out: .*a\.md"):
        read_sources([(tmp_path / "notes", 1)])


def test_inspect_lists_all_that_is_skipped_when_asked(tmp_path, capsys):
    write(tmp_path, **{f"{number}_png": png() for number in range(30)})
    write(tmp_path, **{f"{number}_txt": "x" for number in range(3)})
    assert prepare.main(["inspect", str(tmp_path)]) == 1
    assert "skipped: and 7 more" in capsys.readouterr().out
    assert prepare.main(["inspect", str(tmp_path), "--all"]) == 1
    out = capsys.readouterr().out
    assert "27 that cannot be used (27 without caption)" in out
    assert sum("skipped: " in line for line in out.splitlines()) == 27


@pytest.mark.parametrize("name", ["a-{5..1}.tar", "a-{0..99999999999}.tar"])
def test_ranges_are_bounded(name):
    with pytest.raises(DataPathError, match="a range goes from a number to a larger one"):
        expand(Path(name))


def test_a_source_that_is_no_regular_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for path, said in ((tmp_path / "a.jsonl", "is a FIFO"), (Path("/dev/zero"), "is a device")):
        with pytest.raises(DataPathError, match=said):
            read_source(path)


def test_a_training_tells_what_it_skips_and_what_it_validates_on(tmp_path, caplog):
    write(tmp_path, a_png=png(), a_txt="x", b_png=png(), c_md="x")
    source = SourceConfig(tmp_path)
    data = DataConfig([source], height=4, width=4, max_bad_share=0.5, validation=[source])
    open_data(data, launch("cpu"), held_out=True)
    for line in (
        f"1 other files left out: {tmp_path}/c.md",
        "1 that cannot be used (1 without caption)",
        f"skipped: {tmp_path}/b.png: no caption file b.txt",
        f"1 pictures of data.validation that are trained on too: {tmp_path}/a.png",
    ):
        assert f"data: {line}" in caplog.text


def test_names_of_any_bytes_have_a_place_in_caches(tmp_path):
    name = os.fsdecode(b"\xe9.png")
    record = read_source(shard(tmp_path / "a.tar", (name, png()), (name.replace("png", "txt"), "x"))).records[
        0
    ]
    cached = CachedDataset(Dataset(RecordSet((record,)), Transform(4, 4)), Stores(), 1)
    assert cached.key(Job(0, 0)) == cached.key(Job(0, 0))


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("a.png,red, round apple", ":2: row: 3 fields where the header has 2; quote texts with separators"),
        ("a.png", ":2: row: 1 fields where the header has 2; quote texts with separators"),
        ('a.png,"red', ":2: row: not a table of quoted or plain fields: unexpected end of data"),
        ('a.png,"red" apple', ":2: row: not a table of quoted or plain fields: "),
        ("a.png,x,,", ""),
        ("a.png,x\r\n\r\n", ""),
        ('a.png,"x\ry"\ra.png,z\r', None),
    ],
)
def test_rows_that_do_not_fit_their_header_are_told(tmp_path, rows, said):
    write(tmp_path, a_png=png(), metadata_csv=f"file_name,text\n{rows}\n")
    found = read_source(tmp_path)
    assert captions(found) == ([] if said else [("x",)] if said is not None else [("x\ry",), ("z",)])
    assert [str(bad)[: len(f"{tmp_path}/metadata.csv{said}")] for bad in found.bad] == (
        [f"{tmp_path}/metadata.csv{said}"] if said else []
    )


def test_a_quote_that_is_not_closed_counts_every_row_that_it_takes(tmp_path):
    rows = "".join(f"a.png,{number}\n" for number in range(9))
    write(tmp_path, a_png=png(), metadata_csv=f'file_name,text\na.png,"x\n{rows}')
    assert len(read_source(tmp_path).bad) == 10


def test_one_bad_byte_costs_one_row(tmp_path):
    write(tmp_path, a_png=png(), metadata_csv=b"file_name,text\na.png,x\na.png,\xe9\na.png,y\n")
    found = read_source(tmp_path)
    assert captions(found) == [("x",), ("y",)]
    assert "metadata.csv:3: text: " in str(found.bad[0])
    assert "1 pictures that several rows name" in reasons(found)


def test_a_column_that_comes_twice_is_told(tmp_path):
    write(tmp_path, a_png=png(), metadata_csv="file_name,text,text\na.png,x,y\n")
    assert "text: two columns of this name" in reasons(read_source(tmp_path))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_table_in_utf16_is_one_message(tmp_path, name):
    write(tmp_path, a_png=png())
    text = (
        "file_name,text\na.png,x\n" if name.endswith("csv") else '{"file_name": "a.png", "text": "x"}\n' * 3
    )
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    assert reasons(read_source(tmp_path)) == f"{tmp_path}/{name}: in UTF-16; save it as UTF-8"


def test_a_line_without_end_is_not_read_whole(tmp_path):
    with (tmp_path / "metadata.jsonl").open("wb") as file:
        file.truncate(LONGEST_TEXT * 4)
    assert f"line 1 has more than {LONGEST_TEXT} bytes" in reasons(read_source(tmp_path))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "", "caption": "red apple"}, None),
        ({"captions": ["red apple"]}, None),
        ({"description": "red apple"}, None),
        ({"text": "red\0apple"}, "characters that are no text"),
        ({"text": "\ud800"}, "characters that are no text"),
        ({"text": ["red apple"], "weights": [10**400]}, "weights: int too large to convert to float"),
        ({"text": "x", "file_name": "a\0.png"}, "file_name: a"),
        ({"text": "x", "file_name": "x" * 5000}, "File name too long"),
        ({"text": "x", "file_name": "."}, "Is a directory"),
        ({"text": "x", "file_name": "fifo"}, "is a FIFO"),
        ({"text": [["x"]]}, "expected a caption or a list of captions"),
        ({"words": "x"}, "no caption, expected one of text, prompt, caption, captions, description"),
    ],
)
def test_rows_of_odd_values_are_read_or_told(tmp_path, row, said):
    write(tmp_path, a_png=png())
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png"} | row) + "\n")
    found = read_source(tmp_path)
    assert captions(found) == ([("red apple",)] if said is None else [])
    if said is not None:
        assert said in reasons(found)
        assert str(found.bad[0]).isprintable()


def test_the_captions_of_rows_can_be_named(tmp_path, capsys):
    write(tmp_path, a_png=png())
    (tmp_path / "metadata.jsonl").write_text('{"image": "a.png", "text": "x", "long text": "red apple"}\n')
    found = read_sources([Source(tmp_path, caption="long text")])
    assert captions(found) == [("red apple",)]
    assert captions(read_source(tmp_path)) == [("x",)]
    assert prepare.main(["inspect", str(tmp_path), "--caption", "words"]) == 1
    assert "words: no caption, expected one of words" in capsys.readouterr().out


# ---------------------------------------------------------------------- parquet


def parquet(path: Path, rows: list[dict[str, object]], **settings: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.Table.from_pylist(rows), path, **settings)
    return path


def test_an_image_column_may_name_files_instead(tmp_path):
    write(tmp_path, x_png=png(200))
    rows = [
        {"image": {"bytes": None, "path": "x.png"}, "text": "x"},
        {"image": {"bytes": None, "path": "no"}, "text": "y"},
    ]
    data = Dataset(
        read_sources([(parquet(tmp_path / "a.parquet", rows), 1)]), Transform(4, 6), max_bad_share=0.5
    )
    assert data.get(0, 0, 0).image.mean().item() == pytest.approx(200 / 127.5 - 1, abs=1e-6)
    assert data.get(1, 0, 0).caption == "x"
    assert "No such file" in str(data.bad[0])
    path = parquet(tmp_path / "b.parquet", [{"image": "x.png", "text": "x"}])
    assert read_source(path).records[0].path == tmp_path / "x.png"
    path = parquet(tmp_path / "c.parquet", [{"image": png(), "words": "x"}])
    assert "text: no column text or prompt or caption" in reasons(read_source(path))


def test_a_damaged_row_group_counts_its_rows(tmp_path):
    rows = [{"image": png(n), "text": f"{n:0200d}"} for n in range(8)]
    path = parquet(tmp_path / "a.parquet", rows, row_group_size=4, compression="none", use_dictionary=False)
    import pyarrow.parquet as pq

    start = pq.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    found = read_source(path)
    assert len(found) == 4
    assert found.records[0].name == f"{path}:row 5"
    assert [str(bad).startswith(f"{path}:row {n}: row: damaged") for n, bad in enumerate(found.bad, 1)] == [
        True
    ] * 4


# ---------------------------------------------------------------------- tar shards


MEMBERS = [(f"{n}.{kind}", data) for n in range(6) for kind, data in (("png", png(n)), ("txt", f"{n}"))]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_zeros_in_the_middle_of_a_shard_are_told_and_cost_what_they_hit(tmp_path, blocks):
    path = shard(tmp_path / "a.tar", *MEMBERS)
    with tarfile.open(path) as whole:
        start = whole.getmembers()[4].offset  # the header of 2.png
    data = bytearray(path.read_bytes())
    data[start : start + 512 * blocks] = bytes(512 * blocks)
    path.write_bytes(data)
    found = read_source(path)
    texts = [text for (text,) in captions(found)]
    assert texts == ["0", "1", "3", "4", "5"]
    assert "bytes before 2.txt are no member, samples may be missing" in reasons(found) or blocks == 3
    assert any(isinstance(bad, BadRecord) and "samples may be missing" in bad.reason for bad in found.bad)


def test_what_follows_the_end_mark_is_told(tmp_path):
    path = shard(tmp_path / "a.tar", *MEMBERS[:2])
    path.write_bytes(path.read_bytes() + b"x" * 600)
    assert "it goes on behind its end mark" in reasons(read_source(path))
    path.write_bytes(path.read_bytes()[:-600] + bytes(3 << 20))
    assert "bytes are zeros, so samples may be missing" in reasons(read_source(path))
    path = shard(tmp_path / "b.tar", *MEMBERS)
    path.write_bytes(path.read_bytes()[: 512 * 9 + 100])
    assert "not a whole, uncompressed tar file" in reasons(read_source(path))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_whole_shards_of_every_form_have_no_complaint(tmp_path, form):
    extra = {"pax_headers": {"comment": "of all members"}} if form == tarfile.PAX_FORMAT else {}
    long = [(f"{'d' * 90}/{name}", data) for name, data in MEMBERS]
    found = read_source(shard(tmp_path / "a.tar", *long, format=form, **extra))
    assert len(found) == 6
    assert not reasons(found)


def test_members_that_are_no_samples_are_counted(tmp_path):
    members = [("._0.png", b"x"), ("/abs/1.png", png()), ("/abs/1.txt", "one"), ("../2.png", png())]
    members += [("../2.txt", "two"), ("3.png", png()), ("3.jpg", png(kind="JPEG")), ("3.txt", "three")]
    path = shard(tmp_path / "a.tar", *members, ("4.tar", "x"), ("LICENSE", "x"))
    kinds = {
        "d": tarfile.DIRTYPE,
        "l.png": tarfile.SYMTYPE,
        "f.png": tarfile.FIFOTYPE,
        "h.png": tarfile.LNKTYPE,
    }
    with tarfile.open(path, "a") as out:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            out.addfile(info)
    found = read_source(path)
    assert captions(found) == [("one",), ("two",), ("three",)]
    said = reasons(found)
    assert "4: picture: no member .jpg, .png or the like beside .tar" in said
    assert "5 members of" in said
    assert "1 samples of" in said


def test_a_sample_that_comes_again_is_told(tmp_path):
    apart = [one for kind in ("png", "txt") for one in MEMBERS if one[0].endswith(kind)]
    found = read_source(shard(tmp_path / "a.tar", *apart))
    assert not found.records
    assert "0: key: came before; the members of a sample lie together, once" in reasons(found)
    found = read_source(shard(tmp_path / "b.tar", *MEMBERS[:2], *MEMBERS[2:4], *MEMBERS[:2]))
    assert captions(found) == [("0",), ("1",)]
    assert "0: key: came before" in reasons(found)


def test_any_flipped_bit_of_a_header_is_told(tmp_path):
    path = shard(tmp_path / "a.tar", *MEMBERS)
    whole = path.read_bytes()
    with tarfile.open(path) as members:
        starts = [info.offset for info in members]
    for number, start in enumerate(starts):
        for at in (0, 100, 124, 130, 148, 156, 257):
            data = bytearray(whole)
            data[start + at] ^= 0x04
            path.write_bytes(data)
            assert read_source(path).bad, (number, at)


@pytest.mark.parametrize("name", ["b.tar", "b.parquet", "b/metadata.jsonl", "b/metadata.csv"])
def test_an_empty_file_is_told(tmp_path, name):
    write(tmp_path, a__a_png=png(), a__a_txt="x")
    (tmp_path / "b").mkdir()
    (tmp_path / name).write_bytes(b"")
    if name == "b.tar":
        shard(tmp_path / name)
    assert f"{tmp_path}/{name}: " in reasons(read_source(tmp_path))
