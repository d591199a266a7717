"""``python -m sat.cli.NAME`` is the command, not an import that does nothing and succeeds."""

from __future__ import annotations

import runpy
import sys

import pytest

from tests.architecture.tree import ROOT

COMMANDS = sorted(p.stem for p in (ROOT / "sat/cli").glob("*.py") if "def main(" in p.read_text("utf-8"))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("argument", "code", "begin"), [("--help", 0, "usage: "), ("--no-such-option", 2, "usage: ")]
)
def test_a_command_runs_as_a_module(
    monkeypatch, capsys, name: str, argument: str, code: int, begin: str
) -> None:
    monkeypatch.delitem(sys.modules, f"sat.cli.{name}", raising=False)
    monkeypatch.setattr(sys, "argv", [name, argument])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"sat.cli.{name}", run_name="__main__", alter_sys=True)
    said = capsys.readouterr()
    assert stop.value.code == code
    assert (said.out or said.err).startswith(begin)


def test_every_command_of_a_reader_is_looked_at() -> None:
    assert {"sample", "train", "convert", "web", "evaluate", "prepare", "prompt", "doctor"} <= set(COMMANDS)
