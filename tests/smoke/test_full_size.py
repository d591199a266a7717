"""The stages of ``python -m tests.full_size``, at small sizes: the same commands and comparisons."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.architecture.commands import commands
from tests.full_size.__main__ import main
from tests.full_size.stages import MEMBERS, Choice, Stage


def test_every_stage_of_the_plus_member_runs_and_none_runs_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plus", "--small", "--folder", str(tmp_path), "--dtype", "fp32"]
    stages = [stage.name for stage in MEMBERS["plus"](Choice("plus", True, "fp32", 1))]
    assert main([*words, "--until", stages[2]]) == 0
    first = (tmp_path / "plus" / "done.json").read_text()
    assert main(words) == 0
    done = json.loads((tmp_path / "plus" / "done.json").read_text())
    assert list(done) == stages
    assert json.loads(first).items() <= done.items()
    assert done["a step as diffusers'"]["difference"] < 1e-5
    assert re.search(r"^\| a LoRA step \| \d", capsys.readouterr().out, re.MULTILINE)


def test_every_stage_of_the_cogview4_member_runs(tmp_path: Path) -> None:
    assert main(["cogview4", "--small", "--folder", str(tmp_path), "--dtype", "fp32"]) == 0
    done = json.loads((tmp_path / "cogview4" / "done.json").read_text())
    assert list(done) == [s.name for s in MEMBERS["cogview4"](Choice("cogview4", True, "fp32", 39))]


def test_every_stage_of_the_distilled_cascade_runs(tmp_path: Path) -> None:
    assert main(["distilled", "--small", "--folder", str(tmp_path), "--dtype", "fp32"]) == 0
    done = json.loads((tmp_path / "distilled" / "done.json").read_text())
    assert list(done) == [s.name for s in MEMBERS["distilled"](Choice("distilled", True, "fp32", 1))]


def test_a_failed_stage_ends_the_run_and_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MEMBERS, "plus", lambda choice: [Stage("bad", ["convert.py", "nothing", "out"])])
    with pytest.raises(SystemExit):
        main(["plus", "--small", "--folder", str(tmp_path)])
    assert not (tmp_path / "plus" / "done.json").exists()


@pytest.mark.parametrize("member", ["plus", "base", "cascade"])
def test_documented_commands_on_official_files_are_stages(member: str) -> None:
    typed = {tuple(stage.words) for stage in MEMBERS[member](Choice(member, False, "bf16", 1))}
    for command in commands("README.md", "docs/checkpoints.md"):
        if (
            f"configs/{member}.yaml" in command.arguments
            and command.program != "train.py"
            or (member == "plus" and "weights/cogview3-plus-3b" in command.arguments)
        ):
            words = {command.program, *command.arguments} - {"1024", "1536"}  # drawn at 512
            words = {word for word in words if "red fox" not in word}
            assert any(words <= set(stage) for stage in typed), str(command)
