"""``prepare inspect``: counts, sizes, and everything that cannot be used."""

import shutil

import PIL.Image
import pytest

from sat.cli import prepare
from tests.checkpoints import tokenizer
from tests.configs import DEBUG, ROOT

LORA = [str(ROOT / "configs" / name) for name in ("tiny.yaml", "lora.yaml", "tiny_lora.yaml")]


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
    assert "a.png: not a picture in one of the formats PNG, JPEG" in out


def test_pictures_that_a_table_forgets_are_counted(folder, capsys):
    (folder / "metadata.jsonl").write_text('{"file_name": "./a.png", "text": "x"}\n')
    (folder / "heldout.jsonl").write_text('{"file_name": "b.png", "text": "x"}\n')
    assert prepare.main(["inspect", str(folder)]) == 0
    assert f"1 pictures that no usable row names: {folder}/c.png" in capsys.readouterr().out
    assert "no usable row" not in capsys.readouterr().out


def test_a_missing_source_is_one_line(tmp_path, capsys):
    assert prepare.main(["inspect", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_missing_captions_and_pictures_are_counted_apart(folder, capsys):
    (folder / "a.png").write_bytes(b"x")
    (folder / "b.txt").unlink()
    (folder / "c.txt").write_text(" ")
    prepare.main(["inspect", str(folder)])
    assert (
        "0 pairs, 3 that cannot be used (2 without caption, 1 without readable picture)"
        in capsys.readouterr().out
    )


def test_identical_files_and_identical_pictures_are_told_apart(folder, capsys):
    shutil.copy(folder / "c.png", folder / "d.png")
    (folder / "d.txt").write_text("x")
    PIL.Image.open(folder / "c.png").save(folder / "e.bmp")
    (folder / "e.txt").write_text("x")
    (folder / "b.png").unlink()
    assert prepare.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "identical files: 1 more than needed" in out
    assert f"identical files: {folder}/c.png, {folder}/d.png" in out
    assert f"identical pictures in different files: {folder}/c.png, {folder}/d.png, {folder}/e.bmp" in out


def test_duplicates_are_found_over_sources_and_many_are_shortened(folder, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("other")
    for number in range(5):
        shutil.copy(folder / "c.png", other / f"{number}.png")
        (other / f"{number}.txt").write_text("x")
    for path in (folder / "a.png", folder / "b.png"):
        path.unlink()
    prepare.main(["inspect", str(folder), str(other)])
    out = capsys.readouterr().out
    assert "identical files: 5 more than needed" in out
    assert "identical pictures" not in out
    assert "and 3 others" in out
    prepare.main(["inspect", str(folder)])
    assert "no duplicates" in capsys.readouterr().out
    prepare.main(["inspect", str(folder), str(folder)])
    assert f"1 pictures that are in several sources: {folder}/c.png" in capsys.readouterr().out


def test_the_table_of_buckets_names_the_small_ones(folder, capsys):
    assert prepare.main(["inspect", str(folder), "--area", "128", "--step", "4", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 buckets, 3 images, batches of 2" in out
    assert "8 x 8   1.00        1   33.3%              0.50  fewer than a batch" in out
    assert "8 x 16   2.00        2   66.7%              1.00  2 enlarged, up to 2.0 times\n" in out


def test_captions_over_the_limit_are_shown(folder, tmp_path_factory, capsys):
    model = tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")
    (folder / "a.txt").write_text("one two three four five six seven eight nine ten")
    words = ["inspect", str(folder), "--tokenizer", str(model), "--max-length"]
    prepare.main([*words, "99"])
    assert "over the token limit" not in capsys.readouterr().out
    prepare.main([*words, "4"])
    out = capsys.readouterr().out
    assert "captions over the token limit: " in out
    assert "over the token limit: 'one two three four five" in out


def test_the_tokenizer_beside_the_weights_of_a_config_is_used(folder, capsys):
    (folder / "a.txt").write_text("one two three four five six seven eight nine ten " * 3)
    assert prepare.main(["inspect", str(folder), "--base", *LORA]) == 0
    assert "captions over the token limit: 1" in capsys.readouterr().out


def test_captions_that_cannot_be_counted_are_told(folder, tmp_path, capsys):
    away = tmp_path / "away.yaml"
    away.write_text(f"checkpoint: {{path: {tmp_path / 'none'}}}")
    assert prepare.main(["inspect", str(folder), "--base", *LORA, str(away)]) == 0
    assert "over the token limit are not counted: no spiece.model is at hand" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing to look at: name folders, tables or shards, or --base"),
        (["x", "--area", "3", "--step", "2"], "data.buckets.area [3]: expected at least step x step = 4"),
        (["x", "--tokenizer", "/none"], "--tokenizer /none: no such file"),
        (["--base", str(DEBUG)], "the config of --base has no `data` section"),
    ],
)
def test_what_inspect_cannot_do_is_told(words, told, capsys):
    assert prepare.main(["inspect", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "--base is needed: the config files of the training"),
     (["--base", str(DEBUG), "--batch-size", "0"], "--batch-size 0: expected at least 1")],
)  # fmt: skip
def test_what_cache_cannot_do_is_told(words, told, capsys):
    assert prepare.main(["cache", *words]) == 2
    assert told in capsys.readouterr().err
