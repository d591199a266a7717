"""What may be requested, what a picture tells, and which files can be reached at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sat.apps.web.request import (
    ControlUse,
    GenerationRequest,
    Limits,
    Pictures,
    RequestError,
    settings_of,
)
from sat.apps.web.serve import Access
from sat.config.schema.base import SizeRule
from sat.sampling.output import write_png

FIELDS = {
    "prompt": "<b>ü</b>", "negative_prompt": "", "seed": "7", "height": "32", "width": "48", "steps": "5",
    "guidance": "2.5", "model": "M",
}  # fmt: skip


def picture(path: Path, fields: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, Image.new("RGB", (300, 200), "red"), FIELDS if fields is None else fields)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("0_a/000000000.png", "0_a/000000001.png", "0_a/grid.png", "12_b/000000000.png"):
        picture(tmp_path / "out" / name)
    return tmp_path / "out"


def test_the_newest_come_first_and_sheets_do_not(root) -> None:
    names = ["12_b/000000000.png", "0_a/000000000.png", "0_a/000000001.png"]
    assert Pictures(root).newest(9) == names
    assert Pictures(root).newest(2) == names[:2]
    assert Pictures(root / "none").newest(9) == []
    assert Pictures(root).name(root / names[0]) == names[0]
    assert max(Pictures(root).thumbnail(names[0]).size) == 256


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "0_a/../../1_x/000000000.png", "/etc/passwd", "0_a/grid.png", "run.json", "", "0_a",
     "0_a/000000000.png/", "9_link/000000000.png", "0_a/000000000.png\n", "0_a\\000000000.png",
     "7_x/000000000.png"],
)  # fmt: skip
def test_nothing_but_pictures_of_the_folder_can_be_reached(root, name) -> None:
    picture(root.parent / "1_x" / "000000000.png")
    picture(root.parent / "secret.png")
    (root / "run.json").write_text("{}")
    (root / "9_link").symlink_to(root.parent / "1_x")
    with pytest.raises(RequestError, match="no such picture"):
        Pictures(root).at(name)


def test_settings_are_read_from_the_png(tmp_path) -> None:
    said = settings_of(picture(tmp_path / "a.png"))
    assert said == ("<b>ü</b>", "", 32, 48, 5, 2.5, 7, "M", {}, {})
    odd = {**FIELDS, "guidance": "none", "seed": "3-6", "steps": "²", "height": "9" * 30}
    assert settings_of(picture(tmp_path / "b.png", odd))[2:7] == (None, 48, None, None, 3)
    worn = {**FIELDS, "lora": "fur:0.5, silk:-1e-05, , :3, odd, x:nan"}
    assert settings_of(picture(tmp_path / "e.png", worn)).adapters == {"fur": 0.5, "silk": -1e-05}
    with pytest.raises(RequestError, match="holds no settings"):
        settings_of(picture(tmp_path / "c.png", {}))
    (tmp_path / "d.png").write_bytes(b"no picture")
    with pytest.raises(RequestError, match="no whole PNG file"):
        settings_of(tmp_path / "d.png")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x" * 4001}, "the prompt has 4001 characters, more than 4000"),
        ({"negative_prompt": "x" * 4001}, "the negative prompt has"),
        ({"count": 0}, "pictures: expected 1 to 8, got 0"),
        ({"steps": 201}, "steps: expected 1 to 200, got 201"),
        ({"seed": 2**32}, "seed: expected 0 to 4294967295, got 4294967296"),
        ({"guidance": float("nan")}, "guidance: expected -100 to 100, got nan"),
        ({"adapters": {"fur": 5.0}}, "strength of fur: expected -4 to 4, got 5"),
    ],
)
def test_limits_are_told(change, match) -> None:
    good = {"prompt": "a cat", "height": 32, "width": 48, "steps": 5, "guidance": 2.0, "seed": 0}
    Limits().check(GenerationRequest(**good))
    with pytest.raises(RequestError, match=match):
        Limits().check(GenerationRequest(**{**good, **change}))


def test_sides_that_are_offered_are_those_that_are_possible() -> None:
    rule = SizeRule(min=64, max=160, multiple=32, max_area=128 * 128)
    assert rule.sides() == [64, 96, 128, 160]
    for width in rule.sides():
        assert rule.sides(width) == [h for h in range(1, 200) if rule.allows(h, width)]


def test_only_loopback_is_local() -> None:
    assert Access().is_local and Access("::1").is_local
    assert not Access("0.0.0.0").is_local and not Access(share=True).is_local
    access = Access(password="päss", token="t0ken")
    assert access.knows("user", "päss")
    assert (
        not access.knows("user", "pass")
        and not access.knows("root", "päss")
        and not Access().knows("user", "")
    )
    assert "päss" not in repr(access) and "t0ken" not in repr(access)


def test_a_deleted_picture_takes_its_sheet_along_and_its_number_is_not_used_again(root) -> None:
    pictures = Pictures(root)
    pictures.delete("0_a/000000001.png")
    assert not pictures.has("0_a/000000001.png") and pictures.has("0_a/000000000.png")
    assert not (root / "0_a" / "grid.png").exists()
    pictures.delete("0_a/000000000.png")
    assert not (root / "0_a").exists()
    pictures.delete("12_b/000000000.png")
    assert pictures.new("grid").parent.name == "13_grid"
    for name in ("../secret.png", "12_b/000000000.png"):
        with pytest.raises(RequestError, match="no such picture"):
            pictures.delete(name)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"scale": 2.5}, "strength of the control: expected 0 to 2, got 2.5"),
     ({"start": 0.8, "end": 0.2}, "acts from 0.8 to 0.2"), ({"end": 1.5}, "acts from 0 to 1.5")],
)  # fmt: skip
def test_a_control_keeps_to_its_range(change, match) -> None:
    use = ControlUse("edges", Image.new("RGB", (2, 2)), **change)
    with pytest.raises(RequestError, match=match):
        Limits().check(GenerationRequest("a", 64, 64, 8, 3.0, 5, control=use))
