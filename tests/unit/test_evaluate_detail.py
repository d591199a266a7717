"""Crops at full resolution, and their distance to real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from sat.apps.evaluate.classifier import Classifier, crops, detail_distance, fine_energy, real_pictures
from sat.apps.evaluate.distances import kernel_distance
from sat.cli.evaluate import main
from sat.data.records import DataError
from sat.sampling.output import from_pil
from tests.configs import ROOT

CLASSIFIER = ROOT / "checkpoints" / "tiny_classifier"


def pictures(count: int, side: int = 128) -> list[Image.Image]:
    """Squares of noise that differ from one another."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def test_crops_cover_the_picture_and_overlap_by_half() -> None:
    picture = pictures(1)[0]
    parts = crops(picture, 64)
    whole = from_pil(picture)
    assert parts.shape == (9, 3, 64, 64)
    assert torch.equal(parts[0], whole[:, :64, :64]) and torch.equal(parts[8], whole[:, 64:, 64:])
    assert torch.equal(parts[4], whole[:, 32:96, 32:96])


def test_a_picture_of_the_classifiers_size_is_one_crop_and_a_smaller_one_is_refused() -> None:
    assert len(crops(pictures(1, 64)[0], 64)) == 1
    with pytest.raises(DataError, match="60 x 60 is smaller than the classifier's 64 x 64"):
        crops(pictures(1, 60)[0], 64)


def test_the_more_a_picture_is_blurred_the_farther_it_is() -> None:
    classifier = Classifier.load(CLASSIFIER)
    real = real_pictures(ROOT / "data" / "emoji_sample", [(64, 64)])[:24]
    far = [
        detail_distance([p.filter(ImageFilter.GaussianBlur(radius)) for p in real], real, classifier)
        for radius in (0, 1, 2, 4)
    ]
    assert far[0] == pytest.approx(0, abs=1e-6) and far == sorted(far) and far[1] > 0.1


def test_the_command_compares_folders_and_says_when_they_are_few(tmp_path: Path, capsys) -> None:
    from sat.sampling.output import write_png

    for name in ("made", "real"):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures(3)):
            write_png(tmp_path / name / f"{i}.png", picture, {"prompt": "x"})
    words = ["detail", "--images", str(tmp_path / "made"), "--real", str(tmp_path / "real")]
    assert main([*words, "--classifier", str(CLASSIFIER)]) == 0
    told = capsys.readouterr().out
    assert "full-resolution crops, 3 images: 0.000 (fewer than 500" in told
    assert "kernel distance of the same, which does not depend on the number: -" in told


def test_the_kernel_distance_of_few_pictures_is_that_of_many() -> None:
    """On average over draws, where a Fréchet distance would be larger for few."""
    noise = torch.Generator().manual_seed(0)

    def mean(count: int, shift: float) -> float:
        draws = [torch.randn(2, count, 3, generator=noise) for _ in range(8000 // count)]
        return sum(kernel_distance(a, b + shift) for a, b in draws) / len(draws)

    assert [mean(5, 0), mean(100, 0)] == pytest.approx([0, 0], abs=0.2)
    assert mean(5, 1) == pytest.approx(mean(100, 1), rel=0.1) and mean(100, 1) > 5
    with pytest.raises(ValueError, match="needs 2 pictures on each side, got 5 and 1"):
        kernel_distance(torch.ones(5, 3), torch.ones(1, 3))


def test_real_pictures_of_another_size_are_refused(tmp_path: Path) -> None:
    pictures(1, 32)[0].save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png: is 32 x 32 \(height x width\), the pictures are 128 x 128"):
        real_pictures(tmp_path, [(128, 128)])
    with pytest.raises(DataError, match="holds no pictures"):
        real_pictures(ROOT / "configs", [(128, 128)])


def test_fine_energy_is_1_of_like_pictures_and_falls_with_blur() -> None:
    some, others = pictures(40)[:20], pictures(40)[20:]
    assert fine_energy(some, some) == pytest.approx(1)
    assert fine_energy(some, others) == pytest.approx(1, abs=0.1)
    blurred = [fine_energy([p.filter(ImageFilter.GaussianBlur(r)) for p in some], some) for r in (0.5, 1, 2)]
    assert 1 > blurred[0] > blurred[1] > blurred[2] > 0


def test_fine_energy_sees_only_what_a_picture_of_half_the_size_cannot_hold() -> None:
    """Waves below a quarter cycle a pixel do not count, waves above do, with the square of their height."""

    def wave(cycles: int, height: float) -> Image.Image:
        x = np.arange(128) * 2 * np.pi / 128
        rows = 127.5 + 20 * np.random.default_rng(1).standard_normal((128, 128)) + height * np.sin(cycles * x)
        return Image.fromarray(np.repeat(rows.clip(0, 255).astype(np.uint8)[..., None], 3, 2))

    assert fine_energy([wave(20, 60)], [wave(20, 0)]) == pytest.approx(1, rel=0.02)
    assert fine_energy([wave(50, 60)], [wave(50, 0)]) > 1.02


def test_fine_energy_of_other_shapes_is_refused() -> None:
    with pytest.raises(DataError, match="squares of one size"):
        fine_energy(pictures(1, 64) + pictures(1), pictures(1))
