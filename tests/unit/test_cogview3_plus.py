"""The CogView3-Plus network: streams, positions, what is computed once, precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sat.conditioning.conditioner import Condition
from sat.kernels.compile import recompute
from sat.mixins.adaln import AdaLN
from sat.mixins.joint_attention import JointAttention
from sat.mixins.sincos import SinCos2D, sincos_table
from sat.models.cogview3_plus import CogView3Plus
from sat.transformer import Context, Grid
from sat.transformer.transformer import attend, modulated, residual
from tests.small import condition, fill, plus
from tests.tolerances import BF16, F32, F64

X = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(2))
T = torch.tensor([3.0, 900.0])


def run(model: CogView3Plus, x: Tensor = X, t: Tensor = T, cond: Condition | None = None) -> Tensor:
    cond = cond or condition(len(x), dtype=x.dtype)
    return model(x, t, model.prepare(cond, (x.shape[2], x.shape[3])))


def test_text_tokens_get_no_position() -> None:
    model = plus()
    context = model.prepare(condition(), (6, 10)).context
    table = context.table
    assert context.segments == (7, 15)
    assert table is not None and table.shape == (1, 22, 32)
    assert table[0, :7].abs().max() == 0
    assert torch.equal(table[0, 7:], sincos_table(9, 11, 32)[:3, :5].reshape(15, 32))


def test_first_half_of_the_table_is_the_column() -> None:
    table = sincos_table(3, 5, 8)
    assert torch.equal(table[0, :, :4], table[2, :, :4])  # rows do not change the first half
    assert torch.equal(table[:, 0, 4:], table[:, 4, 4:])  # columns do not change the second
    k = torch.arange(2) / 2
    want = torch.cat([(4 * 10000.0**-k).sin(), (4 * 10000.0**-k).cos()])
    assert torch.allclose(table[1, 4, :4], want, atol=1e-6)


def test_a_grid_larger_than_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="10 x 3 patches do not fit the 9 x 11 position table"):
        SinCos2D(32, 9, 11).position(Context(grid=Grid(10, 3)))


def test_adaln_rows_are_image_first_in_the_weights() -> None:
    mixin = AdaLN(dim=3, emb_dim=5, depth=1)
    fill(mixin)
    emb = torch.randn(2, 5)
    attention, mlp = mixin.modulate(Context(emb=emb), 0) or ()
    raw = mixin.layers[0](emb).chunk(12, -1)
    assert torch.equal(attention.shift[:, 1], raw[0]) and torch.equal(attention.gate[:, 1], raw[2])
    assert torch.equal(mlp.scale[:, 1], raw[4])
    assert torch.equal(attention.shift[:, 0], raw[6]) and torch.equal(mlp.gate[:, 0], raw[11])


@pytest.mark.parametrize("first", [0, 3, 7])
def test_modulation_without_gradients_equals_the_formula(first: int) -> None:
    mixin = AdaLN(dim=4, emb_dim=5, depth=1)
    fill(mixin)
    m, _ = mixin.modulate(Context(emb=torch.randn(2, 5)), 0) or ()
    x, y = torch.randn(2, 7, 4), torch.randn(2, 7, 4)
    row = (torch.arange(7) >= first).long()
    segments = (first, 7 - first)
    want = x * (1 + m.scale[:, row]) + m.shift[:, row]
    want_residual = x + m.gate[:, row] * y
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(modulated(x.clone(), m, segments, x.dtype), want, atol=1e-6)
            assert torch.allclose(residual(x, y.clone(), m, segments), want_residual, atol=1e-6)


def test_a_text_token_that_stands_for_three_is_attended_to_as_three() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8)  # two text tokens, three of the image
    places = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3, 4])
    ctx = Context(segments=(2, 3), text_repeat=3)
    out = JointAttention().attend(lambda q, k, v, ctx: attend(q, k, v), q, k, v, ctx)
    assert torch.equal(out, attend(q, k[:, :, places], v[:, :, places]))


def test_training_and_sampling_paths_agree() -> None:
    model = plus().double()
    x = X.double()
    with torch.no_grad():
        sampled = run(model, x)
    assert (run(model, x) - sampled).abs().max() < F64


def test_modulations_of_all_steps_equal_those_of_each() -> None:
    model = plus().double()
    cond, x = condition(dtype=torch.float64, one_size=True), X.double()
    steps = [999.0, 500.0, 17.0]
    with torch.no_grad():
        once = model.prepare(cond, (6, 10), steps)
        each = model.prepare(cond, (6, 10))
        assert set(once.steps) == set(steps) and not each.steps
        for t in steps:
            assert (model(x, t, once) - model(x, torch.full((2,), t), each)).abs().max() < F64


def test_rows_of_different_sizes_are_not_shared() -> None:
    model = plus()
    prepared = model.prepare(condition(), (6, 10), [999.0])
    assert not prepared.steps and prepared.size_emb.shape[0] == 2


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = plus().double()
    with torch.no_grad():
        whole = run(model, X.double())
        cond = condition(dtype=torch.float64)
        alone = model(X[1:].double(), T[1:], model.prepare(cond.rows(slice(1, 2)), (6, 10)))
    assert (whole[1:] - alone).abs().max() < F64


def test_swapped_axes_give_another_image() -> None:
    model = plus()
    with torch.no_grad():
        tall = run(model, X.transpose(2, 3).contiguous())
        wide = run(model)
    assert tall.shape == (2, 4, 10, 6)
    assert (tall.transpose(2, 3) - wide).abs().max() > 0.1


def test_recomputed_activations_change_no_gradient() -> None:
    grads = []
    for recomputed in (False, True):
        model = plus().double()
        if recomputed:
            recompute(model)
        run(model, X.double()).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # same operations


def test_bfloat16_is_close_to_float32() -> None:
    model = plus()
    with torch.no_grad():
        wide = run(model)
        narrow = run(model.bfloat16(), X.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wide).pow(2).mean().sqrt() / wide.std() < BF16


def test_float16_survives_values_beyond_its_range() -> None:
    model = plus()
    with torch.no_grad():
        model.transformer.blocks[0].mlp.down.weight.mul_(3e4)  # a branch of about 1e6 in the residual stream
        model.transformer.blocks[1].attn.proj.bias.add_(5e4)
        wide = run(model)
        model.half()
        narrow = run(model, X.half())
        branch = model.transformer.blocks[0].mlp.down(torch.ones(1, 128, dtype=torch.float16))
    assert branch.isinf().any()  # the guard is needed
    assert narrow.isfinite().all()
    assert (narrow.float() - wide).pow(2).mean().sqrt() / wide.std() < BF16


def test_masked_padding_changes_nothing() -> None:
    model = plus().double()
    cond = condition(dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 5:] = False
    other = cond.text.clone()
    other[:, 5:] = 9.0
    outs = []
    with torch.no_grad():
        for text in (cond.text, other):
            out = model(X.double(), T, model.prepare(Condition(text, cond.vector, mask), (6, 10)))
            outs.append(out)
    assert (outs[0] - outs[1]).abs().max() < F64


@pytest.mark.parametrize(
    ("size", "tokens", "message"),
    [
        ((5, 10), 7, "5 x 10 cells does not divide into patches of 2"),
        ((6, 10), 5, "takes 7 text tokens, got 5"),
    ],
)
def test_bad_shapes_are_named(size: tuple[int, int], tokens: int, message: str) -> None:
    cond = condition()
    with pytest.raises(ValueError, match=message):
        plus().prepare(Condition(cond.text[:, :tokens], cond.vector), size)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="dim 30 is not divisible by heads 4"):
        CogView3Plus(dim=30, heads=4, depth=1)


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"depth": -1}, {"patch": 0}, {"text_len": 0}, {"heads": 0}])
def test_sizes_must_be_positive(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CogView3Plus(**{"dim": 32, "heads": 4, "depth": 1, "text_dim": 16, **wrong})


def test_a_fresh_model_predicts_zero() -> None:
    shape = {"dim": 32, "heads": 4, "depth": 2, "channels": 4, "text_dim": 16, "text_len": 7, "emb_dim": 24}
    model = CogView3Plus(**shape, size_dim=48, table_size=(9, 11))
    assert run(model).abs().max() == 0  # adaLN-zero: closed gates and a zero head
    busy = CogView3Plus(**shape, size_dim=48, table_size=(9, 11), zero_init=False)
    assert run(busy).std() > 0.01


@pytest.mark.skipif(torch.__version__ < "2.6", reason="this torch's compiler does not know replace()")
def test_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # conftest.py turns it off for the others
    model = plus()
    prepared = model.prepare(condition(one_size=True), (6, 10))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert (compiled(X, T, prepared) - model(X, T, prepared)).abs().max() < F32
