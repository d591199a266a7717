"""Hooks: declared by name, checked when the class is defined, resolved once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sat.config.build import build_engine
from sat.config.load import load
from sat.mixin import HookConflictError, HookError, Mixin, replaces, wraps
from sat.mixins.qk_norm import QKNorm
from sat.mixins.rope import RoPE
from sat.models.cogview3_plus import CogView3Plus
from sat.transformer import Context, TransformerHooks
from sat.transformer.hooks import Layer
from tests.configs import DEBUG, ROOT
from tests.small import condition, plus


class Scale(Mixin):
    host = TransformerHooks

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    @wraps("layer")
    def scale(self, inner: Layer, x: Tensor, ctx: Context, layer: int) -> Tensor:
        return self.by * inner(x, ctx, layer)


def test_unknown_hook_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(HookError, match="has no hook 'atend'; did you mean 'attend'"):

        class Bad(Mixin):
            host = TransformerHooks

            @replaces("atend")
            def f(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor: ...


def test_wrong_parameters_are_refused_with_the_right_ones() -> None:
    with pytest.raises(
        HookError, match=r"with parameters \['q', 'mask'\]; it must take \['q', 'k', 'v', 'ctx'\]"
    ):

        class Bad(Mixin):
            host = TransformerHooks

            @replaces("attend")
            def f(self, q: Tensor, mask: Tensor) -> Tensor: ...


def test_two_owners_of_a_hook_are_refused_by_name() -> None:
    with pytest.raises(HookConflictError, match="mixins 'qk_norm' and 'again' both replace hook 'norm_qk'"):
        plus(mixins={"again": QKNorm(8)})


def test_a_mixin_of_another_host_is_refused() -> None:
    class Elsewhere(Mixin):
        host = dict

    with pytest.raises(HookError, match="plugs into dict, not into TransformerHooks"):
        plus(mixins={"stray": Elsewhere()})


def test_owners_are_shown_outermost_first() -> None:
    model = plus(mixins={"one": Scale(1.0), "two": Scale(2.0)})
    lines = dict(line.split(maxsplit=1) for line in model.hooks.splitlines())
    assert lines["layer"] == "two -> one -> default"
    assert lines["position"] == "joint_attention -> position"
    assert lines["attend"] == "joint_attention -> default"


def test_the_four_mixins_own_their_hooks_by_name() -> None:
    """Joint attention, adaLN and RoPE of configs/debug_rope.yaml, relay of configs/relay_plus.yaml."""

    def owners(laid_over: str, *overrides: str) -> dict[str, str]:
        config = ROOT / "configs" / laid_over
        experiment = load([DEBUG, config], ["conditioning.tokenizer=null", *overrides])
        hooks = build_engine(experiment, device="cpu", dtype=torch.float32, load_weights=False).hooks
        return dict(line.split(maxsplit=1) for line in hooks.splitlines())

    network = owners("debug_rope.yaml")
    assert network["rotate_qk"] == "rope" and network["modulate"] == "adaln"
    assert network["embed"] == "joint_attention -> patch_embed"
    assert network["attend"] == network["position"] == "joint_attention -> default"
    assert network["final"] == "joint_attention -> final_layer" and network["mean"] == "default"
    sizes = "sampling.sizes={min: 16, max: 64, multiple: 16, max_area: 4096}"
    small = (sizes, "sampling.height=48", "sampling.width=64", "checkpoint.path=null")
    process = owners("relay_plus.yaml", *small)
    assert process["mean"] == "relay -> default" and process["start"] == "relay"
    assert process["position"] == "joint_attention -> position"  # the table


def test_wrappers_apply_in_order() -> None:
    plain, once = plus(), plus(mixins={"one": Scale(1.0), "two": Scale(1.0)})
    once.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 6, 10)
    t = torch.tensor([3.0, 900.0])
    assert torch.equal(
        plain(x, t, plain.prepare(condition(), (6, 10))), once(x, t, once.prepare(condition(), (6, 10)))
    )


def test_a_mixin_takes_the_place_of_a_standard_one_by_name() -> None:
    model = plus(mixins={"position": RoPE(8, 6, 10)})
    assert "rotate_qk  position" in model.hooks
    assert not [k for k in model.state_dict() if "position" in k]


def test_a_deep_copy_runs_its_own_weights() -> None:
    model = plus()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.transformer.blocks[0].mlp.up.weight.add_(1)
        twin.transformer.mixins["patch_embed"].proj.weight.add_(1)
    x, t, c = torch.randn(2, 4, 6, 10), torch.tensor([3.0, 900.0]), condition()
    assert not torch.equal(model(x, t, model.prepare(c, (6, 10))), twin(x, t, twin.prepare(c, (6, 10))))
    assert isinstance(twin, CogView3Plus)
