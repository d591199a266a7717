"""Students of few steps, by each method and with all roles, and of pairs, on 2 gloo processes as on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.background import Runs
from tests.distributed.few_step_ranks import LAYOUTS, METHODS

RUNS = Runs("tests.distributed.few_step_ranks")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = torch.load(RUNS() / "results.pt", weights_only=False)
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_student_and_critic_of_one(results: dict[str, Any], layout: str, method: str) -> None:
    """Weights of all roles, and losses, accuracy and gradient norm of each step."""
    (single,) = results["one"]
    assert single["code"] == 0, single.get("error")
    wanted = single["value"][method]
    for end in results[layout]:
        assert end["code"] == 0, end.get("error")
        moved = end["value"][method]["moved"]
        assert moved.keys() == wanted["moved"].keys()
        heads = {name for name in moved if name.startswith("discriminator.")}
        assert bool(heads) == (method == "gan")
        for names in (moved.keys() - heads, heads) if heads else (moved.keys(),):
            scale = max(float(wanted["moved"][n].abs().max()) for n in names)
            apart = max(float((moved[n] - wanted["moved"][n]).abs().max()) for n in names)
            assert scale > 1e-4 and apart < 2e-3 * scale, (scale, apart)
    ours = results[layout][0]["value"][method]["rows"]
    assert len(ours) == len(wanted["rows"])
    for row, other in zip(ours, wanted["rows"], strict=True):
        assert row.keys() == other.keys()
        for key in (
            "loss",
            "grad_norm",
            "student",
            "critic_accuracy",
            "tangent",
            "told_apart",
            "fooled",
        ):
            assert not other.get(key) or row[key] == pytest.approx(other[key], rel=2e-3, abs=1e-6), key
