"""Every YAML file in configs/ is part of a command in its own head, and that command checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_is_plain_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)
