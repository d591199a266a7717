"""The small models that ship: what they draw is what was asked for, and they stay small."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat import CascadePipeline, Pipeline
from sat.apps.evaluate.classifier import Classifier, score
from tests.configs import ROOT

WEIGHTS = ROOT / "checkpoints"
PROMPTS = ["red apple", "lion", "rocket", "star"]


@pytest.mark.parametrize("config", ["tiny_cascade.yaml", "tiny_cascade_distill.yaml"])
def test_the_classifier_finds_in_the_cascades_pictures_what_was_asked_for(config: str) -> None:
    draw = CascadePipeline.from_config(ROOT / "configs" / config, device="cpu", keep_loaded=True)
    out = draw(PROMPTS, seed=0)
    assert {image.size for image in out.images} == {(128, 128)}
    found = score(out.images, PROMPTS, Classifier.load(WEIGHTS / "tiny_classifier"))
    assert not found.unknown and found.top1 >= 3 / 4, found.as_dict()


def test_the_classifier_finds_in_cogview4s_pictures_what_was_asked_for() -> None:
    """Its network and causal text encoder, with the autoencoder and the vocabulary of the small Plus."""
    draw = Pipeline.from_config(ROOT / "configs" / "tiny_cogview4.yaml", device="cpu")
    out = draw(PROMPTS, seed=0, steps=12)
    found = score(out.images, PROMPTS, Classifier.load(WEIGHTS / "tiny_classifier"))
    assert not found.unknown and found.top1 >= 3 / 4, found.as_dict()


def size(*folders: Path) -> int:
    """Bytes of all files in ``folders``."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def test_weights_that_ship_stay_small() -> None:
    assert size(WEIGHTS) < 48e6
    assert size(WEIGHTS / "tiny_cogview4") < 5e6
