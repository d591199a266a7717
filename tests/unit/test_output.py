"""The folder of a run: files, text fields, what counts as finished."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sat.config.load import load
from sat.config.record import Label, label, settings_digest
from sat.sampling.output import OutputError, OutputFolder, prove_writable, read_png_text, write_png
from sat.sampling.prompts import Prompt
from sat.util import host
from tests.configs import ROOT

LABEL = Label(
    height=48,
    width=64,
    steps=4,
    guidance=2.5,
    negative_prompt="blurry",
    seed=7,
    model="CogView3Plus tiny",
    digest="0123456789abcdef",
)
APPLE = Prompt(3, "a red apple, on a table")


def _folder(root: Path, batch_size: int = 1, label: Label = LABEL) -> OutputFolder:
    return OutputFolder(root, label, batch_size)


def _draw(folder: OutputFolder, prompt: Prompt = APPLE) -> list[Path]:
    for index in range(folder.batch_size):
        folder.write_image(prompt, index, Image.new("RGB", (64, 48), (index, 0, 0)))
    return folder.finish(prompt)


def test_layout_is_the_official_one(tmp_path) -> None:
    paths = _draw(_folder(tmp_path, 2))
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == [
        "3_a_red_apple_on_a_tab/000000000.png",
        "3_a_red_apple_on_a_tab/000000001.png",
        "3_a_red_apple_on_a_tab/grid.png",
    ]
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == paths


def test_one_image_has_no_grid(tmp_path) -> None:
    assert [p.name for p in _draw(_folder(tmp_path))] == ["000000000.png"]


def test_a_png_says_how_it_was_made(tmp_path) -> None:
    first, second, sheet = _draw(_folder(tmp_path, 2))
    text = {
        "prompt": "a red apple, on a table",
        "negative_prompt": "blurry",
        "seed": "7",
        "size": "48x64",
        "height": "48",
        "width": "64",
        "steps": "4",
        "guidance": "2.5",
        "model": "CogView3Plus tiny",
        "config_digest": "0123456789abcdef",
        "parameters": "a red apple, on a table\nNegative prompt: blurry\n"
        "Steps: 4, CFG scale: 2.5, Seed: 7, Size: 64x48, Model: CogView3Plus tiny",
    }
    assert read_png_text(first) == text
    again = text["parameters"].replace("Seed: 7", "Seed: 8")
    assert read_png_text(second) == text | {"seed": "8", "parameters": again}
    assert read_png_text(sheet) == text | {"seed": "7-8"}
    worn = replace(LABEL, adapters={"fur": 0.5, "silk": -1.0})
    (only,) = _draw(_folder(tmp_path / "worn", 1, worn))
    assert read_png_text(only) == text | {"lora": "fur:0.5, silk:-1"}


def test_a_drawn_prompt_is_finished_until_a_file_is_missing_or_damaged(tmp_path) -> None:
    folder = _folder(tmp_path, 3)
    assert folder.missing(APPLE) == [0, 1, 2]
    paths = _draw(folder)
    assert folder.finished(APPLE)
    with Image.open(paths[2]) as picture:
        picture.load()
        write_png(paths[2], picture, {k: v for k, v in picture.text.items() if k != "parameters"})
    assert folder.finished(APPLE)  # as it was written before there was this field
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    assert folder.missing(APPLE) == [1]
    assert not folder.finished(APPLE)
    _draw(folder)
    paths[3].unlink()
    assert folder.missing(APPLE) == []
    assert not folder.finished(APPLE)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "f" * 16},
        {"seed": 8},
        {"steps": 5},
        {"negative_prompt": ""},
        {"guidance": None},
        {"width": 32},
        {"model": "CogView3Plus other"},
    ],
)
def test_a_prompt_drawn_with_other_settings_is_not_finished(tmp_path, change: dict[str, object]) -> None:
    _draw(_folder(tmp_path))
    assert not _folder(tmp_path, label=replace(LABEL, **change)).finished(APPLE)


def test_another_prompt_with_the_same_folder_name_is_not_finished(tmp_path) -> None:
    _draw(_folder(tmp_path))
    assert not _folder(tmp_path).finished(replace(APPLE, text=APPLE.text + "!"))


def test_more_images_a_prompt_keep_those_that_are_there(tmp_path) -> None:
    _draw(_folder(tmp_path, 2))
    assert _folder(tmp_path, 4).missing(APPLE) == [2, 3]


def test_leftovers_of_an_earlier_run_in_the_prompts_folder_go_and_strange_files_stay(tmp_path) -> None:
    home = _draw(_folder(tmp_path, 3))[0].parent
    draft, ours = "000000001.png", host.machine()
    dead, live = (
        f".{draft}.{ours}-{_dead_pid()}-0123456789ab.partial",
        f".{draft}.{ours}-1-0123456789ab.partial",
    )
    far, old = f".{draft}.00000000-1-0123456789ab.partial", f".{draft}.42.partial"
    for name in (dead, live, far, old, "mine.png"):
        (home / name).write_bytes(b"half")
    os.utime(home / old, (1, 1))
    _draw(_folder(tmp_path, 1))
    assert sorted(p.name for p in home.iterdir()) == sorted([live, far, "000000000.png", "mine.png"])
    os.utime(home / far, (1, 1))
    _draw(_folder(tmp_path, 1))
    assert not (home / far).exists(), "nobody wrote it for ten minutes"


def _dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-S", "-c", ""])
    done.wait()
    return done.pid


def test_folders_of_another_run_are_told_apart(tmp_path) -> None:
    folder = _folder(tmp_path)
    _draw(folder)
    _draw(folder, Prompt(12, "a dog"))
    (tmp_path / "notes_1").mkdir()
    (tmp_path / "5_a_file").write_text("")
    assert folder.strangers([APPLE]) == ["12_a_dog"]
    assert folder.next_index() == 13


def test_numbering_starts_at_zero_in_a_new_folder(tmp_path) -> None:
    assert _folder(tmp_path / "new").next_index() == 0


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to output folder .*file.sub: Not a directory"):
        prove_writable(tmp_path / "file" / "sub")


def test_the_proof_leaves_an_empty_folder(tmp_path) -> None:
    prove_writable(tmp_path / "new" / "out")
    assert list((tmp_path / "new" / "out").iterdir()) == []


def test_a_failed_write_names_the_file(tmp_path) -> None:
    (tmp_path / "3_a_red_apple_on_a_tab").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write .*000000000.png: "):
        _draw(_folder(tmp_path))


def test_the_settings_digest_ignores_the_order_of_keys_and_sees_every_value() -> None:
    first = settings_digest({"a": 1, "b": {"c": [1, 2], "d": None}})
    assert first == settings_digest({"b": {"d": None, "c": [1, 2]}, "a": 1})
    assert first != settings_digest({"b": {"d": None, "c": [2, 1]}, "a": 1})
    assert len(first) == 16


def test_keys_that_are_added_leave_pictures_of_before_finished() -> None:
    """The digest of a config and the weights that ship: ``--resume`` would draw all of them again otherwise.

    Other weights are another digest: it changes with `checkpoints/tiny`, and with nothing else.
    """
    assert label(load([ROOT / "configs/tiny.yaml"])).digest == "21dcf39071750ed3"
