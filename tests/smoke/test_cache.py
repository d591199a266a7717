"""Caches, buckets and weighted sources through the commands: the same training, with less to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.background import Runs
from tests.tolerances import EXACT, F32
from tests.training import rows


class Ran(NamedTuple):
    """The folder of all runs, and how each ended."""

    folder: Path
    ends: dict[str, dict[str, object]]

    def good(self, name: str) -> str:
        """What a run that ended well said."""
        end = self.ends[name]
        assert end["code"] == 0, end["err"]
        return str(end["out"]) + str(end["err"])

    def losses(self, name: str) -> list[float]:
        """Of each step, and the last validation."""
        self.good(name)
        found = rows(self.folder / name)
        return [row["loss"] for row in found if "lr" in row] + [
            row["validation/loss"] for row in found if "validation/loss" in row
        ]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Of the last step."""
        return load_file(
            self.folder / name / "checkpoints" / "step_00000004" / "native" / "model.safetensors"
        )


RUNS = Runs("tests.smoke.cache_runs", spiece=True)


@pytest.fixture(scope="module")
def ran() -> Ran:
    folder = RUNS()
    return Ran(folder, json.loads((folder / "ends.json").read_text()))


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_prepare_counts_fills_and_finds_all_there(ran) -> None:
    check = ran.ends["check"]
    assert check["code"] == 1
    assert "15 latents, 15 of them to make; 15 text embeddings, 15 of them to make" in str(check["out"])
    assert "all are there now" in ran.good("fill")
    assert "training will not load: first_stage, text" in ran.good("fill")
    assert "15 latents, 0 of them to make; 15 text embeddings, 0 of them to make" in ran.good("full")


def test_training_from_a_full_cache_is_the_same_and_loads_the_network_alone(ran) -> None:
    assert ran.ends["plain"]["loaded"] == ["text", "model", "first_stage"]
    assert "0 of them to make" in ran.good("cached")
    assert ran.ends["cached"]["loaded"] == ["model"]
    assert apart(ran.losses("cached"), ran.losses("plain")) <= F32


def test_readers_change_nothing(ran) -> None:
    assert apart(ran.losses("threads"), ran.losses("cached")) <= EXACT


def test_other_weights_are_another_cache_and_made_without_being_asked(ran) -> None:
    said = ran.good("other_weights")
    assert "15 latents, 15 of them to make; 15 text embeddings, 15 of them to make" in said
    assert ran.ends["other_weights"]["loaded"] == ["text", "first_stage", "model"]


def test_another_placement_makes_new_latents_and_keeps_the_embeddings(ran) -> None:
    assert "45 latents, 30 of them to make; 15 text embeddings, 0 of them" in ran.good("moving")
    assert ran.ends["moving"]["loaded"] == ["first_stage", "model"]


def test_pictures_on_the_way_have_their_prompts_encoded_once_and_need_no_text_encoder(ran) -> None:
    assert "17 text embeddings, 2 of them to make" in ran.good("sampling")
    assert "0 of them to make" in ran.good("sampling_again")
    assert ran.ends["sampling_again"]["loaded"] == ["model", "first_stage"]
    ran.good("sampling_plain")
    assert ran.ends["sampling_plain"]["loaded"] == ["text", "model", "first_stage"]
    ours, plain = (
        np.asarray(Image.open(ran.folder / name / "samples" / "step_00000004" / "00_a_dog.png"), dtype=int)
        for name in ("sampling_again", "sampling_plain")
    )
    assert abs(ours - plain).max() <= 1  # of 255: the cache encodes several prompts at a time
    assert plain.std() > 5


def test_a_first_stage_trains_without_a_cache(ran) -> None:
    assert "FirstStageObjective runs every part itself, so nothing is cached" in ran.good("vae")


def test_a_learning_text_encoder_is_loaded_and_the_first_stage_is_not(ran) -> None:
    assert "15 latents, 0 of them to make; 0 text embeddings" in ran.good("text")
    assert ran.ends["text"]["loaded"] == ["text", "model"]


def test_relay_trains_from_a_cache_of_low_resolution_latents(ran) -> None:
    assert "15 latents, 15 of them to make" in ran.good("relay_cached")
    assert apart(ran.losses("relay_cached"), ran.losses("relay")) <= F32


def test_buckets_train_from_a_cache_as_without(ran) -> None:
    assert "15 images in 3 buckets" in ran.good("buckets")
    assert apart(ran.losses("buckets_cached"), ran.losses("buckets")) <= F32


def test_a_run_over_buckets_resumes_to_the_bit(ran) -> None:
    assert "at step 2 of 4" in ran.good("buckets_rest")
    one, two = ran.weights("buckets_half"), ran.weights("buckets_cached")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_sources_can_be_weighted(ran) -> None:
    assert "30 images an epoch" in ran.good("weights")


def test_adapters_are_trained_from_a_cache_and_embeddings_know_theirs(ran) -> None:
    ran.good("lora")
    assert ran.ends["lora"]["loaded"] == ["model"]
    assert "15 latents, 0 of them to make; 15 text embeddings, 15 of them to make" in ran.good("adapted")
    assert ran.ends["adapted"]["loaded"] == ["text", "model"]
    ran.good("adapted_again")
    assert ran.ends["adapted_again"]["loaded"] == ["model"]


def test_pruning_leaves_one_cache(ran) -> None:
    assert "files deleted that this config does not use" in ran.good("pruned")
    left = sorted(path.name.partition("-")[0] for path in (ran.folder / "cache").iterdir())
    assert left == ["latents", "text"]
    assert len(list((ran.folder / "cache").glob("latents-*/*/*.safetensors"))) == 15


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "no folder for the cache: give --cache DIR or data.cache=DIR"),
     ("no_train", "the config has no `train` and `data` section")],
)  # fmt: skip
def test_what_prepare_cache_needs_is_told(ran, name, words) -> None:
    assert ran.ends[name]["code"] == 2
    assert words in str(ran.ends[name]["err"])


def test_inspect_reads_a_config_and_prints_its_buckets(ran) -> None:
    said = ran.good("inspected")
    assert "3 buckets, 30 images, batches of 4" in said
    assert "48 x 64   1.33        6   20.0%              1.50" in said
    assert "identical files: 15 more than needed" not in said  # the validation source is the same one
