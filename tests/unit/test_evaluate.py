"""The retrieval score and its classifier, on plain colours that a few steps of training tell apart."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageColor
import pytest
import torch
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open

from sat.apps.emoji.concepts import core_labels
from sat.apps.evaluate.classifier import Classifier, score, score_folder, wanted
from sat.apps.evaluate.distances import frechet, statistics
from sat.apps.evaluate.pictures import collect
from sat.apps.evaluate.training import STRENGTHS, Recipe, Strength, augment, recolour, train
from sat.cli import evaluate
from sat.data.records import DataError
from sat.data.transforms import to_tensor
from sat.models.vision.classifier import Card, embed, top_shares

COLOURS = {"red apple": "#e01010", "lime": "#20c020", "blue heart": "#2030e0"}
CARD = Card(("heart", "red heart", "fire engine"), ("noto", "3d"), 16, 14)
SILENT = lambda step, values: None  # noqa: E731


def drawing(colour: str, style: str, size: int = 16) -> PIL.Image.Image:
    """A square (style plain) or a cross (style cross) on white."""
    picture = PIL.Image.new("RGB", (size, size), "white")
    bars = [(4, 4, 12, 12)] if style == "plain" else [(6, 1, 10, 15), (1, 6, 15, 10)]
    for bar in bars:
        picture.paste(colour, tuple(side * size // 16 for side in bar))
    return picture


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for concept, colour in COLOURS.items():
        for style in ("plain", "cross"):
            name = f"{concept} {style}.png"
            drawing(colour, style).save(folder / name)
            rows.append({"file_name": name, "text": concept, "concept": concept, "style": style})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drawing("#3020d0", "cross", 24).save(folder / "other.png")
    (folder / "heldout.jsonl").write_text(json.dumps(rows[-1] | {"file_name": "other.png"}))
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("classifier")
    train(data, out, Recipe(steps=60, batch_size=10, width=14), torch.device("cpu"), SILENT)
    return out


def test_a_trained_classifier_knows_real_pictures_and_says_how_well(trained):
    model = Classifier.load(trained)
    assert model.card.concepts == tuple(COLOURS)
    assert model.card.scores["augmented_top1"] > 0.9
    assert model.card.scores["heldout_top1"] == 1  # another blue cross
    assert model.card.training["pictures"] == 6
    real = [drawing(colour, style) for colour in COLOURS.values() for style in ("plain", "cross")]
    pixels = torch.stack([to_tensor(np.asarray(picture)) for picture in real])
    expected = embed(model, augment(pixels.repeat(40, 1, 1, 1), Strength(), torch.Generator().manual_seed(1)))
    torch.testing.assert_close(model.real_mean, expected.features.mean(0), rtol=0.2, atol=0.2)
    assert model.real_cov.diagonal().min() >= 0


def test_a_judge_of_some_concepts_learns_from_more_and_is_small(data, trained, tmp_path):
    """Further folders and other concepts are trained on and forgotten; the file has 8 bits a weight."""
    more = tmp_path / "more"
    more.mkdir()
    drawing("#e01010", "plain").rotate(45, fillcolor="white").save(more / "a.png")
    row = {"file_name": "a.png", "text": "red apple", "concept": "red apple", "style": "turned"}
    (more / "metadata.jsonl").write_text(json.dumps(row))
    judged = ("blue heart", "red apple")
    recipe = Recipe(
        steps=40, batch_size=10, width=14, judged=judged, often=2.0, bf16=True, eight_bits=True,
        start=trained, strength=STRENGTHS["strong"], average=0.9,
    )  # fmt: skip
    card = train([data, more], tmp_path / "out", recipe, torch.device("cpu"), SILENT)
    assert (card.concepts, card.styles) == (judged, ("plain", "cross"))
    assert (card.training["pictures"], card.training["concepts"], card.training["styles"]) == (7, 3, 3)
    assert card.scores["heldout_top1"] == 1
    model = Classifier.load(tmp_path / "out")
    assert model.card == card
    with safe_open(tmp_path / "out/classifier.safetensors", "pt") as written:
        kinds = {written.get_tensor(name).dtype for name in ("real_cov", "concept.bias")}
        assert kinds == {torch.float16} and written.get_tensor("real_mean").dtype == torch.float32
        assert written.get_tensor("concept.weight").dtype == torch.int8
    sizes = [(folder / "classifier.safetensors").stat().st_size for folder in (tmp_path / "out", trained)]
    assert sizes[0] < 0.8 * sizes[1]
    with pytest.raises(DataError, match="no picture of 'lime tree', which the classifier is to judge"):
        train(data, tmp_path / "no", Recipe(judged=("lime tree",)), torch.device("cpu"), SILENT)
    with pytest.raises(DataError, match="has 14 features, take --width and --stages of it"):
        train(data, tmp_path / "no", Recipe(start=trained), torch.device("cpu"), SILENT)


def test_a_square_of_one_colour_hides_a_share_of_the_pictures():
    still = Strength(shift=0, scale=(1, 1), turn=0, light=0, blur=0, noise=0, hide=0.5)
    out = augment(torch.ones(400, 3, 32, 32), still, torch.Generator().manual_seed(0))
    changed = (out != 1).any(1)  # (B, H, W)
    hidden = changed.flatten(1).any(1)
    assert 0.4 < hidden.double().mean() < 0.6
    for picture, where in zip(out[hidden], changed[hidden], strict=True):
        rows, columns = (where.any(dim).nonzero()[:, 0] for dim in (1, 0))
        low = (int(rows[0]), int(columns[0]))
        square = picture[:, low[0] : int(rows[-1]) + 1, low[1] : int(columns[-1]) + 1]
        assert (square == square[:, :1, :1]).all() and max(square.shape[1:]) <= 32 * 3 / 8 + 1


def test_other_colours_leave_white_and_grey_is_without_any():
    generator = torch.Generator().manual_seed(0)
    images = torch.ones(8, 3, 4, 4)
    images[:, :, :2] = torch.tensor([0.4, -0.3, -0.1])[:, None, None]  # colour above, white below
    out = recolour(images, Strength(colour=0.3), generator)
    torch.testing.assert_close(out[:, :, 2:], images[:, :, 2:])
    assert (out[:, :, :2] - images[:, :, :2]).abs().amax((1, 2, 3)).min() > 0.01
    grey = recolour(images, Strength(grey=1.0), generator)
    torch.testing.assert_close(grey[:, :1].expand(-1, 3, -1, -1), grey)


def test_right_captions_score_higher_than_shuffled_ones(trained):
    model = Classifier.load(trained)
    captions = [f"a {concept}, {style} style" for concept in COLOURS for style in ("plain", "cross")]
    images = [drawing(colour, style, 24) for colour in COLOURS.values() for style in ("plain", "cross")]
    right = score(images, captions, model)
    assert (right.top1, right.images, right.styled) == (1, 6, 6)
    assert right.style >= 0.8
    assert right.top5 == 1
    wrong = score(images, captions[2:] + captions[:2], model)
    assert wrong.top1 == 0
    assert wrong.judged[0].wanted.concept == "lime"
    assert wrong.judged[0].best[0] == "red apple"
    missed = wrong.as_dict()["missed"]
    assert missed[0]["caption"] == captions[2]
    json.dumps(wrong.as_dict())


def test_real_pictures_are_nearer_than_noise(trained):
    model = Classifier.load(trained)
    images = [drawing(colour, style) for colour in COLOURS.values() for style in ("plain", "cross")]
    noise = [PIL.Image.effect_noise((16, 16), 90).convert("RGB") for _ in images]
    captions = ["a lime"] * 6
    assert score(images, captions, model).distance < score(noise, captions, model).distance


def test_saving_keeps_the_judgement(trained, tmp_path):
    model = Classifier.load(trained)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    model.save(tmp_path, model.card)
    again = Classifier.load(tmp_path)
    torch.testing.assert_close(embed(again, images).concept, embed(model, images).concept)
    assert again.card == model.card


def test_pictures_of_any_size_are_judged():
    model = Classifier(CARD).eval()
    out = embed(model, torch.zeros(5, 3, 40, 24), batch_size=2)
    assert out.concept.shape == (5, 3)
    assert out.style.shape == (5, 2)
    assert out.features.shape == (5, 14)


@pytest.mark.parametrize(
    ("caption", "concept", "style"),
    [
        ("a red heart, noto style", "red heart", "noto"),
        ("A Red HEART!", "red heart", None),
        ("a 3d emoji of fire engine", "fire engine", "3d"),
        ("heart, love, 3d style", "heart", "3d"),
        ("notorious heart", "heart", None),
    ],
)
def test_a_caption_asks_for_the_longest_label_in_it(caption, concept, style):
    found = wanted(caption, CARD)
    assert (found.concept, found.style) == (concept, style)


def test_a_caption_without_known_words_asks_for_nothing():
    assert wanted("hearty soup", CARD) is None
    assert wanted("sweetheart", CARD) is None


def test_unknown_captions_are_left_out_and_listed():
    model = Classifier(CARD).eval()
    white = PIL.Image.new("RGB", (16, 16), "white")
    scores = score([white, white], ["a heart", "a zebra"], model)
    assert scores.images == 1
    assert scores.unknown == ("a zebra",)
    assert scores.distance is None
    assert scores.style is None
    with pytest.raises(DataError, match=r"none of 1 captions names one of the 3 concepts.*'a zebra'"):
        score([white], ["a zebra"], model)
    with pytest.raises(ValueError, match="1 images for 2 captions"):
        score([white], ["a heart", "a heart"], model)


def test_frechet_distance_of_known_gaussians():
    mean, identity = torch.zeros(3), torch.eye(3)
    assert frechet(mean, identity, mean, identity) == pytest.approx(0, abs=1e-9)
    assert frechet(mean, identity, mean + 2, identity) == pytest.approx(12)
    assert frechet(mean, identity, mean, 4 * identity) == pytest.approx(3)  # 3 (2 - 1)^2
    a, b = (torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) for _ in "ab")
    (mean_a, cov_a), (mean_b, cov_b) = statistics(a), statistics(b)
    root = (
        torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    )  # of a product, written directly
    expected = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    assert frechet(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        statistics(a[:1])


def test_top_shares_count_the_rank_of_the_target():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    assert top_shares(logits, torch.tensor([0, 0, 0]), (1, 2, 3)) == pytest.approx([1 / 3, 2 / 3, 1])


def test_augmentation_stays_in_range_keeps_white_and_can_do_nothing():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    out = augment(images, Strength(), generator)
    assert out.shape == images.shape
    assert -1 <= out.min() < out.max() <= 1
    still = Strength(shift=0, scale=(1, 1), turn=0, light=0, blur=0, noise=0)
    torch.testing.assert_close(augment(images, still, generator), images, atol=1e-5, rtol=0)
    white = augment(torch.ones(2, 3, 16, 16), Strength(light=0, noise=0), generator)
    torch.testing.assert_close(white, torch.ones_like(white))


def sampled(folder: Path, index: int, prompt: str, colour: str, style: str = "plain") -> None:
    target = folder / f"{index}_{prompt.replace(' ', '_')[:20]}"
    target.mkdir(parents=True)
    info = PngInfo()
    info.add_text("prompt", prompt)
    drawing(colour, style).save(target / "000000000.png", pnginfo=info)
    drawing("black", style).save(target / "grid.png", pnginfo=info)


def test_the_command_reads_a_sampling_folder_in_three_ways(trained, tmp_path, capsys):
    out = tmp_path / "OUT"
    prompts = ["a red apple", "a lime, cross style", "a red apple"]
    for index, (prompt, colour) in enumerate(zip(prompts, ("#e01010", "#20c020", "#2030e0"), strict=True)):
        sampled(out, index, prompt, colour, "cross" if "cross" in prompt else "plain")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    rows = [
        {"file_name": str(path.relative_to(out)), "text": [prompt]}
        for path, prompt in zip(sorted(out.rglob("0*0.png")), prompts, strict=True)
    ]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for captions in (
        [],
        ["--captions", str(tmp_path / "prompts.txt")],
        ["--captions", str(tmp_path / "table.jsonl")],
    ):
        command = ["retrieval", "--images", str(out), "--classifier", str(trained), "--list", *captions]
        assert evaluate.main([*command, "--json", str(tmp_path / "scores.json")]) == 0
        printed = capsys.readouterr().out
        assert "images judged: 3" in printed
        assert "concept top-1: 66.7%" in printed
        assert "taken for 'blue heart'" in printed
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert scores["top1"] == pytest.approx(2 / 3)
        assert [one["seen"][0] for one in scores["missed"]] == ["blue heart"]


def test_a_sheet_shows_the_prompts_in_their_order(tmp_path):
    out = tmp_path / "OUT"
    colours = ["red", "lime", "blue"]
    prompts = [f"thing {i}" for i in range(11)]
    for index, prompt in enumerate(prompts):
        sampled(out, index, prompt, colours[index % 3], "plain")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    command = ["sheet", "--images", str(out), "--captions", str(tmp_path / "prompts.txt"), "--columns", "11"]
    assert evaluate.main([*command, "--out", str(tmp_path / "sheet.png")]) == 0
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        side = (sheet.width - 2) // 11
        seen = [sheet.getpixel((2 + side // 2 + side * i, sheet.height // 2)) for i in range(11)]
    assert seen == [PIL.ImageColor.getrgb(colours[i % 3]) for i in range(11)]


def test_a_missing_prompt_folder_is_named(tmp_path):
    sampled(tmp_path / "OUT", 0, "a lime", "red")
    (tmp_path / "prompts.txt").write_text("a lime\na red apple\n")
    with pytest.raises(DataError, match=r"no folder 1_… for prompt 1 of .*'a red apple' \(1 of 2"):
        collect(tmp_path / "OUT", tmp_path / "prompts.txt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "{tmp}/none"], "no such folder of images"),
        (["--images", "{tmp}"], "no images with a caption"),
        (
            ["--images", "{tmp}", "--captions", "{tmp}/bad.jsonl"],
            "bad.jsonl:1: expected an object with file_name",
        ),
    ],
)
def test_what_cannot_be_judged_is_one_line(trained, tmp_path, capsys, arguments, words):
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    assert evaluate.main(["retrieval", "--classifier", str(trained), *filled]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_classifier_says_how_to_make_one(tmp_path, capsys):
    assert evaluate.main(["retrieval", "--images", str(tmp_path), "--classifier", str(tmp_path / "c")]) == 2
    assert "sat.cli.evaluate train-classifier" in capsys.readouterr().err


def test_a_classifier_that_is_too_weak_is_not_believed(data, tmp_path, capsys):
    command = [
        "train-classifier",
        "--data",
        str(data),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--width",
        "14",
    ]
    assert evaluate.main([*command, "--steps", "1", "--batch-size", "2"]) == 1
    assert "too weak to judge" in capsys.readouterr().out
    assert evaluate.main(["retrieval", "--images", str(data), "--captions", str(data / "metadata.jsonl"),
                          "--classifier", str(tmp_path)]) == 0  # fmt: skip
    assert "do not believe it" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "of_3d"), [("tiny_classifier", 0.7), ("tiny_judge", 0.95)])
def test_the_classifiers_that_ship_know_the_sample_and_the_style_they_have_never_seen(
    name, of_3d, pytestconfig
):
    root = pytestconfig.rootpath
    classifier = Classifier.load(root / "checkpoints" / name)
    assert (root / "checkpoints" / name / "classifier.safetensors").stat().st_size < 0.7e6
    assert classifier.card.scores["augmented_top1"] >= 0.9
    assert set(classifier.card.concepts) == set(core_labels())
    for folder, least in (("emoji_sample", 1.0), ("emoji_sample_3d", of_3d)):  # by chance 1 in 128
        table = root / "data" / folder / "metadata.jsonl"
        assert score_folder(table.parent, table, classifier).top1 >= least


def test_pictures_without_labels_cannot_train_a_classifier(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.png has no concept and style"):
        train(tmp_path, tmp_path / "out", Recipe(), torch.device("cpu"), SILENT)
