"""The run folder: whole and torn checkpoints, pruning, and refusing what does not fit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from sat.checkpoint.verify import digest_file
from sat.train.resume import MARKER, Layout, Progress, ResumeError, RunFolder

PROGRESS = Progress(
    step=3, skipped=1, images=36, seconds=1.5, loader={"position": 36},
    layout=Layout(world=2, data=2, tensor=1, zero=1, batch_size=6, accumulate=1), dtype="fp32", cut=True,
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


FOUR = replace(PROGRESS.layout, world=4, data=4)


@pytest.mark.parametrize(("change", "words"), [
    ({"layout": FOUR}, "12 images a step .* 4 ranks make it 24: set train.batch_size=3 train.accumulate=1"),
    ({"layout": replace(FOUR, world=1, data=1)}, "make it 6: set train.accumulate=2 to go on alike"),
    ({"layout": replace(FOUR, world=5, data=5)}, "set train.batch_size and train.accumulate to what fits"),
    ({"parameters": {"net.weight": [3, 5]}}, r"'net.weight': shape \[3, 4\] there, \[3, 5\] here"),
    ({"parameters": {}}, r"'net.weight': shape \[3, 4\] there, absent here"),
])  # fmt: skip
def test_a_run_that_cannot_go_on_is_refused(change, words) -> None:
    with pytest.raises(ResumeError, match=words):
        PROGRESS.check(replace(PROGRESS, **change), Path("step_00000003"))


def test_other_groups_are_told_and_refused_where_the_state_cannot_be_cut() -> None:
    groups = [{"targets": ["text.*"], "lr": 1e-5, "weight_decay": None}]
    assert PROGRESS.check(replace(PROGRESS, groups=groups), Path("x")) == ["train.groups"]
    whole, raised = replace(PROGRESS, cut=False, groups=groups), [{**groups[0], "lr": 1.0}]
    assert whole.check(replace(whole, groups=raised), Path("x")) == ["train.groups"]
    with pytest.raises(ResumeError, match=r"had the targets \[\['text.*'\]\], now \[\], .* keep them"):
        whole.check(replace(whole, groups=[]), Path("x"))


def test_an_optimizer_that_cannot_be_cut_keeps_its_layout() -> None:
    whole = replace(PROGRESS, cut=False)
    other = replace(PROGRESS.layout, zero=2)
    with pytest.raises(
        ResumeError, match="zero 1 -> 2.*resume with 2 processes, parallel.tensor 1 and train.zero 1"
    ):
        whole.check(replace(PROGRESS, layout=other), Path("step_00000003"))
    assert whole.check(PROGRESS, Path("step_00000003")) == []


def test_what_is_laid_out_anew_is_said() -> None:
    assert PROGRESS.check(replace(PROGRESS, step=0, images=0), Path("step_00000003")) == []
    other = Layout(world=1, data=1, tensor=2, zero=3, batch_size=6, accumulate=4)
    now = replace(PROGRESS, layout=other, dtype="bf16")
    said = [
        "number of processes 2 -> 1",
        "parallel.tensor 1 -> 2",
        "train.zero 1 -> 3",
        "images a step 12 -> 24",
    ]
    assert PROGRESS.check(now, Path("step_00000003")) == [*said, "train.dtype fp32 -> bf16"]


def test_a_checkpoint_of_another_version_is_refused(folder) -> None:
    path = save(folder, 3)
    (path / MARKER).write_text((path / MARKER).read_text().replace('"format": 2', '"format": 1'))
    (saved,) = folder.saved()
    with pytest.raises(ResumeError, match="format 1, this one reads 2.*start a new run from its native"):
        saved.progress()


def test_a_flipped_bit_of_the_state_is_refused_by_name_on_every_rank(folder) -> None:
    path = save(folder, 3, commit=False)
    file = path / "state" / "weights.pt"
    folder.commit(path, PROGRESS, {"state/weights.pt": digest_file(file)})
    (saved,) = folder.saved()
    saved.verify(0, 1, lambda found: [found])
    file.write_bytes(b"0123456799")
    (saved,) = folder.saved()
    with pytest.raises(ResumeError, match=r"state/weights.pt: damaged.*delete .*step_00000003"):
        saved.verify(0, 1, lambda found: [found])
    saved.verify(1, 2, lambda found: [found])  # the other rank's share
    with pytest.raises(ResumeError, match="theirs"):
        saved.verify(1, 2, lambda found: ["theirs", found])


@pytest.mark.parametrize("change", [("36", "35"), ('"check"', '"chesk"'), ('"step": 3', '"step": 2')])
def test_a_changed_marker_is_torn(folder, change, caplog) -> None:
    path = save(folder, 3, commit=False)
    folder.commit(path, PROGRESS, {"state/weights.pt": digest_file(path / "state" / "weights.pt")})
    text = (path / MARKER).read_text()
    (path / MARKER).write_text(text.replace(*change, 1))
    assert folder.saved() == []
    assert "not what was written" in caplog.text


@pytest.mark.parametrize("content", ['{"files": {}, "format": 2}', '{"files": {}}', "[" * 100_000, "[]", "3"])
def test_a_marker_of_another_kind_is_one_line(folder, content) -> None:
    path = save(folder, 3)
    (path / MARKER).write_text(content)
    for saved in folder.saved():
        with pytest.raises(ResumeError):
            saved.progress()
