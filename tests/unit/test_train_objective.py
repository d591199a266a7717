"""The diffusion objective: what it trains, what captions and noise do to its loss."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import PIL.Image
import pytest
import torch

from sat.config.build import build_engine
from sat.data.batch import Batch
from sat.data.dataset import Dataset
from sat.data.loader import Loader
from sat.data.records import ExtraRule
from sat.data.sources import Source, read_sources
from sat.data.transforms import Transform
from sat.engine import DiffusionEngine
from sat.train.objectives.diffusion import DiffusionObjective
from tests.checkpoints import tokenizer
from tests.configs import DEBUG, ROOT, refused
from tests.small import fill
from tests.tolerances import F32


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


# -- masks and weights of losses


def masked(mask: torch.Tensor, weights: torch.Tensor | None = None) -> Batch:
    return replace(batch(), extras={"mask": mask}, loss_weight=weights)


def loss(engine, given: Batch, **params) -> torch.Tensor:
    with torch.no_grad():
        return DiffusionObjective(caption_dropout=0.0, engine=engine, **params)(given, seeded())["loss"]


@pytest.fixture
def mask() -> torch.Tensor:
    """(3, 1, 48, 64) in [0, 1]."""
    return torch.rand(3, 1, 48, 64, generator=seeded(5))


def test_losses_of_a_mask_and_of_its_opposite_add_up_to_the_whole(engine, mask) -> None:
    whole, parts = loss(engine, batch()), [loss(engine, masked(m)) for m in (mask, 1 - mask)]
    torch.testing.assert_close(sum(parts), whole, rtol=F32, atol=0)
    assert torch.equal(loss(engine, masked(torch.ones_like(mask))), whole)
    assert loss(engine, masked(torch.zeros_like(mask))) == 0


def test_what_a_mask_leaves_out_counts_by_its_weight(engine, mask) -> None:
    inside, outside = (loss(engine, masked(m)) for m in (mask, 1 - mask))
    given = loss(engine, masked(mask), unmasked=0.25)
    torch.testing.assert_close(given, inside + 0.25 * outside, rtol=F32, atol=0)


def test_a_mean_over_the_mask_takes_its_size_out(engine, mask) -> None:
    whole = loss(engine, batch())
    even = loss(engine, masked(torch.full_like(mask, 0.1)), mask_mean=True)
    torch.testing.assert_close(even, whole, rtol=F32, atol=0)
    half = torch.zeros_like(mask)
    half[..., :32] = 1
    torch.testing.assert_close(
        loss(engine, masked(half), mask_mean=True), 2 * loss(engine, masked(half)), rtol=F32, atol=0
    )
    assert loss(engine, masked(torch.zeros_like(mask)), mask_mean=True) == 0


def test_a_mask_of_cells_is_the_mean_over_its_pixels(engine, mask) -> None:
    factor = engine.first_stage.factor
    cells = torch.nn.functional.avg_pool2d(mask, factor)
    torch.testing.assert_close(loss(engine, masked(cells)), loss(engine, masked(mask)), rtol=F32, atol=0)


def test_gradients_of_places_outside_are_none(engine, mask) -> None:
    objective = DiffusionObjective(caption_dropout=0.0, engine=engine)
    objective(masked(torch.zeros_like(mask)), seeded())["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in engine.network.parameters())


def test_losses_of_pictures_are_weighted_before_their_mean(engine) -> None:
    alone = [loss(engine, masked(torch.ones(3, 1, 48, 64), torch.eye(3)[i])) for i in range(3)]
    given = loss(engine, masked(torch.ones(3, 1, 48, 64), torch.tensor([1.0, 0.5, 2.0])))
    torch.testing.assert_close(given, alone[0] + 0.5 * alone[1] + 2 * alone[2], rtol=F32, atol=0)


def test_validation_looks_through_the_mask_too(engine, mask) -> None:
    objective = DiffusionObjective(levels=(0.5,), engine=engine)
    with torch.no_grad():
        whole, inside, outside = (
            objective.evaluate(given, seeded())["loss"] for given in (batch(), masked(mask), masked(1 - mask))
        )
    torch.testing.assert_close(inside + outside, whole, rtol=F32, atol=0)


def test_masks_and_prior_weights_train_as_a_small_loop_does(engine, spiece, tmp_path) -> None:
    """Four steps from a folder with masks and one of class pictures, against v prediction by hand."""
    for name, sizes in (("own", (50, 60, 70)), ("prior", (64,))):
        (tmp_path / name).mkdir()
        for number, size in enumerate(sizes):
            grey = torch.randint(0, 256, (2, 48, size), generator=seeded(size), dtype=torch.uint8).numpy()
            PIL.Image.fromarray(grey[0]).convert("RGB").save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text("a dog")
            if name == "own":
                PIL.Image.fromarray(grey[1]).save(tmp_path / name / f"{number}.mask.png")
    rule = {"mask": ExtraRule("mask", required=False)}
    sources = [
        Source(tmp_path / "own", 1, 3.0, None, rule), Source(tmp_path / "prior", 1, 1.0, loss_weight=0.3)
    ]  # fmt: skip
    data = Dataset(read_sources(sources), Transform(48, 32, "random"))
    batches = list(itertools.islice(iter(Loader(data, 2, seed=1, groups=data.groups)), 4))
    assert any(one.loss_weight is not None for one in batches)
    assert all("mask" in one.extras for one in batches)

    start = copy.deepcopy(engine.network.state_dict())
    objective = DiffusionObjective(caption_dropout=0.0, unmasked=0.1, engine=engine)
    optimizer = torch.optim.SGD(engine.network.parameters(), lr=1e-3)
    for step, one in enumerate(batches):
        optimizer.zero_grad()
        objective(one, seeded(step))["loss"].backward()
        optimizer.step()
    ours = copy.deepcopy(engine.network.state_dict())

    engine.network.load_state_dict(start)
    optimizer = torch.optim.SGD(engine.network.parameters(), lr=1e-3)
    for step, one in enumerate(batches):
        optimizer.zero_grad()
        generator = seeded(step)
        with torch.no_grad():
            x0 = engine.first_stage.encode(one.image).sample(generator=generator)
            x0 = x0 * engine.first_stage.scale_factor
            cond = objective.condition(one, x0.device)
        t = torch.randint(0, engine.process.hooks.span(engine.schedule), (2,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        level = engine.process.hooks.at(engine.schedule, t)
        x, v = level.alpha * x0 + level.sigma * eps, level.alpha * eps - level.sigma * x0
        prepared = engine.network.prepare(cond, tuple(x0.shape[2:]))
        out = engine.denoiser.output(x, level, prepared)
        places = 0.1 + 0.9 * torch.nn.functional.avg_pool2d(one.extras["mask"], engine.first_stage.factor)
        each = ((out - v) ** 2 * places).mean((1, 2, 3))
        weights = torch.ones(2) if one.loss_weight is None else one.loss_weight
        ((weights * each).sum() / 2).backward()
        optimizer.step()
    for name, value in engine.network.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=F32)  # over four steps
    assert any(not torch.equal(ours[name], start[name]) for name in start)


@pytest.mark.parametrize(("target", "setting", "words"), [
    ("first_stage.FirstStageObjective", "mask: {alpha: true}", "makes no use of a mask: set it to null"),
    ("distillation.Distillation", "mask: {alpha: true}", "makes no use of a mask: set it to null"),
    ("first_stage.FirstStageObjective", "loss_weight: 0.5", "does not weigh the losses of pictures"),
])  # fmt: skip
def test_an_objective_that_has_no_use_for_it_refuses_it(target, setting, words) -> None:
    problems = refused(
        [ROOT / "configs" / "tiny.yaml", ROOT / "configs" / "tiny_train.yaml"],
        [
            f"train.objective={{target: sat.train.objectives.{target}}}",
            f"data.sources=[{{path: data/emoji_sample, {setting}}}]",
        ],
    )
    assert any(words in line for line in problems), problems
