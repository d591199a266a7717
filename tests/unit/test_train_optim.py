"""Which parameters decay, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sat.config.schema import Component
from sat.train.optim import build_optimizer, groups, prolonged, rate, set_rate, trainable
from tests.small import plus
from tests.training import CONFIG, Toy, changed


class Parts(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(5, 4)
        self.table = nn.Parameter(torch.zeros(2, 3, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.again = self.linear


def test_only_matrices_and_kernels_decay() -> None:
    parts = Parts()
    decayed, kept = groups(parts, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in parts.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"linear.weight", "conv.weight"}
    assert {names[id(p)] for p in kept["params"]} == {
        "linear.bias", "conv.bias", "norm.weight", "norm.bias", "embedding.weight", "table",
    }  # fmt: skip


def test_every_trained_parameter_of_the_network_is_in_one_group() -> None:
    network = plus()
    found = [id(p) for group in groups(network, 0.1) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in trainable(network).values())


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        groups(nn.Linear(2, 2).requires_grad_(False), 0.0)


def test_warm_up_rises_in_equal_steps_to_the_full_rate() -> None:
    config = changed(CONFIG, warmup=4, steps=100, lr=2.0, schedule="constant")
    assert [rate(step, config) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_falls_to_the_floor() -> None:
    config = changed(CONFIG, warmup=0, steps=100, lr=2.0, schedule="cosine", min_lr_ratio=0.1)
    assert rate(0, config) == 2.0
    assert rate(50, config) == pytest.approx(2.0 * (0.1 + 0.9 * (math.cos(math.pi / 2) + 1) / 2))
    assert rate(100, config) == rate(1000, config) == pytest.approx(0.2)


def test_a_prolonged_cosine_says_what_the_rate_does_and_has_three_ways() -> None:
    first = replace(CONFIG, lr=2.0, schedule="cosine", warmup=2, steps=12, min_lr_ratio=0.1)
    longer = replace(first, steps=16)
    before = [rate(step, first) for step in range(12)]
    assert prolonged(first, 12, 12, [12]) == ([12], "")
    assert prolonged(longer, 12, None, []) == ([16], ""), "an older checkpoint"
    assert prolonged(replace(longer, schedule="constant"), 12, 12, [12])[1] == ""
    ends = {}
    for way in ("stretch", "constant", "rewarm"):
        config = replace(longer, prolong=way)
        cycles, said = prolonged(config, 12, 12, [12])
        ends[way] = [rate(step, config, cycles) for step in range(16)]
        assert "train.steps 12 -> 16: " in said
        assert f"(train.prolong={way})" in said
        assert f"goes from {before[-1]:.2g} to {ends[way][12]:.2g} at step 13" in said
        assert prolonged(config, 14, 16, cycles) == (cycles, ""), "resumed once more"
    assert ends["stretch"] == [rate(step, longer) for step in range(16)], "as before there was a choice"
    assert ends["constant"] == [*before, *[before[-1]] * 4]
    assert ends["rewarm"][:12] == before
    assert ends["rewarm"][12:14] == [pytest.approx((before[-1] + 2.0) / 2), 2.0]
    assert ends["rewarm"][15] < ends["rewarm"][14] <= 2.0
    cycles, said = prolonged(replace(first, steps=8, prolong="constant"), 6, 12, [12])
    assert (cycles, "(train.prolong=stretch)" in said) == ([8], True), "shorter"


def test_the_rate_reaches_every_group() -> None:
    optimizer = torch.optim.AdamW(groups(Toy(), 0.1), lr=torch.tensor(1.0), foreach=False)
    optimizer.param_groups[1]["lr"] = 1.0
    set_rate(optimizer, 0.25)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(("kind", "given", "fused"), [
    (torch.optim.AdamW, {}, True), (torch.optim.AdamW, {"foreach": True}, False),
    (torch.optim.AdamW, {"fused": False}, False), (torch.optim.Adamax, {}, False),
])  # fmt: skip
def test_torch_optimizers_run_fused_unless_told_otherwise(kind, given, fused) -> None:
    config = changed(CONFIG, optimizer=Component(f"torch.optim.{kind.__name__}", given))
    optimizer = build_optimizer(config, [], groups(Toy(), 0.1))
    assert type(optimizer) is kind and bool(optimizer.defaults.get("fused")) == fused
