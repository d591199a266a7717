"""Guiders: which rows the network sees, and how its predictions are combined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition
from sat.diffusion.guidance import ClassifierFree, Embedded, Guider, IntervalLimited, Unguided
from sat.diffusion.prediction import V
from sat.diffusion.samplers import DDIM, DPMSolver2M, Heun
from sat.diffusion.schedule import Level, ZeroSNR
from sat.engine import DiffusionEngine
from tests.tolerances import EXACT, F32, F64

X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
UNCOND = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
COND = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def at(timestep: float) -> Level:
    return Level(0.6, 0.8, timestep, 0.6, 0.8)


def rows() -> tuple[Condition, Condition]:
    cond = Condition(torch.ones(2, 3, 4), torch.ones(2, 6))
    return cond, cond.null()


class Told:
    """A denoiser that returns its predictions, the unconditional half first, and counts rows."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        self.asked.append(len(x))
        if len(x) == 2:
            assert torch.equal(x, X)
            return COND
        assert torch.equal(x, torch.cat([X, X]))
        return torch.cat([UNCOND, COND])


def test_unconditional_rows_come_first() -> None:
    both = ClassifierFree(5.0).rows(*rows())
    assert both.text[:2].abs().max() == 0 and both.text[2:].min() == 1
    assert both.vector.min() == 1  # sizes stay


@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
def test_guidance_extrapolates_from_the_unconditional_prediction(scale: float) -> None:
    out = ClassifierFree(scale)(Told(), X, at(500))
    assert (out - (UNCOND + scale * (COND - UNCOND))).abs().max() < F64


def test_scale_one_is_unguided_and_looks_once() -> None:
    cond, uncond = rows()
    assert ClassifierFree(1.0).rows(cond, uncond) is Unguided().rows(cond, uncond) is cond
    told = Told()
    assert torch.equal(ClassifierFree(1.0)(told, X, at(500)), Unguided()(told, X, at(500)))
    assert told.asked == [2, 2]


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale_is_equations_15_and_16(rescale: float) -> None:
    """arXiv:2305.08891: per image, the deviation of the conditional prediction, blended with the guided."""
    out = ClassifierFree(6.0, rescale)(Told(), X, at(500))
    for i in range(2):
        guided = UNCOND[i] + 6 * (COND[i] - UNCOND[i])
        matched = guided * (COND[i].std() / guided.std())
        assert (out[i] - (rescale * matched + (1 - rescale) * guided)).abs().max() < F64
    if rescale == 1:
        assert (out.std((1, 2, 3)) - COND.std((1, 2, 3))).abs().max() < F64


def test_rescale_survives_a_flat_prediction() -> None:
    out = ClassifierFree(6.0, 0.7)(lambda x, level: torch.zeros_like(x), X, at(500))
    assert out.abs().max() == 0


@pytest.mark.parametrize("rescale", [-0.1, 1.1])
def test_a_rescale_beyond_its_range_is_refused(rescale: float) -> None:
    with pytest.raises(ValueError, match=f"guidance rescale is {rescale:g}, expected 0 to 1"):
        ClassifierFree(5.0, rescale)


@pytest.mark.parametrize(("timestep", "inside"), [(199, False), (200, True), (700, True), (701, False)])
def test_limited_guidance_is_guidance_inside_and_the_conditional_prediction_outside(
    timestep: float, inside: bool
) -> None:
    told = Told()
    out = IntervalLimited(5.0, 200, 700, rescale=0.4)(told, X, at(timestep))
    want = ClassifierFree(5.0, 0.4)(Told(), X, at(timestep)) if inside else COND
    assert torch.equal(out, want)
    assert told.asked == [4 if inside else 2]


def test_an_empty_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="lowest 700 is not below highest 200"):
        IntervalLimited(5.0, 700, 200)


def test_an_embedded_strength_is_part_of_the_condition_and_doubles_nothing() -> None:
    cond, uncond = rows()
    seen = Embedded(7.5).rows(cond, uncond)
    assert seen.guidance is not None and seen.guidance.tolist() == [7.5, 7.5]
    assert seen.text is cond.text and len(seen) == 2 and cond.guidance is None
    told = Told()
    assert torch.equal(Embedded(7.5)(told, X, at(500)), COND) and told.asked == [2]


# -- conditions with a strength


def test_a_strength_may_differ_by_image_and_follows_its_rows() -> None:
    cond = rows()[0].guided(torch.tensor([2.0, 7.5]))
    assert cond.rows(slice(1, 2)).guidance.tolist() == [7.5]
    assert Condition.cat([cond, cond]).guidance.tolist() == [2.0, 7.5, 2.0, 7.5]
    assert cond.null().guidance.tolist() == [2.0, 7.5]


def test_rows_with_and_without_a_strength_do_not_mix() -> None:
    cond = rows()[0]
    with pytest.raises(ValueError, match="either every condition has a guidance strength or none has"):
        Condition.cat([cond, cond.guided(3.0)])


# -- through the engine


class Rows(nn.Module):
    """A network whose output depends on its rows' text and strength; notes how many it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.seen: list[tuple[float, int]] = []
        self.prepared: list[int] = []

    def prepare(self, cond: Condition, size: tuple[int, int], timesteps: object = ()) -> Tensor:
        self.prepared.append(len(cond))
        strength = 0 if cond.guidance is None else cond.guidance[:, None]
        return (cond.text.mean((1, 2))[:, None] + strength)[:, :, None, None]

    def forward(self, x: Tensor, timestep: float, prepared: Tensor) -> Tensor:
        self.seen.append((float(timestep), len(x)))
        assert len(x) == len(prepared)
        return torch.tanh(self.weight * x + prepared)


def sampled(guider: Guider, sampler: object = None, steps: int = 5) -> tuple[Tensor, Rows]:
    network = Rows()
    engine = DiffusionEngine(network, nn.Identity(), nn.Identity(), ZeroSNR(), V())  # type: ignore[arg-type]
    cond, uncond = rows()
    noise = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    return engine.sample(cond, uncond, noise, steps=steps, guider=guider, sampler=sampler or DDIM()), network  # type: ignore[arg-type]


def test_sampling_shows_the_network_half_the_rows_outside_the_interval() -> None:
    """Steps at 999, 799, 599, 399 and 199."""
    _, network = sampled(IntervalLimited(5.0, 300, 700))
    assert network.seen == [(999, 2), (799, 2), (599, 4), (399, 4), (199, 2)]
    assert sorted(network.prepared) == [2, 4]  # once each


@pytest.mark.parametrize("sampler", [DDIM(), Heun(), DPMSolver2M()], ids=["ddim", "heun", "2m"])
def test_an_interval_over_all_timesteps_is_plain_guidance_and_over_none_is_none(sampler: object) -> None:
    everywhere, _ = sampled(IntervalLimited(5.0, 0, 1000), sampler)
    nowhere, _ = sampled(IntervalLimited(5.0, 1000, 1001), sampler)
    assert (everywhere - sampled(ClassifierFree(5.0), sampler)[0]).abs().max() == EXACT
    assert (nowhere - sampled(Unguided(), sampler)[0]).abs().max() == EXACT
    assert (everywhere - nowhere).abs().max() > 0.01


def test_sampling_with_scale_one_is_unguided() -> None:
    out, network = sampled(ClassifierFree(1.0))
    assert (out - sampled(Unguided())[0]).abs().max() < F32
    assert {count for _, count in network.seen} == {2}


def test_sampling_gives_the_network_an_embedded_strength_once_a_step() -> None:
    out, network = sampled(Embedded(3.0))
    assert network.prepared == [2] and [count for _, count in network.seen] == [2] * 5
    assert (out - sampled(Embedded(0.5))[0]).abs().max() > 0.01
    assert (sampled(Embedded(0.0))[0] - sampled(Unguided())[0]).abs().max() == EXACT
