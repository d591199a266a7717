"""Hidden states against transformers' GlmModel, through the real key rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM, GlmModel
from transformers.models.glm import modeling_glm

from sat.checkpoint.format import CheckpointError, as_lazy
from sat.checkpoint.load import load
from sat.checkpoint.rules import as_theirs
from sat.config.build import build_empty
from sat.config.schema import Component
from sat.models.glm import GLMEncoder, from_huggingface
from sat.models.glm.keys import HF
from sat.models.glm.model import to_huggingface
from tests.small import fill
from tests.tolerances import F64

CONFIG = GlmConfig(
    vocab_size=70,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=69,
    eos_token_id=68,
    rms_norm_eps=1.5625e-7,
    attention_bias=True,
    partial_rotary_factor=0.5,
    attn_implementation="eager",
)  # fmt: skip; 6 heads of 8 are 48, not 24: a head size taken from the width fails


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's norms and softmax are in float32 even in float64; here in float64, as ours are."""

    def norm(self: modeling_glm.GlmRMSNorm, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(modeling_glm.GlmRMSNorm, "forward", norm)
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(modeling_glm.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


def pair(kind: type[torch.nn.Module] = GlmModel) -> tuple[torch.nn.Module, GLMEncoder]:
    peer = kind(CONFIG).double().eval()
    fill(peer)
    ours = GLMEncoder(**from_huggingface(CONFIG.to_dict()))  # type: ignore[arg-type]
    load(ours, peer.state_dict(), "text", dtype=torch.float64)
    return peer, ours.eval()


@torch.no_grad()
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", [GlmModel, GlmForCausalLM])
@pytest.mark.parametrize("length", [16, 37])
def test_hidden_states_in_front_of_the_last_layer_equal(kind: type[torch.nn.Module], length: int) -> None:
    peer, ours = pair(kind)
    ids = torch.randint(70, (3, length), generator=torch.Generator().manual_seed(1))
    theirs = peer(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours(ids), theirs, rtol=F64, atol=F64)


@torch.no_grad()
def test_a_token_sees_those_before_it_alone() -> None:
    _, ours = pair()
    ids = torch.randint(69, (1, 12), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[0, 7] += 1
    changed = (ours(ids) - ours(other)).abs().amax(-1)[0]
    assert torch.equal(changed > 0, torch.arange(12) >= 7)


@torch.no_grad()
def test_padding_in_front_moves_positions_and_is_attended() -> None:
    """As in CogView4's pipeline, which gives no mask: a prompt is not what it is without its padding."""
    _, ours = pair()
    ids = torch.randint(69, (1, 12), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.full((1, 4), 69), ids], 1)
    assert (ours(padded)[:, 4:] - ours(ids)).abs().max() > 1e-2


def test_one_layer_and_the_final_norm_are_left_in_the_file() -> None:
    peer = GlmModel(CONFIG)
    ours = GLMEncoder(**from_huggingface(CONFIG.to_dict()))  # type: ignore[arg-type]
    assert len(ours.transformer.blocks) == 3
    report = load(ours, peer.state_dict(), "text")
    assert "loaded" in str(report)
    names = set(as_theirs(as_lazy(dict(ours.state_dict())), HF))
    left = {name for name in peer.state_dict() if name not in names}
    assert left == {name for name in peer.state_dict() if name.startswith(("layers.3.", "norm."))}


def test_a_file_that_ends_before_the_encoder_is_refused() -> None:
    peer = GlmModel(CONFIG)
    params = {**from_huggingface(CONFIG.to_dict()), "depth": 5}
    with pytest.raises(CheckpointError, match="layers.4"):
        load(GLMEncoder(**params), peer.state_dict(), "text")  # type: ignore[arg-type]


def test_configs_turn_into_each_other() -> None:
    params = from_huggingface(CONFIG.to_dict())
    assert params["depth"] == 3 and params["rotary"] == 0.5
    assert from_huggingface(to_huggingface(params, "float32")) == params
    assert GlmConfig(**to_huggingface(params, "float32")).num_hidden_layers == 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act is 'gelu', only 'silu'"),
        ("num_hidden_layers", 1, "num_hidden_layers is 1"),
        ("rms_norm_eps", 1e-6, "rms_norm_eps is 1e-06"),
        ("head_dim", None, "head_dim is None"),
    ],
)
def test_other_language_models_are_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_huggingface({**CONFIG.to_dict(), key: value})


def test_names_and_shapes_of_the_published_size_map() -> None:
    config = GlmConfig()  # GLM-4-9B
    with torch.device("meta"):
        peer = GlmModel(config)
    params = from_huggingface({**config.to_dict(), "attention_bias": True})
    assert params == {
        "dim": 4096, "heads": 32, "kv_heads": 2, "head_dim": 128, "mlp_dim": 13696, "depth": 39,
        "vocab": 151552, "rotary": 0.5,
    }  # fmt: skip
    ours = build_empty(Component("sat.models.glm.GLMEncoder", {}))
    written = as_theirs(as_lazy(dict(ours.state_dict())), HF)
    theirs = {
        name: tuple(t.shape)
        for name, t in peer.state_dict().items()
        if not name.startswith(("layers.39.", "norm."))
    }
    theirs = {name: shape for name, shape in theirs.items() if not name.endswith("_proj.bias")}
    assert {n: written.info(n).shape for n in written if not n.endswith("_proj.bias")} == theirs
