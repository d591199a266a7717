"""The run folder: whole and torn checkpoints, pruning, and refusing what does not fit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from sat.train.resume import MARKER, Progress, ResumeError, RunFolder

PROGRESS = Progress(
    step=3, skipped=1, images=36, seconds=1.5, loader={"position": 36}, world=2, zero=1, dtype="fp32",
    parameters={"net.weight": [3, 4]},
)  # fmt: skip


def save(folder: RunFolder, step: int, *, commit: bool = True) -> Path:
    path = folder.begin(step)
    (path / "state").mkdir()
    (path / "state" / "weights.pt").write_bytes(b"0123456789")
    if commit:
        folder.commit(path, replace(PROGRESS, step=step))
    return path


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_committed_checkpoint_is_found_with_its_counters(folder) -> None:
    save(folder, 3)
    (saved,) = folder.saved()
    assert saved.progress() == PROGRESS


def test_checkpoints_come_in_order_of_steps(folder) -> None:
    for step in (9, 100, 20):
        save(folder, step)
    assert [saved.step for saved in folder.saved()] == [9, 20, 100]


def _without_marker(path: Path) -> None:
    (path / MARKER).unlink()


def _cut(path: Path) -> None:
    (path / "state" / "weights.pt").write_bytes(b"01234")


def _missing(path: Path) -> None:
    (path / "state" / "weights.pt").unlink()


def _half_marker(path: Path) -> None:
    (path / MARKER).write_text((path / MARKER).read_text()[:40])


@pytest.mark.parametrize(("damage", "reason"), [
    (_without_marker, "no COMPLETE file"), (_cut, "state/weights.pt has 5 bytes instead of 10"),
    (_missing, "state/weights.pt is missing"), (_half_marker, "COMPLETE file is not readable"),
])  # fmt: skip
def test_a_torn_checkpoint_is_named_and_passed_over(folder, caplog, damage, reason) -> None:
    save(folder, 3)
    damage(save(folder, 6))
    with caplog.at_level(logging.WARNING):
        assert [saved.step for saved in folder.saved()] == [3]
    assert "step_00000006 is torn" in caplog.text
    assert reason in caplog.text


def test_other_folders_are_let_alone(folder) -> None:
    (folder.checkpoints / "best").mkdir(parents=True)
    (folder.checkpoints / "step_12.bak").mkdir()
    save(folder, 3)
    folder.prune(1)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "best",
        "step_00000003",
        "step_12.bak",
    ]


def test_writing_a_step_again_starts_from_an_empty_folder(folder) -> None:
    path = save(folder, 3)
    (path / "state" / "rank_7.pt").write_bytes(b"old")
    save(folder, 3)
    assert [file.name for file in (path / "state").iterdir()] == ["weights.pt"]


def test_pruning_keeps_the_newest_whole_ones_and_drops_older_torn_ones(folder) -> None:
    for step in (1, 2, 3, 4):
        save(folder, step, commit=step != 2)
    save(folder, 5, commit=False)  # being written
    folder.prune(2)
    assert [path.name[-1] for path in sorted(folder.checkpoints.iterdir())] == ["3", "4", "5"]


def test_an_empty_run_folder_has_no_checkpoints(folder) -> None:
    assert folder.saved() == []


@pytest.mark.parametrize(("change", "words"), [
    ({"world": 4}, "number of processes 2, this run has 4: use 2 to resume"),
    ({"zero": 0}, "train.zero 1, this run has 0"),
    ({"dtype": "bf16"}, "train.dtype fp32, this run has bf16"),
    ({"parameters": {"net.weight": [3, 5]}}, r"'net.weight': shape \[3, 4\] there, \[3, 5\] here"),
    ({"parameters": {}}, r"'net.weight': shape \[3, 4\] there, absent here"),
])  # fmt: skip
def test_a_run_laid_out_otherwise_is_refused(change, words) -> None:
    with pytest.raises(ResumeError, match=words):
        PROGRESS.check(replace(PROGRESS, **change), Path("step_00000003"))


def test_a_run_laid_out_alike_is_taken() -> None:
    PROGRESS.check(replace(PROGRESS, step=0, images=0), Path("step_00000003"))
