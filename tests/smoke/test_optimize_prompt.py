"""sample.py --optimize-prompt: what is drawn, what is recorded, and what happens without an answer."""

from __future__ import annotations

import logging
import signal

import pytest

from sat.cli.commands import sample as sample_work
from sat.config.load import load
from sat.sampling.output import read_png_text
from tests.chat import KEY, Says, chat
from tests.checkpoints import tokenizer
from tests.sampling import Command, files

pytest.importorskip("openai", reason="the openai package is an extra")

DESCRIPTION = "a blue car"


@pytest.fixture
def sample(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    root, term = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers = list(root.handlers)
    yield Command(tokenizer(tmp_path / "spiece.model"), capsys)
    root.handlers[:] = handlers
    signal.signal(signal.SIGTERM, term)


def test_the_description_is_drawn_and_recorded_and_the_key_is_not(sample, tmp_path) -> None:
    out = tmp_path / "out"
    with chat(Says(DESCRIPTION)) as server:
        done = sample(
            "--prompt", "汽车", "--optimize-prompt", "--optimizer-url", server.url, "--output-dir", out
        )
        assert done.code == 0, done.err
        assert f"'汽车' is drawn as: {DESCRIPTION}" in done.err
    (picture,) = out.rglob("0*.png")
    assert (read_png_text(picture) or {})["prompt"] == DESCRIPTION
    assert load([out / "resolved.yaml"]).sampling.prompt == [DESCRIPTION]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written and KEY not in done.err + done.out
    before = files(out)
    again = sample("--base", out / "resolved.yaml", "--output-dir", tmp_path / "again")
    assert again.code == 0, again.err
    assert files(tmp_path / "again") == before


def test_without_an_answer_the_prompt_is_drawn_as_it_is(sample, tmp_path) -> None:
    with chat() as server:
        gone = server.url
    words = ("--optimize-prompt", "--optimizer-url", gone, "--output-dir", tmp_path / "out")
    done = sample("--prompt", "a dog", "--prompt", "the sun", *words)
    assert done.code == 0, done.err
    for prompt in ("a dog", "the sun"):
        assert f"warning: '{prompt}' is drawn as it is: cannot connect to {gone}" in done.err
    texts = [(read_png_text(path) or {})["prompt"] for path in sorted((tmp_path / "out").rglob("0*.png"))]
    assert texts == ["a dog", "the sun"]


def test_typed_prompts_are_rewritten_too(sample, tmp_path, monkeypatch) -> None:
    lines = iter(["Auto"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or _end())
    monkeypatch.setattr(sample_work.sys.stdin, "isatty", lambda: True, raising=False)
    with chat(Says(DESCRIPTION)) as server:
        done = sample("--optimize-prompt", "--optimizer-url", server.url, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert [path.name for path in (tmp_path / "out").glob("0_*")] == ["0_a_blue_car"]


def _end() -> str:
    raise EOFError


def test_impossible_combinations_are_refused(sample, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("a dog\n")
    shared = sample("--prompt-file", tmp_path / "p.txt", "--optimize-prompt", "sampling.share=0/2")
    assert shared.code == 2 and "rewrite the file first" in shared.err
    lone = sample("--prompt", "a dog", "--optimizer-url", "http://127.0.0.1:9/v1")
    assert lone.code == 2 and "go with --optimize-prompt" in lone.err
