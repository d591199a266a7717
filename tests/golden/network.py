"""Checks of the CogView3-Plus network: ``dit_*``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition
from tests.golden.build import network
from tests.golden.file import Golden, GoldenError
from tests.golden.report import Comparison, Report

CELL = 8
"""Pixels to a latent cell, for the stored target sizes."""


class Probe:
    """Keeps what enters the first block, what leaves each, and the embedding they are modulated by."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.embedded: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self.emb: list[Tensor] = []
        self._handles = [blocks[0].register_forward_pre_hook(self._enter)]
        self._handles += [block.register_forward_hook(self._leave) for block in blocks]

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.embedded.append(args[0])
        self.emb.append(args[1].emb)

    def _leave(self, block: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self.hidden.append(out)

    def remove(self) -> None:
        """Take the probe out of the network."""
        for handle in self._handles:
            handle.remove()


@torch.inference_mode()
def check(golden: Golden, report: Report) -> None:
    """One forward pass as in training, a time per image, and as in sampling if the times are all alike."""
    net = network(golden.json("config"), golden.weights())
    images, times = golden["in.images"], golden["in.timesteps"]
    cells = (images.shape[2], images.shape[3])
    for height, width in golden["in.target_size"].reshape(-1, 2).tolist():
        if (height // CELL, width // CELL) != cells:
            raise GoldenError(
                f"{golden.path}: target size {height} x {width} is not that of {cells} latent cells"
            )
    cond = Condition(text=golden["in.context"], vector=golden["in.y"])
    probe = Probe(net.transformer.blocks)
    out = net(images, times.reshape(-1, 1, 1, 1), net.prepare(cond, cells))
    probe.remove()
    ours: dict[str, Comparison] = {
        "mid.emb_time_plus_label": (report.network, probe.emb[0]),
        "mid.hidden_after_embed": (report.network, probe.embedded[0]),
        "out.output": (report.network, out),
    }
    for layer, hidden in enumerate(probe.hidden):
        ours[f"mid.hidden_after_layer{layer}"] = (report.network, hidden)
    report.all(golden, ours)
    time = times.tolist()
    if len(set(time)) == 1:
        # As a sampler calls it: the modulations of all its steps are computed beforehand.
        prepared = net.prepare(cond, cells, [time[0], time[0] / 2])
        report.network("out.output (prepared steps)", net(images, time[0], prepared), golden["out.output"])
