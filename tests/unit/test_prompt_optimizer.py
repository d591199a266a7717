"""Rewriting prompts with the real client, against a server that speaks the protocol and fails as they do."""

from __future__ import annotations

import json
import logging
import re
import sys

import pytest

from sat.apps.prompts.optimizer import (
    Cache,
    Endpoint,
    OptimizerError,
    PromptOptimizer,
    UnusableServerError,
    shortened,
)
from sat.apps.prompts.writing import EXAMPLES, AnswerError, Words, is_english, read_answer
from sat.cli import prompt as prompt_command
from sat.tokenizers import T5Tokenizer
from sat.util.ending import FAILED
from tests.chat import KEY, LONG, Chat, Says, chat
from tests.checkpoints import tokenizer as vocabulary

openai = pytest.importorskip("openai", reason="the openai package is an extra")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path) -> None:
    """No settings and no cache of whoever runs the tests."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


def asking(server: Chat, **more: object) -> PromptOptimizer:
    return PromptOptimizer(Endpoint("small", server.url, KEY, **more))  # type: ignore[arg-type]


def test_the_answer_is_streamed_and_put_on_one_line() -> None:
    broken = LONG.replace(" with", "\n\nwith")
    with chat(Says(f"<think>an apple?</think>\n**Prompt:** \n\n{broken}")) as server:
        assert asking(server)("苹果").text == LONG
        (asked,) = server.asked
    assert asked["messages"][-1] == {"role": "user", "content": "苹果"}
    assert "100 to 200 words" in asked["messages"][0]["content"]
    assert asked["model"] == "small" and server.keys == [f"Bearer {KEY}"]


def test_examples_are_what_the_instruction_asks_for() -> None:
    for request, description in EXAMPLES:
        assert 100 <= len(description.split()) <= 200, request
        assert read_answer(description) == description


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status: int) -> None:
    with chat(Says("busy", status), Says("busy", status), Says()) as server:
        assert asking(server)("an apple").text == LONG
        assert len(server.asked) == 3


def test_a_silent_server_is_asked_again_and_then_named() -> None:
    with chat(Says(wait=0.6), Says()) as server:
        assert asking(server, timeout=0.3, retries=4)("an apple").text == LONG
    with (
        chat(Says(wait=0.4)) as server,
        pytest.raises(OptimizerError, match=r"/v1 does not answer within 0\.2 s"),
    ):
        asking(server, timeout=0.2, retries=0)("an apple")


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    with chat(Says(LONG[:50], finish=None), Says()) as server:
        assert asking(server)("an apple").text == LONG
    with (
        chat(Says(LONG[:50], finish=None)) as server,
        pytest.raises(OptimizerError, match="the answer broke off"),
    ):
        asking(server)("an apple")


@pytest.mark.parametrize(
    ("says", "match", "kind"),
    [
        (Says(""), "small: the answer is empty", OptimizerError),
        (
            Says("Ein roter Apfel liegt auf einem runden Tisch aus Holz. " * 5),
            "not in English",
            OptimizerError,
        ),
        (Says("一个红苹果"), "not in English", OptimizerError),
        (Says("I'm sorry, I can't help with that."), "the model refused", OptimizerError),
        (Says("", refusal="No."), "the model refused: 'No.'", OptimizerError),
        (Says("", finish="content_filter"), "the model refused", OptimizerError),
        (Says(f"Incorrect API key provided: {KEY}", 401), "refuses the API key", UnusableServerError),
        (Says("no such model", 404), "has no model 'small'", UnusableServerError),
        (Says(f"your key {KEY} is bad", 400), r"error 400: your key \*\*\* is bad", OptimizerError),
        (Says("quota", 429), "too many requests: quota", OptimizerError),
        (Says("melted", 500), "error 500: melted", OptimizerError),
    ],
)
def test_what_is_no_description_is_one_line_without_the_key(says: Says, match: str, kind: type) -> None:
    with chat(says) as server, pytest.raises(kind, match=match) as caught:
        asking(server, retries=1)("an apple")
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_cannot_be_asked_is_named_at_once() -> None:
    def refusal(url: str | None, key: str | None = KEY) -> str:
        with pytest.raises(UnusableServerError) as caught:
            PromptOptimizer(Endpoint("small", url, key, retries=0))("an apple")
        return str(caught.value)

    with chat() as server:
        gone = server.url
    assert "cannot connect to http://127.0.0.1" in refusal(gone) and "refused" in refusal(gone)
    assert "set OPENAI_API_KEY" in refusal(None, key=None)
    assert "expected http://HOST" in refusal("localhost:8000/v1")
    assert "give a key instead" in refusal("http://me:pass@127.0.0.1/v1")
    assert "pass" not in refusal("http://me:pass@127.0.0.1/v1").replace("password", "")


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UnusableServerError, match="pip install"):
        PromptOptimizer(Endpoint("small", None, KEY))("an apple")


def test_an_answer_is_asked_for_once(tmp_path) -> None:
    with chat(Says(LONG), Says("another")) as server:
        ask = PromptOptimizer(Endpoint("small", server.url, KEY), cache=Cache(tmp_path))
        assert [ask("an apple").text, ask(" an apple ").text] == [LONG, LONG]
        assert len(server.asked) == 1
        other = PromptOptimizer(Endpoint("large", server.url, KEY), cache=Cache(tmp_path))
        assert other("an apple").text == "another"
    (first, *_) = sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime)
    assert KEY not in first.read_text()
    for path in tmp_path.iterdir():
        path.write_text("{half")
    with chat(Says("a third")) as server:
        assert (
            PromptOptimizer(Endpoint("small", server.url, KEY), cache=Cache(tmp_path))("an apple").text
            == "a third"
        )


def test_a_long_answer_is_cut_to_the_tokens_that_are_read(spiece, caplog) -> None:
    limit = T5Tokenizer(spiece, 90)
    assert limit.truncation(LONG) is not None
    with chat() as server:
        got = PromptOptimizer(Endpoint("small", server.url, KEY), limit)("an apple")
    assert limit.truncation(got.text) is None
    assert LONG.startswith(got.text) and got.dropped and LONG.endswith(got.dropped)
    assert "longer than the 90 tokens" in caplog.text


def test_a_cut_is_between_sentences_or_else_between_words(spiece) -> None:
    for tokens in range(5, 60):
        text = "One green cat sat. Two red dogs ran over the wooden table and the small river"
        kept, dropped = shortened(text, T5Tokenizer(spiece, tokens))
        assert len(T5Tokenizer(spiece, tokens).encode(kept)) <= tokens
        if dropped is not None:
            assert f"{kept} {dropped}" == text or len(kept.split()) <= 1
    assert shortened("short", None) == ("short", None)


def test_the_length_asked_for_follows_from_the_tokens() -> None:
    assert Words.within(None) == (100, 200)
    assert Words.within(224) == Words.within(225) == (100, 167) or Words.within(225).least == 100
    assert Words.within(16) == (6, 11)


def test_english_is_told_from_its_neighbours() -> None:
    assert is_english(LONG) and is_english("red apple") and is_english('a sign reading "Straße" in the rain')
    assert not is_english("яблоко") and not is_english("…")
    assert not is_english("Una manzana roja y brillante descansa sobre una mesa redonda de madera cerca del "
                          "borde izquierdo de la imagen, con un tallo corto y una hoja verde")  # fmt: skip
    with pytest.raises(AnswerError):
        read_answer("``` \n\n```")


# -- the command


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = prompt_command.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_the_command_prints_the_description(capsys, monkeypatch) -> None:
    with chat() as server:
        code, out, err = command(capsys, "--prompt", "an apple", "--base-url", server.url, "--api-key", KEY)
        assert (code, out) == (0, LONG + "\n"), err
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_MODEL", "from-the-environment")
        assert command(capsys, "--prompt", "an apple")[0] == 0
        assert server.asked[-1]["model"] == "from-the-environment"


def test_a_dry_run_shows_the_messages_and_sends_nothing(capsys) -> None:
    with chat() as server:
        code, out, _ = command(
            capsys,
            "--prompt",
            "an apple",
            "--base-url",
            server.url,
            "--base",
            "configs/tiny.yaml",
            "--dry-run",
        )
        assert code == 0 and server.asked == []
    sent = json.loads(out)
    assert sent["messages"][-1]["content"] == "an apple"
    assert "6 to 11 words" in sent["messages"][0]["content"]  # the small model reads 16 tokens


def test_a_file_is_rewritten_line_by_line_and_what_fails_stays(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sat.apps.prompts.optimizer.AT_ONCE", 1)
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    bad = Says("不行")
    with chat(Says(), bad, bad) as server:
        code, out, err = command(
            capsys, "--prompt-file", tmp_path / "p.txt", "--output", tmp_path / "d.txt",
            "--base-url", server.url, "--api-key", KEY,
        )  # fmt: skip
    assert code == FAILED and out.strip() == str(tmp_path / "d.txt")
    assert (tmp_path / "d.txt").read_text() == f"{LONG}\ntwo\n"
    assert "prompt 1 is left as it is" in err


def test_the_command_fails_in_one_line(capsys, tmp_path) -> None:
    code, out, err = command(capsys, "--prompt", "an apple")
    assert code == FAILED and out == "" and re.fullmatch(r"error: no API key for .*\n", err)
    assert command(capsys, "--prompt", " ")[0] == 2
    assert command(capsys, "--prompt-file", tmp_path / "none.txt")[0] == 2


def test_the_key_is_in_no_log(capsys, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    with chat(Says(f"{KEY}?", 500), Says()) as server:
        code, out, err = command(
            capsys, "--prompt", "an apple", "--base-url", server.url, "--api-key", KEY, "--debug"
        )
    assert code == 0
    assert "HTTP" in caplog.text  # the client's own log is on
    assert KEY not in caplog.text + out + err
