"""The UNet of CogView3-Base and Relay: what is prepared, the guidance strength, copies, precision, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sat.conditioning.conditioner import Condition
from sat.kernels.compile import recompute
from sat.mixins.cross_attention import CrossLayer
from sat.models.cogview3_unet import CogView3UNet
from sat.models.cogview3_unet.model import Downsample, ResBlock, Upsample
from sat.transformer import Transformer
from tests.small import fill
from tests.tolerances import BF16, EXACT, F64

X = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
T = torch.tensor([3.0, 900.0])
SMALL: dict[str, Any] = {
    "channels": 4, "width": 16, "multipliers": (1, 2, 3), "blocks": 1, "attention": (2, 4),
    "depths": (1, 2, 3), "head_dim": 8, "text_dim": 24, "text_len": 7, "size_dim": 40, "groups": 8,
}  # fmt: skip


def unet(**changes: Any) -> CogView3UNet:
    model = CogView3UNet(**{**SMALL, **changes}).double()
    fill(model)
    return model.eval()


def condition(batch: int = 2, *, dtype: torch.dtype = torch.float64, one_size: bool = False) -> Condition:
    g = torch.Generator().manual_seed(1)
    text = torch.randn(batch, 7, 24, generator=g, dtype=torch.float64).to(dtype)
    vector = torch.randn(1 if one_size else batch, 40, generator=g, dtype=torch.float64).to(dtype)
    return Condition(text, vector.expand(batch, -1))


@torch.no_grad()
def run(model: CogView3UNet, x: Tensor = X, t: Tensor = T, cond: Condition | None = None) -> Tensor:
    cond = cond or condition(len(x), dtype=x.dtype)
    return model(x, t, model.prepare(cond, (x.shape[2], x.shape[3])))


def test_places_are_the_official_ones() -> None:
    """Stem at 0, then residual blocks and a change of resolution at each level but the last; mirrored."""
    model = CogView3UNet(**{**SMALL, "blocks": 2})
    kinds = {ResBlock: "R", Transformer: "T", Downsample: "D", Upsample: "U"}
    spelled = [
        " ".join("".join(kinds[type(layer)] for layer in layers) or "-" for layers in side)
        for side in (model.down, [model.middle], model.up)
    ]
    assert spelled == ["- R R D RT RT D RT RT", "RTR", "RT RT RTU RT RT RTU R R R"]
    assert [len(m.blocks) for m in model.modules() if isinstance(m, Transformer)] == [
        *(2, 2), *(3, 3), 3, *(3, 3, 3), *(2, 2, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("one_size", [True, False])
def test_prepared_steps_equal_those_prepared_at_each(one_size: bool) -> None:
    model = unet()
    cond = condition(one_size=one_size)
    steps = [999.0, 500.0, 17.0]
    once, each = model.prepare(cond, (8, 12), steps), model.prepare(cond, (8, 12))
    assert set(once.steps) == set(steps) and not each.steps
    assert {len(emb) for emb in once.steps.values()} == {1 if one_size else 2}
    with torch.no_grad():
        for t in steps:
            assert (model(X, t, once) - model(X, torch.full((2,), t), each)).abs().max() < F64
        assert (model(X, 250.0, once) - model(X, 250.0, each)).abs().max() < F64  # a step between two


def test_equal_guidance_strengths_share_one_row_and_others_do_not() -> None:
    model = unet(guidance_dim=12)
    for strengths, rows in (([7.5, 7.5], 1), ([7.5, 2.0], 2)):
        cond = condition(one_size=True).guided(torch.tensor(strengths))
        once, each = model.prepare(cond, (8, 12), [500.0]), model.prepare(cond, (8, 12))
        assert len(once.steps[500.0]) == rows
        with torch.no_grad():
            assert (model(X, 500.0, once) - model(X, 500.0, each)).abs().max() < F64


def test_keys_and_values_of_the_text_are_computed_once_per_preparation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = unet()
    made: list[int] = []
    original = CrossLayer.keys_values
    monkeypatch.setattr(
        CrossLayer, "keys_values", lambda self, text: made.append(id(self)) or original(self, text)
    )
    prepared = model.prepare(condition(), (8, 12), [999.0, 500.0])
    layers = [id(m) for m in model.modules() if isinstance(m, CrossLayer)]
    assert sorted(made) == sorted(layers)
    with torch.no_grad():
        model(X, 999.0, prepared)
        model(X, 500.0, prepared)
    assert len(made) == len(layers)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = unet()
    alone = run(model, X[1:], T[1:], condition().rows(slice(1, 2)))
    assert (run(model)[1:] - alone).abs().max() < F64


def test_swapped_axes_give_another_image() -> None:
    model = unet()
    tall = run(model, X.transpose(2, 3).contiguous())
    assert tall.shape == (2, 4, 12, 8)
    assert (tall.transpose(2, 3) - run(model)).abs().max() > 0.1


def test_masked_padding_changes_nothing() -> None:
    model, cond = unet(), condition()
    mask = torch.arange(7).expand(2, 7) < 5
    other = cond.text.clone()
    other[:, 5:] = 9.0
    outs = [run(model, cond=Condition(text, cond.vector, mask)) for text in (cond.text, other)]
    assert (outs[0] - outs[1]).abs().max() < F64
    assert (outs[0] - run(model, cond=cond)).abs().max() > 1e-3  # and the mask does something


@pytest.mark.parametrize("part", ["text", "vector", "index"])
def test_every_input_reaches_the_output(part: str) -> None:
    model, cond = unet(), condition()
    other = {
        "text": (T, Condition(cond.text + 1, cond.vector)),
        "vector": (T, Condition(cond.text, cond.vector + 1)),
        "index": (T + 50, cond),
    }[part]
    assert (run(model) - run(model, X, *other)).abs().max() > 1e-3


def test_a_fresh_guidance_embedding_changes_nothing() -> None:
    plain = unet()
    model = CogView3UNet(**SMALL, guidance_dim=12).double()
    load = model.load_state_dict(plain.state_dict(), strict=False)
    assert load.missing_keys == ["guidance.weight"] and not load.unexpected_keys
    assert (run(model, cond=condition().guided(7.5)) - run(plain)).abs().max() == EXACT


def test_the_guidance_strength_is_added_before_the_time_mlp() -> None:
    """The embedding written out: silu(time(sinusoid(t) + W features(w)) + size)."""
    model = unet(guidance_dim=12)
    cond = condition().guided(torch.tensor([7.5, 2.0]))
    seen: list[Tensor] = []
    hook = model.time.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    run(model, cond=cond)
    hook.remove()
    k = torch.arange(8, dtype=torch.float64)
    angles = T.double()[:, None] * 10000 ** (-k / 8)
    plain = torch.cat([angles.cos(), angles.sin()], 1)
    j = torch.arange(6, dtype=torch.float64)
    turns = 1000 * torch.tensor([[7.5], [2.0]], dtype=torch.float64) * 10000 ** (-j / 5)
    want = plain + torch.cat([turns.sin(), turns.cos()], 1) @ model.guidance.weight.T
    assert (seen[0] - want).abs().max() < 5e-3  # angles of 7500 radians in float32
    assert (seen[0] - plain).abs().max() > 0.1


def test_a_strength_for_a_network_that_takes_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"this network takes none \(guidance_dim is null\)"):
        unet().prepare(condition().guided(7.5), (8, 12))


def test_a_distilled_network_may_run_without_a_strength() -> None:
    model = unet(guidance_dim=12)
    plain = unet()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if n != "guidance.weight"})
    assert (run(model) - run(plain)).abs().max() == EXACT


def test_the_guidance_embedding_takes_a_checkpoints_width() -> None:
    model = unet(guidance_dim=12)
    model.guidance.adopt((16, 20))
    assert model.guidance.weight.shape == (16, 20) and model.guidance.in_features == 20
    assert run(model, cond=condition().guided(7.5)).isfinite().all()


def test_a_copy_runs_its_own_blocks() -> None:
    """Hooks are bound methods and partials: a closure would keep the original's modules."""
    model = unet()
    before = run(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(run(twin), before)
    assert run(model).abs().max() == 0


def test_recomputed_activations_change_no_gradient() -> None:
    grads = []
    for recomputed in (False, True):
        model = unet()
        if recomputed:
            assert recompute(model) == sum(isinstance(module, Transformer) for module in model.modules())
        model(X, T, model.prepare(condition(), (8, 12))).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(g is not None and g.abs().max() > 0 for g in grads[0])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # same operations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_close_to_float32(dtype: torch.dtype) -> None:
    model = unet().float()
    fill(model, std=0.1)  # at 0.3 softmax saturates and rounding picks another token
    wide = run(model, X.float())
    narrow = run(model.to(dtype), X.to(dtype))
    assert narrow.dtype == dtype
    assert (narrow.float() - wide).pow(2).mean().sqrt() / wide.std() < BF16


def test_a_fresh_model_predicts_zero() -> None:
    assert run(CogView3UNet(**SMALL).double()).abs().max() == 0
    assert run(CogView3UNet(**SMALL, zero_init=False).double()).std() > 0.01


def test_every_residual_branch_starts_closed() -> None:
    """A head that is not zero shows the stem and the 1x1 convolutions only."""
    model = CogView3UNet(**SMALL).double()
    for module in model.modules():
        if isinstance(module, ResBlock):
            x = torch.randn(2, module.norm1.num_channels, 4, 6, dtype=torch.float64)
            emb = torch.randn(2, 64, dtype=torch.float64)
            assert torch.equal(module(x, emb), module.shortcut(x))
        if isinstance(module, Transformer):
            leave = module.mixins["map"].leave
            assert leave.weight.abs().max() == leave.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("size", "tokens", "message"),
    [
        ((6, 12), 7, "6 x 12 cells does not halve 2 times: expected multiples of 4 cells"),
        ((8, 10), 7, "8 x 10 cells does not halve 2 times"),
        ((8, 12), 5, "takes 7 text tokens, got 5"),
    ],
)
def test_bad_shapes_are_named(size: tuple[int, int], tokens: int, message: str) -> None:
    cond = condition()
    with pytest.raises(ValueError, match=message):
        unet().prepare(Condition(cond.text[:, :tokens], cond.vector), size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 2)}, r"depths \[1, 2\] must give one number for each of the multipliers \[1, 2, 3\]"),
        ({"depths": (), "multipliers": ()}, r"one number for each of the multipliers \[\]"),
        ({"depths": (1, 0, 3)}, r"depths \[1, 0, 3\] are at least 1"),
        ({"blocks": 0}, "blocks is 0, expected at least 1"),
        ({"head_dim": 5}, "a width of 32 does not divide into heads of 5"),
        ({"groups": 5}, "16 channels cannot be normalised in 5 groups"),
        ({"guidance_dim": 2}, "guidance_dim 2: expected at least 4 features, or null"),
    ],
)
def test_impossible_sizes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CogView3UNet(**{**SMALL, **changes})


def test_the_hook_table_names_its_owners() -> None:
    assert "cross      cross" in unet().hooks and "embed      map" in unet().hooks


@pytest.mark.skipif(torch.__version__ < "2.6", reason="this torch's compiler does not know replace()")
def test_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # conftest.py turns it off for the others
    model = unet(multipliers=(1, 2), depths=(1, 1), attention=(2,))  # tracing takes time
    prepared = model.prepare(condition(), (8, 12))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert (compiled(X, T, prepared) - model(X, T, prepared)).abs().max() < F64


@pytest.fixture(scope="module")
def published() -> CogView3UNet:
    """2.9 B parameters without memory."""
    with torch.device("meta"):
        return CogView3UNet(guidance_dim=512)


@pytest.mark.parametrize("cells", [(64, 64), (128, 128), (48, 96)], ids=str)
def test_the_published_size_gives_the_latents_shape_on_the_meta_device(
    published: CogView3UNet, cells: tuple[int, int]
) -> None:
    """512 pixels for the base, 1024 for relay, and a size that is not square."""
    net = published
    with torch.device("meta"):
        cond = Condition(torch.empty(2, 225, 4096), torch.empty(2, 1536)).guided(7.5)
        prepared = net.prepare(cond, cells)
        out = net(torch.empty(2, 4, *cells), torch.empty(2, 1, 1, 1), prepared)
    assert out.shape == (2, 4, *cells)
