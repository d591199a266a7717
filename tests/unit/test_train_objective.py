"""The diffusion objective: what it trains, what captions and noise do to its loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sat.config.build import build_engine
from sat.data.batch import Batch
from sat.engine import DiffusionEngine
from sat.train.objectives.diffusion import DiffusionObjective
from tests.checkpoints import tokenizer
from tests.configs import DEBUG
from tests.small import fill


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


@pytest.fixture
def engine(spiece) -> DiffusionEngine:
    from sat.config.load import load

    made = build_engine(
        load([DEBUG], [f"conditioning.tokenizer={spiece}"]), device="cpu", dtype=torch.float32
    )
    fill(made.network)
    return made


def batch(captions: tuple[str, ...] = ("a red apple", "the sun", "a dog")) -> Batch:
    count = len(captions)
    size = torch.tensor([[48, 64]]).expand(count, 2)
    image = torch.rand(count, 3, 48, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return Batch(list(captions), size, torch.zeros_like(size), size, image=image)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_only_the_network_learns(engine) -> None:
    objective = DiffusionObjective(engine=engine)
    objective(batch(), seeded())["loss"].backward()
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"network"}
    assert all(p.grad is not None for p in engine.network.parameters() if p.requires_grad)
    assert not any(
        p.requires_grad for p in [*engine.conditioner.parameters(), *engine.first_stage.parameters()]
    )
    assert list(objective.parts()) == ["model"]


def test_the_text_encoder_learns_when_asked_to(engine) -> None:
    objective = DiffusionObjective(train_text=True, caption_dropout=0.0, engine=engine)
    objective(batch(), seeded())["loss"].backward()
    assert list(objective.parts()) == ["model", "text"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in engine.conditioner.text.parameters())


def test_one_generator_state_is_one_loss(engine) -> None:
    objective = DiffusionObjective(engine=engine)
    first = objective(batch(), seeded(1))["loss"]
    torch.rand(5)
    assert torch.equal(objective(batch(), seeded(1))["loss"], first)
    assert not torch.equal(objective(batch(), seeded(2))["loss"], first)


def test_dropped_captions_are_zeros(engine) -> None:
    dropped = DiffusionObjective(caption_dropout=1.0, engine=engine)
    ours = dropped(batch(), seeded())["loss"]
    assert torch.equal(dropped(batch(("x", "y", "z")), seeded())["loss"], ours)
    kept = DiffusionObjective(caption_dropout=0.0, engine=engine)
    assert not torch.equal(kept(batch(), seeded())["loss"], kept(batch(("x", "y", "z")), seeded())["loss"])


def test_cached_moments_give_the_loss_of_their_images(engine) -> None:
    objective = DiffusionObjective(engine=engine)
    images = batch()
    assert images.image is not None
    with torch.no_grad():
        cached = replace(images, image=None, latent_moments=engine.first_stage.encode(images.image).moments)
    assert torch.equal(objective(cached, seeded())["loss"], objective(images, seeded())["loss"])


def test_validation_scores_every_level_with_right_and_shuffled_captions(engine) -> None:
    objective = DiffusionObjective(levels=(0.2, 0.8), engine=engine)
    with torch.no_grad():
        scores = objective.evaluate(batch(), seeded())
        again = objective.evaluate(batch(), seeded())
        alike = objective.evaluate(batch(("a dog", "a dog", "a dog")), seeded())
    assert set(scores) == {"loss", "loss_200", "loss_800", "shuffled", "shuffled_200", "shuffled_800"}
    assert scores == again
    assert scores["loss"] == (scores["loss_200"] + scores["loss_800"]) / 2
    assert scores["loss_200"] != scores["shuffled_200"]
    torch.testing.assert_close(alike["loss_200"], alike["shuffled_200"], rtol=1e-5, atol=0)


def test_a_batch_of_nothing_is_refused(engine) -> None:
    with pytest.raises(ValueError, match="neither images nor latent moments"):
        DiffusionObjective(engine=engine)(replace(batch(), image=None), seeded())


@pytest.mark.parametrize(("options", "words"), [
    ({"caption_dropout": 1.5}, "caption_dropout is 1.5: expected a share of 0 to 1"),
    ({"levels": (0.5, 1.0)}, r"levels \[1.0\] of validation"),
])  # fmt: skip
def test_impossible_shares_are_refused(engine, options, words) -> None:
    with pytest.raises(ValueError, match=words):
        DiffusionObjective(**options, engine=engine)
