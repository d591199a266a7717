"""A mixture of eight Gaussians, learned by a small network and distilled to one step: all modes stay."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from sat.data.batch import Batch
from sat.diffusion.loss import DenoisingLoss, Draw
from sat.diffusion.prediction import Denoiser, Flow
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.samplers import DDIM, Trajectory
from sat.diffusion.schedule import FlowMatching
from sat.train.objectives.distillation import Distillation
from tests.unit.test_few_step_training import engine

RADIUS, DEVIATION, POINTS = 1.4, 0.3, 10_000
PATH, LEARNED, TOGETHER = 50, 400, 256  # the teacher's steps, the student's updates, points in each
SCHEDULE = FlowMatching(1.0, 0.0)
ANGLES = torch.arange(8) * math.pi / 4
CENTRES = RADIUS * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


class Plane(nn.Module):
    """A network of points in the plane, as latents (B, 2, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", torch.arange(1, 9) * math.pi / 2)
        sizes, parts = (18, 128, 128, 128), list[nn.Module]()
        for i in range(3):
            parts += [nn.Linear(sizes[i], sizes[i + 1]), nn.SiLU()]
        self.layers = nn.Sequential(*parts, nn.Linear(128, 2))

    def prepare(self, *given: object) -> None:
        return None

    def forward(self, x: Tensor, timestep: float | Tensor, prepared: None) -> Tensor:
        t = torch.as_tensor(timestep, dtype=torch.float32).expand(len(x))[:, None] / 1000 * self.rates
        return self.layers(torch.cat([x.flatten(1), t.sin(), t.cos()], 1))[:, :, None, None]  # type: ignore[no-any-return]


def points(count: int, generator: torch.Generator) -> Tensor:
    """(count, 2) of the mixture."""
    place = torch.randint(8, (count,), generator=generator)
    return CENTRES[place] + DEVIATION * torch.randn(count, 2, generator=generator)


def energy(a: Tensor, b: Tensor) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'|, of all pairs."""

    def mean(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([torch.cdist(part, y).mean() for part in x.split(1000)]).mean()

    return float(2 * mean(a, b) - mean(a, a) - mean(b, b))


@torch.no_grad()
def drawn(network: nn.Module, steps: int) -> Tensor:
    """POINTS points in ``steps``."""
    noise = torch.randn(POINTS, 2, 1, 1, generator=torch.Generator().manual_seed(5))
    denoiser, path = Denoiser(network, Flow()), Trajectory(SCHEDULE.levels(steps), Process())  # type: ignore[arg-type]
    return DDIM()(lambda x, level: denoiser(x, level, None), noise, path).flatten(1)


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    """The teacher, and the average of a student that learns where its paths of 50 steps end."""
    whole, generator = engine(), torch.Generator().manual_seed(0)
    whole.network = network = Plane()
    whole.schedule, whole.prediction = SCHEDULE, Flow()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        x0 = points(512, generator)[:, :, None, None]
        draw = Draw(
            torch.randint(1000, (512,), generator=generator), torch.randn(x0.shape, generator=generator)
        )
        given = None, draw, SCHEDULE, Process(), ProcessContext()
        optimizer.zero_grad()
        DenoisingLoss()(whole.denoiser, x0, *given).mean().backward()
        optimizer.step()
        rates.step()
    made = Distillation(
        method="consistency", guidance=1.0, terminal=1.0, regression=LEARNED, path=PATH, engine=whole
    )
    made.begin(None)
    made.train()
    teacher, student = copy.deepcopy(network), copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), 4e-3, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, LEARNED)
    size, text = torch.full((TOGETHER, 2), 8), torch.zeros(TOGETHER, 8, 24)
    for made.step in range(LEARNED):
        x0 = points(TOGETHER, generator)[:, :, None, None] / whole.first_stage.scale_factor
        moments = torch.cat([x0, torch.full_like(x0, -30.0)], 1)
        batch = Batch([""] * TOGETHER, size, size * 0, size, text=text, latent_moments=moments)
        optimizer.zero_grad()
        made(batch, generator)["loss"].backward()
        optimizer.step()
        rates.step()
        with torch.no_grad():
            for average, now in zip(student.parameters(), network.parameters(), strict=True):
                average.lerp_(now, 0.01)
    return teacher, student


def test_one_step_covers_eight_of_eight_modes_as_near_as_its_teacher(
    networks: tuple[nn.Module, nn.Module],
) -> None:
    """Energy distance of 10,000 points, to 1.5 times the larger of the teacher's and of two true samples.

    The teacher's is that of its 50 steps.
    """
    true, other = (points(POINTS, torch.Generator().manual_seed(seed)) for seed in (10, 11))
    made, before = drawn(networks[1], 1), drawn(networks[0], 1)
    limit = 1.5 * max(energy(true, other), energy(drawn(networks[0], PATH), true))
    assert energy(made, true) <= limit < 0.1 * energy(before, true)
    near = torch.cdist(made, CENTRES).min(1)
    shares = torch.bincount(near.indices[near.values < 2 * DEVIATION], minlength=8) / POINTS
    assert shares.min() > 0.7 / 8 * (1 - math.exp(-2)), shares  # of those within two deviations
