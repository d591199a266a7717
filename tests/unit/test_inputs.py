"""Folders of low-resolution pictures for relay: what is found, and every way in which one does not fit."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sat.sampling.inputs import InputError, InputFolder
from sat.sampling.output import write_png
from sat.sampling.prompts import Prompt

APPLE, LION = Prompt(0, "a red apple"), Prompt(7, "a lion")


def picture(value: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """Width 12, height 8, all of one value."""
    return Image.new("RGB", size, (value, value, value))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, value, prompt in (("0_a_red_apple", 10, "a red apple"), ("7_a_lion", 200, "a lion")):
        (tmp_path / name).mkdir()
        for i in range(2):
            write_png(tmp_path / name / f"{i:09d}.png", picture(value + i), {"prompt": prompt})
        write_png(tmp_path / name / "grid.png", picture(0, (30, 8)))
    return tmp_path


def folder(root: Path, batch_size: int = 2) -> InputFolder:
    return InputFolder(8, 12, root, batch_size)


def test_a_picture_is_found_by_the_number_of_its_prompt_not_by_position(root: Path) -> None:
    inputs = folder(root)
    inputs.check([LION])
    read = inputs.read(LION, [1])
    assert read.shape == (1, 3, 8, 12) and read.dtype == torch.float32
    assert torch.allclose(read, torch.tensor(201 / 127.5 - 1))


def test_a_folder_belongs_to_its_number_whatever_the_prompt_is_called(root: Path) -> None:
    other = Prompt(7, "ein Löwe")
    folder(root).check([other])
    assert torch.equal(folder(root).read(other, [0]), folder(root).read(LION, [0]))


def test_prompts_are_read_from_the_pictures_when_none_are_given(root: Path) -> None:
    assert folder(root).prompts() == [APPLE, LION]
    write_png(root / "7_a_lion" / "000000000.png", picture(1))
    with pytest.raises(InputError, match="names no prompt in its PNG text; give the prompts"):
        folder(root).prompts()


def test_strays_are_named_and_ignored(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "notes.txt").write_text("mine")
    (root / "run.json").write_text("{}")
    with caplog.at_level(logging.INFO):
        folder(root).check([APPLE])
    assert "ignored notes.txt" in caplog.text and "run.json" not in caplog.text


def test_missing_prompts_are_named_with_what_is_there(root: Path) -> None:
    with pytest.raises(
        InputError, match=r"no folder for prompt 3 \(expected 3_NAME; it holds the numbers 0, 7\)"
    ):
        folder(root).check([APPLE, Prompt(3, "x")])


@pytest.mark.parametrize(("asked", "message"), [(1, "holds 2 pictures, but sampling.batch_size is 1"),
                                                (3, r"is 3, 000000002.png is missing")])  # fmt: skip
def test_a_batch_that_differs_from_the_folder_is_refused(root: Path, asked: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        folder(root, asked).check([APPLE])


def test_a_missing_picture_between_others_is_named(root: Path) -> None:
    (root / "0_a_red_apple" / "000000000.png").unlink()
    with pytest.raises(InputError, match="holds 1 pictures, .* 000000000.png is missing"):
        folder(root).check([APPLE])


def test_a_picture_of_the_wrong_size_is_refused_by_name(root: Path) -> None:
    write_png(root / "7_a_lion" / "000000001.png", picture(1, (8, 12)))
    with pytest.raises(
        InputError, match=r"7_a_lion/000000001.png: is 12 x 8 \(height x width\), expected 8 x 12"
    ):
        folder(root).check([LION])


def test_a_file_that_is_no_picture_is_refused(root: Path) -> None:
    (root / "7_a_lion" / "000000001.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="000000001.png: not a picture in one of the formats"):
        folder(root).check([LION])


def test_two_folders_of_one_number_are_told_apart_by_name_or_refused(root: Path) -> None:
    (root / "7_another").mkdir()
    folder(root).check([LION])
    with pytest.raises(InputError, match="several folders for prompt 7: 7_a_lion, 7_another; keep one"):
        folder(root).check([Prompt(7, "third")])


def test_folders_without_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / 'gone'))}: no such folder"):
        folder(tmp_path / "gone").check([APPLE])
    (tmp_path / "apple").mkdir()
    with pytest.raises(InputError, match="holds no folder named INDEX_NAME"):
        folder(tmp_path).check([APPLE])


def test_pixels_keep_rows_and_columns(root: Path) -> None:
    values = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    write_png(root / "0_a_red_apple" / "000000000.png", Image.fromarray(values))
    read = folder(root).read(APPLE, [0])[0]
    assert torch.equal(read, torch.from_numpy(values.copy()).permute(2, 0, 1).float() / 127.5 - 1)
