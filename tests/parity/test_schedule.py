"""The zero-SNR schedule and its DDIM step against diffusers' scheduler for CogView3-Plus."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from sat.diffusion.prediction import V
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.schedule import ZeroSNR
from tests.tolerances import F32


@pytest.mark.parametrize("steps", [4, 50])
def test_steps_equal_diffusers(steps: int) -> None:
    peer = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=4.0, timestep_spacing="trailing",
        clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    peer.set_timesteps(steps)
    levels = ZeroSNR(rescale="before_spacing").levels(steps)
    assert [round(float(level.timestep)) for level in levels[:-1]] == [int(t) for t in peer.timesteps]
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    mine = theirs = x
    for i, t in enumerate(peer.timesteps):
        out = torch.tanh(theirs + i)
        theirs = peer.step(out, t, theirs).prev_sample
        x0 = V().to_x0(torch.tanh(mine + i), mine, levels[i])
        mine = Process().step(mine, x0, levels[i], levels[i + 1], ProcessContext())
    assert (mine - theirs).abs().max() < F32  # the peer's table is float32
