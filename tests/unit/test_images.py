"""Pixels, sheets and PNG files."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from sat.sampling import output as images
from sat.util import host


def test_uint8_truncates_as_the_official_code_does() -> None:
    values = torch.tensor([0.0, 0.5, 0.999, 1.0, -0.1, 1.2, 254.9 / 255])
    assert images.to_uint8(values).tolist() == [0, 127, 254, 255, 0, 255, 254]


def test_to_pil_keeps_height_width_and_channels() -> None:
    image = torch.zeros(3, 4, 6)
    image[0, 1, 5] = 1.0
    picture = images.to_pil(image)
    assert picture.size == (6, 4)
    assert picture.getpixel((5, 1)) == (255, 0, 0)


def _flat(value: int, size: tuple[int, int] = (4, 3)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def test_grid_lays_images_row_by_row_with_two_black_pixels_around() -> None:
    sheet = np.asarray(images.grid([_flat(v) for v in (10, 20, 30)], columns=2))[..., 0]
    assert sheet.shape == (2 * (3 + 2) + 2, 2 * (4 + 2) + 2)
    expected = np.zeros_like(sheet)
    expected[2:5, 2:6] = 10
    expected[2:5, 8:12] = 20
    expected[7:10, 2:6] = 30
    assert np.array_equal(sheet, expected)


@pytest.mark.parametrize(("count", "columns", "size"), [(4, None, (2, 2)), (5, None, (3, 2)), (2, 9, (2, 1))])
def test_grid_columns(count: int, columns: int | None, size: tuple[int, int]) -> None:
    sheet = images.grid([_flat(1)] * count, columns)
    assert sheet.size == (size[0] * 6 + 2, size[1] * 5 + 2)


def test_grid_refuses_no_images_no_columns_and_mixed_sizes() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        images.grid([])
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        images.grid([_flat(1)], 0)
    with pytest.raises(ValueError, match="images of one size"):
        images.grid([_flat(1), _flat(1, (5, 5))])


TEXT = {"prompt": "a café 🍎\n\tröd", "negative_prompt": "", "seed": "0", "nul": "a\0b"}


def test_png_text_comes_back(tmp_path) -> None:
    images.write_png(tmp_path / "a.png", _flat(9), TEXT)
    assert images.read_png_text(tmp_path / "a.png") == TEXT
    assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == (9, 9, 9)


def test_a_png_cut_anywhere_or_with_a_flipped_bit_is_not_whole(tmp_path) -> None:
    images.write_png(tmp_path / "a.png", _flat(9, (16, 16)), TEXT)
    data = (tmp_path / "a.png").read_bytes()
    broken = tmp_path / "b.png"
    for end in range(0, len(data), 3):
        broken.write_bytes(data[:end])
        assert images.read_png_text(broken) is None, end
    pixels = data.index(b"IDAT") + 8
    broken.write_bytes(data[:pixels] + bytes([data[pixels] ^ 255]) + data[pixels + 1 :])
    assert images.read_png_text(broken) is None


def test_no_png_is_not_whole(tmp_path) -> None:
    _flat(1).save(tmp_path / "a.png", format="BMP")
    (tmp_path / "d.png").mkdir()
    assert images.read_png_text(tmp_path / "a.png") is None
    assert images.read_png_text(tmp_path / "d.png") is None
    assert images.read_png_text(tmp_path / "missing.png") is None


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path) -> None:
    host.write_text(tmp_path / "a.txt", "old")

    def fail(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.write_atomic(tmp_path / "a.txt", fail)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_nothing_stands_under_the_name_before_the_file_is_whole(tmp_path) -> None:
    seen = []

    def write(file) -> None:
        file.write(b"half")
        file.flush()
        seen.append((tmp_path / "a.bin").exists())

    host.write_atomic(tmp_path / "a.bin", write)
    assert seen == [False]
    assert (tmp_path / "a.bin").read_bytes() == b"half"
