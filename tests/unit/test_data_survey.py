"""``prepare inspect``: counts, sizes, and everything that cannot be used."""

import PIL.Image
import pytest

from sat.cli import prepare


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a", (8, 4)), ("b", (8, 4)), ("c", (20, 20))):
        PIL.Image.new("RGB", size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("one two three")
    return tmp_path


def test_it_counts_sizes_and_captions_and_draws_a_sheet(folder, tmp_path, capsys):
    sheet = tmp_path / "out" / "sheet.png"
    assert prepare.main(["inspect", str(folder), "--height", "6", "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert "3 pairs, 0 that cannot be used" in out
    assert "4x8 2, 20x20 1" in out
    assert "captions: 3, 3 to 3 words" in out
    assert "smaller than 6x6, so enlarged: 2" in out
    assert PIL.Image.open(sheet).size == (3 * 8 + 2, 8 + 2)


def test_what_is_wrong_is_listed_and_gives_code_one(folder, capsys):
    (folder / "a.png").write_bytes(b"x")
    (folder / "b.txt").unlink()
    assert prepare.main(["inspect", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "1 pairs, 2 that cannot be used" in out
    assert "no caption file b.txt" in out
    assert "a.png: UnidentifiedImageError" in out


def test_a_missing_source_is_one_line(tmp_path, capsys):
    assert prepare.main(["inspect", str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err
