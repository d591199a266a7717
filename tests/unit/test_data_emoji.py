"""The emoji sets: what is used, captioned, held out, drawn and written. The packages are small stand-ins."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from sat.apps.emoji.build import HELD_OUT_PAIRS, IconSet, build, is_held_out, svg
from sat.apps.emoji.concepts import (
    LABELS,
    STYLES,
    TRAINING_STYLES,
    Archive,
    Concept,
    Package,
    PackageError,
    captions,
    code_points,
    core_labels,
    fetch,
    read_concepts,
    select,
    slug,
    with_article,
)
from sat.cli import prepare
from sat.data.sources import read_source
from tests.configs import ROOT

APPLE = Concept("red apple", "1f34e", ("diet", "food", "fruit"), 4)

pytest.importorskip("resvg_py")


def entry(label: str, hexcode: str, group: int | None, tags: tuple[str, ...] = ()) -> dict[str, object]:
    row = {"label": label, "hexcode": hexcode, "tags": list(tags)}
    return row if group is None else {**row, "group": group, "subgroup": 0}


ENTRIES = [
    entry("red apple", "1F34E", 4, ("apple", "food", "fruit", "ripe")),
    entry("red heart", "2764-FE0F", 0, ("emotion", "love")),
    entry("enraged face", "1F621", 0, ("angry", "mad")),
    entry("regional indicator A", "1F1E6", None),
    entry("light skin tone", "1F3FB", 2),
    entry("flag: Chad", "1F1F9-1F1E9", 9),
    entry("woman cook", "1F469-200D-1F373", 1),
]


def pack(folder: Path, package: Package, files: dict[str, bytes]) -> None:
    with tarfile.open(folder / package.tarball, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def icons(named: dict[str, str], chars: dict[str, str]) -> dict[str, bytes]:
    """An icon set of unit squares in the given colours, filling the left half of the drawing."""
    bodies = {name: {"body": f'<path fill="{fill}" d="M0 0h8v16h-8z"/>'} for name, fill in named.items()}
    aliases = {"mirrored": {"parent": next(iter(named)), "hFlip": True}}
    both = {"icons": bodies, "aliases": aliases, "width": 16, "height": 16}
    return {"icons.json": json.dumps(both).encode(), "chars.json": json.dumps(chars).encode()}


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    pack(folder, LABELS, {"en/data.json": json.dumps(ENTRIES).encode()})
    named = {"red-apple": "#ff0000", "red-heart": "#00ff00", "pouting-face": "#0000ff"}
    chars = {"1f34e": "red-apple", "2764": "red-heart", "1f621": "pouting-face"}
    for style in TRAINING_STYLES:
        coded = style not in ("blob", "emojitwo")
        drawn = named if style != "emojitwo" else {"red-apple": "#ff0000"}
        pack(folder, STYLES[style].package, icons(drawn, chars if coded else {}))
    webp = io.BytesIO()
    PIL.Image.new("RGBA", (256, 256), (255, 0, 0, 0)).save(webp, "WEBP")
    pack(folder, STYLES["3d"].package, {"assets/1f34e.webp": webp.getvalue()})
    return folder


def test_flags_components_and_people_sequences_are_no_concepts(packages):
    with Archive(packages / LABELS.tarball) as archive:
        found = read_concepts(archive)
    assert [concept.label for concept in found] == ["red apple", "red heart", "enraged face"]
    assert found[0].tags == ("food", "fruit", "ripe")
    assert found[1].code == "2764"


def test_every_pair_is_drawn_captioned_and_either_trained_on_or_held_out(packages, tmp_path):
    written = build(tmp_path / "out", packages, TRAINING_STYLES, "all", 64)
    assert written.trained.total() + written.held_out.total() == 13
    assert written.missing == {"emojitwo": 2}
    assert not written.failed
    trained, kept = (read_source(tmp_path / "out" / name) for name in ("metadata.jsonl", "heldout.jsonl"))
    assert not trained.bad + kept.bad
    assert len(trained) == written.trained.total()
    pairs = {(record.labels["concept"], record.labels["style"]) for record in trained.records}
    assert ("red apple", "twemoji") not in pairs  # one of the six named ones
    assert ("red apple", "twemoji") in {(r.labels["concept"], r.labels["style"]) for r in kept.records}
    record = trained.records[0]
    picture = np.asarray(PIL.Image.open(record.path))
    assert picture.shape == (64, 64, 3)
    assert picture[10, 10].tolist() == [255, 0, 0]
    assert picture[10, 50].tolist() == [255, 255, 255]
    assert record.captions[0] == "red apple, noto style"


def test_sets_without_code_points_are_matched_by_any_known_name(packages, tmp_path):
    build(tmp_path / "out", packages, ["blob"], "all", 64)
    assert (tmp_path / "out/blob/enraged-face.png").exists()


def test_a_set_of_compressed_and_older_names_is_matched_too(packages, tmp_path):
    """By the label without hyphens, the character's own name, or the few names that are neither."""
    named = {"redapple": "#ff0000", "heavyblackheart": "#00ff00", "pouting-face": "#0000ff"}
    pack(packages, STYLES["firefox"].package, icons(named, {}))
    written = build(tmp_path / "out", packages, ["firefox"], "all", 64)
    assert (written.trained + written.held_out, written.missing) == ({"firefox": 2}, {"firefox": 1})
    assert (tmp_path / "out/firefox/red-heart.png").exists()


def test_numbered_drawings_of_a_thing_are_found_by_their_first(packages, tmp_path):
    named = {"red-apple-1": "#ff0000", "red-apple-2": "#00ff00"}
    pack(packages, STYLES["streamline"].package, icons(named, {}))
    written = build(tmp_path / "out", packages, ["streamline"], "all", 64)
    assert written.trained + written.held_out == {"streamline": 1}
    assert PIL.Image.open(tmp_path / "out/streamline/red-apple.png").getpixel((10, 10)) == (255, 0, 0)


def test_icons_are_found_by_their_own_names_and_private_code_points_name_no_character(packages, tmp_path):
    named = {"pouting": "#ff0000", "apple-filled": "#00ff00", "home": "#0000ff"}
    chars = {"f02d1": "apple-filled", "e900": "home"}  # of the package's own font
    pack(packages, STYLES["material"].package, icons(named, chars))
    written = build(tmp_path / "out", packages, ["material"], "all", 64)
    assert (written.trained + written.held_out, written.missing) == ({"material": 2}, {"material": 1})
    colours = {n: (0, 255, 0) if n == "red-apple" else (255, 0, 0) for n in ("red-apple", "enraged-face")}
    for name, colour in colours.items():
        assert PIL.Image.open(tmp_path / f"out/material/{name}.png").getpixel((10, 10)) == colour


def test_what_was_used_is_recorded_with_licence_and_digest(packages, tmp_path):
    build(tmp_path / "out", packages, ["flat"], "all", 128)
    record = json.loads((tmp_path / "out/sources.json").read_text())
    assert record["size"] == 128
    by_name = {package["name"]: package for package in record["packages"]}
    assert by_name["@iconify-json/fluent-emoji-flat"]["licence"] == "MIT"
    assert len(by_name["emojibase-data"]["sha256"]) == 64


def test_the_held_out_style_is_drawn_only_by_itself(packages, tmp_path):
    assert build(tmp_path / "3d", packages, ["3d"], "all", 64).trained == {"3d": 1}
    picture = PIL.Image.open(tmp_path / "3d/3d/red-apple.png")
    assert picture.getpixel((9, 9)) == (255, 255, 255)  # transparent red became white
    with pytest.raises(ValueError, match="'3d' is held out"):
        build(tmp_path / "x", packages, ["3d", "noto"], "all", 64)


def test_an_alias_is_drawn_mirrored():
    squares: IconSet = json.loads(icons({"a": "#f00"}, {})["icons.json"])
    assert 'transform="translate(16.0 0) scale(-1 1)"' in svg(squares, "mirrored")
    assert "transform" not in svg(squares, "a")
    with pytest.raises(PackageError, match="no icon named 'b'"):
        svg(squares, "b")


def test_weights_sum_to_one_and_follow_the_recipe():
    drawn = {caption.text: caption.weight for caption in captions(APPLE, "emojitwo")}
    assert sum(drawn.values()) == pytest.approx(1, abs=1e-5)
    assert drawn["red apple, emojitwo style"] == 0.45
    assert drawn["an emojitwo emoji of red apple"] == 0.2
    assert drawn["red apple"] == drawn["a red apple"] == 0.075
    assert captions(APPLE, "noto") == captions(APPLE, "noto")
    plain = {caption.text: caption.weight for caption in captions(Concept("grapes", "1", (), 4), "noto")}
    assert plain == {"grapes, noto style": 0.65, "a noto emoji of grapes": 0.2, "grapes": 0.15}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("apple", "an apple"), ("unicorn", "a unicorn"), ("grapes", "grapes"), ("cactus", "a cactus"),
        ("ear of corn", "an ear of corn"), ("french fries", "french fries"), ("bus", "a bus"),
        ("smiling face with heart-eyes", "a smiling face with heart-eyes"),
    ],
)  # fmt: skip
def test_articles(label, expected):
    assert with_article(label) == expected


def test_about_four_percent_and_the_six_named_pairs_are_held_out():
    concepts = [Concept(f"thing {number}", f"{number:x}", (), 4) for number in range(4000)]
    share = sum(is_held_out(concept, style) for concept in concepts for style in TRAINING_STYLES) / 20000
    assert share == pytest.approx(0.04, abs=0.005)
    for label, style in HELD_OUT_PAIRS:
        assert is_held_out(Concept(label, "0", (), 4), style)
    assert len(HELD_OUT_PAIRS) == 6


def test_a_style_with_the_outlines_of_another_keeps_its_pairs():
    concepts = [Concept(f"thing {number}", f"{number:x}", (), 4) for number in range(500)]
    for style, shapes in (("contrast", "flat"), ("3d", "flat"), ("monotone", "emojitwo")):
        assert [is_held_out(c, style) for c in concepts] == [is_held_out(c, shapes) for c in concepts]
    assert is_held_out(Concept("rocket", "0", (), 4), "contrast")


def test_the_core_list_is_about_130_labels_that_name_the_held_out_ones():
    labels = core_labels()
    assert 100 <= len(labels) == len(set(labels)) <= 150
    assert {label for label, _ in HELD_OUT_PAIRS} <= set(labels)


def test_an_unknown_concept_gets_the_nearest_label(packages, tmp_path):
    (tmp_path / "list.txt").write_text("# mine\n\nRed Apple\nred haert\nzzz\n")
    with Archive(packages / LABELS.tarball) as archive:
        concepts = read_concepts(archive)
    with pytest.raises(
        ValueError, match=r"unknown concept 'red haert' \(did you mean 'red heart'\?\), 'zzz'"
    ):
        select(concepts, str(tmp_path / "list.txt"))
    with pytest.raises(ValueError, match="expected 'all', 'core' or a file"):
        select(concepts, "mine")


def test_names_and_code_points_are_compared_in_one_form():
    assert slug("piñata") == "pinata"
    assert slug("twelve o’clock") == "twelve-oclock"
    assert slug("keycap: #") != slug("keycap: *")
    assert code_points("2764-FE0F-200D-1F525") == "2764-200d-1f525"


def test_without_npm_the_message_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "emojibase-data-9.0.0.tgz").touch()
    with pytest.raises(
        PackageError, match=r"another version: emojibase-data-9\.0\.0.*npm pack emojibase-data@17"
    ):
        fetch(LABELS, tmp_path)


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho first >&2\necho 'E404 not found' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(
        PackageError, match=r"npm pack emojibase-data@17\.0\.0 failed with code 1: E404 not found$"
    ):
        fetch(LABELS, tmp_path / "out")


def test_a_broken_tarball_is_named(tmp_path):
    (tmp_path / "a.tgz").write_bytes(b"no tarball")
    with pytest.raises(PackageError, match=r"a\.tgz is not a readable npm tarball"):
        Archive(tmp_path / "a.tgz")


def test_the_command_writes_and_counts(packages, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare.main(["emoji", "--out", str(out), "--packages", str(packages), "--styles", "noto"]) == 0
    assert "images to train on (metadata.jsonl)" in capsys.readouterr().out
    assert prepare.main(["emoji", "--out", str(out), "--styles", "oil"]) == 2
    assert "--styles 'oil': expected one or more of noto" in capsys.readouterr().err


def test_what_a_style_is_judged_by_is_nothing_it_was_taught_with():
    shipped = ROOT / "data" / "emoji_sample_3d"
    taught = {
        record.labels["concept"]
        for name in ("metadata.jsonl", "heldout.jsonl")
        for record in read_source(shipped / name).records
    }
    judged = (ROOT / "configs" / "tiny_3d_concepts.txt").read_text("utf-8").splitlines()
    assert not taught & set(judged) and taught | set(judged) == set(core_labels())
    prompts = (ROOT / "configs" / "tiny_3d_prompts.txt").read_text("utf-8").splitlines()
    assert prompts == [f"{label}, 3d style" for label in judged]
