"""Quantised linears compute with exactly the weights their codes mean, and fit in where plain ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sat.adapters import lora
from sat.checkpoint.load import load
from sat.cli.train import main as train_main
from sat.config.build import build_engine, quantizers
from sat.config.schema import QuantizeConfig
from sat.kernels.quantize import Kind, QuantizedLinear, Quantizer, Scheme, quantized, quantized_layers, whole
from tests.adapters import output, t5, trained, unet
from tests.configs import DEBUG, ROOT, debug, refused
from tests.small import fill, plus
from tests.tolerances import EXACT, F32

MODELS = {"plus": (plus, "model"), "unet": (unet, "model"), "t5": (t5, "text")}
PATTERNS = tuple(QuantizeConfig().patterns())
COARSE = {"int8": 1 / 254, "int4": 1 / 16}
"""Half a step between codes, over the largest weight that shares the scale."""


def explicit(weight: Tensor, scheme: Scheme) -> Tensor:
    """The weight that the codes mean, element by element from the definition."""
    codes, scales = quantized(weight, scheme)
    out = torch.empty_like(weight)
    size = weight.shape[1] // scales.shape[1]
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            code = (
                int(codes[o, i]) if scheme.kind == "int8" else (int(codes[o, i // 2]) >> 4 * (i % 2)) % 16 - 8
            )
            out[o, i] = torch.tensor(code, dtype=weight.dtype) * scales[o, i // size]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int8", 8), Scheme("int4"), Scheme("int4", 6)])
def test_the_product_is_that_of_the_weight_the_codes_mean(scheme: Scheme, dtype: torch.dtype) -> None:
    linear = nn.Linear(24, 10).to(dtype)
    fill(linear)
    with torch.no_grad():
        linear.weight[3] = 0.0  # a row without a scale
        linear.weight[4] = -linear.weight[4].abs()
    layer = QuantizedLinear(linear, scheme)
    meant = explicit(linear.weight.detach(), scheme)
    assert layer.scales.shape[1] == {None: 1 if scheme.kind == "int8" else 1, 8: 3, 6: 4}[scheme.group]
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        assert (layer.weight - meant).abs().max() == EXACT
        assert (layer(x) - F.linear(x, meant, linear.bias)).abs().max() == EXACT
    largest = linear.weight.float().unflatten(1, (layer.scales.shape[1], -1)).abs().amax(-1, keepdim=True)
    steps = (meant.float() - linear.weight.float()).unflatten(1, (layer.scales.shape[1], -1)).abs() / (
        largest + 1e-9
    )
    bound = COARSE[scheme.kind] * (
        2 if scheme.kind == "int4" else 1
    )  # beyond the last code of the short side
    assert 0 < steps.max() <= bound + 2 * torch.finfo(dtype).eps
    assert layer.codes.numel() * layer.codes.element_size() == 240 // (2 if scheme.kind == "int4" else 1)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_gradients_are_those_of_the_weight_the_codes_mean(kind: Kind) -> None:
    """And nothing of the size of the whole weight is kept between the passes."""
    linear = nn.Linear(24, 10).double()
    layer = QuantizedLinear(linear, Scheme(kind))
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).square().sum().backward()
    assert not [t for t in kept if t.shape == linear.weight.shape and t.is_floating_point()]
    found, biased = x.grad, linear.bias.grad
    assert found is not None and biased is not None
    x.grad = linear.bias.grad = None
    F.linear(x, whole(layer.codes, layer.scales), linear.bias).square().sum().backward()
    torch.testing.assert_close(found, x.grad)
    torch.testing.assert_close(biased, linear.bias.grad)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_quantised_by_patterns_and_computes_with_its_own_weights(name: str, kind: Kind) -> None:
    build, part = MODELS[name]
    model = build()
    plain = output(model)
    before = {n for n, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    count = Quantizer(part, Scheme(kind), PATTERNS)(model)
    found = dict(quantized_layers(model))
    assert 0 < count == len(found) <= len(before)
    assert not [n for n in found if "adaln" in n or "time" in n or "final" in n or "patch_embed" in n]
    quantised = output(model)
    for path, layer in found.items():
        lora._put(model, path, layer.plain())
    assert (output(model) - quantised).abs().max() == EXACT
    error = ((quantised - plain).std() / plain.std()).item()
    assert 0 < error < {"int8": 0.05, "int4": 0.6}[kind]


def test_at_loading_one_weight_at_a_time_is_whole(tmp_path: Path) -> None:
    weights = {n: t.clone() for n, t in plus().state_dict().items()}
    with torch.device("meta"):
        from sat.models.cogview3_plus import CogView3Plus

        empty = CogView3Plus(
            dim=32, heads=4, depth=2, channels=4, patch=2, text_dim=16, text_len=7, emb_dim=24, size_dim=48,
            table_size=(9, 11),
        )  # fmt: skip
    most = 0

    class Counting(Quantizer):
        def placed(self, module: nn.Module, name: str) -> None:
            nonlocal most
            there = [n for n, t in module.named_parameters() if not t.is_meta]
            most = max(most, sum(n.endswith("weight") and self.takes(n.rpartition(".")[0]) for n in there))
            super().placed(module, name)

    quantizer = Counting("model", Scheme("int8"), PATTERNS)
    load(empty, weights, "model", replacing=quantizer)
    assert most == 1
    after = plus()
    quantizer(after)
    assert (output(empty.eval()) - output(after)).abs().max() == EXACT
    assert not [n for n in after.state_dict() if "codes" in n or "scales" in n]


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_sit_on_quantised_layers_and_merge_into_plain_ones(dora: bool) -> None:
    model = plus()
    Quantizer("model", Scheme("int8"), PATTERNS)(model)
    before = output(model)
    trained(model, ["attention", "mlp"], dora=dora)
    unmerged = output(model)
    assert (unmerged - before).abs().max() > 0.01
    lora.merge(model)
    assert not list(quantized_layers(model))
    assert ((output(model) - unmerged).abs().max() / unmerged.std()) < 10 * F32


def test_factors_on_a_quantised_base_learn() -> None:
    model = plus()
    Quantizer("model", Scheme("int4"), PATTERNS)(model)
    model.requires_grad_(False)
    trained(model, ["attention", "mlp"])
    factors = [p for n, p in model.named_parameters() if ".factors." in n]
    for p in factors:
        p.requires_grad_(True)
    from tests.small import condition

    cond = condition()
    x = torch.randn(2, 4, 12, 20)
    model(x, torch.tensor([5.0, 900.0]), model.prepare(cond, (12, 20))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in factors)


# ---------------------------------------------------------------------- in an experiment


def test_an_engine_is_built_with_the_layers_quantised_that_the_config_names() -> None:
    experiment = debug(
        "checkpoint.random=0", "memory.quantize={network: int8, text_encoder: int4, layers: [mlp, text_mlp]}"
    )
    engine = build_engine(experiment, device="cpu", dtype=torch.bfloat16)
    network = [n for n, _ in quantized_layers(engine.network)]
    text = [(n, layer.scheme.kind) for n, layer in quantized_layers(engine.conditioner.text)]
    assert network and all(".mlp." in n for n in network)
    assert text and all(".mlp." in n and kind == "int4" for n, kind in text)
    assert not quantizers(debug().memory.quantize)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("memory.quantize.network=int3", "int8"),
        ("memory.quantize.group=0", "at least 1"),
        ("memory.quantize.layers=[atention]", "did you mean 'attention'?"),
        ("memory.quantize={network: int8, layers: [text_encoder]}", "is a linear of CogView3Plus"),
        (("parallel.tensor", 2), "split layers are not quantised"),
    ],
)
def test_mistakes_are_named(override: str | tuple[str, int], said: str) -> None:
    more = ["memory.quantize.network=int8"] if override[0] == "parallel.tensor" else []
    assert said in "\n".join(refused([DEBUG], ["conditioning.tokenizer=null", override, *more]))


def test_training_whole_weights_needs_them_plain(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["configs/tiny.yaml", "configs/tiny_train.yaml"]
    words = ["--base", *(str(ROOT / f) for f in files), "memory.quantize.network=int8", "--check"]
    assert train_main(words) == 2
    assert "memory.quantize: network: its weights are trained" in capsys.readouterr().err


class Largest(TorchDispatchMode):
    """Notes the most elements of a float32 tensor that an operator makes."""

    most = 0

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_large_weight_is_quantised_some_rows_at_a_time_to_the_same_codes(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    at_once = quantized(weight, Scheme(kind))
    monkeypatch.setattr("sat.kernels.quantize.AT_ONCE", 64 * 7)
    with Largest() as seen:
        by_rows = quantized(weight, Scheme(kind))
    assert seen.most == 64 * 7
    assert all(torch.equal(a, b) for a, b in zip(at_once, by_rows, strict=True))
