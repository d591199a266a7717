"""``cogview3 plot`` and ``sample.py --grid``: what is read, what is drawn, and what is said of damage."""

from __future__ import annotations

import json
import logging
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sat.cli import plot
from sat.cli.commands import plot as work
from sat.cli.main_guard import UsageError
from sat.cli.sample import arguments, main
from sat.pipeline import Pipeline
from sat.sampling.output import GridAxis
from tests.checkpoints import tokenizer
from tests.configs import DEBUG, ROOT
from tests.sampling import Command


@pytest.fixture(autouse=True)
def _restore():
    root, term = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers = list(root.handlers)
    yield
    root.handlers[:] = handlers
    signal.signal(signal.SIGTERM, term)


@pytest.fixture
def drawn():
    """matplotlib, where it is installed."""
    pytest.importorskip("matplotlib", reason="the extra `plot`")


def run(folder: Path, rows: list[object]) -> Path:
    """A training's folder with these rows of metrics."""
    folder.mkdir()
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


ROWS = [
    {"step": s, "loss": 1 / s, "lr": 1e-3, "grad_norm": None, "images_per_second": 9.0} for s in (1, 2, 3, 4)
]
HELD = {
    "step": 4,
    "validation/loss": 0.5,
    "validation/loss_ema": 0.5,
    "validation/loss_100": 0.6,
    "validation/loss_900": 0.4,
}


def test_rows_of_before_a_resume_give_way_to_those_after(tmp_path) -> None:
    again = [{"step": 2, "loss": 9.0}, {"step": 3, "loss": 8.0}]
    rows = work.read_rows(run(tmp_path / "a", [*ROWS, HELD, *again]))
    assert work.curve(rows, "loss") == ([1, 2, 3], [1.0, 9.0, 8.0])
    assert work.curve(rows, "validation/loss") == ([], [])


def test_half_a_line_is_left_out_and_counted(tmp_path, caplog) -> None:
    rows = work.read_rows(run(tmp_path / "a", [*ROWS, HELD, '{"step": 5, "lo', '["x"]']))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]
    assert "2 lines are no rows of metrics" in caplog.text


def test_smoothing_averages_with_falling_weights(tmp_path) -> None:
    rows = [
        {"step": 1, "x": 1.0},
        {"step": 2, "x": 3.0},
        {"step": 3, "x": float("nan")},
        {"step": 4, "x": 5.0},
    ]
    assert work.curve(rows, "x", 0.5) == ([1, 2, 4], [1.0, 3.5 / 1.5, 6.75 / 1.75])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], "gone/metrics.jsonl: no such file|gone: no such file"),
        (["empty"], "no rows yet"),
        (["a", "--smooth", "1"], "expected at least 0, and less than 1"),
    ],
)
def test_what_cannot_be_plotted_is_told(drawn, tmp_path, monkeypatch, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "a", ROWS)
    run(tmp_path / "empty", [])
    args = plot.parser().parse_args(words)
    with pytest.raises(UsageError, match=message):
        work.runs(args)


def test_runs_become_a_picture_and_a_page_with_their_last_values(drawn, tmp_path, capsys) -> None:
    one, two = run(tmp_path / "one", [*ROWS, HELD]), run(tmp_path / "two", ROWS[:2])
    assert plot.main([str(one), str(two)]) == 0
    assert capsys.readouterr().out.split() == [str(one / "plot.png"), str(one / "plot.html")]
    assert np.asarray(Image.open(one / "plot.png").convert("L")).std() > 5
    page = (one / "plot.html").read_text()
    assert "<svg" in page and "<td>0.25</td>" in page and "http" not in page.partition("<svg")[0]
    panels = ["loss", "held-out loss by timestep", "learning rate", "images a second"]
    assert [title for title in work.PANELS if f"<!-- {title} -->" in page] == panels, (
        "no gradient norm is logged"
    )


def test_bars_are_the_ratios_of_the_result_file(drawn, tmp_path, capsys) -> None:
    file = ROOT / "benchmarks/results/amd-epyc-family-26-model-2/performance.json"
    assert plot.main(["benchmarks", str(file), "--out", str(tmp_path / "b.html")]) == 0
    table = json.loads(file.read_text())["tables"]["step_fp32"]
    ours = next(row["ratio"] for row in table["rows"] if row["label"] == "ours")
    assert f"<td>ours</td><td>{ours:.2f}</td>" in (tmp_path / "b.html").read_text()
    (tmp_path / "x.json").write_text("[]")
    assert plot.main(["benchmarks", str(tmp_path / "x.json"), "--out", str(tmp_path / "c.png")]) == 2
    assert "not a result file" in capsys.readouterr().err


def test_data_becomes_buckets_and_a_sheet(drawn, tmp_path) -> None:
    for number, size in enumerate([(64, 64), (64, 64), (96, 64)]):
        Image.new("RGB", size, "red").save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("red")
    words = ["data", str(tmp_path), "--area", "6144", "--step", "32", "--out", str(tmp_path / "o.html")]
    assert plot.main(words) == 0
    page = (tmp_path / "o.html").read_text()
    assert "<td>64 x 64</td><td>2</td>" in page and "<td>64 x 96</td><td>1</td>" in page


def test_a_strip_ends_with_the_finished_picture(tmp_path) -> None:
    spiece = tokenizer(tmp_path / "spiece.model")
    keys = [f"conditioning.tokenizer={spiece}", "parallel.device=cpu"]
    words = ["steps", "--base", str(DEBUG), "--prompt", "a dog", "--steps", "4", "--count", "3"]
    assert plot.main([*words, "--out", str(tmp_path / "s.png"), *keys]) == 0
    picture = Pipeline.from_config([DEBUG], [*keys, "sampling.steps=4"])("a dog", seed=0).images[0]
    strip = np.asarray(Image.open(tmp_path / "s.png"))
    assert strip.shape[1] == 3 * (picture.width + 2) - 2
    assert np.abs(strip[:, -picture.width :].astype(int) - np.asarray(picture)).max() <= 1


def test_words_are_looked_at_by_the_image(drawn, tmp_path, monkeypatch) -> None:
    titles: list[str] = []
    real = work._figure

    def figure(count: int, *size: float):
        made, axes = real(count, *size)
        titles.append(str(count))
        return made, axes

    monkeypatch.setattr(work, "_figure", figure)
    out = tmp_path / "w.svg"
    words = [
        "attention",
        "--base",
        str(ROOT / "configs/tiny.yaml"),
        "--prompt",
        "a red apple",
        "--steps",
        "2",
    ]
    assert plot.main([*words, "--out", str(out), "parallel.device=cpu"]) == 0
    drawing = out.read_text()
    assert titles == ["4"] and all(f"<!-- {word} -->" in drawing for word in ("picture", "a", "red", "apple"))
    words[2] = str(ROOT / "configs/tiny_base.yaml")
    assert plot.main([*words, "--out", str(out), "parallel.device=cpu"]) == 2


def test_a_grid_has_a_cell_for_each_pair_equal_to_the_picture_drawn_alone(tmp_path, capsys) -> None:
    sample = Command(tokenizer(tmp_path / "spiece.model"), capsys)
    words = ("--prompt", "a dog", "--steps", "2", "--output-dir", tmp_path / "g")
    done = sample(*words, "--grid", "guidance=1,3", "seed=0..2")
    assert done.code == 0, done.err
    folder = tmp_path / "g" / "0_a_dog"
    assert done.out.strip() == str(folder / "sheet.png") and len(list(folder.glob("guidance=*.png"))) == 6
    alone = sample(*words[:-1], tmp_path / "one", "--guidance", "3", "--seed", "2")
    assert alone.code == 0
    cell = np.asarray(Image.open(folder / "guidance=3_seed=2.png"))
    assert (cell == np.asarray(Image.open(tmp_path / "one/0_a_dog/000000000.png"))).all()
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    height, width = cell.shape[:2]
    found = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (height, width)) == cell[..., 0]
    assert found.all((2, 3)).any(), "the cell stands on the sheet"
    again = sample(*words, "--grid", "sampling.seed=4,5")
    assert again.out.strip() == str(tmp_path / "g-2" / "0_a_dog" / "sheet.png")


def test_an_override_behind_a_grid_is_an_override() -> None:
    args = arguments(
        ["--base", "a.yaml", "--grid", "seed=0..3", "lora=0,0.5", "sampling.steps=3", "--seed", "1"]
    )
    assert args.grid == ["seed=0..3", "lora=0,0.5"] and args.overrides == ["sampling.steps=3"]
    assert GridAxis.of("seed=0..3").values == [0, 1, 2, 3]
    assert GridAxis.of("lora=0,0.5").values == [0, 0.5]


def test_a_grid_of_a_cascade_is_refused(capsys) -> None:
    assert (
        main(["--base", str(ROOT / "configs/tiny_cascade.yaml"), "--prompt", "x", "--grid", "seed=0,1"]) == 2
    )
    assert "--grid draws given prompts with one model" in capsys.readouterr().err


def test_memory_grows_with_the_side_and_a_wrong_one_is_refused(drawn, tmp_path, caplog, capsys) -> None:
    words = ["memory", "--base", str(DEBUG), "--sides", "32", "64", "--out", str(tmp_path / "m.html")]
    with caplog.at_level(logging.INFO):
        assert plot.main(words) == 0
    page = (tmp_path / "m.html").read_text()
    rows = re.findall(r"<tr><td>(\d+)</td>((?:<td>[\d.]+</td>){3})</tr>", page)
    assert [side for side, _ in rows] == ["32", "64"] and "memory of sampling" in page
    assert plot.main([*words[:4], "33", *words[-2:]]) == 2
    assert "33 x 33 is not possible" in capsys.readouterr().err


def test_a_folder_called_runs_stands_for_the_runs_in_it(drawn, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("a", "b"):
        run(tmp_path / "runs" / name, ROWS)
    assert plot.main(["runs"]) == 0
    assert "<td>runs/b</td>" in (tmp_path / "runs" / "plot.html").read_text()
