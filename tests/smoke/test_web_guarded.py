"""The page and the API on another address than this machine's: password, token, what strangers reach."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sat import Pipeline
from sat.adapters.write import write
from sat.config.build import adaptable
from tests.adapters import adapter, noisy, start
from tests.browser import PHONE, browser, outside, visiting
from tests.chat import KEY, LONG, chat
from tests.configs import DEBUG, ROOT
from tests.web import TOKEN, Server, serving

gradio = pytest.importorskip("gradio", reason="the web page is an extra")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="the official client tries the API")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
USER, PASSWORD = "Änne", "correct horse battery"
TOY = ROOT / "tests" / "assets" / "toy" / "base.yaml"


def fur(folder: Path) -> None:
    """An adapter for the toy model."""
    pipe = Pipeline.from_config([DEBUG, TOY], device="cpu")
    model = adaptable(pipe.generator.engine)["model"]
    write(folder / "fur", adapter(noisy(start(model, ["attention"]), std=1.0)), "native", {"model": model})


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """The toy model on all addresses, with an adapter and somebody who enhances prompts."""
    folder = tmp_path_factory.mktemp("guarded")
    fur(folder / "lora")
    with (
        chat() as writer,
        serving(
            folder / "out", "--base", DEBUG, TOY, "--api", "--host", "0.0.0.0", "--user", USER,
            "--lora-dir", folder / "lora", "--optimizer-url", writer.url, "parallel.device=cpu",
            COGVIEW3_WEB_PASSWORD=PASSWORD, OPENAI_API_KEY=KEY,
        ) as running,
    ):  # fmt: skip
        yield running


def test_strangers_get_the_login_page_and_nothing_else(server) -> None:
    file = {"files": ("a.png", b"png", "image/png")}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.get("/").status_code == http.get("/health").status_code == 200
        for path in ("config", "gradio_api/info", f"gradio_api/file={server.log}", "monitoring"):
            assert http.get(f"/{path}").status_code == 401, path
        assert http.post("/gradio_api/upload", files=file).status_code == 401
        for path in ("queue/join", "run/predict"):
            assert http.post(f"/gradio_api/{path}", json={"fn_index": 0, "data": []}).status_code == 401
        for user, password in ((USER, "wrong"), ("user", PASSWORD), (USER, PASSWORD + "x")):
            answer = http.post("/login", data={"username": user, "password": password})
            assert answer.status_code == 400 and "set-cookie" not in answer.headers
        assert http.get("/config").status_code == 401
        assert http.post("/login", data={"username": USER, "password": PASSWORD}).status_code == 200
        assert http.get("/config").status_code == 200
        assert http.post("/gradio_api/upload", files=file).status_code == 200


def test_only_drawing_waits_in_gradios_queue(server) -> None:
    """There an event is lost that comes while the stream of the one before it closes."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        http.post("/login", data={"username": USER, "password": PASSWORD})
        events = http.get("/config").json()["dependencies"]
    pressed = [event for event in events if event["targets"] != [[None, "unload"]]]  # that one is never sent
    assert len(pressed) == len(events) - 1
    assert [event["queue"] for event in pressed] == [event["types"]["generator"] for event in pressed]


def test_the_api_wants_its_token_and_not_the_password(server) -> None:
    def client(key: str) -> Any:
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    for key in (PASSWORD, TOKEN[:-1], KEY):
        with pytest.raises(openai.AuthenticationError, match="wants its token"):
            client(key).images.generate(prompt="a cat")
    made = client(TOKEN).images.generate(prompt="a cat", extra_body={"seed": 3})
    assert httpx.get(made.data[0].url).headers["content-type"] == "image/png"  # signed: no password
    assert httpx.get(made.data[0].url[:-1] + "?").status_code == 404
    whole = client(TOKEN).images.generate(prompt="a cat", response_format="b64_json", extra_body={"seed": 3})
    assert base64.b64decode(whole.data[0].b64_json) == httpx.get(made.data[0].url).content


def test_a_person_logs_in_and_draws_with_a_lora(server) -> None:
    with browser() as made, visiting(made, server.url, PHONE, expected="status of 400") as page:
        for password in ("wrong", PASSWORD):
            page.wait_for_selector("input[type=password]")
            assert outside(page, "input[type=password]", "button") == []
            page.fill("input[type=text]", USER)
            page.fill("input[type=password]", password)
            page.click("button")
            if password == "wrong":
                page.wait_for_selector("text=Incorrect Credentials")
        page.fill("#prompt textarea", "苹果")
        page.click("#enhance")
        page.wait_for_function("document.querySelector('#status').innerText.includes('Rewritten')")
        short = page.input_value("#prompt textarea")  # the toy model reads 8 tokens
        assert LONG.startswith(short + " ") and "What did not fit was cut" in page.inner_text("#status")
        page.fill("#lora input[type=number]", "0.5")
        page.click("#draw")
        page.wait_for_function("document.querySelector('#facts').innerText.includes('fur at 0.5')")
        assert outside(page, "#canvas img", "#facts", "#lora", "#gallery") == []
        page.fill("#lora input[type=number]", "0")
        page.click("#reuse")
        page.wait_for_function("document.querySelector('#status').innerText.includes('settings of the')")
        assert page.input_value("#lora input[type=number]") == "0.5"


def test_no_secret_is_written(server) -> None:
    secrets = [secret.encode() for secret in (PASSWORD, TOKEN, KEY)]
    files = [path for path in server.out.parent.rglob("*") if path.is_file()]
    assert server.log in files and any(path.suffix == ".png" for path in files)
    assert [path for path in files if any(secret in path.read_bytes() for secret in secrets)] == []


@pytest.mark.parametrize(
    ("host", "reached"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("192.0.2.7", "192.0.2.7")]
)
def test_what_is_shared_is_what_listens(host, reached, monkeypatch) -> None:
    from gradio import networking

    from sat.apps.web.serve import share

    asked: list[Any] = []
    monkeypatch.setattr(networking, "setup_tunnel", lambda *words: asked.append(words[:2]) or "https://x")
    assert (share(host, 7), asked) == ("https://x", [(reached, 7)])
    monkeypatch.setattr(networking, "setup_tunnel", lambda *words: 1 / 0)
    with pytest.raises(RuntimeError, match="sharing did not work, it needs a network: division"):
        share(host, 7)
