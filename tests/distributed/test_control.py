"""Controls on 2 gloo processes: pictures of every layout are those of one rank, and so is training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.background import Runs
from tests.distributed.control_ranks import DESIGNS, DTYPES, LAYOUTS, MODELS, STRONG, TRAINED_HOW
from tests.tolerances import F32

RUNS = Runs("tests.distributed.control_ranks")
CASES = [(layout, model, dtype) for layout in LAYOUTS for model in MODELS for dtype in DTYPES]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    folder = RUNS()
    found: dict[str, Any] = torch.load(folder / "results.pt", weights_only=False)
    return found


def of_ranks(results: dict[str, Any], layout: str, model: str, dtype: str) -> list[dict[str, Any]]:
    for end in results[layout]:
        assert end["code"] == 0 and "value" in end, end.get("error")
    return [end["value"][model, dtype] for end in results[layout]]


@pytest.mark.parametrize(("layout", "model", "dtype"), CASES)
def test_strength_0_is_the_plain_model_to_the_bit(
    results: dict[str, Any], layout: str, model: str, dtype: str
) -> None:
    for found in of_ranks(results, layout, model, dtype):
        assert {name: one["off"] for name, one in found.items()} == dict.fromkeys(found, True)


@pytest.mark.parametrize(("layout", "model", "dtype"), CASES)
def test_an_untrained_control_is_the_plain_model_to_the_bit(
    results: dict[str, Any], layout: str, model: str, dtype: str
) -> None:
    for found in of_ranks(results, layout, model, dtype):
        apart = {name: one["apart"] for name, one in found.items()}
        assert all(apart[f"{design}_new"] == 0 for design in DESIGNS[model] if design != "reference")
        least = {design: 5e-4 if design in STRONG else 0.005 for design in DESIGNS[model]}
        assert all(apart[design] > least[design] for design in DESIGNS[model]), "trained ones do something"


@pytest.mark.parametrize(("layout", "model"), [(name, m) for name in list(LAYOUTS)[1:] for m in MODELS])
def test_every_layout_draws_the_picture_of_one_rank(results: dict[str, Any], layout: str, model: str) -> None:
    (wanted,) = of_ranks(results, "one", model, "fp32")
    for found in of_ranks(results, layout, model, "fp32"):
        for design in DESIGNS[model]:
            apart = (found[design]["steered"] - wanted[design]["steered"]).abs().max()
            assert apart < 100 * F32, design  # two steps of guidance 5 on values of a few units


@pytest.mark.parametrize(("design", "how"), [(d, how) for d in TRAINED_HOW for how in TRAINED_HOW[d]])
def test_a_control_trained_on_two_ranks_is_that_of_one(
    results: dict[str, Any], design: str, how: str
) -> None:
    (one,) = results[f"{design}/one"]
    wanted = one["value"]["moved"]
    assert wanted and all(".control." in name for name in wanted)
    largest = max(value.abs().max() for value in wanted.values())
    assert largest > (1e-5 if design in STRONG else 1e-3)
    for end in results[f"{design}/{how}"]:
        assert end["code"] == 0 and "value" in end, end.get("error")
        assert end["value"]["still"], "the base stays"
        assert end["value"]["moved"].keys() == wanted.keys()
        for name, value in end["value"]["moved"].items():
            assert (value - wanted[name]).abs().max() < 1e-3 * largest, name
