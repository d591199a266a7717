"""Checks of schedules, samplers and losses: ``tables_*``, ``sampler_zerosnr_*``, ``loss_zerosnr*``."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sat.diffusion.denoiser import Denoiser
from sat.diffusion.guidance import ClassifierFree, Unguided
from sat.diffusion.level import Level
from sat.diffusion.loss import DenoisingLoss, Draw
from sat.diffusion.parameterisation import V
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.sampler import DDIM
from sat.diffusion.schedule import Discrete, ZeroSNR
from sat.diffusion.spacing import karras, timesteps
from tests.golden.file import Golden, GoldenError
from tests.golden.report import Report
from tests.golden.toy import condition, toy_network


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


def official_alphas(schedule: ZeroSNR, steps: int) -> Tensor:
    """alpha of the visited levels, most noise first, without the last; NaN for one step as officially."""
    alphas = torch.tensor([level.alpha for level in schedule.levels(steps)[:-1]], dtype=torch.float64)
    return alphas * float("nan") if steps == 1 else alphas


class Recorder(Process):
    """A plain process that keeps x after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def step(self, x: Tensor, x0: Tensor, now: Level, to: Level, ctx: ProcessContext) -> Tensor:
        """As the base class."""
        self.seen.append(super().step(x, x0, now, to, ctx))
        return self.seen[-1]


def check_sampler(golden: Golden, report: Report) -> None:
    """``sampler_zerosnr_*``: the whole loop over the toy network, with every intermediate the file holds."""
    if golden.metadata.get("sampler") != "ZeroSNRDDIMSampler":
        raise GoldenError(f"{golden.path}: sampler {golden.metadata.get('sampler')!r} is not supported yet")
    steps = int(golden.number("num_steps"))
    schedule = OfficialZeroSNR(shift=golden.number("shift_scale", 1.0))
    network, process, x0s = toy_network(golden), Recorder(), []
    guided = "in.uncond.crossattn" in golden
    cond = condition(golden, "cond")
    guider = ClassifierFree(golden.number("cfg_scale")) if guided else Unguided()
    rows = guider.rows(cond, condition(golden, "uncond") if guided else cond.null())
    noise = golden["in.noise"]
    prepared = network.prepare(rows, (noise.shape[2], noise.shape[3]))
    denoiser = Denoiser(network, V())

    def denoise(x: Tensor, level: Level) -> Tensor:
        x0s.append(denoiser(x, level, prepared))
        return x0s[-1]

    x = DDIM()(partial(guider, denoise), noise, schedule.levels(steps), process, ProcessContext())
    calls = len(rows)
    alphas = official_alphas(schedule, steps)[:, None].expand(-1, calls)
    ours = {
        "mid.denoiser_sigma": (report.table, alphas),
        "mid.network_t": (report.exact, torch.stack(network.times)),
        "mid.network_kw.idx": (report.exact, torch.stack(network.times)),
        "mid.network_x": (report.network, torch.stack(network.inputs)),
        "mid.network_output": (report.network, torch.stack(network.outputs)),
        "mid.denoised_before_guider": (report.network, torch.stack(x0s)),
        "mid.x_after_step": (report.network, torch.stack(process.seen)),
        "out.x": (report.network, x),
    }
    report.all(golden, ours)


def check_loss(golden: Golden, report: Report) -> None:
    """``loss_zerosnr*``: the training loss per image, from the stored random draws."""
    calls = golden.json("rng_calls")
    draws = [golden[f"in.rng{i}.{name}"] for i, name in enumerate(calls)]
    if calls[:2] != ["randint", "randn_like"]:
        raise GoldenError(f"{golden.path}: random calls {calls} are not those of the zero-SNR loss")
    index, eps = draws[0], draws[1]
    offset = golden.number("offset_noise_level", 0.0)
    if offset:
        eps = eps + offset * draws[2][:, None, None, None]
    schedule = ZeroSNR(shift=golden.number("shift_scale", 1.0))
    network, process = toy_network(golden), Process()
    x0 = golden["in.input"]
    prepared = network.prepare(condition(golden, "cond"), (x0.shape[2], x0.shape[3]))
    denoiser, ctx, level = Denoiser(network, V()), ProcessContext(), schedule.at(index)
    loss = DenoisingLoss()(denoiser, x0, prepared, Draw(index, eps), schedule, process, ctx)
    noised = process.noise(x0, eps, level, ctx)
    ours = {
        "mid.sigma_or_alpha": (report.table, torch.as_tensor(level.alpha).flatten()),
        "mid.noised_input": (report.network, noised),
        "mid.network_x": (report.network, network.inputs[0]),
        "mid.network_t": (report.exact, network.times[0]),
        "mid.kw.idx": (report.exact, network.times[0]),
        "mid.model_output": (
            report.network,
            denoiser.parameterisation.to_x0(network.outputs[0], noised, level),
        ),
        "out.loss_per_sample": (report.network, loss),
    }
    report.all(golden, ours)


def check_tables(golden: Golden, report: Report) -> None:
    """``tables_*``: every stored schedule, recomputed from the numbers in its name."""
    for name in golden.names("mid.", "out."):
        for pattern, make in _TABLES.items():
            if found := re.fullmatch(pattern, name):
                ours = np.array(make(*map(_number, found.groups())))
                report.table(name, torch.from_numpy(ours), golden[name])
                break
        else:
            report.unknown(name)


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _zero_alphas(shift: float, steps: int) -> list[float]:
    return [*official_alphas(ZeroSNR(shift), steps).tolist(), 0.0]


def _nearest(table: np.ndarray, values: list[float]) -> list[int]:
    return [int(np.abs(table - value).argmin()) for value in values]


def _zero_quantised(shift: float, steps: int) -> list[float]:
    return [float(level.net_alpha) for level in ZeroSNR(shift).levels(steps)[:-1]]


def _sigmas(steps: int) -> list[float]:
    return [float(level.sigma) for level in Discrete().levels(steps)]


_ALL, _N, _SHIFT = r"out\.", r"\.n(\d+)", r"zerosnr_shift([\d.]+)"
_TABLES = {
    rf"{_ALL}timesteps_ascending{_N}": lambda n: timesteps(n, 1000)[::-1],
    rf"{_ALL}{_SHIFT}\.idx_ascending{_N}": lambda s, n: [int(v.index) for v in ZeroSNR(s).levels(n)[:-1]][
        ::-1
    ],
    rf"{_ALL}{_SHIFT}\.alpha_sqrt_append0{_N}": _zero_alphas,
    rf"{_ALL}{_SHIFT}\.quantised_alpha{_N}": _zero_quantised,
    rf"{_ALL}{_SHIFT}\.quantised_idx{_N}": lambda s, n: _nearest(ZeroSNR(s).trained, _zero_quantised(s, n)),
    rf"{_ALL}legacy_ddpm\.sigmas_append0{_N}": _sigmas,
    rf"{_ALL}legacy_ddpm\.quantised_idx{_N}": lambda n: _nearest(Discrete().trained, _sigmas(n)[:-1]),
    rf"{_ALL}edm\.sigmas_append0{_N}": lambda n: [*karras(n, 0.002, 80.0), 0.0],
    rf"{_ALL}denoiser_table\.eps_legacy": lambda: Discrete().trained,
    rf"{_ALL}denoiser_table\.zerosnr_shift([\d.]+)": lambda s: ZeroSNR(s).trained,
}
