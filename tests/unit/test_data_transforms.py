"""From files to tensors, and the size conditions that say what was done."""

import random
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

from sat.data.transforms import Augment, Placement, Transform, augmented, to_tensor
from sat.util.pictures import on_white


def ramp(height: int, width: int) -> PIL.Image.Image:
    """Red grows downwards, green to the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(height)[:, None]
    pixels[..., 1] = np.arange(width)[None, :]
    return PIL.Image.fromarray(pixels)


def test_a_picture_covers_the_target_and_one_side_fits():
    resized = Transform(8, 12).resize(ramp(100, 200))
    assert resized.pixels.shape == (8, 16, 3)
    assert resized.original_size == (100, 200)
    assert Transform(8, 12).resize(ramp(3, 2)).pixels.shape == (18, 12, 3)


def test_center_crop_reports_where_it_cut():
    transform = Transform(10, 6)
    image, crop, _ = transform.place(transform.resize(ramp(10, 20)), Placement())
    assert crop == (0, 7)
    expected = torch.arange(7, 13).float() / 127.5 - 1
    torch.testing.assert_close(image[1, 0], expected)
    assert image.shape == (3, 10, 6)


def test_random_crop_reaches_both_ends_and_reports_where_it_cut():
    transform = Transform(10, 6, crop="random")
    resized = transform.resize(ramp(10, 20))
    for draw, left in ((0.0, 0), (0.999, 14)):
        image, crop, _ = transform.place(resized, Placement(left=draw))
        assert crop == (0, left)
        assert round((image[1, 0, 0].item() + 1) * 127.5) == left


def test_bytes_map_to_minus_one_and_one():
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    assert to_tensor(pixels).flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_transparent_parts_become_white(tmp_path):
    picture = PIL.Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    assert [on_white(picture).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    picture.convert("P").save(tmp_path / "a.gif", transparency=picture.convert("P").getpixel((1, 0)))
    assert Transform(1, 2).load(tmp_path / "a.gif").pixels[0, 1].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_keeps_its_range():
    picture = PIL.Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.asarray(on_white(picture))[0, :, 0].tolist() == [0, 128, 255]


def test_camera_rotation_is_undone(tmp_path):
    picture = ramp(4, 8)
    exif = picture.getexif()
    exif[0x0112] = 6  # the top of the scene is at the right of the file
    picture.save(tmp_path / "a.png", exif=exif)
    resized = Transform(8, 4).load(tmp_path / "a.png")
    assert resized.original_size == (8, 4)
    assert resized.pixels[0, 3].tolist() == [0, 0, 0]


def test_a_shift_moves_by_that_share_and_leaves_white():
    pixels = np.zeros((10, 20, 3), np.uint8)
    out = augmented(pixels, Augment(shift=0.2), Placement(down=1.0, right=0.0))
    assert (out[:2] == 255).all()
    assert (out[:, -4:] == 255).all()
    assert (out[2:, :-4] == 0).all()


def test_scaling_keeps_the_middle():
    pixels = np.full((40, 40, 3), 255, np.uint8)
    pixels[10:30, 10:30] = 0
    out = augmented(pixels, Augment(scale=(0.5, 0.5)), Placement())
    dark = np.argwhere(out[..., 0] < 128)
    assert dark.min(0).tolist() == [15, 15]
    assert dark.max(0).tolist() == [24, 24]


def test_the_middle_draw_of_a_symmetric_augmentation_changes_nothing():
    pixels = np.asarray(ramp(9, 7))
    assert augmented(pixels, Augment(shift=0.1, scale=(0.9, 1.1)), Placement()) is pixels


def test_a_turn_by_ninety_degrees_turns_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    out = augmented(pixels, Augment(turn=90.0), Placement(turn=1.0))
    assert abs(out.astype(int) - np.rot90(pixels)).max() <= 1  # a cosine of 6e-17


def test_a_mirrored_picture_is_the_flipped_one_shifted_as_asked():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    augment = Augment(shift=0.5, mirror=0.4)
    assert (augmented(pixels, augment, Placement(mirror=0.3)) == pixels[:, ::-1]).all()
    assert (augmented(pixels, augment, Placement(mirror=0.4)) == pixels).all()
    assert (augmented(pixels, augment, Placement(mirror=0.3, right=0.75))[:, 2:] == pixels[:, :1:-1]).all()


def test_a_warp_by_middle_numbers_is_the_turned_and_scaled_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8)
    plain = Augment(shift=0.1, scale=(0.8, 0.9), turn=10.0)
    placement = Placement(scale=0.3, down=0.2, right=0.9, turn=0.8)
    warped = augmented(pixels, replace(plain, warp=0.1), placement)
    assert (warped == augmented(pixels, plain, placement)).all()


def test_equal_numbers_of_a_warp_move_all_and_one_moves_its_corner_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    warp = Augment(warp=0.1)  # 4 pixels
    out = augmented(pixels, warp, Placement(warp=[1.0, 0.5] * 25))
    assert (out[:36] == pixels[4:]).all()
    numbers = [0.5] * 50
    numbers[2 * (5 * 1 + 3)] = 1.0  # the corner in row 1, column 3: pixel (10, 30)
    changed = np.argwhere((augmented(pixels, warp, Placement(warp=numbers)) != pixels).any(-1))
    assert changed.min(0).tolist() >= [0, 20]
    assert changed.max(0).tolist() <= [20, 39]
    assert len(changed) > 200


def test_a_picture_and_its_extras_are_warped_alike_and_numbers_are_drawn_for_it_alone():
    augment = Augment(0.1, (0.8, 1.0), 20.0, 0.05, 0.5)
    transform = Transform(24, 24, augment=augment)
    resized = transform.resize(ramp(24, 24), {"control": ramp(24, 24)})
    image, _, extras = transform.place(resized, transform.drawn(random.Random(3)))
    assert torch.equal(image, extras["control"])
    for augment, count in ((None, 5), (Augment(0.1), 5), (Augment(turn=1.0), 57)):
        used, told = random.Random(3), random.Random(3)
        replace(transform, augment=augment).drawn(used)
        [told.random() for _ in range(count)]
        assert used.random() == told.random()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Augment(shift=0.6), "data.augment.shift 0.6"),
        (lambda: Augment(scale=(1.1, 0.9)), "data.augment.scale"),
        (lambda: Augment(mirror=1.5), "data.augment.mirror 1.5"),
        (lambda: Transform(0, 4), "data.height 0"),
        (lambda: Transform(4, 4, crop="corner"), "data.crop 'corner'"),
    ],
)
def test_impossible_settings_are_refused_by_their_key(make, words):
    with pytest.raises(ValueError, match=words):
        make()
