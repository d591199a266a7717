"""Checks from token ids to pixels: ``e2e_plus*``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sat.conditioning.condition import Condition
from sat.conditioning.size import Sizes
from sat.config.build import build_guider, build_sampler
from sat.diffusion.schedule import ZeroSNR
from sat.engine import DiffusionEngine
from sat.util.images import to_uint8
from tests.golden.build import engine
from tests.golden.diffusion import OfficialZeroSNR, Recorder
from tests.golden.file import Golden
from tests.golden.report import Comparison, Report


class Listener:
    """Keeps the times a network was asked about and its first answer."""

    def __init__(self, network: nn.Module) -> None:
        self.times: list[Tensor] = []
        self.first: Tensor | None = None
        network.register_forward_hook(self._heard)

    def _heard(self, network: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self.times.append(torch.as_tensor(args[1], dtype=torch.float32).expand(out.shape[0]))
        self.first = out if self.first is None else self.first


@torch.inference_mode()
def check(golden: Golden, report: Report) -> None:
    """Text encoder, size vector, guided sampling, decoder and 8-bit pixels, each fed by the one before."""
    whole, experiment = engine(golden.json("config"), golden.weights())
    process = Recorder()
    whole.process = process
    if isinstance(whole.schedule, ZeroSNR):
        whole.schedule = OfficialZeroSNR(shift=experiment.diffusion.schedule.params.get("shift", 1.0))
    listener = Listener(whole.network)
    cond = _condition(golden, whole)
    uncond = cond.null()
    latent = whole.sample(
        cond,
        uncond,
        golden["in.noise"],
        steps=experiment.sampling.steps,
        guider=build_guider(experiment),
        sampler=build_sampler(experiment),
    )
    raw = whole.first_stage.decode(latent / whole.first_stage.scale_factor)
    image = whole.decode(latent)
    assert listener.first is not None, "the network was called"
    ours: dict[str, Comparison] = {
        "mid.network_t": (report.exact, torch.stack(listener.times)),
        "mid.first_network_output": (report.network, listener.first),
        "mid.x_after_step": (report.network, torch.stack(process.seen)),
        "mid.decoded_raw": (report.network, raw),
        "out.latent": (report.network, latent),
        "out.image01": (report.image, image),
    }
    for name, condition in (("cond", cond), ("uncond", uncond)):
        report.network(f"in.{name}.crossattn", condition.text, golden[f"in.{name}.crossattn"])
        report.table(f"in.{name}.vector", condition.vector, golden[f"in.{name}.vector"])
    if "out.image_uint8_truncated" in golden:
        # A difference of 1e-3 of the range moves a truncated 8-bit value by one step at most.
        pixels = to_uint8(image).permute(0, 2, 3, 1)
        ours["out.image_uint8_truncated"] = (lambda *args: report.within(*args, 1.0), pixels)
    report.all(golden, ours)


def _condition(golden: Golden, whole: DiffusionEngine) -> Condition:
    """From the token ids and the picture's size, as the official sampler conditions: nothing cropped."""
    ids = golden["in.input_ids"]
    sizes = Sizes.uncropped(int(golden.number("height")), int(golden.number("width")), len(ids))
    return Condition(whole.conditioner.text(ids), whole.conditioner.size(*sizes))
