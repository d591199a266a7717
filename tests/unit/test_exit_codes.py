"""Exit code 2 is the user's mistake in every command: a path that is not there is one."""

from __future__ import annotations

from importlib import import_module

import pytest

CASES = {
    "convert": [
        ["/nosuch", "OUT", "--to", "native"],
        ["EMPTY", "OUT", "--to", "native"],
        ["checkpoints/tiny", "FULL", "--to", "native"],
    ],
    "prepare": [["inspect", "/nosuch"], ["tokenizer", "--captions", "/nosuch", "--out", "OUT"]],
    "evaluate": [["retrieval", "--images", "/nosuch"], ["preference", "/nosuch", "/nosuch2", "--summary"]],
    "sample": [["--base", "configs/tiny.yaml", "--prompt-file", "/nosuch"]],
    "train": [["--base", "/nosuch.yaml"]],
}


@pytest.mark.parametrize(
    ("command", "words"), [(name, words) for name, all_ in CASES.items() for words in all_], ids=str
)
def test_a_path_that_is_not_there_is_a_mistake(command, words, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty").mkdir()
    places = {name.upper(): str(tmp_path / name) for name in ("full", "empty", "out")}
    main = import_module(f"sat.cli.{command}").main
    assert main([places.get(word, word) for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
