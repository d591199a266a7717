"""Checks of the UNet of CogView3-Base, CogView3-Relay and their distilled versions: ``unet_*``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition
from sat.models.cogview3_unet import CogView3UNet, Prepared
from tests.golden.build import unet
from tests.golden.file import Golden, GoldenError
from tests.golden.options import option
from tests.golden.report import Comparison, Report


class Probe:
    """Keeps what leaves each place of the way, and the timestep's embedding, under the official names."""

    def __init__(self, net: CogView3UNet) -> None:
        self.seen: dict[str, Tensor] = {}
        self._handles = [
            module.register_forward_hook(partial(self._heard, name)) for name, module in _places(net)
        ]

    def _heard(self, name: str, module: nn.Module, args: tuple[object, ...], out: Tensor) -> None:
        self.seen[name] = out

    def remove(self) -> None:
        """Take the probe out of the network."""
        for handle in self._handles:
            handle.remove()


def _places(net: CogView3UNet) -> Iterator[tuple[str, nn.Module]]:
    """Official name and module."""
    yield "time_embed", net.time
    yield "input_block0", net.stem
    yield "middle_block", net.middle[-1]
    for side, places in (("input", net.down), ("output", net.up)):
        for place, layers in enumerate(places):
            if len(layers):  # type: ignore[arg-type]
                yield f"{side}_block{place}", layers[-1]  # type: ignore[index]


@torch.inference_mode()
def check(golden: Golden, report: Report) -> None:
    """One forward pass as in training, a time per image, and one as in sampling, a time for all."""
    x, times, text = golden["in.x"], golden["in.timesteps"], golden["in.context"]
    net = unet(golden.json("config"), golden.weights(), text.shape[1])
    cells = (x.shape[2], x.shape[3])
    ready = partial(prepared, golden, net, Condition(text=text, vector=golden["in.y"]), cells)
    probe = Probe(net)
    out = net(x, times.reshape(-1, 1, 1, 1), ready())
    probe.remove()
    ours: dict[str, Comparison] = {"out.output": (report.network, out)}
    for name, tensor in probe.seen.items():
        ours[f"mid.{name}"] = (report.network, tensor)
        ours[f"mid.{name}_mean_abs"] = (report.network, tensor.abs().mean())
    report.all(golden, ours)
    steps(report, net, x, times, ready, out, golden["out.output"])


def steps(
    report: Report,
    net: CogView3UNet,
    x: Tensor,
    times: Tensor,
    ready: Callable[..., Prepared],
    out: Tensor,
    stored: Tensor,
) -> None:
    """As a sampler calls it: each time once for all images, its embedding made beforehand."""
    known = sorted({float(t) for t in times})
    prepared = ready(known)
    rows = torch.empty_like(out)
    for time in known:
        mine = times == time
        rows[mine] = net(x, time, prepared)[mine]
    report.network("out.output (prepared steps)", rows, stored)


def prepared(
    golden: Golden,
    net: CogView3UNet,
    cond: Condition,
    cells: tuple[int, int],
    timesteps: Sequence[float] = (),
) -> Prepared:
    """What the steps share. The features of a guidance strength are the file's where it holds them."""
    if "in.scale_emb" not in golden:
        strength = option(golden, "cfg_cond_scale")
        return net.prepare(cond if strength is None else cond.guided(float(strength)), cells, timesteps)
    if net.guidance is None:
        raise GoldenError(f"{golden.path}: in.scale_emb is there, but the config has no cfg_cond_embed_dim")
    features = golden["in.scale_emb"]
    if features.shape[1] != net.guidance.in_features:
        raise GoldenError(
            f"{golden.path}: in.scale_emb is {features.shape[1]} wide, w_proj {net.guidance.in_features}"
        )
    return replace(net.prepare(cond, cells), guidance=F.linear(features, net.guidance.weight))
