"""Checks of training losses: ``loss_*``, per image over the toy network."""

from __future__ import annotations

import torch
from torch import Tensor

from sat.diffusion.loss import DenoisingLoss, Draw
from sat.diffusion.prediction import Denoiser, Eps, V
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.schedule import Discrete, Schedule, ZeroSNR
from sat.mixins.relay import RelayNoise
from tests.golden.file import Golden, GoldenError
from tests.golden.options import number, option, understood
from tests.golden.report import Comparison, Report
from tests.golden.toy import condition, toy_network


def check(golden: Golden, report: Report) -> None:
    """Noised input, prediction and loss from the stored random draws."""
    understood(
        golden, ("type", "shift_scale", "partial_num_steps", "blurring_schedule", "offset_noise_level")
    )
    kind = option(golden, "type") or "l2"
    if kind not in ("l2", "l1"):
        why = ": VGG takes three channels, latents have more" * (kind == "lpips")
        raise GoldenError(f"{golden.path}: type {kind!r} of a loss is not supported{why}")
    zero = "zerosnr" in golden.name or option(golden, "shift_scale") is not None
    schedule: Schedule = ZeroSNR(shift=number(golden, "shift_scale", 1.0)) if zero else Discrete()
    process, ctx = process_of(golden)
    network = toy_network(golden)
    x0 = golden["in.input"]
    prepared = network.prepare(condition(golden, "cond"), (x0.shape[2], x0.shape[3]))
    denoiser = Denoiser(network, V() if zero else Eps())
    draw = draw_of(golden)
    loss = DenoisingLoss(kind=kind)(denoiser, x0, prepared, draw, schedule, process, ctx)
    level = process.hooks.at(schedule, draw.timestep)
    noised = process.noise(x0, draw.eps, level, ctx)
    times = network.times[0]
    ours: dict[str, Comparison] = {
        "mid.sigma_or_alpha": (report.table, torch.as_tensor(level.alpha if zero else level.sigma).flatten()),
        "mid.noised_input": (report.network, noised),
        "mid.network_x": (report.network, network.inputs[0]),
        "mid.network_t": (report.exact, times),
        "mid.kw.idx": (report.exact, times),
        "mid.network_output": (report.network, network.outputs[0]),
        "mid.model_output": (
            report.network,
            denoiser.prediction.to_x0(network.outputs[0], noised, level),
        ),
        "out.loss_per_sample": (report.network, loss),
    }
    report.all(golden, ours)


def process_of(golden: Golden) -> tuple[Process, ProcessContext]:
    """Relay where the file has a low-resolution latent, else plain diffusion."""
    if "in.lr_input" not in golden:
        if "relay" in golden.name:
            raise GoldenError(f"{golden.path}: a relay loss needs in.lr_input")
        return Process(), ProcessContext()
    blend = option(golden, "blurring_schedule") or "linear"
    if blend not in ("linear", "exp", "sigma"):
        raise GoldenError(f"{golden.path}: blurring_schedule {blend!r} is not supported yet")
    relay = RelayNoise(partial=number(golden, "partial_num_steps", 500), blend=blend)
    return Process({"relay": relay}), ProcessContext(golden["in.lr_input"])


def draw_of(golden: Golden) -> Draw:
    """Timesteps: the first integers drawn (relay draws unused ones after). Then noise, then the offset."""
    calls = golden.json("rng_calls")

    def first(kind: str) -> Tensor:
        if kind not in calls:
            raise GoldenError(f"{golden.path}: random calls {calls} lack {kind}")
        return golden[f"in.rng{calls.index(kind)}.{kind}"]

    index, eps = first("randint"), first("randn_like")
    offset = number(golden, "offset_noise_level", 0.0)
    if offset:
        eps = eps + offset * first("randn")[:, None, None, None]
    return Draw(index, eps)
