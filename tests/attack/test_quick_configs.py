"""Two dozen of the configs of :mod:`tests.attack.configs`, and one of each kind that once fell."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

from sat.cli import sample
from sat.config.load import load
from sat.config.yaml_source import ConfigError
from tests.attack.configs import attack
from tests.configs import ROOT

TINY = ROOT / "configs/tiny.yaml"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The commands set up the log of a whole process."""
    before = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = before


def test_every_changed_config_is_meant_or_refused_in_a_line() -> None:
    failures, ends, _ = attack(24, 1, seconds=60)
    assert not failures, "\n".join(failures)
    assert ends["refused"] >= 12


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("sampling: {steps: !!bool 12}", ":1: sampling.steps: tag"),
        ("sampling:\n  steps: !!int abc", ":2: sampling.steps: tag"),
        ("sampling:\n  steps: !!float ''", ":2: sampling.steps: tag"),
        ('sampling:\n  prompt: "a\\0b"', ":2: sampling.prompt: text with a NUL character"),
        ("sampling:\n  prompt: a\0b", ":2: not valid YAML: character 0x0"),
        ("sampling:\n  steps: 0x" + "f" * 9000, ":2: sampling.steps: a number of 9002 characters"),
        ("sampling:\n  prompt: " + "[" * 9000, ":2: not valid YAML: nested deeper than 64 levels"),
        ("model:\n  params:\n    patch: 0", "patch 0, channels 16"),
        ("model:\n  params:\n    table_size: []", "table_size"),
        ("conditioning:\n  text:\n    params:\n      vocab: 0", "is a width or a length 0?"),
        ("model:\n  params:\n    dim: 100000000", "more than 1e+12 weights"),
        ("imports: ['']", ":1: imports.0: expected the dotted name of a module"),
        ("imports: [../x]", ":1: imports.0: expected the dotted name of a module"),
        ("sampling:\n  steps: " + "9" * 900, "expected 1 to 1000 steps, got 999"),
        ("sampling:\n  " + "x" * 900 + ": 3", "xxx"),
        ("\n".join(f"x{index}: 3" for index in range(500)), "more"),
        ("{}\n" * 3_000_000, "cannot be read: has 9000000 bytes, more than 4194304"),
    ],
    ids=range(17),
)
def test_a_config_is_refused_in_readable_lines(tmp_path, text: str, line: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load([TINY, tmp_path / "a.yaml"])
    said = str(caught.value)
    assert line in said
    assert all(len(one) < 1600 for one in said.splitlines()) and len(said.splitlines()) <= 102


def test_a_check_ends_before_a_million_blocks_are_made() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match="more than 10000 modules: is a depth or a number of blocks"):
        load([TINY], ["model.params.depth=1000000"])
    assert time.monotonic() - started < 30  # a second or two, were this machine idle


def test_a_module_whose_code_fails_is_told_with_its_line(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_parts.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "worse_parts.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load([TINY], ["imports=[broken_parts, worse_parts]"])
    said = str(caught.value)
    assert "imports.0: cannot import 'broken_parts': SystemExit: 0" in said
    assert "imports.1: cannot import 'worse_parts': ZeroDivisionError: division by zero" in said


@pytest.mark.parametrize(
    "words", [["--x" + "a" * 4900], ["--base", "a" * 4900], ["sampling.a=" + "b" * 4900]]
)
def test_what_was_typed_is_not_echoed_whole(capsys, words) -> None:
    try:
        code = sample.main([*words, *(["--base", str(TINY)] if "--base" not in words else []), "--check"])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and "…" in said or len(said) < 400
    assert max(map(len, said.splitlines())) < 800
