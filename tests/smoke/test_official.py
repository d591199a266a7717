"""The official config through the command line, as it is."""

from __future__ import annotations

import pytest

from sat.cli.sample import main
from tests.unit.test_config_official import PLUS


def test_the_official_config_checks_and_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base", str(PLUS), "--check"]) == 0
    out = capsys.readouterr().out
    assert "config ok: no prompts yet, 4 x 1024 x 2048 (images x height x width), 50 steps, bf16" in out
    assert "not honoured: args.force_inference (missing weights are an error here" in out
    assert "checkpoint.model: there is no 'cogview3-plus-3b/transformer'" in out


def test_without_its_weights_it_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base", str(PLUS), "--prompt", "a dog"]) == 2
    assert "checkpoint.text: there is no 't5-v1_1-xxl'; see docs/checkpoints.md" in capsys.readouterr().err
