"""Checkpoints kept and runs ended by the held-out loss; rsLoRA's scale."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sat.config.schema import LoraConfig
from sat.config.schema.base import RuleError
from sat.train.checkpoints import HeldOut
from sat.train.resume import RunFolder
from tests.configs import ROOT, refused
from tests.training import CONFIG, changed
from tests.unit.test_train_resume import save


def test_the_first_lowest_finite_loss_is_the_best(tmp_path: Path) -> None:
    held_out, lowest = HeldOut(tmp_path), []
    for step, loss in enumerate((math.nan, 3.0, 2.0, 2.0, math.nan, 2.5), 1):
        lowest.append(held_out.add(step, loss, write=True))
    assert lowest == [False, True, True, False, False, False]
    assert (held_out.best, held_out.since) == (3, 3)
    again = HeldOut(tmp_path)
    again.resume(2, main=True)
    assert (again.best, again.since) == (2, 0)
    assert HeldOut(tmp_path / "none").best is None


def test_spared_checkpoints_outlive_the_newest(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(1, 8):
        save(folder, step)
    folder.prune(2, lambda step: step % 3 == 0)
    assert [saved.step for saved in folder.saved()] == [3, 6, 7]
    folder.prune(1)
    assert [saved.step for saved in folder.saved()] == [7]


@pytest.mark.parametrize("key", ["keep_best", "patience"])
def test_what_goes_by_the_held_out_loss_needs_one(key: str) -> None:
    with pytest.raises(RuleError, match=f"{key}: goes by the held-out loss: set `validate_every`"):
        changed(CONFIG, **{key: 3 if key == "patience" else True})
    files = [ROOT / "configs" / "tiny.yaml", ROOT / "configs" / "tiny_train.yaml"]
    told = refused(files, [f"train.{key}={3 if key == 'patience' else 'true'}", "train.validate_every=5",
                           "data.validation=[]"])  # fmt: skip
    assert any(f"train.{key}: goes by the held-out loss, and there are no" in line for line in told)


def test_rank_stabilised_alpha_gives_alpha_over_the_root_of_the_rank() -> None:
    rs, plain = LoraConfig(rank=4, alpha=6.0, rslora=True), LoraConfig(rank=4, alpha=6.0)
    for rank in (2, 4, 9):
        assert rs.effective_alpha(rank) / rank == pytest.approx(6 / math.sqrt(rank))
        assert plain.effective_alpha(rank) / rank == 1.5
    with pytest.raises(RuleError, match="so say alpha; got null"):
        LoraConfig(rslora=True)
