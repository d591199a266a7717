"""Key rules: what a pattern matches, that nothing is used twice or lost, and that shapes follow the rule."""

import pytest
import torch

from sat.checkpoint.format import CheckpointError, InMemory
from sat.checkpoint.rules import KeyMappingError, as_ours, as_theirs, read_map, write_map
from sat.keys import Computed, ConvToLinear, Drop, Fuse, LinearToConv, Rename, Split, SwapHalves, Tie


def test_a_star_is_one_name_and_two_stars_are_the_rest():
    rules = [Rename("a.*", "b.*"), Rename("c.**", "d.**")]
    found = read_map(["a.weight", "a.x.weight", "c.x.weight"], rules)
    assert set(found.sources) == {"b.weight", "d.x.weight"}
    assert found.unmatched == ["a.x.weight"]


def test_an_index_is_digits_only():
    found = read_map(["layers.0.w", "layers.12.w", "layers.x.w"], [Rename("layers.{}.w", "blocks.{}.w")])
    assert set(found.sources) == {"blocks.0.w", "blocks.12.w"}
    assert found.unmatched == ["layers.x.w"]


def test_dots_in_a_pattern_are_dots():
    assert read_map(["axb"], [Rename("a.b", "c")]).unmatched == ["axb"]


def test_reversed_levels_are_counted_over_names_of_any_kind():
    """Only levels 1 to 3 have an upsampler, so its own indices do not tell how many levels there are."""
    rules = [
        Rename("up.{~}.block.{}.w", "levels.{}.blocks.{}.w"),
        Rename("up.{~}.upsample.w", "levels.{}.up.w"),
    ]
    theirs = [f"up.{level}.block.{block}.w" for level in range(4) for block in range(2)]
    theirs += [f"up.{level}.upsample.w" for level in (1, 2, 3)]
    found = read_map(theirs, rules)
    assert found.sources["levels.0.blocks.1.w"].names == ("up.3.block.1.w",)
    assert {name for name in found.sources if name.endswith("up.w")} == {
        f"levels.{i}.up.w" for i in (0, 1, 2)
    }
    back = write_map(list(found.sources), rules)
    assert set(back.sources) == set(theirs)
    assert back.sources["up.3.upsample.w"].names == ("levels.0.up.w",)


def test_fused_parts_are_stacked_in_the_order_of_the_rule():
    rules = [Fuse(["q.*", "k.*", "v.*"], "qkv.*")]
    theirs = InMemory({f"{n}.weight": torch.full((2, 3), float(i)) for i, n in enumerate("vkq")})
    ours = as_ours(theirs, rules)
    assert ours.info("qkv.weight").shape == (6, 3)
    assert ours["qkv.weight"][:, 0].tolist() == [2, 2, 1, 1, 0, 0]
    back = as_theirs(ours, rules)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert back.info("k.weight").shape == (2, 3)


def test_a_part_missing_from_a_fusion_is_named():
    with pytest.raises(KeyMappingError, match=r"1 names missing: 'k\.weight'"):
        as_ours(
            InMemory({"q.weight": torch.ones(1), "v.weight": torch.ones(1)}),
            [Fuse(["q.*", "k.*", "v.*"], "f.*")],
        )


def test_parts_of_a_fusion_must_have_equal_shapes():
    theirs = InMemory({"q.w": torch.ones(2, 2), "k.w": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match="should be equal"):
        as_ours(theirs, [Fuse(["q.w", "k.w"], "f.w")]).info("f.w")


def test_a_split_tensor_is_cut_in_the_order_of_the_rule():
    rules = [Split("ff.{}.*", ["mlp.{}.up.*", "mlp.{}.gate.*"])]
    theirs = InMemory({"ff.3.weight": torch.arange(12.0).reshape(6, 2), "ff.3.bias": torch.arange(6.0)})
    ours = as_ours(theirs, rules)
    assert set(ours) == {f"mlp.3.{name}.{kind}" for name in ("up", "gate") for kind in ("weight", "bias")}
    assert ours["mlp.3.up.bias"].tolist() == [0, 1, 2] and ours["mlp.3.gate.bias"].tolist() == [3, 4, 5]
    assert ours.info("mlp.3.gate.weight").shape == ours["mlp.3.gate.weight"].shape == (3, 2)
    back = as_theirs(ours, rules)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[n], theirs[n]) and back.info(n) == theirs.info(n) for n in theirs)


def test_a_tensor_that_does_not_split_evenly_is_refused():
    with pytest.raises(CheckpointError, match=r"a: shape \[5, 2\] does not split into 2 equal parts"):
        as_ours(InMemory({"a": torch.ones(5, 2)}), [Split("a", ["b", "c"])]).info("b")


def test_halves_of_unequal_shape_are_not_joined_when_written():
    ours = InMemory({"b": torch.ones(2, 2), "c": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match="should be equal to make 'a'"):
        as_theirs(ours, [Split("a", ["b", "c"])]).info("a")


def test_a_half_missing_from_a_split_is_named_when_written():
    with pytest.raises(KeyMappingError, match=r"1 names missing: 'c\.w'"):
        as_theirs(InMemory({"b.w": torch.ones(2)}), [Split("a.*", ["b.*", "c.*"])])


def test_a_fused_tensor_that_does_not_split_is_refused():
    with pytest.raises(CheckpointError, match=r"shape \[7\] does not split into 3 equal parts"):
        as_theirs(InMemory({"f.w": torch.ones(7)}), [Fuse(["q.w", "k.w", "v.w"], "f.w")]).info("q.w")


def test_swapped_halves_come_back():
    rules = [SwapHalves("a.*", "b.*")]
    theirs = InMemory({"a.weight": torch.arange(8.0).reshape(4, 2)})
    ours = as_ours(theirs, rules)
    assert ours["b.weight"][:, 0].tolist() == [4, 6, 0, 2]
    assert torch.equal(as_theirs(ours, rules)["a.weight"], theirs["a.weight"])


def test_an_odd_tensor_has_no_halves():
    with pytest.raises(CheckpointError, match="no two halves"):
        as_ours(InMemory({"a.w": torch.ones(3)}), [SwapHalves("a.*", "b.*")]).info("b.w")


@pytest.mark.parametrize("rule", [ConvToLinear("a.*", "b.*"), LinearToConv("a.*", "b.*")])
def test_one_by_one_convolutions_become_linear_and_back(rule):
    conv = isinstance(rule, ConvToLinear)
    weight = torch.randn(3, 2, 1, 1) if conv else torch.randn(3, 2)
    theirs = InMemory({"a.weight": weight, "a.bias": torch.randn(3)})
    ours = as_ours(theirs, [rule])
    assert ours["b.weight"].shape == ours.info("b.weight").shape == ((3, 2) if conv else (3, 2, 1, 1))
    assert ours["b.bias"].shape == (3,)
    back = as_theirs(ours, [rule])
    assert all(torch.equal(back[n], theirs[n]) and back.info(n) == theirs.info(n) for n in theirs)


@pytest.mark.parametrize("there", [["a"], ["b"], ["a", "b"]])
def test_any_of_tied_names_is_enough_and_the_first_is_written(there):
    rules = [Tie(["a", "b"], "c")]
    value = torch.randn(4)
    ours = as_ours(InMemory(dict.fromkeys(there, value)), rules)
    assert torch.equal(ours["c"], value)
    assert list(as_theirs(ours, rules)) == ["a"]


def test_tied_names_with_different_values_are_refused():
    ours = as_ours(InMemory({"a": torch.zeros(2), "b": torch.ones(2)}), [Tie(["a", "b"], "c")])
    with pytest.raises(CheckpointError, match="'a' and 'b' should hold the same tensor"):
        ours["c"]


def test_dropped_and_computed_names_are_listed_and_not_written():
    rules = [Drop("loss.**", "training only"), Computed("table", "not saved"), Rename("w", "w")]
    found = read_map(["loss.a.b", "w"], rules)
    assert (found.ignored, found.unmatched) == (["loss.a.b"], [])
    assert write_map(["table", "w"], rules).ignored == ["table"]


def test_names_that_no_rule_knows_are_refused():
    with pytest.raises(KeyMappingError, match=r"memory: 2 names match no rule: 'x', 'y'"):
        as_ours(InMemory({"x": torch.ones(1), "y": torch.ones(1)}), [])


def test_a_name_may_match_only_one_rule():
    with pytest.raises(KeyMappingError, match="'a.w' matches two rules"):
        read_map(["a.w"], [Rename("a.*", "b.*"), Drop("a.w", "twice")])


def test_two_names_may_not_become_one():
    with pytest.raises(KeyMappingError, match="'c' comes from both"):
        read_map(["a", "b"], [Rename("a", "c"), Rename("b", "c")])


def test_views_read_nothing_before_a_tensor_is_asked_for():
    class Counting(InMemory):
        reads = 0

        def __getitem__(self, key):
            Counting.reads += 1
            return super().__getitem__(key)

    rules = [Fuse(["q.*", "k.*", "v.*"], "qkv.*"), SwapHalves("a.*", "b.*")]
    theirs = Counting({name: torch.ones(4, 2) for name in ("q.w", "k.w", "v.w", "a.w")})
    stacked = as_theirs(as_ours(theirs, rules), rules)
    stacked.infos()
    assert Counting.reads == 0
    stacked["a.w"]
    assert Counting.reads == 1
