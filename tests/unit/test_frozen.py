"""Frozen weights packed for both passes train low-rank factors to the same numbers as plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sat.adapters.lora import Adapted, merge
from sat.config.schema import LoraConfig
from sat.kernels.compile import recompute
from sat.kernels.packed import FrozenLinear, packable
from sat.kernels.quantize import QuantizedLinear, Scheme
from sat.models.cogview3_plus import CogView3Plus
from sat.train import lora
from sat.train.log import _Count
from sat.train.objectives import Objective
from tests.small import condition, plus
from tests.tolerances import F32

pytestmark = pytest.mark.skipif(not packable(torch.float32), reason="oneDNN's operators are not here")


class Network(Objective):
    """An objective that trains the network alone."""

    def __init__(self, network: CogView3Plus) -> None:
        super().__init__()
        self.network = network

    def parts(self) -> dict[str, nn.Module]:
        return {"model": self.network}


def model(**settings) -> CogView3Plus:
    """A small network with trained factors, none at zero."""
    network = plus()
    config = LoraConfig(**{"rank": 4, "alpha": 6, "targets": ["attention"], **settings})
    torch.manual_seed(0)
    lora.add_lora(Network(network), config, 0)
    for module in network.modules():
        if isinstance(module, Adapted):
            for factor in module.named(lora.NAME).parameters():
                nn.init.normal_(factor, std=0.2)
    return network.train()


def loss(network: CogView3Plus) -> Tensor:
    torch.manual_seed(5)  # of dropout
    x = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    out = network(x, torch.tensor([9.0, 700.0]), network.prepare(condition(), (6, 10)))
    return out.square().mean()


def gradients(network: CogView3Plus) -> dict[str, Tensor]:
    network.zero_grad()
    loss(network).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert found.keys() == expected.keys() and found
    return all((found[n] - e).norm() < F32 * e.norm() for n, e in expected.items())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"targets": ["attention", "mlp"], "ranks": {"mlp": 2}},
        {"dropout": 0.3},
        {"dora": True},
    ],
    ids=["attention", "mlp", "dropout", "dora"],
)
def test_packed_weights_give_the_same_gradients_and_steps(settings) -> None:
    plain = model(**settings)
    packed = copy.deepcopy(plain)
    said = lora.pack_frozen({"model": packed})
    assert said.startswith(f"{4 if settings.get('dora') else 8} frozen weights packed")
    assert ("as they are: 4 DoRA" in said) == bool(settings.get("dora"))
    again = lora.pack_frozen({"model": packed})
    assert again.startswith("frozen weights are not packed (train.pack), as no layer can be here")
    assert close(gradients(packed), gradients(plain))
    trained = []
    for network in (plain, packed):
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            gradients(network)
            optimizer.step()
        trained.append({n: p.detach() for n, p in network.named_parameters() if p.requires_grad})
    assert close(*reversed(trained))


def test_factors_of_some_parts_and_recomputed_blocks_are_right() -> None:
    plain = model()
    for module in plain.modules():
        if isinstance(module, Adapted) and len(module.named(lora.NAME).down) == 3:
            own = module.named(lora.NAME)
            del own.down["1"], own.up["1"]  # q and v alone
    packed = copy.deepcopy(plain)
    lora.pack_frozen({"model": packed})
    recompute(packed)
    assert close(gradients(packed), gradients(plain))


def test_the_plain_weight_comes_back_for_merging() -> None:
    plain, packed = model(), model()
    lora.pack_frozen({"model": packed})
    linear = packed.transformer.blocks[0].mlp.up
    assert isinstance(linear, FrozenLinear) and torch.equal(
        linear.weight, plain.transformer.blocks[0].mlp.up.weight
    )
    for network in (plain, packed):
        merge(network)
    assert type(packed.transformer.blocks[0].attn.qkv) is nn.Linear
    assert (loss(plain) - loss(packed)).abs() < F32


def test_what_is_trained_or_quantised_is_left() -> None:
    network = model()
    block = network.transformer.blocks[0]
    block.mlp.up.requires_grad_(True)
    block.mlp.down = QuantizedLinear(block.mlp.down, Scheme("int8"))
    said = lora.pack_frozen({"model": network})
    assert type(block.mlp.up) is nn.Linear and "as they are: 1 Linear, 1 QuantizedLinear" in said


def test_packed_products_are_counted_as_the_plain_ones() -> None:
    counts = []
    for network in (plain := model(), copy.deepcopy(plain)):
        if counts:
            lora.pack_frozen({"model": network})
        with _Count() as count:
            loss(network).backward()
        counts.append(count.flops)
    assert counts[0] == counts[1]
