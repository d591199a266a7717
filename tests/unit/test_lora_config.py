"""The adapters section: what it says, what it refuses, with the nearest name and in one line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat.adapters.groups import GROUPS
from sat.adapters.names import choose
from sat.cli.arguments import lora
from sat.cli.sample import arguments, given
from sat.config.load import dump, load
from sat.config.schema import LoraConfig, RuleError
from tests.adapters import t5, unet
from tests.configs import DEBUG, ROOT, refused
from tests.small import plus

LORA = ROOT / "configs" / "lora.yaml"
BASES = [DEBUG, LORA]


def test_the_shipped_file_is_over_every_model_file() -> None:
    for name in ("tiny", "plus", "base", "debug"):
        size = {"tiny": 64, "debug": 48}.get(name, 512)
        bases = [ROOT / "configs" / f"{name}.yaml", LORA]
        found = load(bases, [f"data.height={size}", f"data.width={size}", "conditioning.tokenizer=null"])
        assert found.adapters.lora is not None
        assert (found.adapters.lora.rank, found.adapters.lora.targets) == (16, ["attention", "mlp"])
        assert found.train is not None and found.train.lr == 1e-4


def test_keys_are_set_on_the_command_line_over_any_config() -> None:
    found = load([DEBUG], ["adapters.lora.rank=8", "adapters.lora.alpha=4"])
    assert found.adapters.lora == LoraConfig(rank=8, alpha=4.0)
    assert found.adapters.lora.effective_alpha(2) == 1.0
    assert LoraConfig(rank=8).effective_alpha(8) == 8.0


def test_what_is_written_out_reads_back_the_same(tmp_path: Path) -> None:
    found = load(BASES, ["data.height=32", "data.width=48", "adapters.lora.ranks={mlp: 4}"])
    (tmp_path / "resolved.yaml").write_text(dump(found))
    assert load([tmp_path / "resolved.yaml"]) == found


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapters.lora.targets=[atention]"], "no group 'atention'; did you mean 'attention'? (there are"),
        (["adapters.lora.targets=[]"], "adapters.lora.targets: expected at least one of attention,"),
        (["adapters.lora.targets=[cross_attention]"], "'cross_attention' matches no layer of CogView3Plus"),
        (
            ["adapters.lora.targets=[model.transformer.blocks.0.attn.qvk]"],
            "did you mean 'model.transformer.blocks.0.attn.qkv'?",
        ),
        (["adapters.lora.ranks={mpl: 4}"], "adapters.lora.ranks: no group 'mpl'; did you mean 'mlp'?"),
        (["adapters.lora.ranks={adaln: 4}"], "ranks: 'adaln' matches no targeted layer"),
        (["adapters.lora.ranks={mlp: 0}"], "adapters.lora.ranks: expected at least 1, got 0 for 'mlp'"),
        (["adapters.lora.rank=0"], "adapters.lora.rank: expected at least 1, got 0"),
        (["adapters.lora.alpha=0"], "adapters.lora.alpha: expected more than 0, or null for the rank, got 0"),
        (["adapters.lora.dropout=1.0"], "adapters.lora.dropout: expected a share of 0 to below 1, got 1.0"),
        (["adapters.lora.rnak=4"], "did you mean 'adapters.lora.rank'?"),
        (["adapters.lora.targets=[attention, text_mlp]"], "set train.objective.params.train_text=true"),
        (["train.objective.params.train_text=true"], "add text_encoder, or set train_text to false"),
        (
            ["adapters.load=[{path: x, strength: .inf}]"],
            "adapters.load.0.strength: expected a number, got inf",
        ),
        (["adapters.load=[{pth: x}]"], "adapters.load.0.pth: no such key; did you mean 'path'?"),
    ],
)
def test_mistakes_are_named(overrides: list[str], said: str) -> None:
    lines = refused(BASES, [*overrides, "data.height=32", "data.width=48"])
    assert any(said in line for line in lines), lines


@pytest.mark.parametrize(("setting", "what"), [("dora=true", "DoRA"), ("lokr=4", "LoKr")])
def test_convolutions_take_lora_alone(setting: str, what: str) -> None:
    files = ["configs/tiny_base.yaml", "configs/lora.yaml"]
    sizes = ["data.height=64", "data.width=64", "adapters.lora.targets=[convolution]"]
    (line,) = refused(files, [*sizes, f"adapters.lora.{setting}"])
    assert f"conv1' is a convolution, which takes LoRA factors alone, no {what}" in line


def test_rounds_with_a_pair_of_strengths_are_no_training_of_factors() -> None:
    over = [
        "data.height=32", "data.width=48", "model.params.guidance_dim=16",
        "sampling.guider={target: sat.diffusion.guidance.Embedded, params: {scale: 2.0}}",
        "train.objective={target: sat.train.objectives.distillation.Distillation, params: "
        "{teacher_steps: 8, rounds: [4, 2]}}",
    ]  # fmt: skip
    assert any("a pair of guidance strengths is a new input" in line for line in refused(BASES, over))


def test_whole_weights_are_not_trained_under_loaded_adapters(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    over = ["data.height=32", "data.width=48", "adapters.lora=null", f"adapters.load=[{{path: {tmp_path}}}]"]
    assert any("adapters.merge: training whole weights" in line for line in refused(BASES, over))
    assert load(BASES, [*over, "adapters.merge=true"]).adapters.merge


def test_every_group_has_layers_in_some_model() -> None:
    parts = [{"model": plus()}, {"model": unet()}, {"text": t5()}]
    for group in GROUPS:
        sizes = []
        for part in parts:
            try:
                sizes.append(len(choose(part, [group], 4, {})))
            except ValueError:
                sizes.append(0)
        assert any(sizes), group


def test_a_section_says_all_that_is_wrong_with_it() -> None:
    with pytest.raises(RuleError) as caught:
        LoraConfig(rank=0, dropout=-1.0, targets=["nothing"])
    assert [key for key, _ in caught.value.broken] == ["rank", "dropout", "targets"]


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("runs/a", "runs/a", 1.0),
        ("runs/a:0.5", "runs/a", 0.5),
        ("runs/a:-2", "runs/a", -2.0),
        ("odd:name", "odd:name", 1.0),
        ("odd:name:3", "odd:name", 3.0),
        (":1", ":1", 1.0),
    ],
)
def test_a_strength_follows_the_last_colon(text: str, path: str, strength: float) -> None:
    assert lora(text) == (Path(path), strength)


def test_the_flag_sets_the_adapters_to_load() -> None:
    args = arguments(["--base", "a.yaml", "--lora", "one:0.5", "--lora", "two"])
    assert dict(given(args)) == {
        "adapters.load": [{"path": "one", "strength": 0.5}, {"path": "two", "strength": 1.0}]
    }


def test_in_a_cascade_adapters_are_the_first_stages(tmp_path: Path) -> None:
    from sat.config.cascade import load_cascade

    (tmp_path / "a").mkdir()
    cascade = ROOT / "tests" / "assets" / "toy" / "cascade.yaml"
    found = load_cascade([cascade], [("adapters.load", [{"path": str(tmp_path / "a")}])])
    assert [len(stage.experiment.adapters.load) for stage in found.stages] == [1, 0]
