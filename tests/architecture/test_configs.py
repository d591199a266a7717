"""Every YAML file in configs/ is part of a command in its own head, and that command checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sat.cli import sample, train
from tests.architecture.commands import commands
from tests.architecture.test_commands import accepted
from tests.architecture.tree import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_checks_with_the_command_in_its_head(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    name = str(path.relative_to(ROOT))
    own = [command for command in commands(name) if name in command.arguments]
    assert own, f"the comment at the top of {name} shows no command with it after --base"
    for command in own:
        assert accepted(command) == 0, f"{command}\n{capsys.readouterr().out}"


@pytest.mark.parametrize(
    "over",
    [
        "lora", "sft", "distill", "control", "control control_blockwise", "control control_concat",
        "sft zero2", "sft zero3_offload", "lora tensor2", "sft memory.quantize.text_encoder=int8",
    ],
)  # fmt: skip
def test_trainings_of_cogview4_check(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [word if "=" in word else f"configs/{word}.yaml" for word in ("cogview4", *over.split())]
    assert train.main(["--base", *words, "data.sources.0.path=data/emoji_sample", "--check"]) == 0


@pytest.mark.parametrize(
    "over",
    ["tensor2", "sequence2", "guidance2", "memory.quantize.network=int8"],
)
def test_pictures_of_cogview4_check(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget, whose estimate takes minutes, is in the runs of the small one."""
    monkeypatch.chdir(ROOT)
    word = over if "=" in over else f"configs/{over}.yaml"
    words = ["--base", "configs/cogview4.yaml", word, "--prompt", "a red fox", "--check"]
    assert sample.main(words) == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_is_plain_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)
