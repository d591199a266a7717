"""An engine without some of its parts: it trains on what caches hold, and says what it lacks."""

from __future__ import annotations

import pytest
import torch

from sat.checkpoint.format import PARTS
from sat.checkpoint.formats import part_digest
from sat.checkpoint.save import save_native
from sat.config.build import MissingPartError, build_engine
from sat.config.load import load
from sat.data.batch import Batch
from sat.diffusion.process import Process
from sat.mixins.relay import RelayNoise
from sat.train.objectives.diffusion import DiffusionObjective
from sat.train.objectives.distillation import Distillation
from sat.train.objectives.first_stage import FirstStageObjective
from tests.checkpoints import tokenizer
from tests.configs import DEBUG
from tests.small import fill
from tests.tolerances import EXACT


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    spiece = tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")
    return load([DEBUG], [f"conditioning.tokenizer={spiece}"])


def engine(experiment, *without):
    made = build_engine(experiment, device="cpu", dtype=torch.float32, without=without)
    fill(made.network)
    return made


def batch(**tensors) -> Batch:
    size = torch.tensor([[48, 64]]).expand(2, 2)
    return Batch(["a red apple", "the sun"], size, torch.zeros_like(size), size, **tensors)


IMAGE = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_a_loss_from_caches_is_that_from_images_and_captions(experiment):
    whole, lean = engine(experiment), engine(experiment, "first_stage", "text")
    full = batch(image=IMAGE)
    with torch.no_grad():
        moments = whole.first_stage.encode(IMAGE).moments
        text = whole.conditioner.encode_batch(full.caption).text
    cached = batch(latent_moments=moments, text=text)
    losses = [
        DiffusionObjective(engine=made)(one, torch.Generator().manual_seed(0))["loss"]
        for made, one in ((whole, full), (lean, cached))
    ]
    assert abs(losses[0] - losses[1]) <= EXACT


def test_parts_left_out_have_no_weights_and_say_so_when_called(experiment):
    lean = engine(experiment, "first_stage", "text")
    assert {name.split(".")[0] for name, _ in lean.named_parameters()} == {"network"}
    whole = engine(experiment)
    assert lean.latent_shape(48, 64) == whole.latent_shape(48, 64)
    assert lean.first_stage.scale_factor == whole.first_stage.scale_factor
    for call in (
        lambda: lean.first_stage.encode(IMAGE),
        lambda: lean.decode(torch.zeros(1, 4, 6, 8)),
        lambda: lean.conditioner.encode(["x"]),
    ):
        with pytest.raises(MissingPartError, match=r"was not loaded, because a cache \(data\.cache\)"):
            call()
    shell = engine(experiment, *PARTS)
    with pytest.raises(MissingPartError, match="the network was not loaded"):
        shell.network.prepare(None, (6, 8))
    assert not list(shell.parameters())


def test_the_others_weights_do_not_change_when_a_part_is_left_out(experiment):
    whole = build_engine(experiment, device="cpu", dtype=torch.float32).network.state_dict()
    lean = build_engine(experiment, device="cpu", dtype=torch.float32, without=("text",)).network.state_dict()
    assert all(torch.equal(whole[name], lean[name]) for name in whole)


def test_a_learning_text_encoder_takes_no_cached_embeddings(experiment):
    objective = DiffusionObjective(train_text=True, engine=engine(experiment))
    with pytest.raises(ValueError, match="cannot be cached"):
        objective(batch(image=IMAGE, text=torch.zeros(2, 8, 24)), torch.Generator())


def test_objectives_say_which_parts_they_run():
    assert DiffusionObjective.needs({}) == {"model"}
    assert DiffusionObjective.needs({"train_text": True}) == {"model", "text"}
    assert Distillation.needs({}) == {"model"}
    assert FirstStageObjective.needs({}) == set(PARTS)


def test_a_degradation_is_told_from_others_by_its_name(experiment):
    plain = engine(experiment)
    assert DiffusionObjective.degradation({}, plain) is None
    plain.process = Process({"relay": RelayNoise()})
    names = {
        DiffusionObjective.degradation(params, plain).name for params in ({}, {"low_from": "first_stage"})
    }
    assert len(names) == 2
    made = DiffusionObjective.degradation({"low_from": "first_stage"}, plain).apply(IMAGE)
    assert torch.equal(made, DiffusionObjective(low_from="first_stage", engine=plain).degrade()(IMAGE))


def test_a_part_digest_is_of_that_part_alone(tmp_path):
    tensors = {"a": torch.arange(70000.0), "b": torch.zeros(3, dtype=torch.bfloat16)}
    one, two = tmp_path / "one", tmp_path / "two"
    save_native(one, {"first_stage": tensors, "text": {"x": torch.zeros(1)}}, {})
    save_native(two, {"first_stage": tensors, "text": {"x": torch.ones(1)}}, {})
    assert part_digest(one, "first_stage") == part_digest(two, "first_stage")
    assert part_digest(one, "text") != part_digest(two, "text")
    other = tmp_path / "other"
    save_native(other, {"first_stage": tensors | {"a": tensors["a"] + 1}}, {})
    assert part_digest(one, "first_stage") != part_digest(other, "first_stage")
