"""The benchmarks' own arithmetic, and that what needs a GPU is built and runs, in small, without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu as gpu_run
from benchmarks import measure, run
from benchmarks.cases import KINDS, Case, make
from benchmarks.tables import cpu, gpu

TINY = {
    "plus": {
        "params": {
            "dim": 32, "heads": 4, "depth": 2, "channels": 4, "text_dim": 16, "text_len": 7, "emb_dim": 24,
            "size_dim": 48, "table_size": [8, 8],
        },
        "cells": 8,
    },
    "vae": {"width": 8, "multipliers": [1, 2], "res_blocks": 1, "latent_channels": 4, "groups": 4},
    "cells": 8,
    "text": {"dim": 32, "heads": 4, "head_dim": 8, "mlp_dim": 48, "depth": 2, "vocab": 64},
    "unet": {
        "params": {
            "width": 32, "multipliers": [1, 2], "blocks": 1, "attention": [2], "depths": [1, 1],
            "head_dim": 8, "text_dim": 16, "text_len": 7, "size_dim": 48, "groups": 8,
        },
        "cells": 8,
        "tokens": 7,
    },
    "whole": gpu_run.SMALL["whole"],
}  # fmt: skip
GPU_ONLY = ("cudnn", "efficient", "flash3", "sage", "graphs")


def test_every_case_of_the_gpu_suite_runs_in_small_on_a_cpu() -> None:
    seen, facts = set(), dict[tuple[str, str], dict[str, float]]()
    for table in gpu(True, "cpu", TINY):
        assert table.base in table.rows and set(table.ours) <= set(table.rows)
        for label, case in table.rows.items():
            options = case.options
            words = options.get("settings", ())
            compiled = options.get("compile") or "sampling.compile=true" in words
            if case.side in ("cache-dit", "diffusers compiled") or compiled:
                continue  # need a package, or a compiler
            if (
                options.get("graphs")
                or "sampling.graphs=true" in words
                or options.get("offload")
                or options.get("attention") in GPU_ONLY
            ):
                with pytest.raises(ValueError, match="GPU|CUDA"):
                    make(case)
                continue
            work = make(case)
            work()
            facts[table.name, label] = getattr(work, "facts", dict)()
            seen.add((table.name, label))
    assert {name for name, _ in seen} == {table.name for table in gpu(True, "cpu", TINY)}
    for name in ("gpu_peaks", "gpu_quality", "gpu_training"):
        assert all(found["planned MB"] > 0.1 for (table, _), found in facts.items() if table == name)
    quality = {label: found for (table, label), found in facts.items() if table == "gpu_quality"}
    assert quality["plain"]["apart"] == 0 < quality["int8"]["apart"] < quality["int4"]["apart"]
    assert 0 < quality["step cache 0.2"]["computed"] <= 1


class Here:
    """A worker in this process."""

    made: list[str] = []
    stop_after = 99

    def __init__(self, case: Case, threads: int) -> None:
        self.case, self.peak, self.facts = case, 1.0, {"planned MB": 2.0}

    def ready(self, deadline: float | None) -> measure.Sample:
        if len(self.made) >= self.stop_after:
            raise RuntimeError(gpu_run.NO_TIME)
        self.made.append(self.case.side)
        self.work = make(self.case)
        return self.sample()

    def sample(self) -> measure.Sample:
        return measure.sample(self.work)

    def close(self) -> None: ...


def test_a_call_writes_each_row_and_the_next_goes_on(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_run, "Worker", Here)
    monkeypatch.setattr(gpu_run, "find_spec", lambda module: None if module == "peft" else object())
    outcome = {"failed": ["FAILED tests/x.py"], "said": ["1 failed"]}
    monkeypatch.setattr(gpu_run, "tests", lambda seconds, words: outcome)
    call = ["--small", "--output", str(tmp_path), "--only"]
    monkeypatch.setattr(Here, "made", [])
    monkeypatch.setattr(Here, "stop_after", 1)
    assert gpu_run.main([*call, "gpu_text"]) == 75
    said = capsys.readouterr().out
    assert "missing: peft: rows" in said and "left: gpu_text; the same command goes on" in said
    monkeypatch.setattr(Here, "stop_after", 99)
    assert gpu_run.main([*call, "gpu_text"]) == 0
    assert Here.made == ["transformers", "ours"]  # each once
    written = json.loads((tmp_path / "gpu.json").read_text())["gpu_text"]
    assert [row["label"] for row in written["rows"]] == ["transformers", "ours"]
    assert written["rows"][0]["ratio"] == 1 and written["code"]
    assert gpu_run.main([*call, "tests,gpu_text"]) == 1  # a test failed
    assert gpu_run.main([*call, "gpu_text", "--again"]) == 0 and len(Here.made) == 4
    with pytest.raises(SystemExit):
        gpu_run.main(["--only", "gpu_tex", "--small"])


def test_the_tests_of_a_call_end_with_its_time() -> None:
    found = gpu_run.tests(1.0, ["tests/unit/test_benchmarks.py", "-k", "nothing_of_the_kind"])
    assert found["failed"] == [] and ("cut" in found or found["said"])


def test_a_missing_base_leaves_the_first_row_as_one() -> None:
    table = gpu(True, "cpu", TINY)[0]
    rows = [{"label": "diffusers", "left_out": "no such module"}]
    rows += [{"label": name, "median": m, "cpu": m} for name, m in (("ours", 2.0), ("ours compiled", 1.0))]
    assert [row.get("ratio") for row in run.rated(table, rows, 1)["rows"]] == [None, 1.0, 0.5]


def test_tables_name_known_kinds() -> None:
    for table in (*cpu(False, compiled=True), *gpu(False)):
        assert {case.kind for case in table.rows.values()} <= set(KINDS)
        assert table.base in table.rows and set(table.ours) <= set(table.rows)


def test_disturbed_samples_do_not_count() -> None:
    taken = [measure.Sample(*one) for one in ((1.0, 2.0, True), (9.0, 2.5, False), (1.2, 2.2, True))]
    assert measure.timing(taken) == measure.Timing(1.1, 1.0, 1.2, 2.2, 2, 1)
    assert measure.timing(taken[1:2]).kept == 0


def test_variants_take_turns() -> None:
    order: list[str] = []

    def take(name: str):
        def sample() -> measure.Sample:
            order.append(name)
            return measure.Sample(1.0, 1.0, True)

        return sample

    measure.compare({"a": take("a"), "b": take("b")}, rounds=3)
    assert order[-6:] == ["a", "b", "b", "a", "a", "b"]


def test_the_gpu_suite_refuses_a_machine_without_one(monkeypatch, capsys) -> None:
    monkeypatch.setattr(run, "_has_gpu", lambda: False)
    with pytest.raises(SystemExit):
        run.main(["--suite", "gpu"])
    assert "needs a GPU" in capsys.readouterr().err


def test_tables_of_result_files_go_between_their_marks(tmp_path: Path, monkeypatch) -> None:
    row = {
        "label": "ours", "median": 0.5, "low": 0.4, "high": 0.6, "kept": 5, "disturbed": 2, "ratio": 0.75,
        "peak_mb": 321.0, "cpu": 0.9, "cpu_ratio": 0.7,
    }  # fmt: skip
    table = {
        "title": "a step", "base": "x", "threads": 2, "rows": [row], "command": "python benchmarks/run.py",
        "versions": {"torch": "2"}, "written": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    (tmp_path / "m").mkdir()
    content = {"machine": "M", "device": "cpu", "tables": {"step": table}}
    (tmp_path / "m" / "performance.json").write_text(json.dumps(content))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table step -->\nold\n<!-- end -->\nafter\n<!-- table other -->\n<!-- end -->\n"
    )
    run.update_page(page)
    text = page.read_text()
    assert "| ours | 500 | 400 to 600 | 0.75 | 900 | 0.70 | 321 | 5 of 7 |" in text and "old" not in text
    assert text.startswith("before\n<!-- table step -->\n") and text.endswith(
        "<!-- end -->\nafter\n<!-- table other -->\n<!-- end -->\n"
    )
