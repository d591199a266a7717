"""Checks from token ids to pixels: ``e2e_*``."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition, Sizes
from sat.config.build import components
from sat.diffusion.schedule import ZeroSNR
from sat.engine import DiffusionEngine
from sat.sampling.output import to_uint8
from tests.golden.build import engine
from tests.golden.file import Golden, GoldenError
from tests.golden.options import number
from tests.golden.report import Comparison, Report
from tests.golden.samplers import OfficialZeroSNR, Recorder, draws, next_draw


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
    """Text encoder, size vector, sampling, decoder and 8-bit pixels, each fed by the one before.

    With relay also the way of the low-resolution image into the sampler.
    """
    whole, experiment = engine(golden.json("config"), golden.weights())
    if isinstance(whole.schedule, ZeroSNR):
        whole.schedule = OfficialZeroSNR(shift=experiment.diffusion.schedule.params.get("shift", 1.0))
    sampler = components(experiment).sampler
    recorder = Recorder()
    listener = Listener(whole.network)
    cond = _condition(golden, whole)
    uncond = cond.null()
    low = low_image(golden, whole) if whole.process.input else None
    latent = whole.sample(
        cond,
        uncond,
        golden["in.noise"],
        steps=experiment.sampling.steps,
        guider=components(experiment).guider,
        sampler=sampler,
        low_res=None if low is None else low.latent,
        noise_sampler=partial(next_draw, draws(golden), golden),
        callback=recorder.done,
    )
    raw = whole.first_stage.decode(latent / whole.first_stage.scale_factor)
    image = whole.decode(latent)
    assert listener.first is not None, "the network was called"
    ours: dict[str, Comparison] = {
        "mid.network_t": (report.exact, torch.stack(listener.times)),
        "mid.first_network_output": (report.network, listener.first),
        "mid.x_after_step": (report.network, torch.stack(recorder.seen)),
        "mid.decoded_raw": (report.network, raw),
        "out.latent": (report.network, latent),
        "out.image01": (report.image, image),
    }
    if low is not None:
        ours = _low_comparisons(golden, report, low) | ours
    for name, condition in (("cond", cond), ("uncond", uncond)):
        if f"in.{name}.crossattn" in golden:
            report.network(f"in.{name}.crossattn", condition.text, golden[f"in.{name}.crossattn"])
            report.table(f"in.{name}.vector", condition.vector, golden[f"in.{name}.vector"])
    if "out.image_uint8_truncated" in golden:
        # A difference of 1e-3 of the range moves a truncated 8-bit value by one step at most.
        pixels = to_uint8(image).permute(0, 2, 3, 1)
        ours["out.image_uint8_truncated"] = (lambda *args: report.within(*args, 1.0), pixels)
    report.all(golden, ours)


class Low(NamedTuple):
    """The low-resolution image on its way into the sampler."""

    image: Tensor  # (B, 3, H, W) in [-1, 1], enlarged to the size of the result
    mean: Tensor  # (B, C, h, w) of the posterior, unscaled
    sample: Tensor  # (B, C, h, w) of the posterior, unscaled
    latent: Tensor  # the sample times the scale factor


def low_image(golden: Golden, whole: DiffusionEngine) -> Low:
    """The stored image, enlarged in pixels and encoded with the stored posterior noise.

    It is the file's three-channel input: at half the size, or at the result's size if only that is there.
    """
    height, width = _size(golden, whole)
    wanted = whole.process.input
    assert wanted is not None, "only asked for with relay"
    small = wanted.size(height, width)
    sizes = {
        name: tuple(golden[name].shape[2:])
        for name in golden.names("in.")
        if golden[name].ndim == 4 and golden[name].shape[1] == 3
    }
    halves = [name for name, size in sizes.items() if size == small]
    wholes = [name for name, size in sizes.items() if size == (height, width)]
    if len(halves or wholes) != 1:
        raise GoldenError(
            f"{golden.path}: relay needs one input image (in.image, in.lr_image or in.low*, {small[0]} x "
            f"{small[1]}, 3 channels); found {sizes or golden.names('in.')}"
        )
    noises = [name for name in golden.names("in.") if "posterior" in name]
    if len(noises) != 1:
        raise GoldenError(
            f"{golden.path}: encoding the low-resolution image draws noise; expected one in.posterior_noise, "
            f"found {noises or golden.names('in.')}"
        )
    image = signed(golden[(halves or wholes)[0]])
    if halves:
        image = wanted.enlarge(image)
    posterior = whole.first_stage.encode(image)
    sample = posterior.sample(golden[noises[0]])
    return Low(image, posterior.mode(), sample, sample * whole.first_stage.scale_factor)


def signed(image: Tensor) -> Tensor:
    """Pixels in [-1, 1]; all in [0, 1] they are taken for a picture as the decoder leaves it."""
    return image if bool((image < 0).any()) else image * 2 - 1


_LOW = r"\.lr|low|image|input|relay|encod|upsampl|posterior|\.z"


def _low_comparisons(golden: Golden, report: Report, low: Low) -> dict[str, Comparison]:
    """Stored tensors on the image's way, under the names such files use: the latent may be scaled or not."""
    found: dict[str, Comparison] = {}
    for name in golden.names("mid.", "out."):
        if not re.search(_LOW, name) or name == "out.image01" or "uint8" in name:
            continue
        stored = golden[name]
        network: Callable[..., None] = report.network
        if stored.shape == low.image.shape and re.search(r"up|x2|large|bilinear|resized", name):
            found[name] = (network, low.image if bool((stored < 0).any()) else (low.image + 1) / 2)
        elif stored.shape == low.latent.shape and re.search(r"mode|mean", name):
            found[name] = (network, low.mean)
        elif stored.shape == low.latent.shape:
            size = stored.abs().mean()
            nearest = min((low.latent, low.sample), key=lambda z: float((z.abs().mean() - size).abs()))
            found[name] = (network, nearest)
    return found


def _size(golden: Golden, whole: DiffusionEngine) -> tuple[int, int]:
    """Height and width in pixels: the metadata's, or those of the noise."""
    h, w = (int(n) * whole.first_stage.factor for n in golden["in.noise"].shape[2:])
    return int(number(golden, "height", h)), int(number(golden, "width", w))


def _condition(golden: Golden, whole: DiffusionEngine) -> Condition:
    """From the token ids and the picture's size, as the official sampler conditions: nothing cropped."""
    ids = golden["in.input_ids"]
    sizes = Sizes.uncropped(*_size(golden, whole), len(ids))
    return Condition(whole.conditioner.text(ids), whole.conditioner.size(*sizes))
