"""Checks of samplers: ``sampler_*``, whole runs over the toy network."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sat.conditioning.conditioner import Condition
from sat.diffusion.guidance import ClassifierFree, Embedded, Guider, Unguided
from sat.diffusion.prediction import Denoiser, Eps, V
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.samplers import (
    DDIM,
    DPMSolver2M,
    DPMSolver2SAncestral,
    Euler,
    EulerAncestral,
    Heun,
    LinearMultistep,
    Sampler,
    Trajectory,
)
from sat.diffusion.schedule import Discrete, Level, Schedule, ZeroSNR
from sat.mixins.relay import RelayNoise
from tests.golden.file import Golden, GoldenError
from tests.golden.options import class_name, number, option, understood
from tests.golden.report import Comparison, Report
from tests.golden.toy import condition, toy_network

RELAY = "LinearRelayEDMSampler"
ZERO = "ZeroSNRDDIMSampler"
DEAF = {ZERO, "LinearMultistepSampler"}
"""Official samplers that do not tell the network the guidance strength."""


class OfficialZeroSNR(ZeroSNR):
    """Our schedule with the official accident put back for a run of one step, which ours defines as alpha 0.

    There the official rescaling divides 0 by 0. The nearest training level to NaN is the first, the least
    noisy, and x0 is computed with its alpha; as the last step returns x0, nothing else of the level matters.
    """

    def levels(self, steps: int) -> list[Level]:
        """As the base class, but for one step."""
        levels = super().levels(steps)
        if steps == 1:
            alpha = float(self.trained[0])
            levels[0] = levels[0]._replace(net_alpha=alpha, net_sigma=(1 - alpha**2) ** 0.5)
        return levels


class Recorder:
    """Keeps x after every step of a run: the ``x`` of the sampler's loop when it calls back."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def done(self, done: int, total: int, x0: Tensor) -> None:
        """The sampler's callback."""
        self.seen.append(sys._getframe(1).f_locals["x"])


#: Entries of the metadata that say what was run.
OPTIONS = (
    "sampler", "num_steps", "partial_num_steps", "shift_scale", "cfg_scale", "cfg_cond_scale",
    "cfg_cond_embed_dim", "s_churn", "s_tmin", "s_tmax", "s_noise", "eta", "order",
)  # fmt: skip


def check(golden: Golden, report: Report) -> None:
    """The run that the metadata describes, with every intermediate the file holds."""
    understood(golden, OPTIONS)
    name = class_name(golden, "sampler")
    sampler, schedule, process, steps = run_of(golden, name)
    recorder = Recorder()
    network = toy_network(golden)
    guider = guider_of(golden, name)
    rows = guider.rows(condition(golden, "cond"), _uncond(golden, guider))
    noise = golden["in.noise"]
    prepared = network.prepare(rows, (noise.shape[2], noise.shape[3]))
    denoiser = Denoiser(network, V() if isinstance(schedule, ZeroSNR) else Eps())
    levels: list[Level] = []
    x0s: list[Tensor] = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        levels.append(level)
        x0s.append(denoiser(x, level, prepared))
        return x0s[-1]

    path = Trajectory(
        process.hooks.levels(schedule, steps),
        process,
        ProcessContext(low_of(golden) if name == RELAY else None),
        partial(process.hooks.level_at_sigma, schedule),
        partial(next_draw, draws(golden), golden),
    )
    x = sampler(partial(guider, denoise), noise, path, recorder.done)
    times = torch.stack(network.times)
    ours: dict[str, Comparison] = {
        "mid.denoiser_sigma": (report.table, noises(schedule, levels, steps)[:, None].expand(-1, len(rows))),
        "mid.network_t": (report.exact, times),
        "mid.network_kw.idx": (report.exact, times),
        "mid.network_x": (report.network, torch.stack(network.inputs)),
        "mid.network_output": (report.network, torch.stack(network.outputs)),
        "mid.denoised_before_guider": (report.network, torch.stack(x0s)),
        "mid.x_after_step": (report.network, torch.stack(recorder.seen)),
        "out.x": (report.network, x),
    }
    if network.strengths:
        largest = 1000 * number(golden, "cfg_cond_scale")
        ours["mid.network_kw.scale_emb"] = (
            partial(report.sinusoid, largest=largest),
            torch.stack(network.strengths),
        )
    report.all(golden, ours)


def run_of(golden: Golden, name: str) -> tuple[Sampler, Schedule, Process, int]:
    """Our sampler, schedule and process for the official sampler ``name``, and the steps to take."""
    steps = int(number(golden, "num_steps"))
    if name == ZERO:
        return DDIM(), OfficialZeroSNR(number(golden, "shift_scale", 1.0)), Process(), steps
    churn, highest = number(golden, "s_churn", 0.0), number(golden, "s_tmax", float("inf"))
    noise, eta = number(golden, "s_noise", 1.0), number(golden, "eta", 1.0)
    process = Process()
    if name == RELAY:
        taken = int(number(golden, "partial_num_steps"))
        process = Process({"relay": RelayNoise(partial=1000 * taken / steps)})
        churn, steps = churn * taken / steps, taken  # official churn is counted over the whole run
    edm = (churn, number(golden, "s_tmin", 0.0), highest, noise)
    makers: dict[str, Callable[[], Sampler]] = {
        "EulerEDMSampler": lambda: Euler(*edm),
        RELAY: lambda: Euler(*edm),
        "HeunEDMSampler": lambda: Heun(*edm),
        "DDIMSampler": lambda: DDIM(share=number(golden, "s_noise", 0.1)),
        "EulerAncestralSampler": lambda: EulerAncestral(eta, noise),
        "DPMPP2SAncestralSampler": lambda: DPMSolver2SAncestral(eta, noise),
        "DPMPP2MSampler": DPMSolver2M,
        "LinearMultistepSampler": lambda: LinearMultistep(int(number(golden, "order", 4))),
    }
    if name not in makers:
        raise GoldenError(
            f"{golden.path}: sampler {name!r} is not supported yet; {ZERO} and {', '.join(makers)} are"
        )
    return makers[name](), Discrete(), process, steps


def guider_of(golden: Golden, name: str) -> Guider:
    """Guidance by two predictions, by a strength that the network is told, or none."""
    if option(golden, "cfg_cond_scale") is not None and name not in DEAF:
        return Embedded(number(golden, "cfg_cond_scale"))
    if option(golden, "cfg_scale") is not None:
        return ClassifierFree(number(golden, "cfg_scale"))
    return Unguided()


def _uncond(golden: Golden, guider: Guider) -> Condition:
    """The unconditional half, which must be there where it is used."""
    if isinstance(guider, ClassifierFree):
        return condition(golden, "uncond")
    return condition(golden, "cond").null()


def low_of(golden: Golden) -> Tensor:
    """The latent of the low-resolution image."""
    names = [name for name in golden.names("in.") if name.startswith(("in.image", "in.lr", "in.low"))]
    if len(names) != 1:
        raise GoldenError(
            f"{golden.path}: relay needs one latent, in.image*, in.lr* or in.low*; found {names}"
        )
    return golden[names[0]]


def noises(schedule: Schedule, levels: list[Level], steps: int) -> Tensor:
    """What the official denoiser is told of each level: sigma, or alpha under zero-SNR (NaN for one step)."""
    if not isinstance(schedule, ZeroSNR):
        return torch.tensor([level.sigma for level in levels], dtype=torch.float64)
    alphas = torch.tensor([level.alpha for level in levels], dtype=torch.float64)
    return alphas * float("nan") if steps == 1 else alphas


def draws(golden: Golden) -> Iterator[Tensor]:
    """The stored unit noise, in the order it was drawn."""
    if "in.randn_like_draws" not in golden:
        return iter(())
    return iter(golden["in.randn_like_draws"])


def next_draw(stored: Iterator[Tensor], golden: Golden) -> Tensor:
    """One more of them."""
    drawn = next(stored, None)
    if drawn is None:
        raise GoldenError(f"{golden.path}: the sampler draws more noise than in.randn_like_draws holds")
    return drawn
