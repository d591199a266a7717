"""Plans of tensor ranks put on models without weights: what a rank holds, and what is refused."""

import pytest
import torch
from torch import nn

from sat.models.cogview3_plus import CogView3Plus
from sat.parallel.launch import Axis, fake_group
from sat.parallel.tensor import apply_sharding, check_sharding
from sat.sharding import Column, Row, family_sharding
from tests.small import plus


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    "params", [{}, {"dim": 640, "heads": 16, "depth": 8, "emb_dim": 128}], ids=["published", "measured"]
)
def test_one_of_two_ranks_holds_at_most_55_percent_of_the_network(params) -> None:
    with torch.device("meta"):
        whole, split = CogView3Plus(**params), CogView3Plus(**params)
    with fake_group(tensor=2) as mesh:
        apply_sharding(split, family_sharding(CogView3Plus), mesh.tensor)
    assert 0.5 < count(split) / count(whole) < 0.55


def test_sizes_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"over 3 tensor ranks: the 4 heads .* possible are 1, 2"):
        check_sharding(plus(), family_sharding(CogView3Plus), 3)


def test_a_pattern_without_a_layer_is_refused_but_for_gathered_layers() -> None:
    """A mixin that makes modulations in its own way may stand for adaLN."""
    model = plus()
    model.transformer.mixins["adaln"] = nn.Identity()
    split = apply_sharding(model, family_sharding(CogView3Plus), Axis(2, 1))
    assert split.transformer.blocks[0].mlp.up.weight.shape == (64, 32)
    with pytest.raises(
        ValueError, match=r"sharding patterns match no module of CogView3Plus: blocks\.\*\.gate"
    ):
        check_sharding(model, {"blocks.*.gate": Column()}, 2)


@pytest.mark.parametrize("style", (Row(), Column(gather=True)))
def test_an_embedding_is_split_by_its_outputs_alone(style) -> None:
    with pytest.raises(ValueError, match="the sharding of 0, an embedding, must be Column without gather"):
        check_sharding(nn.Sequential(nn.Embedding(4, 8)), {"0": style}, 2)
