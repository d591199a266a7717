"""Factors on 2 gloo processes: trained under ZeRO as on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.background import Runs
from tests.distributed.lora_ranks import STAGES
from tests.tolerances import BF16, F32

RUNS = Runs("tests.distributed.lora_ranks")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    folder = RUNS()
    found: dict[str, Any] = torch.load(folder / "results.pt", weights_only=False)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_the_factors_of_one(results: dict[str, Any], stage: str) -> None:
    (single,) = results["single"]
    for end in results[stage]:
        assert end["code"] == 0, end.get("error")
        value, wanted = end["value"], single["value"]
        assert value["trained"] == wanted["trained"]
        assert all(".factors." in name for name in value["trained"])
        for name in value["trained"]:
            close = BF16 if stage == "bf16" else F32
            assert (value["weights"][name] - wanted["weights"][name]).abs().max() < close, name


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_frozen_stays_what_it_was(results: dict[str, Any], stage: str) -> None:
    for end in results[stage]:
        for name, before in end["value"]["frozen"].items():
            after = end["value"]["weights"][name]
            assert torch.equal(after, before.to(torch.bfloat16).float() if stage == "bf16" else before), name
        moved = [n for n in end["value"]["trained"] if ".up." in n and end["value"]["weights"][n].any()]
        assert len(moved) == 2
