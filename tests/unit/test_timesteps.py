"""Losses by kind and timesteps by chance: formulas, quantiles, strata, and a short training of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sat.config.check import build
from sat.config.schema import Component
from sat.data.batch import Batch
from sat.diffusion.draws import PictureDraws, keyed, strata
from sat.diffusion.loss import DenoisingLoss, MinSNR, Weighting
from sat.diffusion.prediction import Denoiser, Eps, Prediction, V
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.schedule import Discrete, Schedule, ZeroSNR
from sat.diffusion.timesteps import LogitNormal, LogSNR, Timesteps
from sat.engine import DiffusionEngine
from sat.parallel.launch import Mesh, Runtime
from sat.train.backend import PlainBackend
from sat.train.log import Averages, Record
from sat.train.loop import Extras, Trainer
from sat.train.objectives.diffusion import DiffusionObjective
from sat.train.objectives.distillation import Distillation
from sat.train.resume import RunFolder
from tests.diffusion import drawing
from tests.training import CONFIG, Numbers, changed, rows
from tests.unit.test_diffusion import Fixed

CTX = ProcessContext()
SCHEDULES = [(ZeroSNR(), V()), (Discrete(), Eps())]


@pytest.mark.parametrize("weighting", [None, MinSNR(5.0)])
@pytest.mark.parametrize(("schedule", "prediction"), SCHEDULES)
def test_l1_is_the_official_weight_times_the_absolute_error_of_x0(
    schedule: Schedule, prediction: Prediction, weighting: Weighting | None
) -> None:
    x0, out = torch.randn(4, 2, 4, 5), torch.randn(4, 2, 4, 5)
    loss = DenoisingLoss(weighting, kind="l1")
    draw = loss.draw(x0.shape[1:], 1000, drawing(x0))._replace(timestep=torch.tensor([990, 700, 300, 5]))
    denoiser = Denoiser(Fixed(out), prediction)
    level = schedule.at(draw.timestep)
    error = (denoiser(level.alpha * x0 + level.sigma * draw.eps, level, None) - x0).abs()
    w = 1 / level.sigma**2 if weighting is None else (level.alpha**2 / level.sigma**2).clamp(max=5)
    theirs = (w * error).mean((1, 2, 3))
    got = loss(denoiser, x0, None, draw, schedule, Process(), CTX)
    torch.testing.assert_close(got, theirs, rtol=1e-3, atol=0)


def test_huber_is_half_the_square_within_delta_and_linear_beyond() -> None:
    level = ZeroSNR().at(torch.tensor([500]))
    out = torch.tensor([0.0, 0.1, -0.5, 2.0]).view(1, 1, 2, 2)
    got = DenoisingLoss(kind="huber", delta=0.5).error(
        out, torch.zeros_like(out), level, Denoiser(Fixed(out), V())
    )
    assert float(got) == pytest.approx((0 + 0.005 + 0.125 + 0.5 * (2 - 0.25)) / 4)


@pytest.mark.parametrize(("options", "words"), [
    ({"delta": 0.5}, "delta 0.5 is of kind huber, got kind l2"),
    ({"kind": "huber", "delta": 0.0}, "delta is 0, expected a finite number above 0"),
])  # fmt: skip
def test_a_delta_without_meaning_is_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DenoisingLoss(**options)  # type: ignore[arg-type]


def test_logit_normal_has_the_quantiles_of_its_formula() -> None:
    loss = DenoisingLoss(timesteps=LogitNormal(0.5, 1.2))
    drawn = loss.draw((1, 1, 1), 1000, drawing(range(40_000), 0), ZeroSNR())
    share = (drawn.timestep.double().numpy() + 0.5) / 1000
    for q, z in ((0.1, -1.28155), (0.5, 0.0), (0.9, 1.28155)):
        assert np.quantile(share, q) == pytest.approx(1 / (1 + math.exp(-0.5 - 1.2 * z)), abs=0.01)


@pytest.mark.parametrize("schedule", [Discrete(), ZeroSNR()])
def test_levels_are_even_or_normal_in_their_log_snr(schedule: Schedule) -> None:
    value = np.array([-2 * np.log(schedule.sigma_at(t)) for t in range(999)])
    even, normal = (timesteps.chances(schedule, 1000) for timesteps in (LogSNR(), LogSNR(-0.5, 1.0)))
    for chances in (even, normal):
        assert chances.shape == (1000,) and bool((chances >= 0).all())
        assert float(chances.sum()) == pytest.approx(1)
    inner = even.numpy()[1:998]
    widths = (value[:-2] - value[2:]) / 2
    np.testing.assert_allclose(inner / inner.sum(), widths / widths.sum(), rtol=1e-9)
    below = {q: float(normal[:999].numpy()[value <= -0.5 + z].sum()) for q, z in ((0.16, -1.0), (0.5, 0.0))}
    for q, share in below.items():
        assert share == pytest.approx(q, abs=0.02)


def test_impossible_chances_are_refused() -> None:
    for wrong in (lambda: LogitNormal(0, 0), lambda: LogSNR(1.0, -1.0)):
        with pytest.raises(ValueError, match="std more than 0"):
            wrong()
    with pytest.raises(ValueError, match="expected both"):
        LogSNR(mean=1.0)
    with pytest.raises(ValueError, match="no level is near mean 900"):
        LogSNR(900.0, 1.0).chances(Discrete(), 1000)


@pytest.mark.parametrize("timesteps", [None, LogitNormal(), LogSNR()])
def test_a_step_has_one_picture_in_each_stratum_however_it_is_split(timesteps: Timesteps | None) -> None:
    loss = DenoisingLoss(timesteps=timesteps, stratified=True)

    def drawn(size: int) -> Tensor:
        """The timesteps of a step of 16 pictures in micro-batches of ``size``."""
        micros = [PictureDraws(3, 7, place, size, 16) for place in range(0, 16, size)]
        return torch.cat([loss.draw((1, 2, 2), 1000, draws, ZeroSNR()).timestep for draws in micros])

    whole = drawn(16)
    assert all(torch.equal(drawn(size), whole) for size in (1, 2, 8))
    chances = torch.full((1000,), 1e-3) if timesteps is None else timesteps.chances(ZeroSNR(), 1000)
    ends = chances.double().cumsum(0)
    wanted = torch.searchsorted(ends, torch.arange(17).double() / 16)  # first timesteps of the strata
    ordered = whole.sort().values
    assert bool((ordered >= wanted[:16] - 1).all()) and bool((ordered <= wanted[1:] + 1).all())
    assert not torch.equal(strata(3, 8, 0, 16, 16), strata(3, 7, 0, 16, 16))


def test_without_a_step_strata_are_those_of_the_batch() -> None:
    drawn = DenoisingLoss(stratified=True).draw((1, 2, 2), 1000, drawing(range(10)))
    assert sorted(t // 100 for t in drawn.timestep.tolist()) == list(range(10))


def test_elements_of_vectors_are_averaged_where_they_are_finite() -> None:
    averages, nan = Averages(), math.nan
    averages.add({"a": torch.tensor([1.0, nan, 3.0]), "b": torch.tensor([nan] * 3), "c": torch.tensor(2.0)})
    averages.add({"a": torch.tensor([nan, nan, 8.0]), "b": torch.tensor([nan] * 3), "c": torch.tensor(4.0)})
    means = averages.take()
    assert (means["a"], means["c"]) == (4.0, 3.0) and math.isnan(means["b"])


# -- short trainings, against the same written out


STEPS = 200


class Small(torch.nn.Module):
    """A network of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(2, 2, 1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.3, -0.2], [0.1, 0.4]])[..., None, None])
            self.layer.bias.zero_()

    def prepare(self, cond: object, size: object, timesteps: object = ()) -> None: ...

    def forward(self, x: Tensor, timestep: object, prepared: object) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Plain(DiffusionObjective):
    """The diffusion objective without text."""

    def condition(self, batch: Batch, device: torch.device) -> None:  # type: ignore[override]
        return None

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        return 2, 2, 2

    def latents(self, batch: Batch, noise: Tensor) -> Tensor:
        assert batch.latent_moments is not None
        return batch.latent_moments.view(len(batch), 2, 2, 2)


def objective(loss: DenoisingLoss) -> Plain:
    conditioner, first = torch.nn.Identity(), torch.nn.Identity()
    engine = DiffusionEngine(Small(), conditioner, first, ZeroSNR(), V(), loss=loss)  # type: ignore[arg-type]
    return Plain(caption_dropout=0.0, timestep_buckets=2, engine=engine)


def test_buckets_that_cannot_be_are_refused() -> None:
    engine = objective(DenoisingLoss()).engine
    for count in (-1, 1001):
        with pytest.raises(ValueError, match=rf"timestep_buckets is {count}: expected 0 to 1000"):
            Plain(timestep_buckets=count, engine=engine)


def test_chances_without_a_level_are_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="no level is near mean -900"):
        objective(DenoisingLoss(timesteps=LogSNR(-900.0, 1.0)))


@pytest.mark.parametrize("params", [{"kind": "l1"}, {"timesteps": LogitNormal()}, {"stratified": True}])
def test_distillation_refuses_the_losses_that_it_does_not_take(params: dict[str, Any]) -> None:
    engine = objective(DenoisingLoss(**params)).engine
    engine.network.guidance = torch.nn.Identity()
    with pytest.raises(ValueError, match="leave kind, timesteps and stratified out of diffusion.loss.params"):
        Distillation(engine=engine)


@pytest.mark.parametrize("params", [
    {}, {"kind": "l1"}, {"kind": "huber", "delta": 0.3}, {"stratified": True},
    {"timesteps": Component("sat.diffusion.timesteps.LogitNormal", {"mean": 0.2})},
    {"timesteps": Component("sat.diffusion.timesteps.LogSNR"), "stratified": True},
])  # fmt: skip
def test_a_training_is_that_of_a_loop_written_out(  # noqa: C901 - the loop, in order
    params: dict[str, object], tmp_path: Path
) -> None:
    loss = build(Component("sat.diffusion.loss.DenoisingLoss", params))
    config = changed(CONFIG, steps=STEPS, ema=None, clip=None, log_every=1, accumulate=2, save_every=100,
                     schedule="constant", warmup=0, weight_decay=0.0)  # fmt: skip
    made, runtime = objective(loss), Runtime(0, 1, 0, torch.device("cpu"))
    optimizer = torch.optim.SGD(made.parameters(), lr=config.lr)
    engine = PlainBackend(made, optimizer, config, runtime, Mesh(runtime))
    run = Trainer(engine, Numbers(3), RunFolder(tmp_path), Extras(record=Record(tmp_path)))
    batches = run.batches()
    for _ in range(STEPS):
        run.train_step(batches)
        run._log()
    written = rows(tmp_path)

    network, schedule = Small(), ZeroSNR()

    def drawn(what: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Of each picture of the micro-batch, by its place in the step."""
        keys = [keyed(config.seed, step, 3 * micro + i, what) for i in range(3)]
        return torch.stack([draw(torch.Generator().manual_seed(key)) for key in keys])

    sgd, source = torch.optim.SGD(network.parameters(), lr=config.lr), iter(Numbers(3))
    for step in range(STEPS):
        total, ends, buckets = 0.0, loss.cumulative(schedule, 1000), {0: [], 1: []}
        for micro in range(2):
            x0 = next(source).latent_moments.view(3, 2, 2, 2)
            if loss.stratified:
                t = (strata(config.seed, step, 3 * micro, 3, 6)[:, None] >= ends).sum(1)
            elif loss.timesteps is not None:
                u = drawn("timestep", lambda g: torch.rand((), generator=g, dtype=torch.float64))
                t = (u[:, None] >= ends).sum(1)
            else:
                t = drawn("timestep", lambda g: torch.randint(1000, (), generator=g))
            eps = drawn("eps", lambda g: torch.randn(2, 2, 2, generator=g))
            alpha = torch.from_numpy(schedule.trained)[t].float()[:, None, None, None]
            sigma = (1 - alpha.double() ** 2).sqrt().float()
            error = network.layer(alpha * x0 + sigma * eps) - (alpha * eps - sigma * x0)
            if loss.kind == "l1":
                value = error.abs() / sigma
            elif loss.kind == "huber":
                value = torch.where(error.abs() <= 0.3, error**2 / 2, 0.3 * (error.abs() - 0.15))
            else:
                value = error**2
            each = value.mean((1, 2, 3))
            (each.mean() / 2).backward()
            total += each.mean().item() / 2
            for at, one in zip(t.tolist(), each.tolist(), strict=True):
                buckets[at // 500].append(one)
        sgd.step()
        sgd.zero_grad()
        row = written[step]
        assert row["loss"] == pytest.approx(total, rel=2e-4)
        for name, key in (("loss_t0_499", 0), ("loss_t500_999", 1)):
            mean = sum(buckets[key]) / len(buckets[key]) if buckets[key] else None
            assert row[name] == (None if mean is None else pytest.approx(mean, rel=2e-4))
