"""python -m sat.cli.web: who is let in, and what is refused before anything is loaded."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys

import pytest

from sat.cli import web
from sat.util.ending import FAILED
from tests.configs import ROOT

TINY = ["--base", str(ROOT / "configs" / "tiny.yaml")]


@pytest.fixture
def run(monkeypatch, capsys):
    """The command on the small model: (code, standard error); it must not get as far as loading."""
    for name in (web.PASSWORD, web.TOKEN):
        monkeypatch.delenv(name, raising=False)
    handlers, term = list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM)

    def command(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = web.main([*TINY, *map(str, arguments)])
        return code, capsys.readouterr().err

    yield command
    logging.getLogger().handlers[:] = handlers
    signal.signal(signal.SIGTERM, term)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets others in: set a password in COGVIEW3_WEB_PASSWORD"),
        (["--share"], "--share lets others in: set a password"),
        (["--queue", "0"], "expected at least 1"),
        (["--port", "70000"], "--port 70000: expected 0 to 65535"),
        (["--token-file", "none.txt"], "none.txt cannot be read"),
        (["samplng.steps=3", "--check"], "sampling"),
    ],
)
def test_what_cannot_be_is_refused_at_once(run, arguments, match) -> None:
    code, err = run(*arguments)
    assert code == 2 and match in err, err


def test_others_need_a_password_and_for_the_api_a_token_too(run, monkeypatch, tmp_path) -> None:
    (tmp_path / "password").write_text("secret-word\n")
    guarded = ("--host", "0.0.0.0", "--password-file", tmp_path / "password", "--check")
    assert run(*guarded) == (0, "")
    code, err = run(*guarded, "--api")
    assert code == 2 and "set a token in COGVIEW3_API_TOKEN" in err and "secret-word" not in err
    monkeypatch.setenv(web.TOKEN, "token")
    assert run(*guarded, "--api")[0] == 0
    (tmp_path / "password").write_text(" \n")
    assert "is empty" in run(*guarded)[1]


def test_a_missing_package_says_what_to_install(run, monkeypatch) -> None:
    monkeypatch.setattr(web, "find_spec", lambda name: None)
    code, err = run()
    assert code == 2 and "pip install -e '.[web]'" in err


def test_a_port_that_is_taken_is_named_before_the_model_is_loaded(run, tmp_path) -> None:
    import socket

    pytest.importorskip("gradio", reason="the web page is an extra")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = run("--port", port, "--output-dir", tmp_path / "out")
    assert code == FAILED and f"cannot listen on 127.0.0.1, port {port}" in err and "loaded" not in err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom sat.cli.web import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'gradio', 'fastapi', 'numpy', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--share" in done.stdout
