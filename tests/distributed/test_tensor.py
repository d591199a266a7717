"""Models split over tensor ranks by their plans: the numbers of whole ones, and training as one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.background import Runs
from tests.distributed.tensor_ranks import GOLDEN
from tests.tolerances import BF16, F32

SPLIT = {"plus": 16, "unet": 40, "t5": 11, "cogview4": 16, "glm": 16}  # tensors
MODELS = tuple(SPLIT)


RUNS = Runs("tests.distributed.tensor_ranks")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    folder = RUNS()
    found: dict[str, Any] = torch.load(folder / "results.pt", weights_only=False)
    return {**found, "folder": folder}


def values(results: dict[str, Any], case: str) -> list[Any]:
    """What every rank found."""
    for end in results[case]:
        assert end["code"] == 0, end.get("error")
    return [end["value"] for end in results[case]]


@pytest.mark.parametrize(("model", "size"), [*((model, 2) for model in MODELS), ("plus", 4)])
def test_a_split_model_is_the_whole_one(results: dict[str, Any], model: str, size: int) -> None:
    """Output and every gradient, in float64."""
    for value in values(results, f"models {size}"):
        assert value[model]["output"] < 1e-13
        assert max(value[model]["gradients"].values()) < 1e-12
        assert len(value[model]["split"]) == SPLIT[model]


def test_gathered_outputs_of_fused_projections_are_in_order(results: dict[str, Any]) -> None:
    for value in values(results, "models 2"):
        assert value["fused"] < 1e-14


def test_ranks_agree_on_the_output_bit_for_bit(results: dict[str, Any]) -> None:
    for first, *others in (values(results, "models 2"), values(results, "models 4")):
        for other in others:
            for model in other.keys() & set(MODELS):
                assert torch.equal(first[model]["out"], other[model]["out"])


@pytest.mark.parametrize("file", ("whole.safetensors", "whole.pt"))
def test_a_rank_reads_its_share_of_a_whole_file(results: dict[str, Any], file: str) -> None:
    assert all(value[file] for value in values(results, "read"))


@pytest.mark.parametrize("dora", (False, True))
def test_factors_on_a_split_model_are_those_on_the_whole_one(results: dict[str, Any], dora: bool) -> None:
    """Output, gradients, what is read back, what is merged, and with dropout too."""
    for value in values(results, f"adapters {dora}"):
        assert value["output"] < 1e-13
        assert max(value["gradients"].values()) < 1e-12
        assert sum(".factors." in name for name in value["gradients"]) == (41 if dora else 30)
        assert sum(".factors." in name for name in value["split"]) == (20 if dora else 14)
        assert value["extracted"] == 0
        assert value.get("magnitudes", 0) < 1e-15
        assert value["merged"] < 1e-13
        assert value["dropped"]["output"] < 1e-13
        assert max(value["dropped"]["gradients"].values()) < 1e-12
        assert value["calm"] > 0.01  # the dropout did something


def test_kronecker_factors_on_a_split_model_are_those_on_the_whole_one(results: dict[str, Any]) -> None:
    """w1 is split under columns and rows alike; w2 is whole, and its gradients are those of one process."""
    for value in values(results, "adapters lokr"):
        assert value["output"] < 1e-13
        assert max(value["gradients"].values()) < 1e-12
        assert any(name.endswith(".w1") for name in value["split"])
        assert not any(name.endswith((".a", ".b")) for name in value["split"])
        assert value["extracted"] == 0
        assert value["merged"] < 1e-13
        assert value["dropped"]["output"] < 1e-13
        assert max(value["dropped"]["gradients"].values()) < 1e-12


def test_half_precision_has_the_types_of_a_whole_model(results: dict[str, Any]) -> None:
    for value in values(results, "halves"):
        for case in value.values():
            assert case["types"]
            assert case["same"]
            assert case["far"] < BF16


def test_shares_may_wait_in_host_memory(results: dict[str, Any]) -> None:
    assert values(results, "offloaded") == [True, True]


def test_a_split_model_is_the_official_one(results: dict[str, Any]) -> None:
    for value in values(results, "official"):
        assert value == {name: [] for name in GOLDEN}


LAYOUTS = [
    *(("sft", layout) for layout in ("2x2", "zero0", "zero2", "zero3", "joined", "split", "replanned")),
    *(("lora", layout) for layout in ("2x2", "zero2", "zero3", "joined")),
    *(("lokr", layout) for layout in ("zero2", "zero3")),
]
"""``joined`` and ``split`` go on at step 5 from a checkpoint of 2 tensor ranks on 1, and the other way;
``replanned`` on as many, by a plan that leaves adaLN whole."""


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_ten_steps_are_those_of_one_process(results: dict[str, Any], kind: str, layout: str) -> None:
    """With clipping, averages and, of factors, dropout; also when resumed on other tensor ranks."""
    (one,) = values(results, f"{kind}/one")
    found = values(results, f"{kind}/{layout}")
    assert all(norm > 0.02 for norm in one["norms"])  # the clip acted
    assert found[0]["norms"][-2:] == pytest.approx(one["norms"][-2:], rel=1e-4)
    assert layout in ("joined", "split", "replanned") or found[0]["norms"] == pytest.approx(
        one["norms"], rel=1e-4
    )
    for row, norm in zip(found[0]["by_group"], found[0]["norms"], strict=True):  # the one group is the model
        assert row == {"grad_norm/model": pytest.approx(norm, rel=1e-4)}
    for value in found:
        for what in ("weights", "averages"):
            assert value[what].keys() == one[what].keys()
            for name, wanted in one[what].items():
                assert (value[what][name] - wanted).abs().max() < F32, (what, name)
    moved = [
        name for name, value in one["weights"].items() if (value - one["averages"][name]).abs().max() > F32
    ]
    assert len(moved) == len(one["weights"])


@pytest.mark.parametrize(("kind", "layout"), [("sft", "zero0"), ("sft", "2x2"), ("lora", "zero2")])
def test_what_every_rank_holds_stays_the_same_on_all(results: dict[str, Any], kind: str, layout: str) -> None:
    first, *others = (value["replicated"] for value in values(results, f"{kind}/{layout}"))
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("kind", "layout"), [("sft", "zero2"), ("sft", "zero3"), ("lora", "zero2"), ("lokr", "zero2")]
)
def test_what_is_exported_is_whole(results: dict[str, Any], kind: str, layout: str) -> None:
    one, other = (
        results["folder"] / f"{kind}/{name}/run/checkpoints/step_00000010/native" for name in ("one", layout)
    )
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files
    for file in files:
        wanted, found = load_file(one / file), load_file(other / file)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert (found[name] - value).abs().max() < F32, name
