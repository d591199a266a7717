"""Files of pictures: which are opened, what is made of them, and how much memory that takes."""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from sat.data.records import Record
from sat.data.survey import inspect_picture
from sat.data.transforms import KEPT, Placement, Transform
from sat.util.pictures import FORMATS, LONGEST, PictureError, on_white, open_picture
from tests.configs import ROOT


def saved(kind: str, mode: str = "RGB", **settings: object) -> bytes:
    out = io.BytesIO()
    PIL.Image.new(mode, (32, 32)).save(out, kind, **settings)
    return out.getvalue()


def others() -> dict[str, bytes]:
    """A file of every other format that this Pillow can write, EPS and PDF among them."""
    PIL.Image.init()
    modes, made = {"MSP": "1", "SPIDER": "F", "BLP": "P", "XBM": "1", "PALM": "P"}, {}
    for kind in sorted(PIL.Image.SAVE.keys() - {*FORMATS, "MPO", "DIB"}):
        with contextlib.suppress(OSError):  # kinds that it only knows by name
            made[kind] = saved(kind, modes.get(kind, "RGB"))
    return made


OTHERS = others()


@pytest.mark.parametrize("kind", FORMATS)
def test_documented_formats_are_read_whatever_the_file_is_called(tmp_path, kind):
    (tmp_path / "a.jpg").write_bytes(saved(kind))
    with open_picture(tmp_path / "a.jpg") as picture:
        assert (picture.format, picture.size) == (kind, (32, 32))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_cut_off_anywhere_is_refused_or_whole(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, kind)
    data = out.getvalue()
    whole = Transform(8, 8).load(io.BytesIO(data)).pixels
    for cut in range(1, len(data)):
        with contextlib.suppress(PictureError):
            np.testing.assert_array_equal(Transform(8, 8).load(io.BytesIO(data[:cut])).pixels, whole)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_refused_and_start_no_program(tmp_path, monkeypatch, kind):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "a.jpg"
    path.write_bytes(OTHERS[kind])
    for source in (path, io.BytesIO(OTHERS[kind])):
        with pytest.raises(PictureError, match="not a picture in one of the formats PNG, JPEG"):
            Transform(4, 4).load(source)
    assert not (tmp_path / "started").exists()
    assert {"EPS", "PDF", "ICO", "PPM", "TGA"} <= OTHERS.keys()


def damaged(folder: Path) -> list[tuple[Path, str]]:
    """Files that are no pictures, and what is said of them."""
    rng = np.random.default_rng(0)
    out = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(out, "PNG")
    bomb = bytearray(saved("BMP"))
    bomb[18:26] = (20000).to_bytes(4, "little") * 2
    made = {
        "empty.png": (b"", "an empty file"),
        "text.png": (b"a red apple", "not a picture in one of the formats"),
        "cut.png": (out.getvalue()[:2000], "cannot be read: "),
        "cut.jpg": (saved("JPEG")[:300], "not a picture|cannot be read: "),
        "bomb.bmp": (bytes(bomb), "decompression bomb"),
    }
    for name, (data, _) in made.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to("none.png")
    (folder / "device.png").symlink_to("/dev/zero")
    others = {
        "fifo.png": "is a FIFO", "folder.png": "directory", "link.png": "No such file",
        "device.png": "is a device",
    }  # fmt: skip
    return [(folder / name, said) for name, (_, said) in made.items()] + [
        (folder / name, said) for name, said in others.items()
    ]


def test_what_is_no_picture_is_told_in_one_line_and_never_waited_for(tmp_path):
    for path, said in damaged(tmp_path):
        with pytest.raises(PictureError, match=said) as told:
            Transform(4, 4).load(path)
        assert "\n" not in str(told.value)


def test_every_kind_of_pixels_becomes_rgb_and_is_said(tmp_path):
    for number, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F")):
        kind = "tif" if mode in ("CMYK", "F") else "png"
        path = tmp_path / f"{number}.{kind}"
        PIL.Image.new(mode, (6, 4)).save(path)
        found = inspect_picture(Record(path, ("x",)))
        assert (found.mode, found.size) == (mode, (4, 6))
        assert Transform(4, 6).load(path).pixels.shape == (4, 6, 3)
    frames = [PIL.Image.new("RGB", (6, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert inspect_picture(Record(tmp_path / "two.gif", ("x",))).several
    exif = frames[0].getexif()
    exif[0x0112] = 6
    frames[0].save(tmp_path / "turned.jpg", exif=exif)
    found = inspect_picture(Record(tmp_path / "turned.jpg", ("x",)))
    assert found.turned
    assert found.size == (6, 4)


def test_values_that_would_be_clipped_are_refused():
    for values in (np.array([[0.0, 255.0]], np.float32), np.array([[0, np.nan]], np.float32)):
        with pytest.raises(PictureError, match="values from .*expected 0 to 1"):
            on_white(PIL.Image.fromarray(values))
    with pytest.raises(PictureError, match="values from 0 to 70000, expected 0 to 65535"):
        on_white(PIL.Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_sixteen_bit_grey_with_a_transparent_value_keeps_its_range(tmp_path):
    grey = np.array([[0, 32768, 65535]], np.uint16)
    PIL.Image.fromarray(grey).save(tmp_path / "a.png", transparency=0)
    assert Transform(1, 3).load(tmp_path / "a.png").pixels[0, :, 0].tolist() == [255, 128, 255]


def test_large_pictures_are_put_on_white_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    pictures = [
        PIL.Image.fromarray(rng.integers(0, 255, (7, 5, 4), np.uint8)),
        PIL.Image.fromarray(rng.integers(0, 65535, (7, 5), np.uint16)),
        PIL.Image.fromarray(rng.integers(0, 255, (7, 5, 3), np.uint8)).quantize(8),
    ]
    whole = [np.asarray(on_white(picture)) for picture in pictures]
    monkeypatch.setattr("sat.util.pictures._AT_ONCE", 10)
    for picture, expected in zip(pictures, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(on_white(picture)), expected)


def test_lines_are_refused_and_of_strips_the_middle_is_kept():
    rng = np.random.default_rng(0)
    strip = PIL.Image.fromarray(rng.integers(0, 255, (4, 4 * LONGEST, 3), np.uint8))
    transform = Transform(8, 8, "random")
    resized = transform.resize(strip)
    assert resized.pixels.shape == (8, KEPT * 8, 3)
    whole = np.asarray(strip.resize((8 * LONGEST, 8), PIL.Image.Resampling.LANCZOS)).astype(int)
    left = resized.start[1]
    assert left == (LONGEST - KEPT) * 4
    assert np.abs(whole[:, left : left + KEPT * 8] - resized.pixels).max() <= 1
    assert resized.original_size == (4, 4 * LONGEST)
    assert transform.place(resized, Placement(left=0.0))[1] == (0, left)
    out = io.BytesIO()
    PIL.Image.new("RGB", (1, LONGEST + 1)).save(out, "PNG")
    with pytest.raises(PictureError, match=r"101 x 1 \(.*: one side is over 100 times"):
        transform.load(out)


def memory(name: str) -> int:
    """KiB of this process: VmRSS is what it holds, VmHWM the most that it held."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def test_no_picture_takes_much_more_memory_than_its_pixels(tmp_path):
    """Lines, strips, 16 bits a channel and transparency; 5 million pixels are 20 MB."""
    PIL.Image.new("RGB", (8000, 1)).save(tmp_path / "line.png")
    PIL.Image.new("RGB", (8000, 100)).save(tmp_path / "strip.png")
    PIL.Image.new("I;16", (2500, 2000)).save(tmp_path / "grey.png")
    PIL.Image.new("RGBA", (2500, 2000)).save(tmp_path / "clear.png")
    for path in sorted(tmp_path.iterdir()):
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the most that it held is what it holds
        except OSError as error:
            pytest.skip(f"the peak of memory cannot be measured: {error}")
        before = memory("VmRSS")
        try:
            Transform(512, 512).load(path)
        except PictureError:
            assert path.stem == "line"
        assert memory("VmHWM") - before < 100 * 1024, path.name  # gigabytes when lines were resized whole


def test_pictures_are_opened_in_one_place_alone():
    for path in (ROOT / "sat").rglob("*.py"):
        if path != ROOT / "sat/util/pictures.py":
            assert "Image.open(" not in path.read_text("utf-8"), path
