"""LoRA and DoRA layers: they start as nothing, weigh linearly, merge exactly, and can be split over ranks."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from sat.adapters import lora
from sat.adapters.factors import AdapterError, LayerFactors, Pair, weight_change
from sat.adapters.lora import Adapted, attach, detach, extract, merge, set_strength
from sat.adapters.names import adaptable, choose
from sat.kernels.compile import recompute
from sat.transformer.transformer import expand, shrink
from tests.adapters import EVERYTHING, noisy, output, start, t5, trained, unet
from tests.small import condition, plus
from tests.tolerances import EXACT, F32, F64

MODELS = {"plus": (plus, "model"), "unet": (unet, "model"), "t5": (t5, "text")}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[str], str]:
    """A model, what to target in it, and its part."""
    build, part = MODELS[name]
    return build().to(dtype), ["text_encoder"] if part == "text" else list(EVERYTHING), part


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the scale of ``b``."""
    return ((a - b).abs().max() / b.std()).item()


# ---------------------------------------------------------------------- what an adapter does


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_at_the_start_nothing_changes(name: str, dtype: torch.dtype, dora: bool) -> None:
    model, targets, part = made(name, dtype)
    before = output(model)
    layers = start(model, targets, part=part, dora=dora)
    assert len(layers) > 5
    attach(model, "style", layers)
    assert (output(model) - before).abs().max() == EXACT


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged(name: str, dora: bool) -> None:
    model, targets, part = made(name)
    before = output(model)
    trained(model, targets, part=part, dora=dora)
    set_strength(model, "style", 0.7)
    unmerged = output(model)
    assert far(unmerged, before) > 0.01
    merge(model)
    assert not list(lora.adapted(model))
    assert far(output(model), unmerged) < F64


@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_adds_the_change_of_its_weight(dora: bool) -> None:
    """Against the changed weight itself, made whole; one part of the fused three stays as it is."""
    g = torch.Generator().manual_seed(0)
    base = nn.Linear(8, 18).double()
    pairs = [
        Pair(torch.randn(r, 8, generator=g).double(), torch.randn(6, r, generator=g).double(), 3.0)
        for r in (2, 4)
    ]
    magnitude = torch.rand(18, generator=g).double() + 0.5 if dora else None
    layer = LayerFactors((pairs[0], None, pairs[1]), magnitude)
    wanted = base.weight.detach().clone()
    wanted[:6] += 3 / 2 * pairs[0].up @ pairs[0].down
    wanted[12:] += 3 / 4 * pairs[1].up @ pairs[1].down
    if magnitude is not None:
        wanted = magnitude[:, None] * wanted / wanted.norm(dim=1, keepdim=True)
    x = torch.randn(5, 8, generator=g).double()
    full = nn.functional.linear(x, wanted, base.bias)
    adapted = Adapted(base)
    adapted.add("a", layer, 0.0, 1.0)
    assert (adapted(x) - full).abs().max() < F64
    assert (base.weight + weight_change(base.weight.detach(), layer) - wanted).abs().max() < F64


@pytest.mark.parametrize("dora", [False, True])
def test_strength_is_linear_in_a_layers_output(dora: bool) -> None:
    model = plus().double()
    layers = trained(model, dora=dora)
    name = "transformer.blocks.0.attn.qkv"
    layer, x = model.get_submodule(name), torch.randn(3, 32).double()
    out = {}
    for strength in (0.0, 0.5, 1.0, -2.0):
        set_strength(model, "style", strength)
        out[strength] = layer(x)
    assert isinstance(layer, Adapted)
    assert torch.equal(out[0.0], layer.base(x))
    assert (out[1.0] - out[0.0]).abs().max() > 0.01
    for strength in (0.5, -2.0):
        assert (out[strength] - out[0.0] - strength * (out[1.0] - out[0.0])).abs().max() < F64
    assert name in layers


def test_several_adapters_add_up_and_merge_together() -> None:
    model = plus().double()
    for name, seed, dora in (("one", 0, False), ("two", 1, True)):
        layers = noisy(start(model, ["attention"], dora=dora), seed=seed)
        attach(model, name, layers, strength=0.5)
    x, layer = torch.randn(3, 32).double(), model.get_submodule("transformer.blocks.1.attn.proj")
    assert isinstance(layer, Adapted)
    changes = []
    for name in ("one", "two"):
        set_strength(model, "one", 0.5 * (name == "one"))
        set_strength(model, "two", 0.5 * (name == "two"))
        changes.append(layer(x) - layer.base(x))
    set_strength(model, "one", 0.5)
    set_strength(model, "two", 0.5)
    assert (layer(x) - layer.base(x) - sum(changes)).abs().max() < F64
    assert lora.names(model) == ["one", "two"]
    unmerged = output(model)
    merge(model)
    assert far(output(model), unmerged) < F64


def test_detached_the_model_is_what_it_was() -> None:
    model = plus()
    before, modules = output(model), str(model)
    trained(model)
    attach(model, "second", start(model, ["attention"]))
    detach(model, "second")
    assert lora.names(model) == ["style"]
    detach(model, "style")
    assert str(model) == modules
    assert torch.equal(output(model), before)


def test_an_adapter_may_be_called_as_a_method_of_modules() -> None:
    model = plus()
    before = output(model)
    layers = noisy(start(model, ["attention"]))
    attach(model, "half", layers)
    assert lora.names(model) == ["half"]
    assert extract(model, "half").keys() == layers.keys()
    detach(model, "half")
    assert torch.equal(output(model), before)


def test_a_copy_has_factors_of_its_own() -> None:
    """EMA and distillation copy networks."""
    model = plus()
    trained(model)
    before = output(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if ".factors." in name:
                p.zero_()
    assert torch.equal(output(model), before)
    assert not torch.equal(output(other), before)


def test_extracted_factors_are_those_attached() -> None:
    model = plus().double()
    layers = trained(model, dora=True)
    found = extract(model, "style")
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        for ours, theirs in zip(found[name].parts, layer.parts, strict=True):
            assert ours is not None and theirs is not None
            assert torch.equal(ours.up, theirs.up) and torch.equal(ours.down, theirs.down.double())
            assert ours.alpha == theirs.alpha
        assert layer.magnitude is not None
        assert torch.allclose(found[name].magnitude, layer.magnitude, rtol=1e-12)


def test_fresh_factors_do_not_depend_on_what_else_is_chosen() -> None:
    model = plus()
    few, many = start(model, ["attention"]), start(model)
    name = "transformer.blocks.1.attn.qkv"
    downs = [pair.down for pair in few[name].parts if pair is not None]
    assert all(torch.equal(a, b.down) for a, b in zip(downs, many[name].parts, strict=True) if b is not None)
    assert not torch.equal(downs[0], downs[1]) or downs[0].shape[0] == 0


# ---------------------------------------------------------------------- training


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of a fixed loss; the global generators are left alone."""
    x = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    out = model(x, torch.tensor([5.0, 900.0]), model.prepare(condition(), (12, 20)))
    out.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [plus, unet], ids=["plus", "unet"])
def test_recomputed_blocks_repeat_their_dropout(build) -> None:
    found = []
    for recomputed in (False, True):
        model = build()
        layers = noisy(start(model, ["attention", "mlp"]))
        model.requires_grad_(False)
        attach(model, "style", layers, dropout=0.5)
        model.train()
        if recomputed:
            recompute(model)
        torch.manual_seed(7)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all(".factors." in name for name in found[0])
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_dropout_is_for_training_only() -> None:
    model = plus()
    attach(model, "style", noisy(start(model)), dropout=0.5)
    assert torch.equal(output(model), output(model))
    model.train()
    assert not torch.equal(output(model), output(model))


@pytest.mark.parametrize("dora", [False, True])
def test_every_factor_gets_a_gradient(dora: bool) -> None:
    model = plus()
    model.requires_grad_(False)
    trained(model, dora=dora)
    found = gradients(model)
    factors = [name for name, _ in model.named_parameters() if ".factors." in name]
    assert sorted(found) == sorted(factors)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert any(name.endswith(".gain") for name in found) == dora


@pytest.mark.parametrize(
    "how", [{"padding": 1}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}, {}]
)
@pytest.mark.parametrize("points", [1, 3])
def test_a_convolution_adds_the_change_of_its_weight(points: int, how: dict[str, int]) -> None:
    """Against the changed kernel itself, made whole; extracted, its factors are those attached."""
    g = torch.Generator().manual_seed(0)
    base = nn.Conv2d(6, 10, points, **how).double()
    shape = (2, 6, points, points)
    down, up = torch.randn(shape, generator=g).double(), torch.randn(10, 2, generator=g).double()
    layer = LayerFactors((Pair(down, up, 3.0),))
    wanted = base.weight + 0.7 * 3 / 2 * torch.einsum("or,rcij->ocij", up, down)
    x = torch.randn(2, 6, 9, 7, generator=g).double()
    options = {"bias": base.bias, "stride": base.stride, "padding": base.padding, "dilation": base.dilation}
    made = Adapted(base)
    made.add("style", layer, 0.0, 0.7)
    assert far(made(x), torch.conv2d(x, wanted, **options)) < F64
    kept = made.layer("style").parts[0]
    assert kept is not None and torch.equal(kept.down, down) and torch.equal(kept.up, up)
    assert far(made.merged().weight, wanted) < F64  # type: ignore[arg-type]


def test_convolutions_of_a_unet_start_as_they_were_stack_learn_and_merge() -> None:
    model = unet().double()
    before, targets = output(model), ["convolution", "attention", "model.stem", "model.head.2"]
    fresh = start(model, targets)
    attach(model, "first", fresh, dropout=0.3)
    assert (output(model) - before).abs().max() == EXACT
    attach(model, "second", noisy(fresh, seed=1), strength=0.5)
    attach(model, "third", noisy(fresh, seed=2), strength=-0.3)
    unmerged = output(model)
    assert far(unmerged, before) > 0.01
    for path in ("up.0.0.conv1", "up.0.0.shortcut", "down.2.0.shrink"):
        layer = model.get_submodule(path)
        layer(torch.randn(1, cast(Adapted, layer).weight.shape[1], 4, 4).double()).square().sum().backward()
        found = cast(Adapted, layer).named("first")
        assert all(p.grad is not None for p in found.parameters()) and found.up["0"].weight.grad.any()  # type: ignore[union-attr]
    merge(model)
    assert far(output(model), unmerged) < F64


@pytest.mark.parametrize("kind", [{"dora": True}, {"lokr": 2}])
def test_a_convolution_refuses_dora_and_lokr_by_name(kind: dict[str, int]) -> None:
    model = unet()
    what = "DoRA" if "dora" in kind else "LoKr"
    with pytest.raises(
        AdapterError, match=f"conv1' is a convolution, which takes LoRA factors alone, no {what}"
    ):
        attach(model, "style", start(model, ["model.down.1.0.conv1"], **kind))  # type: ignore[arg-type]
    assert not lora.names(model)


# ---------------------------------------------------------------------- choosing layers


def test_a_pattern_that_names_linears_means_these_alone() -> None:
    """So a pattern of before means what it meant; one that named nothing then may mean convolutions."""

    def kernels(target: str) -> set[tuple[int, ...]]:
        return {layer.kernel for layer, _ in choose({"model": unet()}, [target], 4, {}).values()}

    assert kernels("model.*") == kernels("model.down.*") == kernels("model.down.1.0.*") == {()}
    assert kernels("model.stem") == kernels("model.*.conv1") == {(3, 3)}
    assert kernels("convolution") == {(3, 3), (1, 1)}


def test_groups_mean_these_layers() -> None:
    block = "model.transformer.blocks.0."
    chosen = choose({"model": plus(), "text": t5()}, ["attention", "adaln"], 8, {"adaln": 2})
    assert {name: rank for name, (_, rank) in chosen.items() if name.startswith(block)} == {
        block + "attn.qkv": 8,
        block + "attn.proj": 8,
    }
    adaln = [name for name, (_, rank) in chosen.items() if rank == 2]
    assert adaln == [
        "model.transformer.mixins.adaln.layers.0.1",
        "model.transformer.mixins.adaln.layers.1.1",
        "model.transformer.mixins.final_layer.adaln.1",
    ]
    assert not any(name.startswith("text.") for name in chosen)


def test_attention_of_a_unet_is_self_and_cross() -> None:
    model = {"model": unet()}
    both, own, cross = (
        set(choose(model, [t], 4, {})) for t in ("attention", "self_attention", "cross_attention")
    )
    assert both == own | cross
    assert own and cross and not own & cross
    assert {name.rpartition(".")[2] for name in cross} == {"q", "kv", "proj"}
    assert any(name.endswith(".emb") for name in choose(model, ["adaln"], 4, {}))


def test_fused_layers_are_known_from_the_plan() -> None:
    parts = {name.rpartition(".")[2]: linear.parts for name, linear in adaptable(unet()).items()}
    assert (parts["qkv"], parts["kv"], parts["q"], parts["up"], parts["emb"]) == (3, 2, 1, 1, 1)


def test_ranks_go_to_patterns_and_the_last_wins() -> None:
    name = "model.transformer.blocks.1.attn.qkv"
    chosen = choose({"model": plus()}, ["attention"], 8, {"attention": 4, "model.transformer.blocks.1.*": 2})
    assert chosen[name][1] == 2
    assert chosen[name.replace("1", "0")][1] == 4


def test_a_model_with_adapters_can_take_more() -> None:
    model = plus()
    before = choose({"model": model}, EVERYTHING, 4, {}).keys()
    trained(model)
    assert choose({"model": model}, EVERYTHING, 4, {}).keys() == before


@pytest.mark.parametrize(
    ("targets", "ranks", "said"),
    [
        (
            ["cross_attention"],
            {},
            "'cross_attention' matches no layer of CogView3Plus .groups.*self_attention, mlp, adaln",
        ),
        (["model.transformer.blocks.0.attn.qvk"], {}, "did you mean 'model.transformer.blocks.0.attn.qkv'"),
        (["attention"], {"mlp": 4}, "ranks: 'mlp' matches no targeted layer"),
    ],
)
def test_what_matches_nothing_is_named(targets, ranks, said) -> None:
    with pytest.raises(AdapterError, match=said):
        choose({"model": plus()}, targets, 4, ranks)


# ---------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    model = plus()
    layers = start(model)
    wrong = dict(layers)
    wrong["transformer.blocks.9.attn.qkv"] = layers["transformer.blocks.0.attn.qkv"]
    with pytest.raises(
        AdapterError, match="CogView3Plus has no layer 'transformer.blocks.9.attn.qkv'.*another"
    ):
        attach(model, "style", wrong)
    wrong = dict(layers)
    wrong["transformer.blocks.0.mlp.up"] = layers["transformer.blocks.0.mlp.down"]
    with pytest.raises(
        AdapterError, match="blocks.0.mlp.up': the adapter is for 128 inputs and 32 outputs, .* 32 and 128"
    ):
        attach(model, "style", wrong)
    with pytest.raises(AdapterError, match="transformer.blocks.0.norm1' of CogView3Plus is a LayerNorm"):
        attach(model, "style", {"transformer.blocks.0.norm1": layers["transformer.blocks.0.attn.proj"]})
    assert not lora.names(model)


def test_an_adapters_name_is_its_own() -> None:
    model = plus()
    trained(model)
    with pytest.raises(AdapterError, match="has an adapter 'style' already"):
        trained(model)
    with pytest.raises(AdapterError, match="there is no adapter 'stile'; there are style"):
        set_strength(model, "stile", 1.0)


# ---------------------------------------------------------------------- splitting over ranks


def test_half_precision_stays_close() -> None:
    """float16 projections run at 1/64 scale: a layer with adapters keeps to that."""
    layer = nn.Linear(16, 8)
    adapted = Adapted(layer)
    adapted.add("a", LayerFactors((Pair(torch.randn(2, 16), torch.randn(8, 2), 4.0),)), 0.0, 1.0)
    x = torch.randn(3, 16)
    wanted = adapted(x)
    half = adapted.half()
    got = expand(half, shrink(x.half()))
    assert got.dtype == torch.float32
    assert far(got, wanted) < 1e-2  # float16's own rounding
    assert far(wanted, layer.float()(x)) > 100 * F32
