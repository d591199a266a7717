"""Which parameters decay, and the learning rate of each step."""

from __future__ import annotations

import copy
import io
import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sat.config.schema import Component, GroupConfig
from sat.train.optim import (
    RateError,
    Scheduler,
    build_optimizer,
    groups,
    prolonged,
    rate,
    set_rate,
    trainable,
)
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


def test_linear_falls_to_the_floor() -> None:
    config = changed(CONFIG, warmup=10, steps=110, lr=2.0, schedule="linear", min_lr_ratio=0.1)
    assert [rate(step, config) for step in (4, 9, 10)] == [1.0, 2.0, 2.0]
    assert rate(60, config) == pytest.approx(2.0 * 0.55)
    assert rate(109, config) == pytest.approx(2.0 * (1 - 0.9 * 0.99))
    assert rate(110, config) == rate(1000, config) == pytest.approx(0.2)


def test_inverse_square_root_begins_at_the_full_rate_and_has_no_end() -> None:
    config = changed(CONFIG, warmup=16, steps=1000, lr=2.0, schedule="inverse_sqrt")
    assert [rate(step, config) for step in (7, 15, 16, 64, 400)] == [
        1.0,
        2.0,
        2.0,
        1.0,
        2.0 * math.sqrt(0.04),
    ]
    assert rate(999, replace(config, min_lr_ratio=0.5)) == 1.0
    cold = replace(config, warmup=0)
    assert [rate(step, cold) for step in (0, 3)] == [2.0, 1.0]
    longer = replace(config, steps=2000)
    cycles, said = prolonged(longer, 1000, 1000, [1000])
    assert (said, rate(1023, longer, cycles)) == ("", 2.0 * math.sqrt(16 / 1023))
    cycles, said = prolonged(replace(longer, prolong="constant"), 1000, 1000, [1000])
    assert "inverse_sqrt is kept" in said and rate(1999, longer, cycles) == rate(999, config)


def test_wsd_is_stable_and_falls_over_its_last_steps() -> None:
    config = changed(CONFIG, warmup=4, steps=100, lr=2.0, schedule="wsd", decay_steps=20, min_lr_ratio=0.1)
    assert [rate(step, config) for step in (1, 3, 4, 50, 80)] == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert rate(90, config) == pytest.approx(2.0 * 0.55)
    assert rate(99, config) == pytest.approx(2.0 * (1 - 0.9 * 0.95))
    assert rate(100, config) == pytest.approx(0.2)
    longer = replace(config, steps=200)
    cycles, said = prolonged(longer, 70, 100, [100])
    assert "the wsd now ends at step 200" in said and "from 2 to 2 at step 71" in said
    assert [rate(step, longer, cycles) for step in (99, 180)] == [2.0, 2.0]
    again = replace(longer, prolong="rewarm")
    cycles, said = prolonged(again, 100, 100, [100])
    assert "a second wsd follows" in said
    assert rate(99, again, cycles) == rate(99, config) < rate(100, again, cycles) < 2.0
    assert [rate(step, again, cycles) for step in (103, 180)] == [2.0, 2.0]
    assert rate(190, again, cycles) == pytest.approx(2.0 * 0.55)


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


def test_groups_have_their_own_rates_and_decays_and_are_told(caplog) -> None:
    caplog.set_level(logging.INFO)
    toy = Toy()
    own = [
        GroupConfig(["model.0.*"], lr=0.5), GroupConfig(["model.?.weight", "norm.*"], weight_decay=0.3),
    ]  # fmt: skip
    found = groups(toy, 0.1, own, 2.0)
    names = {id(p): name for name, p in toy.named_parameters()}
    assert [([names[id(p)] for p in g["params"]], g["weight_decay"], g["lr"]) for g in found] == [
        (["net.2.bias"], 0.0, 2.0), (["net.0.weight"], 0.1, 0.5), (["net.0.bias"], 0.0, 0.5),
        (["net.2.weight"], 0.3, 2.0), (["norm.weight", "norm.bias"], 0.0, 2.0),
    ]  # fmt: skip
    assert caplog.messages == [
        "the others: lr 2, 1 parameters (8) with no decay",
        "train.groups.0 (model.0.*): lr 0.5, 1 parameters (264) with decay 0.1 and "
        "1 parameters (33) with no decay",
        "train.groups.1 (model.?.weight, norm.*): lr 2, 1 parameters (264) with decay 0.3 and "
        "2 parameters (16) with no decay",
    ]
    optimizer = torch.optim.AdamW(found, lr=2.0)
    set_rate(optimizer, 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.25, 0.25, 1.0, 1.0]


@pytest.mark.parametrize(("own", "words"), [
    ([GroupConfig(["model.*"], lr=1.0), GroupConfig(["text.*"], lr=1.0)],
     "train.groups.1: 'text.*' matches no trained parameter"),
    ([GroupConfig(["frozen.weight"], lr=1.0)], "train.groups.0: 'frozen.weight' matches no trained"),
    ([GroupConfig(["model.*"], lr=1.0), GroupConfig(["model.0.bias"], lr=2.0)],
     "train.groups.1: 'model.0.bias' matches only what train.groups.0 has: put the narrower one first"),
    ([GroupConfig(["norm.*"], weight_decay=0.1)], "train.groups.0: `weight_decay` is for matrices"),
])  # fmt: skip
def test_groups_that_do_nothing_are_refused(own, words) -> None:
    with pytest.raises(RateError) as caught:
        groups(Toy(), 0.1, own, 1.0)
    assert words in str(caught.value)


def _scheduled(kind: str, params: dict, lr: float = 1.0, own: float = 0.5) -> Scheduler:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [first], "lr": lr}, {"params": [second], "lr": own}])
    config = replace(
        CONFIG, schedule=Component(f"torch.optim.lr_scheduler.{kind}", params), warmup=0, steps=12
    )
    return Scheduler(config, [], optimizer)


def _rates(scheduler: Scheduler, steps: int) -> list[tuple[object, ...]]:
    found = []
    for _ in range(steps):
        found.append(tuple((g["lr"], g["betas"]) for g in scheduler._optimizer.param_groups))
        scheduler.step()
    return found


@pytest.mark.parametrize(("kind", "params", "own"), [
    ("MultiStepLR", {"milestones": [3, 3, 9], "gamma": 0.3}, 0.5), ("ExponentialLR", {"gamma": 0.7}, 0.5),
    ("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 2}, 0.5),
    ("OneCycleLR", {"max_lr": 2.0, "total_steps": 14}, 1.0),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 2.0, "step_size_up": 3}, 1.0),
])  # fmt: skip
def test_schedulers_of_torch_go_on_to_the_bit(kind, params, own, caplog) -> None:
    expected = _rates(_scheduled(kind, params, own=own), 12)
    begun = _scheduled(kind, params, own=own)
    assert _rates(begun, 5) == expected[:5]
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    resumed = _scheduled(kind, params, own=own)
    resumed.load(torch.load(file, weights_only=True), 5)
    assert _rates(resumed, 7) == expected[5:]
    caplog.clear()
    late = _scheduled(kind, params, own=own)
    late.load(None, 5)
    assert _rates(late, 7) == expected[5:] and "as if it had made the 5 steps" in caplog.text


def test_a_scheduler_with_other_params_goes_on_by_them_and_says_so(caplog) -> None:
    state = copy.deepcopy(_scheduled("ExponentialLR", {"gamma": 0.7}).state_dict())
    other = _scheduled("ExponentialLR", {"gamma": 0.5})
    other.load(state, 3)
    assert other.rate == 0.125 and "another train.schedule" in caplog.text


def test_a_scheduler_that_has_its_own_rates_says_so_and_takes_no_groups(caplog) -> None:
    _scheduled("OneCycleLR", {"max_lr": 2.0, "total_steps": 14}, own=1.0)
    assert "OneCycleLR begins at its own rate 0.08: train.lr 1 is not used" in caplog.text
    with pytest.raises(RateError, match="override `lr` in train.groups"):
        _scheduled("OneCycleLR", {"max_lr": 2.0, "total_steps": 14})
    _scheduled("OneCycleLR", {"max_lr": 2.0, "total_steps": 12}, own=1.0)
    with pytest.raises(RateError, match=r"ends after 11 steps, train.steps is 12"):
        _scheduled("OneCycleLR", {"max_lr": 2.0, "total_steps": 11}, own=1.0)


def test_a_floor_that_nothing_falls_to_is_told(caplog) -> None:
    build_optimizer(changed(CONFIG, schedule="cosine", min_lr_ratio=0.1), [], groups(Toy(), 0.1))
    assert not caplog.messages
    build_optimizer(changed(CONFIG, schedule="constant", min_lr_ratio=0.1), [], groups(Toy(), 0.1))
    assert caplog.messages == [
        "train.min_lr_ratio 0.1 has no effect: train.schedule is constant; set it to 0, or choose a schedule "
        "that falls"
    ]


@pytest.mark.parametrize(("kind", "given", "fused"), [
    (torch.optim.AdamW, {}, True), (torch.optim.AdamW, {"foreach": True}, False),
    (torch.optim.AdamW, {"fused": False}, False), (torch.optim.Adamax, {}, False),
])  # fmt: skip
def test_torch_optimizers_run_fused_unless_told_otherwise(kind, given, fused) -> None:
    config = changed(CONFIG, optimizer=Component(f"torch.optim.{kind.__name__}", given))
    optimizer = build_optimizer(config, [], groups(Toy(), 0.1))
    assert type(optimizer) is kind and bool(optimizer.defaults.get("fused")) == fused
