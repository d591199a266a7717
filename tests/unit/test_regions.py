"""Regional prompts: who attends to whom, equal to attention written out, and off where they do not act."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sat.control_input import ControlInput
from sat.mixin import Mixin, wraps
from sat.mixins.regions import NAME, Areas, _joint_mask, attached, regions
from sat.models.cogview3_unet import CogView3UNet
from sat.transformer import Context, TransformerHooks
from sat.transformer.hooks import Attend
from tests.small import condition, fill, plus
from tests.tolerances import F64

GRID = (3, 5)  # patches
LEFT = torch.zeros(6, 10, dtype=torch.float64)
LEFT[:, :4] = 1  # two of five columns of patches
RIGHT = torch.zeros(6, 10, dtype=torch.float64)
RIGHT[2:, 6:] = 1
AREAS = Areas(torch.stack([LEFT, RIGHT]), (7, 7))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unet() -> CogView3UNet:
    made = CogView3UNet(
        channels=4, width=16, multipliers=(1, 2), blocks=1, attention=(1, 2), depths=(1, 2), head_dim=8,
        text_dim=16, text_len=7, size_dim=48, groups=4, zero_init=False,
    )  # fmt: skip
    fill(made)
    return made.eval()


class Watch(Mixin):
    """Keeps what attention is given and gives."""

    host = TransformerHooks

    def __init__(self, seen: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.seen = seen

    @wraps("attend")
    def attend(self, inner: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        out = inner(q, k, v, ctx)
        self.seen.append((q, k, v, out))
        return out


NETWORKS = {"plus": plus, "unet": unet}
both = pytest.mark.parametrize("network", [make().double() for make in NETWORKS.values()], ids=NETWORKS)


def run(network: nn.Module, own: ControlInput | None, rows: slice = slice(None)) -> Tensor:
    """The network's output for two rows, read within a context of regions if there are any."""
    cond = condition(2, dtype=torch.float64).rows(rows)
    x = drawn(3, 2, 4, 6, 10)[rows]
    if own is None:
        return network(x, 500.0, network.prepare(cond, (6, 10)))
    with torch.no_grad(), attached(network):
        return network(x, 500.0, network.prepare(replace(cond, controls=(own.rows(rows),)), (6, 10)))


def texts(share: float = 0.8, areas: Areas = AREAS) -> ControlInput:
    return regions(drawn(5, 2, sum(areas.lengths), 16), areas, share)


@both
def test_a_share_of_0_is_the_network_without_regions(network: nn.Module) -> None:
    assert (run(network, texts(0.0)) - run(network, None)).abs().max() < F64


@both
def test_the_unconditional_half_is_drawn_without_regions(network: nn.Module) -> None:
    half = texts()
    mixed = replace(half, strengths=(half.null().strengths[0], half.strengths[1]))
    out, plain = run(network, mixed), run(network, None)
    assert (out[0] - plain[0]).abs().max() < F64 and (out[1] - plain[1]).abs().max() > 1e-3


@both
def test_the_network_is_as_before_afterwards(network: nn.Module) -> None:
    before = str(network.hooks)
    run(network, texts())
    assert str(network.hooks) == before and NAME not in before


@both
def test_rows_do_not_depend_on_each_other(network: nn.Module) -> None:
    whole = run(network, texts())
    for row in (slice(0, 1), slice(1, 2)):
        assert (run(network, texts(), row) - whole[row]).abs().max() < F64


def test_a_region_of_everything_with_the_prompts_own_text_changes_nothing_in_the_unet() -> None:
    network = unet().double()
    everywhere = Areas(torch.ones(1, 6, 10, dtype=torch.float64), (7,))
    own = regions(condition(2, dtype=torch.float64).text, everywhere, 1.0)
    assert (run(network, own) - run(network, None)).abs().max() < F64


def test_the_mask_says_who_sees_whom() -> None:
    inside = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)  # cells 0 to 3; 3 in no region
    see = _joint_mask(2, (1, 2), inside)[0, 0]
    names = ["t0", "t0", "a", "b", "b", *(f"c{i}" for i in range(4))]

    def seen(who: int) -> set[str]:
        return {name for name, yes in zip(names, see[who].tolist(), strict=True) if yes}

    assert seen(2) == {"a", "c0", "c1"} and seen(3) == {"b", "c1", "c2"}
    assert seen(5) == {"a", "c0", "c1"}
    assert seen(6) == {"a", "b", "c0", "c1", "c2"}
    assert seen(8) == {"t0", "c0", "c1", "c2", "c3"}
    assert see.any(1).all()


def test_joint_attention_equals_two_attentions_written_out() -> None:
    network = plus().double()
    transformer = network.transformer
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with torch.no_grad(), attached(network):
        transformer.extend("watch", Watch(seen))
        cond = replace(condition(2, dtype=torch.float64), controls=(texts(0.7),))
        network(drawn(3, 2, 4, 6, 10), 500.0, network.prepare(cond, (6, 10)))
    inside = torch.zeros(2, *GRID, dtype=torch.bool)
    inside[0, :, :2], inside[1, 1:, 3:] = True, True
    inside = inside.flatten(1)
    for q, k, v, out in seen:
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        count, text = q.shape[2], 7
        allowed = torch.zeros(count, count, dtype=torch.bool)
        plain = torch.zeros(count, count, dtype=torch.bool)
        image = range(21, 36)
        for i in range(count):
            for j in range(count):
                plain[i, j] = (j < text) or (j >= 21)
                cell, other = i - 21, j - 21
                if i in image and j in image:
                    mine = inside[:, cell]
                    allowed[i, j] = bool((mine & inside[:, other]).any()) or not bool(mine.any())
                elif i in image:
                    region = (j - 7) // 7
                    allowed[i, j] = not bool(inside[:, cell].any()) if j < 7 else bool(inside[region, cell])
                elif i >= 7:
                    region = (i - 7) // 7
                    allowed[i, j] = j // 7 == region + 1 if j < 21 else bool(inside[region, other])
                else:
                    allowed[i, j] = j < 7
        one = logits.masked_fill(~plain, float("-inf")).softmax(-1) @ v
        two = logits.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
        wanted = torch.cat([one[:, :, :7], two[:, :, 7:21], one[:, :, 21:].lerp(two[:, :, 21:], 0.7)], 2)
        assert (out - wanted).abs().max() < F64
    assert len(seen) == 2


def test_cells_far_from_a_region_keep_the_prompts_text_in_the_unet() -> None:
    """One transformer layer: cross-attention is cell by cell."""
    network = unet().double()
    transformer = network.down[1][1]
    x, ctx_cells = drawn(7, 2, 60, 16), (6, 10)
    cond = replace(condition(2, dtype=torch.float64), controls=(texts(1.0),))
    with torch.no_grad(), attached(network):
        prepared = network.prepare(cond, ctx_cells)
        ctx = replace(prepared.contexts["down.1.1"], image=drawn(8, 2, 16, *ctx_cells))
        regional = transformer.hooks.cross(x, ctx, 0)
    ctx = replace(
        network.prepare(replace(cond, controls=()), ctx_cells).contexts["down.1.1"], image=ctx.image
    )
    plain = transformer.hooks.cross(x, ctx, 0)
    only = replace(cond, text=texts().value[:, :7], controls=())
    left = transformer.hooks.cross(
        x, replace(network.prepare(only, ctx_cells).contexts["down.1.1"], image=ctx.image), 0
    )
    inside = (LEFT > 0).flatten()
    neither = ~(inside | (RIGHT > 0).flatten())
    assert (regional - plain)[:, neither].abs().max() < F64
    assert (regional - left)[:, inside].abs().max() < F64


def test_a_range_of_noise_leaves_regions_out_elsewhere() -> None:
    own = replace(texts(), start=0.2, end=0.6)
    cond = replace(condition(2, dtype=torch.float64), controls=(own,))
    assert [len(cond.at(share).controls) for share in (1.0, 0.85, 0.79, 0.5, 0.4, 0.3, 0.0)] == [
        0, 0, 1, 1, 1, 0, 0
    ]  # fmt: skip


def test_masked_text_of_regions_is_not_seen() -> None:
    network = plus().double()
    hidden = torch.ones(1, 14, dtype=torch.bool)
    hidden[0, 3:7] = False
    masked = replace(AREAS, text_mask=hidden)
    value = texts().value
    other = value.clone()
    other[:, 3:7] = drawn(9, 2, 4, 16)
    out = [run(network, regions(v, masked, 0.8)) for v in (value, other)]
    assert (out[0] - out[1]).abs().max() < F64
    assert (run(network, regions(other, AREAS, 0.8)) - run(network, texts())).abs().max() > 1e-6
