"""Running means and the record of a run."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import types
from dataclasses import replace

import PIL.Image
import pytest
import torch

from sat.parallel.heartbeat import current
from sat.sampling.output import write_png
from sat.train.log import Averages, Record, line
from sat.train.profile import Gap, Span, Trace, gaps
from sat.util.log import clock
from tests.training import CONFIG


def test_means_are_since_the_last_take_and_leave_out_what_is_not_finite() -> None:
    averages = Averages()
    for value in (1.0, math.nan, 3.0, math.inf):
        averages.add({"loss": torch.tensor(value), "bad": torch.tensor(math.nan)})
    taken = averages.take()
    assert taken["loss"] == 2.0
    assert math.isnan(taken["bad"])
    assert averages.take() == {}


def test_rows_are_lines_of_json_with_null_for_nan(tmp_path) -> None:
    record = Record(tmp_path)
    record.write({"step": 1, "loss": math.nan})
    record.write({"step": 2, "loss": 0.5})
    record.close()
    rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_a_resumed_record_drops_later_and_broken_rows(tmp_path) -> None:
    lines = [json.dumps({"step": step}) for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 8, "lo']))
    record = Record(tmp_path, step=4)
    record.write({"step": 6})
    record.close()
    rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]


def test_a_tracker_that_fails_costs_a_warning(tmp_path, monkeypatch, caplog) -> None:
    def init(**given: object) -> None:
        raise OSError("no network\nat all")

    broken = types.SimpleNamespace(init=init, Settings=lambda **given: None)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    record = Record(tmp_path)
    with caplog.at_level(logging.WARNING):
        record.start_wandb(tmp_path, replace(CONFIG, wandb="offline"), {}, resume=False)
    record.write({"step": 1})
    assert "wandb does not start (no network)" in caplog.text


def test_a_resumed_run_goes_on_as_the_same_run_of_the_tracker(tmp_path, monkeypatch) -> None:
    begun: list[dict[str, object]] = []
    fake = types.SimpleNamespace(init=lambda **given: begun.append(given), Settings=lambda **given: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    names = {"wandb_name": "apples", "wandb_group": "g", "wandb_tags": ["t"], "wandb_notes": "n"}
    named = replace(CONFIG, **names)
    for config, resume in ((CONFIG, False), (CONFIG, True), (named, True), (CONFIG, False)):
        Record(tmp_path).start_wandb(tmp_path, replace(config, wandb="offline"), {}, resume=resume)
    ids = [one["id"] for one in begun]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert {one["resume"] for one in begun} == {"allow"}
    assert (begun[0]["name"], begun[0]["group"], begun[0]["tags"]) == (tmp_path.name, None, [])
    assert [begun[2][key] for key in ("name", "group", "tags", "notes")] == ["apples", "g", ["t"], "n"]


def test_a_tracker_that_is_not_installed_is_told_in_one_line(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    Record(tmp_path).start_wandb(tmp_path, replace(CONFIG, wandb="offline"), {}, resume=False)
    (line,) = caplog.messages
    assert "wandb is not installed" in line and "train.wandb=disabled" in line and "[wandb]" in line


def test_a_tracker_that_is_disabled_is_not_imported(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    Record(tmp_path).start_wandb(tmp_path, replace(CONFIG, wandb="disabled"), {}, resume=False)


def test_the_line_for_the_reader_says_what_is_left() -> None:
    text = line({"step": 10, "loss": 0.123456, "seconds_per_step": 2.0, "images": 5}, 100)
    assert text == "step 10/100  loss 0.1235  s/step 2  left 0:03:00"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (3661.9, "1:01:01"), (-3, "0:00:00")])
def test_clock(seconds, text) -> None:
    assert clock(seconds) == text


def test_a_line_fits_a_hundred_columns_and_keeps_what_matters() -> None:
    row = {"step": 120, "loss": 0.0823456, **{f"loss_t{n}_{n + 249}": 0.1 for n in range(0, 1000, 250)}}
    row |= {"grad_norm": 0.31, "lr": 1.2e-4, "images_per_second": 12.3, "seconds_per_step": 2.6}
    row |= {"tokens_per_second": 1e5, "data_wait": 0.02, "memory_gb": 5.1, "skipped": 3, "epoch": 1.5}
    text = line(row, 100000)
    assert len(text) <= 100
    assert text.startswith("step 120/100000  loss 0.08235  lr 0.00012  norm 0.31  images/s 12.3  s/step 2.6")
    assert text.endswith("left 72:08:08")
    scores = {"step": 5, **{f"validation/shuffled_{n}": 1.0 for n in range(99)}, "validation/loss": 0.5}
    assert line(scores, 9).startswith("step 5/9  validation/loss 0.5  shuffled_0 1")
    assert len(line(scores, 9)) <= 100


class Board:
    """Calls that tensorboard got."""

    def __init__(self) -> None:
        self.seen: dict[str, object] = {}

    def add_text(self, name: str, text: str, step: int) -> None:
        self.seen[name] = text

    def add_image(self, name: str, image: object, step: int, dataformats: str) -> None:
        self.seen[name] = (image.shape, step, dataformats)  # type: ignore[attr-defined]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen[name] = value

    def flush(self) -> None:
        pass


def test_trackers_get_pictures_and_grouped_names(tmp_path, monkeypatch) -> None:
    logged: list[dict[str, object]] = []
    fake = types.SimpleNamespace(Image=lambda file, caption: (file, caption))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    record = Record(tmp_path)
    record._wandb = types.SimpleNamespace(log=lambda values, step: logged.append({**values, "at": step}))
    record._board = board = Board()
    record.write({"step": 7, "loss": 1.0, "data_wait": 0.5, "validation/loss": 2.0})
    folder = tmp_path / "samples" / "step_00000007"
    folder.mkdir(parents=True)
    for name in ("00_fox", "grid"):
        write_png(folder / f"{name}.png", PIL.Image.new("RGB", (6, 4)), {"prompt": "a fox"})
    record.pictures(7, folder)
    names = {"train/loss": 1.0, "speed/data_wait": 0.5, "validation/loss": 2.0}
    assert logged[0] == {**names, "at": 7}
    assert logged[1] == {"samples/00_fox": (str(folder / "00_fox.png"), "a fox"), "at": 7}
    assert board.seen == {**names, "samples/00_fox": ((4, 6, 3), 7, "HWC")}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 7, "loss": 1.0, "data_wait": 0.5, "validation/loss": 2.0
    }  # fmt: skip


def test_tensorboard_holds_the_config_and_the_runs_name(tmp_path, monkeypatch) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    board = Board()
    monkeypatch.setattr(tensorboard, "SummaryWriter", lambda folder, purge_step: board)
    train = replace(CONFIG, wandb_group="foxes", wandb_tags=["a", "b"])
    Record(tmp_path).start_tensorboard(tmp_path, step=0, train=train, config="train:\n  lr: 1")
    assert board.seen["config"] == "    train:\n      lr: 1"
    assert "**group**: foxes" in board.seen["run"] and "**tags**: a, b" in board.seen["run"]
    assert f"**run**: {tmp_path.name}" in board.seen["run"]


# -- a profile


def test_gaps_are_what_no_work_covers_by_phase() -> None:
    phases = [Span(0, 40, "read a batch"), Span(40, 90, "forward pass"), Span(90, 100, "optimizer")]
    work = [
        Span(10, 30, "aten::mm"), Span(20, 50, "aten::add"), Span(25, 28, "aten::t"),
        Span(70, 95, "aten::gelu"),
    ]  # fmt: skip
    found = gaps(work, phases)
    assert found == [
        Gap(50, 70, "aten::add", "aten::gelu", "forward pass"),
        Gap(0, 10, "", "aten::mm", "read a batch"),
        Gap(95, 100, "aten::gelu", "", "optimizer"),
    ]
    expected = "0.02 ms (20.0%) in 'forward pass', between aten::add and aten::gelu"
    assert found[0].told(100) == expected
    assert gaps(work, []) == []


def test_a_trace_of_steps_names_its_longest_gaps(tmp_path, caplog) -> None:
    trace, matrix = Trace(tmp_path / "profile", 2, 0, accelerator=False), torch.ones(64, 64)
    with caplog.at_level(logging.INFO):
        for step in range(6):
            with trace.around():
                current().mark(f"step {step}: read a batch")
                time.sleep(0.02 if step == 4 else 0)
                current().mark(f"step {step}: forward pass")
                (matrix @ matrix).sum()
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["trace_00000.json.gz"]
    assert "profile of 2 steps" in caplog.messages[0]
    assert "in 'read a batch'" in caplog.messages[1]
    assert len(caplog.messages) == 4
    assert current().mark.__name__ == "mark"
