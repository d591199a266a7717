"""A step cache reuses exactly what the blocks added, if the first adds nearly the same, within its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sat.diffusion.step_cache import Count, FirstBlock
from sat.models.cogview3_plus import CogView3Plus
from tests.adapters import unet
from tests.configs import DEBUG, debug, refused
from tests.small import condition, plus
from tests.tolerances import EXACT, F32

TIMES = [900.0, 600.0, 600.001, 20.0]
"""Between the second and the third nearly nothing changes."""


def steps(model: CogView3Plus, rows: int = 2, times: Sequence[float] = TIMES) -> list[Tensor]:
    """Outputs at some timesteps of one latent."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 4, 12, 20, generator=g)
    cond = condition(rows, one_size=True)
    prepared = model.prepare(cond, (12, 20), times)
    with torch.no_grad():
        return [model(x, t, prepared) for t in times]


def test_without_a_threshold_everything_is_computed_as_without_a_cache() -> None:
    model = plus()
    plain, count = steps(model), Count()
    with FirstBlock(0.0).over(model, count):
        cached = steps(model)
    assert count == Count(4, 4)
    assert all((a - b).abs().max() == EXACT for a, b in zip(plain, cached, strict=True))


def test_a_step_much_like_the_last_reuses_what_the_other_blocks_added() -> None:
    model = plus()
    plain, count = steps(model), Count()
    with FirstBlock(0.05).over(model, count):
        cached = steps(model)
    assert count == Count(4, 3)
    same = [(a - b).abs().max().item() == EXACT for a, b in zip(plain, cached, strict=True)]
    assert same == [True, True, False, True]
    # the third step by hand: its first block, and what the second block added at the second step
    seen: list[Tensor] = []
    blocks = model.transformer.blocks
    hooks = [block.register_forward_hook(lambda _, args, out: seen.append(out.clone())) for block in blocks]
    steps(model)
    for hook in hooks:
        hook.remove()
    first, last = seen[0::2], seen[1::2]
    cond = condition(2, one_size=True)
    prepared = model.prepare(cond, (12, 20), [TIMES[2]])
    x = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(2))
    step = prepared.steps[TIMES[2]]
    ctx = replace(prepared.context, image=x, emb=step.emb, modulation=step.modulation)
    with torch.no_grad():
        want = model.transformer.hooks.final(first[2] + (last[1] - first[1]), ctx)
    assert (cached[2] - want).abs().max() < 10 * F32


def test_rows_of_another_number_and_other_runs_share_nothing() -> None:
    model = plus()
    cache, count = FirstBlock(0.05), Count()
    with cache.over(model, count):
        steps(model, 2, TIMES[1:3])
        assert count == Count(2, 1)
        steps(model, 1, TIMES[1:3])
        assert count == Count(4, 2)
        steps(model, 2, TIMES[1:3])
        assert count == Count(6, 2)
    with cache.over(model, count):
        steps(model, 2, TIMES[1:3])
    assert count == Count(8, 3)


def test_afterwards_the_network_is_as_before() -> None:
    model = plus()
    owners = str(model.transformer.resolved)
    with pytest.raises(RuntimeError), FirstBlock(0.5).over(model, Count()):
        assert "step cache -> default" in str(model.transformer.resolved)
        raise RuntimeError
    assert str(model.transformer.resolved) == owners


CACHE = ("sampling.cache", {"target": "sat.diffusion.step_cache.FirstBlock", "params": {"threshold": 0.2}})


def test_a_config_may_name_one() -> None:
    assert debug(CACHE).sampling.cache is not None
    wrong = ("sampling.cache", {**CACHE[1], "params": {"threshold": 1.5}})
    assert "expected a relative change" in "\n".join(refused([DEBUG], ["conditioning.tokenizer=null", wrong]))
    tiled = ["conditioning.tokenizer=null", CACHE, "sampling.tile=8"]
    assert "the cache would take for steps" in "\n".join(refused([DEBUG], tiled)).replace("  ", " ")
    assert "CogView3UNet is not" in "\n".join(refused(["configs/tiny_base.yaml"], [CACHE]))


def test_a_network_of_several_transformers_is_refused() -> None:
    with pytest.raises(ValueError, match="CogView3UNet is not"), FirstBlock().over(unet(), Count()):
        pass
