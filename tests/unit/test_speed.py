"""What makes sampling faster leaves the numbers: packed weights, kernels, compiled and recorded passes."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition
from sat.diffusion.step_cache import Count, FirstBlock
from sat.errors import UserError
from sat.first_stage.model import AutoencoderKL, Upsample
from sat.kernels import apply as speed
from sat.kernels import attention as kernels
from sat.kernels import compile as fast
from sat.kernels import convolutions, exp_attention, packed
from sat.kernels.apply import Folded, Folding, Ragged, fold
from sat.kernels.packed import PackedLinear, SigmoidFeedForward, by_sigmoid, pack, packable
from sat.mixin import Mixin, wraps
from sat.mixins.qk_norm import QKNorm
from sat.mixins.rope import RoPE
from sat.models.cogview3_plus import CogView3Plus
from sat.models.cogview3_unet import CogView3UNet
from sat.parallel.launch import Axis
from sat.parallel.sequence import apply_sequence
from sat.train.lora import pack_frozen
from sat.transformer import Context, Transformer, TransformerHooks
from tests.small import condition, fill, plus
from tests.tolerances import BF16, F32, F64

CPU = torch.device("cpu")
NARROW_AND_SINGLE = (torch.bfloat16, torch.float32)
TIMES = (999.0, 17.0)
OLDEST = torch.__version__ < "2.6"
"""The oldest torch that is allowed, whose compiler tells more layers and sizes apart."""


def step(
    model: CogView3Plus, time: float = TIMES[0], seed: int = 1, size: tuple[int, int] = (6, 10)
) -> Tensor:
    """One denoising step as sampling makes it."""
    with torch.inference_mode():
        x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(seed)).to(model.dtype)
        cond = condition(dtype=model.dtype, one_size=True)
        return model(x, time, model.prepare(cond, size, TIMES)).float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# -- packed weights


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, F32), (torch.bfloat16, BF16)])
def test_packed_layers_give_the_same_step(dtype: torch.dtype, bound: float) -> None:
    if not packable(dtype):
        pytest.skip("this processor has no fast product of this type")
    plain = plus().to(dtype)
    fast_one = copy.deepcopy(plain)
    assert pack(fast_one) == 8  # two layers of four
    assert relative(step(fast_one), step(plain)) < bound


def test_a_packed_layer_drops_the_original_and_can_make_it_again() -> None:
    linear = nn.Linear(24, 40)
    layer = PackedLinear(linear)
    assert not list(layer.parameters()) and torch.equal(layer.weight, linear.weight)
    x = torch.randn(3, 5, 24)
    with torch.no_grad():
        assert (copy.deepcopy(layer)(x) - linear(x)).abs().max() < F32
        for how in ("tanh", "none"):
            assert (layer.gelu(x, how) - F.gelu(linear(x), approximate=how)).abs().max() < F32


@pytest.mark.parametrize("way", [pack, lambda model: pack_frozen({"model": model})])
def test_each_plain_weight_goes_before_the_next_is_packed(
    way: Callable[[nn.Module], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plus().requires_grad_(False)
    inside = [m for b in model.transformer.blocks for m in b.modules() if isinstance(m, nn.Linear)]
    weights = [weakref.ref(linear.weight) for linear in inside if linear.weight is not None]
    del inside
    reordered, whole = packed.reordered, len(weights)
    seen: list[int] = []

    def counted(weight: Tensor) -> Tensor:
        seen.append(sum(ref() is not None for ref in weights))
        return reordered(weight)

    monkeypatch.setattr(packed, "reordered", counted)
    assert way(model)
    assert len(seen) >= 8 and seen[-1] <= whole - 6, seen


def test_weights_are_turned_channels_last_where_they_lie() -> None:
    module = nn.Sequential(nn.Conv2d(6, 10, 3), nn.Conv2d(10, 4, 1), nn.Linear(5, 3))
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in module.named_parameters()}
    speed.channels_last(module)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name, p in module.named_parameters():
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1]), name
    x = torch.randn(2, 6, 7, 9)
    expected = F.conv2d(F.conv2d(x, before["0.weight"][1], before["0.bias"][1]), before["1.weight"][1])
    bias = before["1.bias"][1][:, None, None]
    assert (module[:2](x) - expected - bias).abs().max() < F32


def test_layers_that_are_no_plain_linears_are_left() -> None:
    class Wrapped(nn.Linear):
        pass

    model = plus()
    block = model.transformer.blocks[0]
    block.attn.qkv = Wrapped(32, 96)
    fill(block.attn.qkv)
    expected = step(model)
    assert pack(model) == 7 and type(block.attn.qkv) is Wrapped
    assert relative(step(model), expected) < F32


def test_without_the_private_operators_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: object) -> Tensor:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(packed, "product", gone)
    packable.cache_clear()
    try:
        model = plus()
        assert pack(model) == 0
        assert relative(step(model), step(plus())) == 0
    finally:
        packable.cache_clear()


# -- kernels


def heads(length: int, size: int = 40) -> list[Tensor]:
    q, k, v = torch.randn(3, 2, 3, length, size, generator=torch.Generator().manual_seed(0))
    return [F.layer_norm(q, (size,)), F.layer_norm(k, (size,)), v]


@pytest.mark.parametrize("length", [7, 400, 1100])  # torch's kernel; whole rows; rows in pieces
def test_exp_attention_is_attention(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exp_attention, "_BYTES", dict.fromkeys(NARROW_AND_SINGLE, 1_000_000))
    q, k, v = heads(length)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    scale = q.shape[-1] ** -0.5
    assert relative(kernels.exp_attention(q, k, v, scale), exact) < F32
    narrow = [x.bfloat16() for x in (q, k, v)]
    assert relative(kernels.exp_attention(*narrow, scale), exact) < BF16 / 2


@pytest.mark.parametrize(("queries", "keys"), [(400, 400), (1100, 1100), (77, 500)])
def test_exp_attention_has_the_gradients_of_attention(
    queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exp_attention, "_BYTES", {torch.float32: 1_000_000})
    q, (_, k, v) = heads(queries)[0], heads(keys)
    gradient = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))

    def gradients(attend: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*given), given, gradient.to(dtype))

    found = gradients(lambda q, k, v: kernels.exp_attention(q, k, v, 0.11), torch.float32)
    exact = gradients(lambda q, k, v: kernels.attend(q, k, v, scale=0.11), torch.float64)
    assert max(map(relative, found, exact)) < F32
    narrow = gradients(lambda q, k, v: kernels.exp_attention(q, k, v, 0.11), torch.bfloat16)
    assert max(map(relative, narrow, exact)) < BF16


def test_the_operator_keeps_torchs_rules() -> None:
    """Shapes, strides, gradients and what a compiler may assume, by torch's own check."""
    given = heads(20)
    operator = torch.ops.cogview3.exp_attention
    torch.library.opcheck(operator, (*(x.bfloat16() for x in given), 0.2))
    torch.library.opcheck(operator, (*given, 0.2))
    torch.library.opcheck(operator, (*(x.requires_grad_() for x in given), 0.2))


@pytest.mark.parametrize("dtype", NARROW_AND_SINGLE)
def test_heads_shared_out_over_threads_are_the_same_to_the_last_bit(
    dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    q, k, v = (x.to(dtype) for x in heads(400))
    threads(1)
    alone = kernels.exp_attention(q, k, v, 0.15)
    threads(2)
    with torch.inference_mode():
        assert torch.equal(kernels.exp_attention(q, k, v, 0.15), alone)
    assert torch.get_num_threads() == 2
    counts = exp_attention._lone_threads(os.getpid(), 2).map(lambda _: torch.get_num_threads(), range(8))
    assert list(counts) == [1] * 8


def test_without_onednn_float32_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: object) -> Tensor:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(exp_attention, "product", gone)
    exp_attention.works.cache_clear()
    try:
        assert kernels.choose("auto", CPU, torch.float32, 6.3)[0] is kernels.attend
        with pytest.raises(ValueError, match="exp needs a CPU with oneDNN, in bf16 or fp32"):
            kernels.choose("exp", CPU, torch.float32, 6.3)
    finally:
        exp_attention.works.cache_clear()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_exp_attention_survives_the_largest_logits() -> None:
    """q and k all along one direction: every logit is at the bound, and the weights are even."""
    q = F.layer_norm(torch.randn(40), (40,)).expand(1, 1, 500, 40).bfloat16()
    v = torch.randn(1, 1, 500, 40).bfloat16()
    out = kernels.exp_attention(q, q, v, 40**-0.5)
    assert (out.float() - v.float().mean(2, keepdim=True)).abs().max() < 5e-3


def test_only_normed_queries_and_keys_bound_the_logits() -> None:
    class Louder(Mixin):
        host = TransformerHooks

        @wraps("norm_qk")
        def norm_qk(self, inner, q: Tensor, k: Tensor, ctx: Context, layer: int):
            return tuple(10 * x for x in inner(q, k, ctx, layer))

    bound = speed.largest_logit(plus().transformer)
    assert bound == pytest.approx(8**0.5)
    assert speed.largest_logit(plus({"position": RoPE(8, 9, 11)}).transformer) == bound
    assert speed.largest_logit(plus({"louder": Louder()}).transformer) is None
    shared = plus()
    apply_sequence(shared, Axis(2))
    assert speed.largest_logit(shared.transformer) == bound  # shared out, q and k stay what they are
    bare = Transformer(32, 4, 1, {})
    assert speed.largest_logit(bare) is None
    with pytest.raises(ValueError, match="sampling.attention=exp needs logits"):
        speed.use_kernel(bare, "exp")


def test_kernels_by_name_agree() -> None:
    expected = step(plus())
    for name in ("auto", "torch", "math", "flash"):
        model = plus()
        speed.use_kernel(model, name)
        assert relative(step(model), expected) < F32, name


def test_a_kernel_that_takes_no_mask_leaves_masked_calls_to_others() -> None:
    q, k, v = heads(9, 8)
    mask = torch.rand(2, 1, 1, 9) < 0.6
    kernel, _ = kernels.choose("flash", CPU, torch.float32, None)
    assert (kernel(q, k, v, mask=mask) - kernels.attend(q, k, v, mask=mask)).abs().max() < F32
    own = kernels.Plain(lambda q, k, v, scale: torch.full_like(q, 7.0))
    assert (own(q, k, v, mask=mask) - kernels.attend(q, k, v, mask=mask)).abs().max() == 0
    with torch.inference_mode():
        assert own(q, k, v).min() == 7


@pytest.mark.parametrize(
    ("major", "dtype", "order"),
    [
        (9, torch.bfloat16, ("cudnn", "flash", "efficient", "math")),
        (7, torch.float16, ("flash", "cudnn", "efficient", "math")),  # flash is refused there when tried
        (0, torch.bfloat16, ("flash", "efficient", "math")),  # AMD
        (9, torch.float32, ()),
        (None, torch.float16, ()),  # other accelerators
    ],
)
def test_kernels_are_preferred_by_device(
    major: int | None, dtype: torch.dtype, order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "capability", lambda device: major)
    assert kernels.preferred(CPU, dtype) == order


def test_the_default_falls_back_and_names_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """This build has no cuDNN: torch's own refusal, on the device at hand."""
    refusal = kernels.refusal
    assert refusal("flash", CPU, torch.bfloat16, 20) is None
    monkeypatch.setattr(kernels, "capability", lambda device: 9)
    monkeypatch.setattr(kernels, "refusal", lambda kind, device, *rest: refusal(kind, CPU, *rest))
    kernel, title = kernels.choose("auto", torch.device("meta"), torch.bfloat16, None, 20)
    assert title.startswith("flash, else math; cudnn refused: No viable backend")
    q, k, v = heads(9, 20)
    assert (kernel(q, k, v) - kernels.attend(q, k, v)).abs().max() < F32
    with pytest.raises(ValueError, match="attention=cudnn cannot work on meta: No viable .* use auto"):
        kernels.choose("cudnn", torch.device("meta"), torch.bfloat16, None, 20)
    monkeypatch.setattr(kernels, "refusal", lambda *rest: "never")
    assert kernels.choose("auto", torch.device("meta"), torch.bfloat16, None)[0] is kernels.attend
    wanting = kernels.Chosen((kernels._SDPA["cudnn"], kernels._SDPA["math"]))
    assert (wanting(q, k, v) - kernels.attend(q, k, v)).abs().max() < F32


@pytest.mark.parametrize("name", ["cudnn", "efficient", "flash3", "sage"])
def test_a_kernel_for_gpus_is_refused_on_the_cpu(name: kernels.Backend) -> None:
    with pytest.raises(ValueError, match=f"sampling.attention={name} needs a GPU"):
        kernels.choose(name, CPU, torch.bfloat16, None)


def test_an_optional_kernel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(ValueError, match="needs the package sageattention"):
        kernels.choose("sage", torch.device("meta"), torch.bfloat16, None)


@pytest.mark.parametrize(("name", "module"), [("flash3", "flash_attn_interface"), ("sage", "sageattention")])
def test_optional_kernels_are_called_as_they_want(name, module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the packages' signatures, computing plain attention in their layouts."""
    made = type(importlib)(module)
    made.flash_attn_func = lambda q, k, v, softmax_scale: F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=softmax_scale
    ).transpose(1, 2)
    made.sageattn = lambda q, k, v, tensor_layout, is_causal, sm_scale: F.scaled_dot_product_attention(
        q, k, v, scale=sm_scale
    )
    monkeypatch.setitem(sys.modules, module, made)
    kernel, _ = kernels.choose(name, torch.device("meta"), torch.bfloat16, None)
    q, k, v = heads(9, 8)
    with torch.inference_mode():
        assert (kernel(q, k, v, scale=0.1) - kernels.attend(q, k, v, scale=0.1)).abs().max() < F32


# -- one text token for all


def guided_step(model: CogView3Plus, rows: int = 1, text: Tensor | None = None) -> Tensor:
    """A step of ``rows`` images without a prompt and two with one."""
    with torch.inference_mode():
        cond = condition(dtype=torch.float64, one_size=True)
        both = Condition.cat([cond.null().rows(slice(rows)), cond])
        x = torch.randn(rows + 2, 4, 6, 10, generator=torch.Generator().manual_seed(1)).double()
        prepared = model.prepare(both, (6, 10), TIMES)
        folds = [mixin for mixin in model.transformer.mixins.values() if isinstance(mixin, Folding)]
        assert [type(prepared.context)] == ([Ragged if one.ragged else Folded for one in folds] or [Context])
        return model(x, TIMES[0], prepared)


@pytest.mark.parametrize("mixins", [{}, {"position": RoPE(8, 9, 11)}], ids=["table", "rope"])
def test_one_text_token_for_all_is_the_same_step(mixins: dict[str, Mixin]) -> None:
    model = plus(mixins).double()
    expected = guided_step(model)
    fold(model, 22)
    assert (guided_step(model) - expected).abs().max() < F64
    with torch.inference_mode():  # all rows without a prompt, as a rank of shared guidance has them
        null = condition(dtype=torch.float64, one_size=True).null()
        x = torch.randn(2, 4, 6, 10).double()
        folded = model(x, TIMES[0], model.prepare(null, (6, 10), TIMES))
        fold(model, 23)  # tokens: there are 7 + 15
        assert (folded - model(x, TIMES[0], model.prepare(null, (6, 10), TIMES))).abs().max() < F64


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("mixins", [{}, {"position": RoPE(8, 9, 11)}], ids=["table", "rope"])
def test_rows_end_to_end_in_one_pass_are_the_same_step(mixins: dict[str, Mixin], rows: int) -> None:
    model = plus(mixins).double()
    expected = guided_step(model, rows)
    fold(model, 23, ragged=True)  # tokens: there are 7 + 15
    assert (guided_step(model, rows) - expected).abs().max() < F64
    lengths: list[tuple[int, ...]] = []
    model.transformer.blocks[0].register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape))
    guided_step(model, rows)
    assert lengths == [(1, rows * 1 + 2 * 7 + (rows + 2) * 15, 32)]


def test_rows_of_different_steps_are_not_laid_end_to_end() -> None:
    """Their modulations differ, and a row has only one for each segment."""
    model = plus().double()
    cond = condition(dtype=torch.float64)  # sizes differ
    both, x = Condition.cat([cond.null().rows(slice(1)), cond]), torch.randn(3, 4, 6, 10).double()
    with torch.inference_mode():
        expected = model(x, torch.tensor([999.0, 17.0, 3.0]), model.prepare(both, (6, 10)))
        fold(model, 23, ragged=True)
        prepared = model.prepare(both, (6, 10))
        assert isinstance(prepared.context, Ragged)
        assert torch.equal(model(x, torch.tensor([999.0, 17.0, 3.0]), prepared), expected)


@pytest.mark.parametrize("packs", [False, True])
def test_gelu_by_a_sigmoid_is_gelu_by_tanh(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if packs and not packable(torch.float32):
        pytest.skip("this torch has no packed products")
    model = plus()
    expected = step(model)
    if packs:
        pack(model)
    assert by_sigmoid(model) == 2 and by_sigmoid(model) == 0
    monkeypatch.setattr(packed, "AT_ONCE", 3 * 128)
    assert relative(step(model), expected) < F32
    assert all(isinstance(block.mlp, SigmoidFeedForward) for block in model.transformer.blocks)
    assert by_sigmoid(plus().bfloat16()) == 0  # rounded on the way


def test_text_that_something_else_sees_is_not_folded() -> None:
    class Watcher(Mixin):
        host = TransformerHooks

        @wraps("layer")
        def layer(self, inner, x: Tensor, ctx: Context, layer: int):
            return inner(x, ctx, layer)

    class Other(QKNorm):
        """Another class says for itself what it does to text."""

    null = condition(one_size=True).null()
    masked = Condition(null.text, null.vector, torch.ones(2, 7, dtype=torch.bool))
    watched = plus({"watcher": Watcher()})
    other = plus({"qk_norm": Other(8)})
    for model, cond in ((plus(), masked), (watched, null), (other, null), (plus(), condition(one_size=True))):
        fold(model, 22)
        with torch.inference_mode():
            assert not isinstance(model.prepare(cond, (6, 10), TIMES).context, Folded)
    fold(model := plus(), 22)
    with torch.inference_mode(), FirstBlock(0.1).over(model, Count()):  # it decides for all rows together
        assert not isinstance(model.prepare(null, (6, 10), TIMES).context, Folded)
    assert not isinstance(model.prepare(null, (6, 10)).context, Folded)  # training
    with torch.inference_mode():
        assert isinstance(model.prepare(null, (6, 10)).context, Folded)


# -- compiled and recorded


def test_one_graph_serves_all_layers_steps_and_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # conftest.py turns it off for the others
    torch._dynamo.reset()
    graphs = 0

    def backend(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    plain, model = plus(), plus()
    assert speed.layers_alike(model.transformer)
    fast.compile_blocks(model.transformer, alike=True, backend=backend, fullgraph=True)
    for time in TIMES:
        for seed in (1, 2):
            assert relative(step(model, time, seed), step(plain, time, seed)) < F32
    assert graphs == 1
    for size in ((4, 6), (8, 6), (4, 10)):
        assert relative(step(model, size=size), step(plain, size=size)) < F32
    # The second size is compiled with a free number of tokens, for all others; torch 2.5 makes one a size.
    assert graphs == 2 or (OLDEST and graphs <= 4)


def test_blocks_of_an_accelerator_compile_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which is no CPU: what only a GPU's path does is traced whole."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []
    model = plus().to("meta")
    backend = lambda module, inputs: graphs.append(module) or module.forward  # noqa: E731
    fast.compile_blocks(model.transformer, alike=True, backend=backend, fullgraph=True)
    cond = condition(one_size=True)
    with torch.inference_mode(), torch.device("meta"):
        prepared = model.prepare(Condition(cond.text.to("meta"), cond.vector[:1].to("meta")), (6, 10), TIMES)
        assert model(torch.empty(2, 4, 6, 10), TIMES[0], prepared).shape == (2, 4, 6, 10)
    assert len(graphs) == 1


def test_two_graphs_serve_a_unet_of_two_widths_and_two_more_its_other_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    torch._dynamo.reset()
    graphs = 0

    def backend(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    model = CogView3UNet(
        channels=4, width=16, multipliers=(1, 2), blocks=1, attention=(1, 2), depths=(1, 2), head_dim=8,
        text_dim=16, text_len=7, size_dim=48, groups=4,
    )  # fmt: skip
    fill(model)
    plain, found = copy.deepcopy(model.eval()), speed.transformers(model)
    for transformer in found:
        assert speed.layers_alike(transformer)
        fast.compile_blocks(transformer, alike=True, backend=backend, fullgraph=True)
    assert sum(len(transformer.blocks) for transformer in found) == 11
    for size, most in (((6, 10), 2), ((4, 6), 4), ((8, 6), 4)):
        assert relative(step(model, size=size), step(plain, size=size)) < F32
        assert OLDEST or graphs <= most, size


def test_a_compiler_that_gives_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    torch._dynamo.reset()
    monkeypatch.setattr(fast, "GRAPHS", 3)
    model = plus()
    with torch._dynamo.config.patch(cache_size_limit=1):
        fast.compile_blocks(model.transformer, alike=False, backend="eager")
        assert torch._dynamo.config.cache_size_limit == 1 + 6  # two layers
        torch._dynamo.config.cache_size_limit = 1
        step(model)
        with pytest.raises(UserError, match="sampling.compile .*gave up at its 1th graph.* set it to false"):
            step(model, size=(4, 6))


@pytest.mark.parametrize(("kernel", "compiled"), [("torch", True), ("exp", False), ("exp", True)])
def test_compiled_blocks_and_heads_on_their_own_train_alike(
    kernel: kernels.Backend, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    torch._dynamo.reset()
    plain, other = plus(), plus()
    speed.use_kernel(other, kernel)
    if compiled:
        fast.compile_blocks(other.transformer, alike=True, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(kernels, "SHORTEST", 64)  # of 7 + 9 x 11
    x = torch.randn(2, 4, 18, 22, generator=torch.Generator().manual_seed(1))
    for model in (plain, other):
        out = model(x, torch.tensor([9.0, 700.0]), model.prepare(condition(), (18, 22)))
        out.square().mean().backward()
    for expected, found in zip(plain.parameters(), other.parameters(), strict=True):
        assert relative(found.grad, expected.grad) < F32


def test_layers_with_hooks_of_their_own_are_not_alike() -> None:
    class Numbered(Mixin):
        host = TransformerHooks

        @wraps("norm_qk")
        def norm_qk(self, inner, q: Tensor, k: Tensor, ctx: Context, layer: int):
            return tuple(x * (1 + layer) for x in inner(q, k, ctx, layer))

    assert not speed.layers_alike(plus({"numbered": Numbered()}).transformer)


def test_a_replayed_pass_is_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in records on the CPU: the same memory is computed on again, as a CUDA graph does."""
    recordings = 0

    def record(work):
        nonlocal recordings
        recordings += 1
        out = work()

        def run() -> None:
            out.copy_(work())

        return run, out

    plain, model = plus(), plus()
    model.transformer.extend("recorded", fast.Recorded(record))
    for time in (*TIMES, TIMES[0]):
        for seed in (1, 2):
            assert torch.equal(step(model, time, seed), step(plain, time, seed))
    assert recordings == 1
    monkeypatch.setattr(fast, "RECORDINGS", 2)
    for size, expected in (((4, 6), 2), ((4, 8), 3), ((4, 6), 3), ((6, 10), 4), ((4, 6), 4), ((4, 8), 5)):
        assert torch.equal(step(model, size=size), step(plain, size=size))
        assert recordings == expected, size  # the one drawn longest ago was forgotten


def test_a_step_of_a_replayed_pass_copies_three_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent, embedding and modulations, each in one piece of memory: one launch."""
    model = plus()
    model.transformer.extend("recorded", fast.Recorded(lambda work: (lambda: None, work())))
    copied: list[list[Tensor]] = []
    copy_all = torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda to, now: copied.append([*to, *now]) or copy_all(to, now)
    )
    with torch.inference_mode():
        prepared = model.prepare(condition(one_size=True), (6, 10), TIMES)
        for time in TIMES:
            model(torch.randn(2, 4, 6, 10), time, prepared)
    assert len(copied) == 1 and len(copied[0]) == 6 and all(x.is_contiguous() for x in copied[0])


def test_graphs_are_recorded_and_replayed_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.cuda that keeps the current device."""
    now, events = [0], []

    @contextmanager
    def device(place: torch.device) -> Iterator[None]:
        now.append(place.index)
        yield
        now.pop()

    @contextmanager
    def graph(made: object, pool: object, capture_error_mode: str) -> Iterator[None]:
        events.append(("capture", now[-1], pool, capture_error_mode))
        yield

    fake = SimpleNamespace(
        device=device, graph=graph, graph_pool_handle=object,
        Stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
        current_stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
        stream=lambda stream: nullcontext(),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: events.append(("replay", now[-1]))),
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", fake)
    record = fast.CudaRecorder(torch.device(f"{'cuda'}:1"))
    first, _ = record(lambda: torch.zeros(()))
    record(lambda: torch.zeros(()))
    first()
    assert [event[1] for event in events] == [1, 1, 1] and now == [0]
    assert events[0] == events[1] and events[0][3] == "thread_local"  # one pool


def test_graphs_are_refused_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="sampling.graphs .* CPU"):
        fast.replayed(plus().transformer, CPU)


def test_what_is_put_on_adds_no_key_and_a_copy_runs_its_own_weights() -> None:
    model = plus()
    keys, expected = list(model.state_dict()), step(model)
    speed.use_kernel(model, "math")
    fast.compile_blocks(model.transformer, alike=True, backend="eager")
    fast.recompute(model)
    fold(model, 22)
    assert list(model.state_dict()) == keys and not [*model.transformer.mixins["folding"].buffers()]
    hooks = dict(line.split(maxsplit=1) for line in model.hooks.splitlines())
    assert hooks["attend"] == "joint_attention -> attention_kernel"
    assert hooks["layer"] == "recompute -> compiled_blocks" and hooks["run"] == "folding -> default"
    assert relative(step(model), expected) < F32
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert relative(step(twin), expected) < F32 and step(model).abs().max() == 0
    for name in ("attention_kernel", "compiled_blocks", "recompute", "folding"):
        twin.transformer.remove(name)
    assert str(twin.transformer.resolved) == str(plus().transformer.resolved)
    assert relative(step(twin), expected) < F32


# -- first stage


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, F64), (torch.float32, F32), (torch.bfloat16, BF16)]
)
def test_doubling_by_phases_is_doubling(dtype: torch.dtype, bound: float) -> None:
    layer = Upsample(6)
    fill(layer)
    x = torch.randn(2, 6, 5, 7).to(dtype)
    exact = (
        layer(x.float() if dtype == torch.bfloat16 else x) if dtype != torch.float64 else layer.double()(x)
    )
    layer.to(dtype)
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            out = layer(x.contiguous(memory_format=layout))
            assert out.is_contiguous(memory_format=layout)
            assert relative(out, exact) < bound


@pytest.mark.parametrize("kind", [{}, {"mid_attention": True, "quant_convs": True}], ids=["16", "4 channels"])
def test_packed_convolutions_are_the_autoencoder(kind: dict[str, bool]) -> None:
    if not convolutions.convolvable():
        pytest.skip("this torch's oneDNN operators differ")
    plain = AutoencoderKL(8, (1, 2, 3), res_blocks=1, latent_channels=4, groups=4, **kind).eval()
    fill(plain)
    fast_one = copy.deepcopy(plain)
    convs = sum(isinstance(m, nn.Conv2d) for m in plain.modules())
    norms = sum(isinstance(m, nn.GroupNorm) for m in plain.modules())
    assert convolutions.pack_convolutions(fast_one) == convs + norms - 2 * bool(
        kind
    )  # not those beside the latent
    assert fast_one.dtype == torch.float32
    draw = torch.Generator().manual_seed(0)
    images, latents = torch.randn(2, 3, 40, 56, generator=draw), torch.randn(2, 4, 10, 14, generator=draw)
    assert images[0, 0].numel() > convolutions.FEW > latents[0, 0].numel()  # both ways of the norm
    with torch.inference_mode():
        for twin in (fast_one, copy.deepcopy(fast_one)):
            for found, expected in (
                (twin.encode(images).mean, plain.encode(images).mean),
                (twin.decode(latents), plain.decode(latents)),
            ):
                assert found.stride() == expected.stride() and relative(found, expected) < F32


def test_the_norm_of_maps_far_from_zero_cancels_nothing() -> None:
    norm = nn.GroupNorm(4, 12).requires_grad_(False)
    fill(norm)
    x = torch.randn(2, 12, 40, 30, generator=torch.Generator().manual_seed(0)) + 300
    x[:, ::2] -= 250
    exact = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
    with torch.inference_mode():
        found = convolutions.RowsNorm(norm)(x.contiguous(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last) and relative(found, exact) < F32


def test_without_the_private_operators_convolutions_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: object) -> Tensor:
        raise RuntimeError("no such operator")

    first_stage = AutoencoderKL(8, (1, 2), groups=4)
    engine = SimpleNamespace(network=plus(), first_stage=first_stage)
    monkeypatch.setattr(convolutions, "convolved", gone)
    convolutions.convolvable.cache_clear()
    try:
        message = speed.quicken(engine, speed.Speed(convolutions="packed"))
        assert "autoencoder" not in message and type(first_stage.decoder.head) is nn.Conv2d
    finally:
        monkeypatch.undo()
        convolutions.convolvable.cache_clear()
    if convolutions.convolvable():
        assert "layers of the autoencoder packed" in speed.quicken(engine, speed.Speed(convolutions="packed"))
