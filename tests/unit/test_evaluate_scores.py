"""Prompt lists, arithmetic on features, tables and reports, against values worked out another way."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sat.apps.evaluate.benchmarks import write_layout
from sat.apps.evaluate.distances import precision_recall
from sat.apps.evaluate.metrics import Score, best_of
from sat.apps.evaluate.pictures import Opened, Picture, PromptList, drawn, plain, read_list
from sat.apps.evaluate.report import (
    Folder,
    Results,
    as_dict,
    by_category,
    html,
    interval,
    open_folders,
    spread,
    standard_error,
    table,
)
from sat.data.records import DataError
from sat.sampling.output import write_png
from sat.sampling.prompts import Prompt, PromptError

ROWS = (
    '{"text": "A red, round apple", "category": "Colors"}',
    '{"prompt": "Two  dogs", "Category": "Counting"}',
)


def prompts_of(path: Path, text: str) -> PromptList:
    path.write_text(text, "utf-8")
    return read_list(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("drawbench.csv", 'Prompts,Category\n"A red, round apple",Colors\nTwo dogs,Counting\n'),
        ("parti.tsv", "Prompt\tCategory\tNote\nA red, round apple\tColors\tx\nTwo dogs\tCounting\t\n"),
        ("a.jsonl", f'{ROWS[0]}\n\n{ROWS[1]}'),
        ("a.json", f"[{ROWS[0]}, {ROWS[1]}]"),
    ],
)  # fmt: skip
def test_lists_with_categories_are_read_alike(tmp_path, name: str, text: str) -> None:
    found = prompts_of(tmp_path / name, text)
    assert [prompt.text for prompt in found.prompts] == ["A red, round apple", "Two dogs"]
    assert found.categories == ("Colors", "Counting")


def test_plain_lines_and_coco_captions_have_no_categories(tmp_path) -> None:
    lines = prompts_of(tmp_path / "a.txt", "a dog, sitting\n\ntwo, cats\n")
    assert [(p.index, p.text) for p in lines.prompts] == [(0, "a dog, sitting"), (1, "two, cats")]
    coco = prompts_of(tmp_path / "c.json", json.dumps({"annotations": [{"caption": "A bus \n on a road"}]}))
    assert (coco.prompts, coco.categories) == ((Prompt(0, "A bus on a road"),), ("",))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "words,kind\na,b\n", "expected one called prompts or .*it has words, kind"),
        ("a.csv", "prompt\n", "holds no prompt"),
        ("a.csv", "prompt\nA red, round apple\n", "line 2: more fields than the header has"),
        ("a.tsv", "prompt\tcategory\na dog\tx\n\ty\n", "line 3: no prompt"),
        ("a.jsonl", '{"text": "a"}\n{oops\n', "line 2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2: no prompt; expected text in"),
        ("a.json", "[1]", "line 1: no prompt"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_read_is_told_with_its_line(tmp_path, name: str, text: str, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        prompts_of(tmp_path / name, text)


def test_precision_and_recall_are_those_of_a_double_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(30, 3, generator=generator) * 0.5
    real = torch.randn(40, 3, generator=generator)

    def covered(points: np.ndarray, others: np.ndarray) -> float:
        hits = 0
        for point in points:
            for i, other in enumerate(others):
                radius = sorted(np.linalg.norm(other - one) for j, one in enumerate(others) if j != i)[2]
                if np.linalg.norm(point - other) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    a, b = made.double().numpy(), real.double().numpy()
    found = precision_recall(made, real)
    assert found == pytest.approx((covered(a, b), covered(b, a)))
    assert found.precision > found.recall > 0
    assert precision_recall(made, made) == (1, 1)
    assert precision_recall(made, made + 100) == (0, 0)
    with pytest.raises(ValueError, match="more than 3 pictures on both sides, got 3"):
        precision_recall(made[:3], real)


def test_pictures_are_opened_when_asked_for_and_broken_ones_named(tmp_path) -> None:
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"x")
    opened = Opened([tmp_path / "a.png", tmp_path / "b.png"])
    assert opened[0].getpixel((0, 0)) == (255, 255, 255)
    assert len(opened[1:]) == 1
    with pytest.raises(DataError, match=r"b\.png"):
        opened[1]


def picture(folder: Path, name: str, prompt: str | None = None, side: int = 8) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    if prompt is not None:
        info.add_text("prompt", prompt)
    kind = {"pnginfo": info} if name.endswith(".png") else {}
    Image.new("RGB", (side, side), "red").save(folder / name, **kind)


def test_pictures_are_found_by_the_number_of_their_prompt(tmp_path) -> None:
    prompts = plain(["a dog", "a cat"]).prompts
    for i, text in enumerate(("a dog", "a cat")):
        picture(tmp_path / f"{i}_x", "000000000.png", text)
        picture(tmp_path / f"{i}_x", "grid.png", "whatever")
    found = drawn(tmp_path, prompts)
    assert [(p.path.name, p.caption, p.prompt, p.image) for p in found] == [
        ("000000000.png", "a dog", 0, 0),
        ("000000000.png", "a cat", 1, 0),
    ]
    picture(tmp_path / "1_x", "000000001.png", "a cat")
    with pytest.raises(DataError, match="pictures of every prompt .*, found 1 in 0_x, 2 in 1_x"):
        drawn(tmp_path, prompts)
    with pytest.raises(DataError, match=r"no folder 2_… for prompt 2, 'a cow' \(1 of 3 are missing\)"):
        drawn(tmp_path, plain(["a dog", "a cat", "a cow"]).prompts)
    with pytest.raises(DataError, match="was drawn for 'a dog', but prompt 0 is now 'a fox'"):
        drawn(tmp_path, plain(["a fox"]).prompts)
    picture(tmp_path / "0_y", "000000000.png", "a dog")
    with pytest.raises(DataError, match="several folders for prompt 0: 0_x, 0_y"):
        drawn(tmp_path, prompts[:1])


def test_another_programs_pictures_need_only_the_numbered_folders(tmp_path) -> None:
    picture(tmp_path / "pictures" / "0_a", "out.jpg")
    (found,) = drawn(tmp_path, plain(["a dog"]).prompts)  # the folder of an evaluation has them in `pictures`
    assert (found.path.name, found.caption) == ("out.jpg", "a dog")


@pytest.fixture
def results(tmp_path) -> Results:
    texts = ("a <b>dog</b> & 'cat'", "two", "three")
    prompts = PromptList(plain(texts).prompts, ("Animals", "Counting", "Counting"))
    folders = []
    for name, side in (("left", 8), ("right", 500)):
        for index in range(3):
            for image in range(2):
                picture(tmp_path / name / f"{index}_x", f"{image:09d}.png", side=side)
        folders += open_folders([tmp_path / name], prompts)
    one, two = (1.0, 3.0, 2.0, 4.0, 7.0, None), (0.0,) * 6
    scores = {
        "left": (Score("A", 17 / 5, "higher", 5, one, "a note"), Score("D", 2.5, "lower", 6)),
        "right": (Score("A", 0.0, "higher", 6, two, "a note"), Score("D", 0.5, "lower", 6)),
    }
    return Results(prompts, tuple(folders), scores, ("hps: damaged",))


def test_errors_come_from_the_spread_over_prompts_and_means_from_categories(results) -> None:
    left = results.folders[0]
    score = results.score("left", "A")
    means = np.array([2.0, 3.0, 7.0])  # of two, two and one picture
    assert standard_error(score, left.pictures) == pytest.approx(means.std(ddof=1) / np.sqrt(3))
    assert standard_error(results.score("left", "D"), left.pictures) is None
    assert by_category(score, left.pictures, results.prompts) == {
        "Animals": 2,
        "Counting": pytest.approx(13 / 3),
    }
    told = as_dict(results)["folders"]["left"]
    second = {"file": "0_x/000000001.png", "prompt": "a <b>dog</b> & 'cat'", "category": "Animals"}
    assert told["pictures"][1] == second | {"scores": {"A": 3.0}}
    assert json.loads(json.dumps(told))["scores"]["D"]["value"] == 2.5


def test_the_table_has_a_column_a_folder_and_each_note_once(results) -> None:
    text = "\n".join(table(results))
    assert re.search(r"^ +left +right$", text, re.MULTILINE)
    assert re.search(r"^A \(higher is better\) +3\.4 ± 1\.528 +0 ± 0$", text, re.MULTILINE)
    assert re.search(r"^  A +4\.333 +0$", text, re.MULTILINE)
    assert text.count("a note") == 1


def test_the_report_is_whole_in_itself_and_escapes_prompts(results) -> None:
    page = "".join(html(results, "left and right", 10))
    assert page.count("data:image/webp;base64,") == 12
    assert not re.search(r"(src|href)=(?!'data:)|url\(|@import", page)
    assert "<b>dog" not in page and "a &lt;b&gt;dog&lt;/b&gt; &amp; &#x27;cat&#x27;" in page
    assert "<td class=best>0.5" in page and "hps: damaged" in page
    assert "A 7" in page
    few = "".join(html(results, "t", 2))
    assert few.count("<article>") == 2 and "2 of 3 prompts" in few
    assert [spread(5, 9), spread(10, 2), spread(10, 4)] == [[0, 1, 2, 3, 4], [0, 5], [0, 2, 5, 7]]


def test_the_best_of_a_score_depends_on_its_direction() -> None:
    for better, best in (("higher", 3.0), ("lower", 0.4), ("near 1", 1.2)):
        assert best_of([Score("x", value, better, 1) for value in (0.4, 1.2, 3.0)]).value == best


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path) -> None:
    prompts = plain(["a dog"])
    for name in ("a/out", "b/out"):
        picture(tmp_path / name / "0_x", "000000000.png")
    found = open_folders([tmp_path / "a/out", tmp_path / "b/out"], prompts)
    assert [folder.name for folder in found] == [str(tmp_path / "a/out"), str(tmp_path / "b/out")]
    assert isinstance(found[0], Folder) and isinstance(found[0].pictures[0], Picture)


def _pictures_of(folder: Path, texts: list[str], each: int) -> Path:
    for index in range(len(texts)):
        (own := folder / f"{index}_x").mkdir(parents=True)
        for image in range(each):
            write_png(own / f"{image:09d}.png", Image.new("RGB", (8, 8), (40 * index, 50 * image, 9)))
    return folder


def test_geneval_gets_each_prompts_line_and_samples(tmp_path) -> None:
    rows = [
        {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "a photo of two benches"},
        {"tag": "colors", "include": [{"class": "cup", "count": 1}], "prompt": "a photo of a red cup"},
    ]
    (listed := tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_list(listed).categories == ("counting", "colors")
    images = _pictures_of(tmp_path / "drawn", [row["prompt"] for row in rows], 4)
    assert write_layout("geneval", images, listed, tmp_path / "out") == 8
    for index, row in enumerate(rows):
        own = tmp_path / "out" / f"{index:05d}"
        assert json.loads((own / "metadata.jsonl").read_text()) == row
        assert sorted(p.name for p in (own / "samples").iterdir()) == [f"{i:04d}.png" for i in range(4)]
    assert Image.open(tmp_path / "out/00001/samples/0003.png").getpixel((0, 0)) == (40, 150, 9)
    (plain_list := tmp_path / "plain.txt").write_text("a photo of two benches\na photo of a red cup\n")
    with pytest.raises(PromptError, match="expected GenEval's evaluation_metadata.jsonl"):
        write_layout("geneval", images, plain_list, tmp_path / "other")
    with pytest.raises(DataError, match="is not empty"):
        write_layout("geneval", images, listed, tmp_path / "out")


def test_dpg_gets_four_pictures_in_one_named_by_item(tmp_path) -> None:
    (folder := tmp_path / "prompts").mkdir()
    texts = {"drawtext_7": "a red cup\non a table", "whoops_12": "a blue bench"}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    rows = "".join(
        f'{name},"{" ".join(text.split())}",q{i}\n' for name, text in texts.items() for i in (1, 2)
    )
    (table := tmp_path / "dpg_bench.csv").write_text("item_id,text,question\n" + rows)
    assert read_list(folder) == read_list(table)  # each item once, though the table has a row a question
    images = _pictures_of(tmp_path / "drawn", list(texts), 4)
    for prompts in (folder, table):
        write_layout("dpg", images, prompts, tmp_path / "out" / prompts.stem)
        sheet = Image.open(tmp_path / "out" / prompts.stem / "whoops_12.png")
        assert sheet.size == (16, 16)
        corners = [sheet.getpixel(at)[1] for at in ((0, 0), (8, 0), (0, 8), (8, 8))]
        assert corners == [0, 50, 100, 150]
    with pytest.raises(DataError, match="takes 1 or 4 square pictures of one size a prompt, found 3"):
        write_layout("dpg", _pictures_of(tmp_path / "three", list(texts), 3), folder, tmp_path / "no")


def test_an_item_of_dpg_that_leads_out_of_the_folder_is_refused(tmp_path) -> None:
    (table := tmp_path / "dpg_bench.csv").write_text("item_id,text\n../away,a red cup\n")
    with pytest.raises(DataError, match="item_id '../away' is no file name"):
        write_layout("dpg", _pictures_of(tmp_path / "a", ["a red cup"], 1), table, tmp_path / "out")
    assert not (tmp_path / "away.png").exists()


def test_t2i_compbench_gets_prompts_in_names_numbered_through(tmp_path) -> None:
    texts = ["a green bench and a blue bowl.", "a red apple"]
    (listed := tmp_path / "color_val.txt").write_text("\n".join(texts))
    write_layout("t2i_compbench", _pictures_of(tmp_path / "a", texts, 2), listed, tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "out/samples").iterdir())
    assert names == sorted(f"{text}_{2 * i + j:06d}.png" for i, text in enumerate(texts) for j in (0, 1))
    listed.write_text("a_b")
    with pytest.raises(DataError, match="keeps prompts in file names"):
        write_layout("t2i_compbench", _pictures_of(tmp_path / "b", ["a_b"], 1), listed, tmp_path / "no")


def test_limits_of_a_mean_resample_prompts_not_pictures() -> None:
    """Prompts of one value each: as wide as the binomial of the prompts, however many pictures each has."""
    each = tuple(float(prompt % 2) for prompt in range(100) for _ in range(4))
    pictures = [Picture(Path("x"), "", prompt, image) for prompt in range(100) for image in range(4)]
    limits = interval(Score("s", 0.5, "higher", 400, each), pictures)
    assert limits is not None
    assert limits.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011)
    assert limits.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)
    assert interval(Score("FID", 3.0, "lower", 400), pictures) is None
