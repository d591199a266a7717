"""Checks of schedules: ``tables_*``."""

from __future__ import annotations

import re

import numpy as np
import torch

from sat.diffusion.schedule import Discrete, ZeroSNR, karras, timesteps
from tests.golden.file import Golden
from tests.golden.report import Report
from tests.golden.samplers import noises


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
    schedule = ZeroSNR(shift)
    return [*noises(schedule, schedule.levels(steps)[:-1], steps).tolist(), 0.0]


def _nearest(table: np.ndarray, values: list[float]) -> list[int]:
    return [int(np.abs(table - value).argmin()) for value in values]


def _zero_quantised(shift: float, steps: int) -> list[float]:
    return [float(level.net_alpha) for level in ZeroSNR(shift).levels(steps)[:-1]]


def _sigmas(steps: int) -> list[float]:
    return [float(level.sigma) for level in Discrete().levels(steps)]


_ALL, _N, _SHIFT = r"out\.", r"\.n(\d+)", r"zerosnr_shift([\d.]+)"
_TABLES = {
    rf"{_ALL}timesteps_ascending{_N}": lambda n: timesteps(n, 1000)[::-1],
    rf"{_ALL}{_SHIFT}\.idx_ascending{_N}": lambda s, n: [int(v.timestep) for v in ZeroSNR(s).levels(n)[:-1]][
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
