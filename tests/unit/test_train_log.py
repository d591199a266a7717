"""Running means and the record of a run."""

from __future__ import annotations

import json
import logging
import math
import sys
import types
from dataclasses import replace

import pytest
import torch

from sat.train.log import Averages, Record, line
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
    assert text == "step 10/100  loss 0.1235  seconds_per_step 2  left 0:03:00"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (3661.9, "1:01:01"), (-3, "0:00:00")])
def test_clock(seconds, text) -> None:
    assert clock(seconds) == text
