"""Class pictures for prior preservation, drawn by the model itself."""

from pathlib import Path

import PIL.Image
import pytest

from sat.cli import prepare
from sat.data.sources import read_source
from tests.configs import ROOT

BASE = ["prior", "--base", str(ROOT / "configs" / "tiny.yaml"), str(ROOT / "configs" / "tiny_train.yaml")]


def test_missing_class_pictures_are_drawn_and_others_stay(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "prior"
    words = [*BASE, "--prompt", "a fox", "--prompt", "an owl", "--out", str(folder), "sampling.steps=2"]
    assert prepare.main([*words, "--count", "2"]) == 0
    assert [record.captions for record in read_source(folder).records] == [("a fox",), ("an owl",)]
    first = [(folder / f"{number:05d}.png").read_bytes() for number in range(2)]
    (folder / "00000.png").unlink()
    assert prepare.main([*words, "--count", "3"]) == 0
    assert f"{folder}: 1 of 3 class pictures are there, 2 to draw" in capsys.readouterr().out
    assert [(folder / f"{number:05d}.png").read_bytes() for number in range(2)] == first
    with PIL.Image.open(folder / "00002.png") as picture:
        assert picture.size == (64, 64)


@pytest.mark.parametrize(("more", "words"), [
    (["--count", "0"], "--count 0: expected at least 1"),
    (["--count", "1"], "holds other pictures"),
])  # fmt: skip
def test_what_prior_cannot_do_is_told(tmp_path: Path, capsys, more, words) -> None:
    (tmp_path / "a.png").touch()
    assert prepare.main([*BASE, "--prompt", "a fox", "--out", str(tmp_path), *more]) == 2
    assert words in capsys.readouterr().err
