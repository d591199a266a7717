"""Random numbers of a training step: the same however it is split; those of older runs as they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sat.config.build import build_engine
from sat.config.load import load
from sat.data.batch import Batch
from sat.data.loader import Loader
from sat.diffusion.draws import Draws, GeneratorDraws, PictureDraws, keyed, strata
from sat.diffusion.loss import DenoisingLoss
from sat.diffusion.process import Process
from sat.engine import DiffusionEngine
from sat.mixins.relay import RelayNoise
from sat.train.objectives import Objective
from sat.train.objectives.diffusion import DiffusionObjective
from sat.train.objectives.distillation import Distillation
from sat.train.objectives.first_stage import FirstStageObjective
from tests.checkpoints import tokenizer
from tests.configs import DEBUG
from tests.small import fill
from tests.tolerances import F32
from tests.unit.test_data_order import Numbers

SPLITS = [[8], [4, 4], [2, 2, 2, 2], [1] * 8]
DRAWN: dict[str, Callable[[Draws], Tensor]] = {
    "normal": lambda draws: draws.normal("a", (2, 3)),
    "uniform": lambda draws: draws.uniform("a"),
    "integers": lambda draws: draws.integers("a", 1000),
    "strata": lambda draws: draws.strata(),
    "child": lambda draws: draws.child(3).normal("a", (2,)),
}


def micros(sizes: list[int], seed: int = 5, step: int = 7) -> list[PictureDraws]:
    """Draws of the micro-batches of a step of eight pictures."""
    return [PictureDraws(seed, step, sum(sizes[:i]), size, 8) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", SPLITS[1:], ids=str)
@pytest.mark.parametrize("kind", DRAWN)
def test_numbers_of_a_picture_do_not_depend_on_the_split(kind: str, sizes: list[int]) -> None:
    whole, parts = ([DRAWN[kind](draws) for draws in micros(s)] for s in ([8], sizes))
    assert torch.equal(torch.cat(parts), whole[0])


@pytest.mark.parametrize("kind", DRAWN)
def test_seed_step_and_place_make_other_numbers(kind: str) -> None:
    whole = DRAWN[kind](micros([8])[0])
    assert not torch.equal(DRAWN[kind](micros([8], seed=6)[0]), whole)
    assert not torch.equal(DRAWN[kind](micros([8], step=8)[0]), whole)
    assert len(whole.unique(dim=0)) > 6


def test_names_are_apart_and_numbers_are_spread_as_they_should() -> None:
    draws = PictureDraws(0, 1, 0, 4000, 4000)
    a, b, u = draws.normal("a", (3,)), draws.normal("b", (3,)), draws.uniform("a")
    assert abs(float((a * b).mean())) < 0.03
    assert abs(float(a.mean())) < 0.03 and abs(float(a.std()) - 1) < 0.03
    assert abs(float(u.mean()) - 0.5) < 0.02 and abs(float(u.var()) - 1 / 12) < 0.01
    assert torch.bincount(draws.integers("a", 4), minlength=4).min() > 900


def test_batches_are_prepared_with_their_numbers_by_threads_as_without() -> None:
    def batches(workers: int) -> list[Tensor]:
        stream = Loader(Numbers(12), 2, workers=workers).batches(prepare)
        return [next(stream).draws["u"] for _ in range(5)]

    def prepare(number: int, batch: Batch) -> Batch:
        return replace(batch, draws={"u": PictureDraws(0, number, 0, 2, 2).uniform("u")})

    for one, other, number in zip(batches(0), batches(3), range(5), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, PictureDraws(0, number, 0, 2, 2).uniform("u"))


# -- objectives


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    spiece = tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")
    settings = [f"conditioning.tokenizer={spiece}", "model.params.guidance_dim=8",
                "sampling.guider={target: sat.diffusion.guidance.Embedded}"]  # fmt: skip
    made = build_engine(load([DEBUG], settings), device="cpu", dtype=torch.float32)
    fill(made)
    made.process = Process({"relay": RelayNoise(500.0)})
    made.denoising_loss = DenoisingLoss(offset_noise=0.1, stratified=True)
    return made


def objectives(engine: DiffusionEngine) -> dict[str, Objective]:
    plain = DiffusionObjective(0.4, engine=engine)
    stage = FirstStageObjective(noise=0.2, engine=engine)
    stratified, engine.denoising_loss = engine.denoising_loss, DenoisingLoss()
    student = Distillation(teacher_steps=8, rounds=[4], engine=engine)
    engine.denoising_loss = stratified
    return {"diffusion": plain, "distillation": student, "first stage": stage}


def pictures(count: int = 8) -> Batch:
    size = torch.tensor([[48, 64]]).expand(count, 2)
    image = torch.rand(count, 3, 48, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return Batch([f"a dog {i}" for i in range(count)], size, torch.zeros_like(size), size, image=image)


def cut(batch: Batch, first: int, count: int) -> Batch:
    rows = slice(first, first + count)
    return Batch(
        batch.caption[rows], batch.original_size[rows], batch.crop[rows], batch.target_size[rows],
        image=None if batch.image is None else batch.image[rows],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["diffusion", "distillation", "first stage"])
def test_the_loss_of_a_step_is_the_same_however_it_is_split(name: str, engine: DiffusionEngine) -> None:
    objective, batch, found = objectives(engine)[name], pictures(), []
    for sizes in SPLITS[:3]:
        values = []
        for draws, first in zip(micros(sizes), range(0, 8, sizes[0]), strict=True):
            micro = cut(batch, first, sizes[0])
            values.append(objective(replace(micro, draws=objective.draws(micro, draws)))["loss"].detach())
        found.append(torch.stack(values).mean())
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=F32, atol=0)
    other = objective(replace(batch, draws=objective.draws(batch, micros([8], step=8)[0])))["loss"]
    assert abs(float(other.detach() - found[0])) > 100 * F32 * float(found[0])


def test_nothing_random_of_an_objective_is_drawn_outside_its_draws(engine: DiffusionEngine) -> None:
    for name, objective in objectives(engine).items():
        batch = pictures(3)
        drawn = replace(batch, draws=objective.draws(batch, PictureDraws(0, 0, 0, 3, 3)))
        generator = torch.Generator().manual_seed(1)
        before = generator.get_state(), torch.get_rng_state()
        objective(drawn, generator)
        assert torch.equal(generator.get_state(), before[0]), name
        assert torch.equal(torch.get_rng_state(), before[1]), name


def test_the_older_rule_draws_in_the_order_of_before(engine: DiffusionEngine) -> None:
    """Written out: posterior, captions, posterior of the low resolution, stratum, noise, offset."""
    made = objectives(engine)["diffusion"].draws(pictures(4), GeneratorDraws.of_micro_batch(5, 7, 12, 4, 16))
    g = torch.Generator().manual_seed(keyed(5, 7, 3))  # the fourth micro-batch
    shape = (4, *engine.latent_shape(48, 64))
    assert torch.equal(made["posterior"], torch.randn(shape, generator=g))
    assert torch.equal(made["drop"], torch.rand(4, generator=g) < 0.4)
    assert torch.equal(made["low_res"], torch.randn(shape, generator=g))
    assert torch.equal(made["timestep"], (strata(5, 7, 12, 4, 16) * 500).long())
    eps = torch.randn(shape, generator=g)
    offset = torch.randn(4, generator=g)
    assert torch.equal(made["eps"], eps + 0.1 * offset[:, None, None, None])


def test_the_older_rule_validates_with_the_noise_of_before(engine: DiffusionEngine) -> None:
    engine.denoising_loss, kept = DenoisingLoss(), engine.denoising_loss
    made = objectives(engine)["diffusion"].held_out_draws(
        pictures(4), GeneratorDraws.of_micro_batch(5, -1, 4, 4, 8)
    )
    engine.denoising_loss = kept
    g, shape = torch.Generator().manual_seed(keyed(5, -1, 1)), (4, *engine.latent_shape(48, 64))
    assert torch.equal(made["posterior"], torch.randn(shape, generator=g))
    assert torch.equal(made["low_res"], torch.randn(shape, generator=g))
    seed = int(torch.randint(2**31, (), generator=g))
    for timestep in (50, 150, 250, 350, 450):
        g = torch.Generator().manual_seed(seed + timestep)
        torch.randint(0, 500, (4,), generator=g)
        assert torch.equal(made[f"eps_{timestep}"], torch.randn(shape, generator=g))
