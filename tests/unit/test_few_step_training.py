"""Few-step students in training: prediction and weights of each role, and what it learns from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sat.adapters.lora import adapted
from sat.config.build import build_engine
from sat.config.load import load
from sat.config.schema import LoraConfig
from sat.data.batch import Batch, collate
from sat.data.dataset import Dataset
from sat.data.sources import Source, read_sources
from sat.data.transforms import Transform
from sat.diffusion.distillation import LevelTable, nearer_levels
from sat.diffusion.guidance import ClassifierFree
from sat.diffusion.loss import AngleWeighting, LearnedWeighting
from sat.diffusion.prediction import Eps, Preconditioned
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.samplers import Euler
from sat.diffusion.schedule import Discrete
from sat.engine import DiffusionEngine
from sat.train.lora import NAME, add_lora
from sat.train.objectives.distillation import Distillation
from sat.train.objectives.matching import Heads
from sat.train.objectives.progressive import TEACHER
from tests.configs import DEBUG, ROOT, refused

LORA = LoraConfig(rank=3, targets=["attention", "mlp"])


def engine(*settings: str) -> DiffusionEngine:
    """The toy Plus as a network of noise on the exploding schedule of Base."""
    torch.manual_seed(0)
    predicts = "diffusion.prediction={target: sat.diffusion.prediction.Eps}"
    schedule = "diffusion.schedule={target: sat.diffusion.schedule.Discrete}"
    experiment = load([DEBUG], ["conditioning.tokenizer=null", predicts, schedule, *settings])
    return build_engine(experiment, device="cpu", dtype=torch.float32)


def unet_engine() -> DiffusionEngine:
    """The same around a small UNet."""
    network = (
        "model={target: sat.models.cogview3_unet.CogView3UNet, params: {channels: 4, width: 16, multipliers: "
        "[1, 2], blocks: 1, attention: [1, 2], depths: [1, 1], head_dim: 8, text_dim: 24, text_len: 8, "
        "size_dim: 48, groups: 4, zero_init: false}}"
    )
    return engine(network)


def batch(count: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor([[48, 64]]).expand(count, 2)
    return Batch(
        ["a red apple"] * count, size, torch.zeros_like(size), size,
        text=torch.randn(count, 8, 24, generator=generator),
        latent_moments=torch.randn(count, 8, 6, 8, generator=generator),
    )  # fmt: skip


def student(lora: bool, method: str = "consistency", **params: Any) -> Any:
    """An objective as ``train.py`` makes it."""
    objective = Distillation(method=method, **{"guidance": 3.0, "engine": engine(), **params})
    if lora:
        add_lora(objective, LORA, 0)
    objective.begin(NAME if lora else None)
    return objective.train()


def test_a_student_of_another_prediction_leaves_its_teacher_as_it_was() -> None:
    for lora in (True, False):
        plain, own = student(lora), student(lora, prediction="v", regression=5)
        here, there = plain.given(batch(), torch.Generator()), own.given(batch(), torch.Generator())
        level = plain._levels_of((6, 8))[0].at(torch.tensor([999, 500, 10]))
        x = torch.randn(3, 4, 6, 8)
        assert torch.equal(plain.teacher(x, level, here), own.teacher(x, level, there))
        assert isinstance(own.engine.prediction, Preconditioned) and isinstance(own._base, Eps)
        assert own.few_steps().prediction == "v" and plain.few_steps().prediction is None


def test_a_student_learns_its_prediction_in_the_first_steps() -> None:
    """Its x0 at the noisiest level, where the base divides by a signal of 0.07, comes near the teacher's."""
    objective = student(lora=False, prediction="v", regression=60, terminal=1.0)
    optimizer = torch.optim.Adam((p for p in objective.parameters() if p.requires_grad), 3e-3)
    apart = []
    for objective.step in range(60):
        losses = objective(batch(), torch.Generator().manual_seed(objective.step))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        apart.append(float(losses["tangent"]))
    assert apart[-1] < 0.5 * apart[0], apart
    assert set(losses) == {"loss", "tangent"}


@pytest.mark.parametrize(("method", "alone"), [("dmd2", {}), ("rcm", {"alone": 2})])
def test_the_critic_comes_in_after_regression(method: str, alone: dict[str, int]) -> None:
    made = student(True, method, prediction="x0", regression=3, student_every=2, **alone)
    turns = []
    for made.step in range(8):
        turns.append(made.turn())
    first = 3 + sum(alone.values())
    assert turns == (["student"] * first + ["student", "critic"] * 4)[:8]
    assert list(made.turns()) == [first, first + 1]
    made.step = 0
    assert "consistency" in made(batch(), torch.Generator()) and "matching" not in made(batch())


def test_another_prediction_needs_its_regression() -> None:
    with pytest.raises(ValueError, match="learns it in the first `regression` steps: above 0"):
        student(True, prediction="v")


def test_regression_aims_at_the_picture_that_the_teacher_draws_from_the_noise() -> None:
    objective = student(lora=True, regression=5, path=3, terminal=1.0, guidance=2.0)
    given = objective.given(batch(), torch.Generator().manual_seed(1))
    engine, guider = objective.engine, ClassifierFree(2.0)
    noise = given.drawn["eps"]
    with torch.no_grad():
        drawn = engine.sample(given.cond, given.cond.null(), noise, steps=3, guider=guider, sampler=Euler())
        first = engine.process.hooks.levels(engine.schedule, 3)[0]
        x = engine.process.start(noise, first, given.ctx)
        level = LevelTable([first]).at(torch.zeros(3, dtype=torch.int64))
        x0 = engine.denoiser(x, level, engine.network.prepare(given.seen, (6, 8)))
    apart = (x0 - drawn).square().mean().sqrt()
    torch.testing.assert_close(objective.consistency(given)["tangent"], apart)


ROUNDS = {"teacher_steps": 8, "rounds": (4, 2), "guidance": 3.0}


def test_a_folded_strength_is_the_teachers_in_the_first_round_of_factors() -> None:
    """Factors that are zero at first: the student's target is what two guided steps of the base reach."""
    made, whole = (student(lora, "progressive", **ROUNDS) for lora in (True, False))
    assert not made.beside() and len(whole.beside()) == 1
    losses = [o(batch(), torch.Generator().manual_seed(3))["loss"] for o in (made, whole)]
    torch.testing.assert_close(*losses)
    losses[0].backward()
    learn = {name for name, p in made.named_parameters() if p.grad is not None}
    assert learn and all(f".factors.{NAME}." in name for name in learn)
    assert made.few_steps().guidance == 3.0 and made.few_steps().steps == (4,)


def test_the_second_rounds_teacher_has_the_factors_of_the_first() -> None:
    """It stays as it began, unguided, while the student's factors learn."""
    made = student(True, "progressive", **ROUNDS)
    factors = {n: p for n, p in made.named_parameters() if p.requires_grad}
    filled = torch.Generator().manual_seed(4)
    for p in factors.values():
        p.data = 0.1 * torch.randn(p.shape, generator=filled)
    second = student(True, "progressive", **ROUNDS, round=1)
    for layer, before in zip(adapted(second.network), adapted(made.network), strict=True):
        for name in (NAME, TEACHER):
            layer[1].named(name).load_state_dict(before[1].named(NAME).state_dict())
    x, cond = torch.randn(3, 4, 6, 8), made.condition(batch(), torch.device("cpu"))
    place, strength = torch.tensor([0, 1, 1]), torch.full((3,), 3.0)

    def arrived() -> torch.Tensor:
        return second._two_steps(x, place, cond, strength, ProcessContext())  # type: ignore[no-any-return]

    denoiser, process = made.engine.denoiser, made.engine.process
    (levels, middles), prepared = second._levels_of((6, 8)), made.network.prepare(cond, (6, 8))
    level, middle, end = levels.at(place), middles.at(place), levels.at(place + 1)
    with torch.no_grad():
        expected = process.step(x, denoiser(x, level, prepared), level, middle, ProcessContext())
        expected = process.step(expected, denoiser(expected, middle, prepared), middle, end, ProcessContext())
    torch.testing.assert_close(arrived(), expected)
    for _, layer in adapted(second.network):
        for p in layer.named(NAME).parameters():
            torch.nn.init.zeros_(p)
    torch.testing.assert_close(arrived(), expected)
    assert not any(p.requires_grad for n, p in second.named_parameters() if f".{TEACHER}." in n)
    assert second.few_steps().steps == (2,)


def gradients(made: Any) -> set[str]:
    """The parts and factors that the loss reaches."""
    made.zero_grad()
    made(batch(), torch.Generator().manual_seed(made.step))["loss"].backward()
    reached = [n for n, p in made.named_parameters() if p.grad is not None and p.grad.any()]
    return {made.role(n) if "discriminator" not in n else "discriminator" for n in reached}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("predicts", ["", "unet"])
def test_each_role_learns_in_its_turn_through_the_teachers_features(lora: bool, predicts: str) -> None:
    settings = {"engine": unet_engine()} if predicts else {}
    heads = Heads(penalty=10.0, depths=(0.5, 1.0))
    made = student(lora, "dmd2", student_every=2, adversarial=heads, **settings)
    before = {name: p.clone() for name, p in made.named_parameters()}
    assert gradients(made) == {"student"}
    pulled = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    made.adversarial = replace(heads, weight=30.0)
    gradients(made)  # through features: the weight tells in the student's gradient
    assert any(not torch.allclose(pulled[n], p.grad) for n, p in made.named_parameters() if n in pulled)
    made.step = 1
    assert gradients(made) == {"critic", "discriminator"}
    losses = made(batch(), torch.Generator().manual_seed(1))
    assert {"critic", "critic_accuracy", "told_apart", "discriminator_accuracy"} < losses.keys()
    assert all(torch.equal(before[name], p) for name, p in made.named_parameters())
    assert [n for n, p in made.named_parameters() if "discriminator" in n and p.requires_grad]


def test_the_discriminator_separates_two_distributions() -> None:
    """Latents around 1 from the untrained student's: all right after a few dozen steps."""
    made = student(True, "dmd2", student_every=100, adversarial=Heads())
    made.step = 1
    optimizer = torch.optim.Adam(made.discriminator.parameters(), 1e-2)
    data = batch(8)
    data = replace(data, latent_moments=data.latent_moments.abs() + 1.0)
    for step in range(60):
        optimizer.zero_grad()
        given = made.given(data, torch.Generator().manual_seed(step))
        loss, right = made.told_apart(given)
        loss.backward()
        optimizer.step()
    assert float(right) > 0.9 and float(loss.detach()) < math.log(2)  # 2 log 2 is that of a guess


def test_a_learned_weight_is_the_inverse_of_the_error() -> None:
    """exp(w) E - w is least at w = -log E, at each of two levels with errors of 4 and 0.04 of x0 in angle."""
    weighting = LearnedWeighting()
    level = LevelTable(nearer_levels(Process(), Discrete(), 0.1)[0]).at(torch.tensor([100, 900]))
    error = torch.tensor([4.0, 0.04])[:, None, None, None] / AngleWeighting()(level, 1.0)
    optimizer = torch.optim.Adam(weighting.parameters(), 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (weighting(level, 1.0) * error - weighting.log(level)).mean().backward()
        optimizer.step()
    expected = -torch.tensor([4.0, 0.04]).log()
    torch.testing.assert_close(weighting.log(level).flatten(), expected, atol=0.02, rtol=0)
    made = student(True, weighting=weighting, gap=0.05)
    made(batch(), torch.Generator())["loss"].backward()
    assert weighting.weights.grad is not None and weighting.weights.grad.any()
    assert "weighting.weights" in dict(made.named_parameters()) and list(made.parts()) == ["model"]


PROMPTS = ("train.objective={target: sat.train.objectives.distillation.Distillation, params: {method: %s}}",
           "data.height=48", "data.width=64", "data.cache=null", "data.validation=[]")  # fmt: skip


def test_matching_learns_from_a_list_of_prompts_alone(tmp_path: Path) -> None:
    """As with pictures of those captions and sizes: at them it looks not at all."""
    (tmp_path / "prompts.txt").write_text("a red apple\n\n the sun \n")
    records = read_sources([Source(tmp_path / "prompts.txt")])
    dataset = Dataset(records, Transform(48, 64))
    assert [record.captions for record in records.records] == [("a red apple",), ("the sun",)]
    alone = collate([dataset.get(i, 0, 0) for i in (0, 1)])
    assert alone.image is None and alone.target_size.tolist() == [[48, 64]] * 2
    alone = replace(alone, text=batch(2).text)
    pictured = replace(alone, latent_moments=batch(2).latent_moments)
    for lora in (True, False):
        made = student(lora, "dmd2", student_every=2)
        for made.step in range(2):
            ours, theirs = (made(one, torch.Generator().manual_seed(7)) for one in (alone, pictured))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
        with torch.no_grad():
            assert "tangent" not in made.eval().evaluate(alone, torch.Generator())


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("rcm", (), "sources.0.path: is a list of prompts without pictures: that is for method dmd2"),
        ("dmd2, adversarial: {weight: 0.1}", (), "that is for method dmd2 without adversarial and relay"),
        ("dmd2", ("data.cache=somewhere",), "cache: keeps or sorts pictures, and a list of prompts has none"),
    ],
)
def test_what_needs_pictures_refuses_a_list_of_prompts(
    method: str, more: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple")
    data = f"data.sources=[{{path: {tmp_path / 'prompts.txt'}}}]"
    settings = [PROMPTS[0] % method, *PROMPTS[1:], data, *more]
    assert any(
        said in line for line in refused([ROOT / "configs/tiny.yaml", ROOT / "configs/sft.yaml"], settings)
    )
