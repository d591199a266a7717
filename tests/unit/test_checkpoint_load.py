"""Strict loading: every name once, all that does not fit in one line, values cast and placed as asked."""

import pytest
import torch
from torch import nn

from sat.checkpoint import CheckpointError, InMemory, load, match
from sat.checkpoint.load import Overflow
from sat.checkpoint.rules import as_theirs, family_rules
from sat.mixin import Mixin
from sat.mixins.rope import RoPE
from sat.models.cogview3_plus import CogView3Plus
from sat.models.cogview3_plus.keys import SAT
from tests.checkpoints import MODEL, build, same, tensors

PREFIX = "model.diffusion_model."


def engine(**more):
    """The tiny network under official engine names, with ``more`` tensors beside."""
    theirs = as_theirs(InMemory(build("model").state_dict()), SAT)
    return {**{PREFIX + name: theirs[name] for name in theirs}, **more}


def message(source, part="model", module=None, **options):
    with pytest.raises(CheckpointError) as caught:
        load(module or build(part, meta=True), source, part, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- names


@pytest.mark.parametrize("part", ["model", "first_stage", "text"])
@pytest.mark.parametrize("layout", ["NATIVE", "SAT", "DIFFUSERS"])
def test_every_layout_loads_by_its_names_alone(part, layout):
    whole = build(part)
    rules = family_rules(type(whole))[layout]
    module = build(part, meta=True)
    report = load(module, as_theirs(InMemory(whole.state_dict()), rules), part)
    assert same(module.state_dict(), whole.state_dict())
    assert report.layout == layout or part == "text"
    assert report.missing == report.unexpected == []


def test_an_engine_file_gives_each_part_its_own_names():
    parts = tensors()
    rules = {part: family_rules(type(build(part)))["SAT"] for part in parts}
    prefixes = {
        "model": PREFIX,
        "first_stage": "first_stage_model.",
        "text": "conditioner.embedders.0.transformer.",
    }
    whole = {}
    for part, own in parts.items():
        theirs = as_theirs(InMemory(own), rules[part])
        whole.update({prefixes[part] + name: theirs[name] for name in theirs})
    for part, own in parts.items():
        module = build(part, meta=True)
        report = load(module, whole, part)
        assert same(module.state_dict(), own)
        assert len(report.ignored) == len(whole) - len([n for n in whole if n.startswith(prefixes[part])])


def test_our_own_engine_prefix_is_understood():
    own = build("model").state_dict()
    module = build("model", meta=True)
    load(module, {"network." + name: t for name, t in own.items()}, "model")
    assert same(module.state_dict(), own)


def test_missing_names_are_listed_under_both_names():
    file = engine()
    del file[PREFIX + "time_embed.0.weight"], file[PREFIX + "transformer.layers.1.mlp.dense_h_to_4h.bias"]
    text = message(file)
    assert "does not fit CogView3Plus (SAT names)" in text
    assert "2 missing" in text
    assert "time.0.weight (there: time_embed.0.weight)" in text


def test_unexpected_names_are_listed():
    assert "2 unexpected: 'model.diffusion_model.ghost', 'stray'" in message(
        engine(**{PREFIX + "ghost": torch.ones(1), "stray": torch.ones(1)})
    )


def test_averages_beside_the_weights_are_left_out_by_the_switch_that_is_named():
    ema = {"model_ema.decay": torch.ones(1), "model_ema.diffusion_modeltime0weight": torch.ones(3)}
    says = "averages of a training: checkpoint.allow_unexpected=['model_ema.*'] in the config"
    assert says in message(engine(**ema))
    load(build("model"), engine(**ema), "model", allow_unexpected=["model_ema.*"])
    assert "allow_unexpected" not in message(engine(**{"model.diffusion_model.ghost": torch.ones(1)}))


def test_a_layer_too_many_is_unexpected():
    extra = PREFIX + "transformer.layers.2.mlp.dense_h_to_4h.bias"
    assert f"1 unexpected: '{extra}'" in message(engine(**{extra: torch.ones(128)}))


def test_misshapen_tensors_are_listed_with_both_shapes():
    file = engine()
    file[PREFIX + "time_embed.0.weight"] = torch.ones(5, 32)
    assert "1 misshapen: 'time.0.weight' is [5, 32], the model has [20, 32]" in message(file)


def test_all_problems_come_in_one_line():
    file = engine(stray=torch.ones(1))
    file[PREFIX + "time_embed.0.weight"] = torch.ones(5, 32)
    del file[PREFIX + "time_embed.0.bias"]
    text = message(file)
    assert "1 missing" in text
    assert "1 unexpected" in text
    assert "1 misshapen" in text


def test_weights_of_another_part_are_recognised_as_such():
    text = message(build("first_stage").state_dict())
    assert "none of its" in text
    assert "is it the model part of this model?" in text


def test_a_failed_load_leaves_the_module_as_it_was():
    module = build("model")
    before = {name: t.clone() for name, t in module.state_dict().items()}
    message(engine(stray=torch.ones(1)), module=module)
    assert same(module.state_dict(), before)


def test_patterns_allow_what_is_missing_or_unexpected():
    own = build("model").state_dict()
    file = {name: t for name, t in own.items() if not name.startswith("size.")} | {"lora.x": torch.ones(1)}
    module = build("model")
    report = load(module, file, "model", allow_missing=["size.*"], allow_unexpected=["lora.*"])
    assert report.missing == ["size.0.weight", "size.0.bias", "size.2.weight", "size.2.bias"]
    assert report.unexpected == ["lora.x"]
    assert "4 missing, 1 unexpected" in str(report)


def test_layers_that_may_be_missing_initialise_themselves_on_a_meta_model():
    own = build("model").state_dict()
    file = {name: t for name, t in own.items() if not name.startswith("size.")}
    module = build("model", meta=True)
    load(module, file, "model", allow_missing=["size.*"])
    weight = module.size[0].weight
    assert not weight.is_meta
    assert 0 < weight.std() < 1


def test_a_value_that_nothing_can_give_is_an_error():
    class Bare(Mixin):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        host = RoPE.host

    with torch.device("meta"):
        module = CogView3Plus(**MODEL, mixins={"bare": Bare()})
    text = message(build("model").state_dict(), module=module, allow_missing=["*bare*"])
    assert "1 tensors of CogView3Plus are allowed to be missing, but it cannot compute them" in text


# -- the position table


def test_the_position_table_of_the_file_is_used():
    file = engine()
    file[PREFIX + "mixins.pos_embed.image_pos_embedding"] = torch.full((12, 12, 32), 2.0)
    module = build("model", meta=True)
    load(module, file, "model")
    assert (module.get_buffer("transformer.mixins.position.table") == 2).all()


def test_without_a_position_table_the_computed_one_stays():
    file = engine()
    del file[PREFIX + "mixins.pos_embed.image_pos_embedding"]
    module = build("model", meta=True)
    report = load(module, file, "model")
    assert report.computed == ["transformer.mixins.position.table"]
    assert same(module.state_dict(), build("model").state_dict())


def test_a_position_table_where_the_model_has_none_is_unexpected():
    with torch.device("meta"):
        module = CogView3Plus(**MODEL, mixins={"position": RoPE(8, 12, 12)})
    assert "1 unexpected: 'model.diffusion_model.mixins.pos_embed.image_pos_embedding'" in message(
        engine(), module=module
    )


# -- types and places


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_are_cast_and_buffers_keep_their_type(meta, dtype):
    own = build("model").state_dict()
    module = build("model", meta=meta)
    load(module, own, "model", dtype=dtype, device="cpu")
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module.get_buffer("transformer.mixins.position.table").dtype == torch.float32
    assert torch.equal(module.time[0].weight, own["time.0.weight"].to(dtype))


def test_a_cast_tensor_is_not_copied_again(monkeypatch):
    """In float32 the largest tensors would be held twice; one that is not cast may be a window on a file."""
    made = {}
    cast = Overflow.cast

    def noting(self, key, tensor, dtype):
        made[key] = out = cast(self, key, tensor, dtype)
        return out

    monkeypatch.setattr(Overflow, "cast", noting)
    with torch.device("meta"):
        module = nn.Linear(3, 5)
    given = {"weight": torch.ones(5, 3, dtype=torch.bfloat16), "bias": torch.ones(5)}
    load(module, given, "model", dtype=torch.float32)
    assert module.weight.data_ptr() == made["weight"].data_ptr()
    assert module.bias.data_ptr() != given["bias"].data_ptr()


def test_values_beyond_the_range_of_fp16_are_reported_by_name():
    own = {name: t.bfloat16() for name, t in build("model").state_dict().items()}
    own["time.0.weight"][0, 0] = 70000.0
    own["size.2.bias"][0] = -1e6
    text = message(own, dtype=torch.float16)
    assert "2 tensors hold values beyond the range of float16 (largest 65504)" in text
    assert "'time.0.weight' (7.014e+04)" in text
    assert "'size.2.bias' (9.994e+05)" in text
    assert "use bf16 or fp32" in text


def test_infinite_values_in_the_file_are_not_taken_for_overflow():
    own = build("model").state_dict()
    own["time.0.weight"][0, 0] = float("inf")
    module = build("model", meta=True)
    load(module, own, "model", dtype=torch.float16)
    assert module.time[0].weight[0, 0].isinf()


def test_a_loaded_module_owns_its_memory():
    own = build("model").state_dict()
    module = build("model", meta=True)
    load(module, own, "model")
    own["time.0.weight"].zero_()
    assert module.time[0].weight.abs().sum() > 0


def test_parameters_that_exist_are_filled_in_place_and_keep_their_marks():
    module = build("model")
    weight = module.time[0].weight
    weight.requires_grad_(False)
    weight.mark = "kept"
    load(module, build("model").state_dict(), "model")
    assert module.time[0].weight is weight
    load(module, build("model").state_dict(), "model", dtype=torch.bfloat16)
    assert module.time[0].weight.mark == "kept"
    assert not module.time[0].weight.requires_grad


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    with torch.device("meta"):
        module = Tied()
    value = torch.randn(3, 3)
    load(module, {"a.weight": value, "b.weight": value}, "model")
    assert module.a.weight is module.b.weight


def test_match_reads_no_tensor():
    file = {name: torch.empty_like(t, device="meta") for name, t in engine().items()}
    assert len(match(build("model", meta=True), InMemory(file), "model").view) == len(file)
