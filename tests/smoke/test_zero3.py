"""ZeRO 3 trains every objective and family as ZeRO 0 does: what is exported, held-out losses, samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sat.train.resume import RunFolder
from tests.background import Runs
from tests.smoke.zero3_runs import CASES
from tests.tolerances import F32
from tests.training import rows

RUNS = Runs("tests.smoke.zero3_runs", spiece=True)


@pytest.fixture(scope="module")
def ran() -> Path:
    folder = RUNS()
    ends: dict[str, Any] = json.loads((folder / "ends.json").read_text())
    for name, end in ends.items():
        assert end["code"] == 0, f"{name}: {end['err']}"
    return folder


def checkpoints(run: Path) -> list[Path]:
    """Of the run, or of its rounds."""
    found = [saved.path for root in (run, *sorted(run.iterdir())) for saved in RunFolder(root).saved()]
    assert found
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_is_that_of_zero_0(ran: Path, case: str) -> None:
    pairs = zip(checkpoints(ran / f"{case}_0"), checkpoints(ran / f"{case}_3"), strict=True)
    for plain, sharded in pairs:
        for file in (plain / "native").glob("*.safetensors"):
            wanted, got = load_file(file), load_file(sharded / "native" / file.name)
            assert wanted.keys() == got.keys()
            for name, tensor in wanted.items():
                assert tensor.shape == got[name].shape
                assert (tensor - got[name]).abs().max() <= F32, f"{file.name} {name}"


@pytest.mark.parametrize("case", [case for case in CASES if case != "distilled"])
def test_losses_and_held_out_losses_are_those_of_zero_0(ran: Path, case: str) -> None:
    timed = ("second", "data_wait", "memory")
    for one, other in zip(rows(ran / f"{case}_0"), rows(ran / f"{case}_3"), strict=True):
        told = {k: v for k, v in one.items() if not any(word in k for word in timed)}
        assert {k: other[k] for k in told} == pytest.approx(told, rel=1e-4, abs=1e-6)


def test_the_fixed_prompts_are_drawn_alike(ran: Path) -> None:
    from PIL import Image

    for name in ("00_red_apple.png", "01_a_dog.png"):
        pictures = []
        for zero in (0, 3):
            with Image.open(ran / f"plus_{zero}" / "samples" / "step_00000003" / name) as image:
                pictures.append(list(image.convert("RGB").tobytes()))
        assert max(abs(a - b) for a, b in zip(*pictures, strict=True)) <= 1


def test_the_toys_weights_were_shared_out(ran: Path) -> None:
    """Were they all below the threshold, the cases above would prove nothing."""
    file = checkpoints(ran / "plus_3")[0] / "state" / "shard_000_00000.safetensors"
    sizes = [value.numel() for name, value in load_file(file).items() if name.startswith("weight/")]
    assert sum(size > 9 for size in sizes) > len(sizes) / 2
