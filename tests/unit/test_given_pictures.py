"""Pictures that a user names: of every mode, turned, fitted by a rule that is told; files and folders."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from sat.sampling.inputs import InputError, PictureFiles
from sat.sampling.prompts import Prompt
from sat.util.pictures import PictureError, fit_message, fitted, open_whole

RAMP = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)  # 6 high, 10 wide


def saved(path: Path, image: PIL.Image.Image, **settings: object) -> Path:
    image.save(path, **settings)
    return path


def ramp() -> PIL.Image.Image:
    return PIL.Image.fromarray(RAMP)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path, kind: str) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    lossless = {"lossless": True} if kind == "webp" else {}
    path = saved(tmp_path / f"a.{kind}", ramp(), exif=exif, **lossless)
    shown = open_whole(path).rgb
    assert shown.size == (6, 10)
    if kind != "jpg":
        np.testing.assert_array_equal(np.asarray(shown), np.rot90(RAMP, -1))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "png"), ("L", "png"), ("LA", "png"), ("P", "gif"), ("RGBA", "webp"), ("CMYK", "jpg"),
     ("YCbCr", "jpg"), ("I;16", "png"), ("F", "tif")],
)  # fmt: skip
def test_a_picture_of_any_mode_becomes_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    wide = {"I;16": np.uint16(32896), "F": np.float32(128 / 255)}
    if mode in wide:
        image = PIL.Image.fromarray(np.full((4, 6), wide[mode]))
    else:
        image = PIL.Image.new("RGB", (6, 4), (128, 128, 128)).convert(mode)
    rgb, alpha = open_whole(saved(tmp_path / f"a.{kind}", image))
    assert (rgb.mode, rgb.size, alpha) == ("RGB", (6, 4), None)
    assert abs(np.asarray(rgb).mean() - 128) <= 2


def test_an_alpha_channel_comes_apart_from_the_pixels_which_lie_on_white(tmp_path: Path) -> None:
    image = PIL.Image.new("RGBA", (3, 2), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    rgb, alpha = open_whole(saved(tmp_path / "a.png", image))
    assert alpha is not None and alpha.getpixel((1, 0)) == 0 and alpha.getpixel((0, 0)) == 255
    assert rgb.getpixel((1, 0)) == (255, 255, 255) and rgb.getpixel((0, 0)) == (10, 20, 30)


def test_a_damaged_or_strange_file_is_named(tmp_path: Path) -> None:
    out = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(out, "PNG")
    for name, data, words in (
        ("cut.png", out.getvalue()[:2000], "cannot be read"),
        ("text.png", b"a red apple", "not a picture"),
        ("empty.png", b"", "an empty file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PictureError, match=f"{name}: .*{words}"):
            open_whole(tmp_path / name)


def test_a_picture_of_the_right_size_keeps_its_very_pixels() -> None:
    for fit in ("crop", "pad", "stretch"):
        assert fitted(ramp(), 6, 10, fit) is not None
        np.testing.assert_array_equal(np.asarray(fitted(ramp(), 6, 10, fit)), RAMP)
        assert fit_message((10, 6), 6, 10, fit) is None


def test_crop_keeps_the_middle_without_stretching() -> None:
    np.testing.assert_array_equal(np.asarray(fitted(ramp(), 6, 6, "crop")), RAMP[:, 2:8])
    assert fit_message((10, 6), 6, 6, "crop") == (
        "6 x 10 brought to 6 x 6 (height x width) by fit crop, 40% of it cut off"
    )


def test_pad_shows_the_whole_picture_and_repeats_its_edges() -> None:
    padded = np.asarray(fitted(ramp(), 10, 10, "pad"))
    np.testing.assert_array_equal(padded[2:8], RAMP)
    np.testing.assert_array_equal(padded[:2], np.broadcast_to(RAMP[:1], (2, 10, 3)))
    mask = PIL.Image.new("L", (10, 6), 0)
    assert np.asarray(fitted(mask, 10, 10, "pad", fill=255))[[0, -1]].min() == 255
    assert "40% of the frame padded" in str(fit_message((10, 6), 10, 10, "pad"))


def test_stretch_changes_the_shape_and_says_by_how_much() -> None:
    assert fitted(ramp(), 6, 20, "stretch").size == (20, 6)
    assert "2.00 times wider" in str(fit_message((10, 6), 6, 20, "stretch"))


def test_a_file_is_for_all_images_and_a_plain_folder_has_one_for_each_prompt(tmp_path: Path) -> None:
    for name in ("b.png", "a.webp"):
        saved(tmp_path / name, ramp())
    (tmp_path / "notes.txt").write_text("mine")
    one = PictureFiles(tmp_path / "b.png", "sampling.init_image")
    assert {one.find(Prompt(i, "x"), j) for i in (0, 7) for j in (0, 1)} == {tmp_path / "b.png"}
    folder = PictureFiles(tmp_path, "sampling.init_image")
    assert (folder.each, one.each) == (2, None)
    assert [folder.find(Prompt(i, "x"), 1).name for i in (0, 1)] == ["a.webp", "b.png"]
    with pytest.raises(InputError, match=r"sampling.init_image: .* holds 2 pictures, none for prompt 2"):
        folder.find(Prompt(2, "x"), 0)


def test_the_folder_of_a_run_has_a_picture_for_each_image_of_a_prompt(tmp_path: Path) -> None:
    for folder, images in (("0_a", 2), ("3_b", 1)):
        (tmp_path / folder).mkdir()
        for i in range(images):
            saved(tmp_path / folder / f"{i:09d}.png", ramp())
    run = PictureFiles(tmp_path, "sampling.mask")
    assert run.each is None
    assert run.find(Prompt(0, "a"), 1) == tmp_path / "0_a" / "000000001.png"
    assert run.find(Prompt(3, "b"), 5) == tmp_path / "3_b" / "000000000.png"  # one for all images
    for prompt, image in ((Prompt(1, "c"), 0), (Prompt(0, "a"), 2)):
        with pytest.raises(InputError, match=f"no picture {image} for prompt {prompt.index}"):
            run.find(prompt, image)


def test_a_missing_file_and_a_folder_without_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sampling.mask: .*gone.png: No such file"):
        PictureFiles(tmp_path / "gone.png", "sampling.mask").open(Prompt(0, "x"), 0)
    with pytest.raises(InputError, match="holds no pictures"):
        PictureFiles(tmp_path, "sampling.mask").find(Prompt(0, "x"), 0)
