"""The web page and the HTTP API as people meet them: one process, Chromium, the official client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from tests.browser import DESKTOP, PHONE, browser, outside, visiting
from tests.web import TOKEN, Server, serving

pytest.importorskip("gradio", reason="the web page is an extra")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="the official client tries the API")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
QUEUE = 50
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """The small cascade, 6 steps and then 1, nobody to enhance prompts."""
    with serving(
        tmp_path_factory.mktemp("web") / "out", "--base", "configs/tiny_cascade.yaml", "--api",
        "--keep-loaded", "--queue", QUEUE, "--grace", 5, "--optimizer-url", "http://127.0.0.1:9/v1",
        "sampling.steps=6", "cascade.relay.sampling.steps=1", "parallel.device=cpu",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def client(server) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0, timeout=120) as made:
        yield made


def opened(data: str | bytes) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def health(server: Server) -> dict[str, Any]:
    return httpx.get(f"{server.url}/health", timeout=60).json()


# -- the API


def test_the_official_client_draws(server, client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny_cascade"]
    assert client.models.retrieve("tiny_cascade").owned_by == "local"
    made = client.images.generate(
        prompt="a red apple", n=2, size="128x128", response_format="b64_json", extra_body={"seed": 7}
    )
    assert [item.seed for item in made.data] == [7, 8]
    first = opened(made.data[0].b64_json)
    assert first.size == (128, 128)
    assert first.text["prompt"] == "a red apple" and first.text["seed"] == "7"
    by_url = client.images.generate(prompt="a red apple", extra_body={"seed": 8})
    answer = httpx.get(by_url.data[0].url)
    assert answer.headers["content-type"] == "image/png"
    assert opened(answer.content).tobytes() == opened(made.data[1].b64_json).tobytes()
    assert httpx.get(by_url.data[0].url[:-1]).status_code == 404
    assert httpx.get(f"{server.url}/pictures/..%2f..%2fetc%2fpasswd?key=x").status_code == 404


@pytest.mark.parametrize(
    ("change", "status", "match"),
    [
        ({"prompt": " "}, 400, "the prompt is empty"),
        ({"prompt": "x" * 4001}, 400, "4001 characters"),
        ({"n": 9}, 400, "pictures: expected 1 to 8, got 9"),
        ({"n": 0}, 400, "pictures: expected 1 to 8, got 0"),
        ({"size": "100x128"}, 400, "the nearest is 128x128"),
        ({"size": "large"}, 400, "expected WIDTHxHEIGHT such as 128x128"),
        ({"extra_body": {"seed": -1}}, 400, "seed: expected 0 to"),
        ({"extra_body": {"steps": 10**6}}, 400, "steps: expected 1 to 200"),
        ({"extra_body": {"colour": "red"}}, 400, "colour: is not one of this server's"),
        ({"model": "dall-e-3"}, 404, "only 'tiny_cascade'"),
        ({"prompt": "x" * 70_000}, 413, "larger than 64 kB"),
    ],
)
def test_a_bad_request_is_a_sentence(client, change, status, match) -> None:
    with pytest.raises(openai.APIStatusError, match=match) as caught:
        client.images.generate(**{"prompt": "a red apple", **change})
    assert caught.value.status_code == status


def test_strangers_and_other_kinds_of_requests_stay_out(server, client) -> None:
    for key in ("wrong", TOKEN + "x", TOKEN[:-1]):
        with pytest.raises(openai.AuthenticationError, match="wants its token"):
            client.with_options(api_key=key).images.generate(prompt="a red apple")
    post = f"{server.url}/v1/images/generations"
    assert httpx.post(post, json={"prompt": "a"}).status_code == 401
    assert httpx.post(post, data={"prompt": "a"}, headers=HEADERS).status_code == 415
    assert (
        httpx.post(post, content=b"{", headers={**HEADERS, "Content-Type": "application/json"}).status_code
        == 400
    )
    assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 400
    assert "default-src 'self'" in httpx.get(server.url).headers["content-security-policy"]


def test_a_client_that_leaves_takes_its_job_along(server) -> None:
    until(lambda: not health(server)["drawing"])
    body = {"prompt": "a red apple", "n": 8, "steps": 200}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json=body, headers=HEADERS, timeout=2)
    started = time.monotonic()
    until(lambda: not health(server)["drawing"])
    assert time.monotonic() - started < 20  # 1600 steps would take longer


def test_fifty_at_once_lose_nothing(server) -> None:
    """Each gets its own picture, and no other is drawn."""

    async def all_at_once() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0, timeout=500
        ) as many:

            async def one(seed: int) -> Any:
                more = {"seed": seed, "steps": 1}
                return await many.images.generate(
                    prompt="a red apple", response_format="b64_json", extra_body=more
                )

            return await asyncio.gather(*(one(seed) for seed in range(QUEUE)))

    before = len(list(server.out.glob("*_a_red_apple")))
    answers = asyncio.run(all_at_once())
    assert [answer.data[0].seed for answer in answers] == list(range(50))
    assert [opened(answer.data[0].b64_json).text["seed"] for answer in answers] == [str(i) for i in range(50)]
    assert len({answer.data[0].b64_json for answer in answers}) == 50
    assert len(list(server.out.glob("*_a_red_apple"))) - before == 2 * 50  # of both stages


def test_a_full_queue_refuses_at_once_and_empties_when_the_clients_leave(server) -> None:
    body = {"prompt": "a red apple", "n": 8, "steps": 200}

    async def refused() -> Any:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=server.url, headers=HEADERS, timeout=500, limits=limits
        ) as many:
            asked = [many.post("/v1/images/generations", json=body) for _ in range(QUEUE + 2)]
            tasks = [asyncio.ensure_future(request) for request in asked]
            done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
            return done.pop().result()

    answer = asyncio.run(refused())
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert (
        answer.json()["error"]["code"] == "queue_full"
        and "waiting already" in answer.json()["error"]["message"]
    )
    until(lambda: not health(server)["drawing"] and health(server)["waiting"] == 0)


# -- the page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as made:
        yield made


@pytest.fixture
def page(server, chromium) -> Iterator[Any]:
    with visiting(chromium, server.url) as visited:
        visited.wait_for_selector("#draw")
        yield visited


def said(page: Any, text: str) -> str:
    page.wait_for_function("text => document.querySelector('#status').innerText.includes(text)", arg=text)
    return page.inner_text("#status")


def test_a_picture_is_drawn_enlarged_and_its_settings_come_back(server, page) -> None:
    page.fill("#prompt textarea", "a red apple")
    page.fill("#steps input[type=number]", "190")
    page.wait_for_selector("#status[role=status]", state="attached")  # keys are heard from now on
    page.uncheck("#whole input")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#canvas img.live")
    said(page, "Done: 1 picture.")
    assert (
        page.eval_on_selector("#canvas a img", "image => image.decode().then(() => image.naturalWidth)") == 64
    )
    seed = page.input_value("#seed input")
    facts = page.inner_text("#facts")
    assert "a red apple" in facts and seed in facts and "190" in facts
    page.click("#enlarge")
    page.wait_for_function("document.querySelector('#facts').innerText.includes('128 x 128')")
    page.click("#enlarge")
    said(page, "was enlarged already")
    page.click("#reuse")
    said(page, "is an enlarged one")
    assert page.input_value("#steps input[type=number]") == "6"
    assert (
        page.eval_on_selector("#canvas a img", "image => image.decode().then(() => image.naturalWidth)")
        == 128
    )
    page.fill("#prompt textarea", "something else")
    page.click("#gallery .gallery-item:nth-child(2) button")
    page.wait_for_function("document.querySelector('#facts').innerText.includes('64 x 64')")
    page.click("#reuse")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a red apple'")
    said(page, "settings of the picture are set")
    assert page.input_value("#seed input") == seed
    assert not page.is_checked("#anew input")


def test_a_whole_cascade_is_the_default_and_several_pictures_are_enlarged_at_once(page) -> None:
    assert page.is_checked("#whole input")
    page.fill("#prompt textarea", "a green apple")
    page.fill("#steps input[type=number]", "2")
    page.fill("#count input", "2")
    page.click("#draw")
    said(page, "Done: 2 pictures.")
    assert "128 x 128" in page.inner_text("#facts")
    page.uncheck("#whole input")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#facts').innerText.includes('64 x 64')")
    page.click("#enlarge")
    page.wait_for_function("document.querySelector('#facts').innerText.includes('128 x 128')")
    assert len(page.query_selector_all("#canvas img[alt='a green apple']")) == 2
    page.click("#compare")
    said(page, "Left: before it was enlarged. Right: the picture.")


def test_drawing_can_be_cancelled(server, page) -> None:
    page.fill("#prompt textarea", "a red apple")
    page.fill("#steps input[type=number]", "200")
    page.fill("#count input", "8")
    page.click("#draw")
    page.wait_for_selector("#canvas img.live")
    assert "picture 1 of 8" in page.inner_text("#status")
    page.fill("#prompt textarea", "a green cup")
    page.click("#draw")
    said(page, "1 more in the queue")
    page.keyboard.press("Escape")
    said(page, "Cancelled.")
    page.wait_for_selector("#canvas img.live")
    page.click("#cancel")
    until(lambda: not health(server)["drawing"] and not health(server)["waiting"])


def test_a_page_loaded_anew_finds_its_form_its_job_and_its_pictures_and_others_do_not(
    server, page, chromium
) -> None:
    page.fill("#prompt textarea", "a red apple")
    page.fill("#steps input[type=number]", "150")
    page.fill("#count input", "2")
    page.click("#draw")
    page.wait_for_selector("#canvas img.live")
    page.reload()
    page.wait_for_selector("#canvas img.live")
    values = [page.input_value(f"#{name}") for name in ("prompt textarea", "count input", "steps input")]
    assert values == ["a red apple", "2", "150"]
    said(page, "Done: 2 pictures.")
    page.wait_for_selector("#gallery img[alt='a red apple']")
    assert {image.get_attribute("alt") for image in page.query_selector_all("#canvas img")} == {"a red apple"}
    page.reload()
    page.wait_for_selector("#gallery .gallery-item:nth-child(2)")
    with visiting(chromium, server.url) as other:
        other.wait_for_selector("#draw")
        other.wait_for_timeout(1500)
        assert other.query_selector_all("#gallery .gallery-item") == []


def test_words_that_do_not_arrive_are_told_beside_the_prompt_and_with_the_picture(page) -> None:
    page.fill("#prompt textarea", "a red apple")
    page.wait_for_function("document.querySelector('#tokens').innerText.includes('of 16 tokens.')")
    page.fill("#prompt textarea", "红苹果")
    page.wait_for_function("document.querySelector('#tokens').innerText.includes('does not know')")
    page.click("#draw")
    assert "does not know" in said(page, "Done: 1 picture.")


def test_closing_the_page_cancels_too(server, chromium) -> None:
    pytest.importorskip("prometheus_client", reason="it tells how jobs ended")

    def cancelled() -> float:
        told = httpx.get(f"{server.url}/metrics", headers=HEADERS, timeout=60).text
        return float(next(line for line in told.splitlines() if 'state="cancelled"' in line).split()[-1])

    before = cancelled()
    with visiting(chromium, server.url) as page:
        page.fill("#prompt textarea", "a red apple")
        page.fill("#steps input[type=number]", "200")
        page.fill("#count input", "8")
        page.click("#draw")
        page.wait_for_selector("#canvas img.live")
    until(lambda: cancelled() == before + 1, 30)
    until(lambda: not health(server)["drawing"], 30)


def test_what_cannot_be_drawn_is_told_in_a_sentence(server, page, tmp_path) -> None:
    info = PngImagePlugin.PngInfo()
    for key, value in {
        "prompt": "<i>a cat</i>",
        "seed": "3",
        "height": "1024",
        "width": "1000",
        "model": "X",
    }.items():
        info.add_text(key, value)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=info)
    page.set_input_files("#settings input[type=file]", str(tmp_path / "other.png"))
    text = said(page, "is not possible")
    assert "1024 x 1000 is not possible" in text and "The nearest size is 64 x 64" in text
    assert page.input_value("#prompt textarea") == "<i>a cat</i>"
    assert page.input_value("#width input") == page.input_value("#height input") == "64"
    page.fill("#prompt textarea", "")
    page.click("#draw")
    said(page, "The prompt is empty")
    page.click("#enlarge")
    said(page, "Choose a picture first")
    page.fill("#prompt textarea", "a red apple")
    page.click("#enhance")
    said(page, "Cannot connect to http://127.0.0.1:9/v1")
    assert page.input_value("#prompt textarea") == "a red apple"


def test_sizes_that_cannot_be_drawn_are_not_offered(page) -> None:
    page.click("#width input")
    page.wait_for_selector("[role=option]")
    offered = [option.inner_text().strip("✓ \n") for option in page.query_selector_all("[role=option]")]
    assert offered == ["64"]


def test_nothing_is_wider_than_the_screen(page) -> None:
    for width, height in (PHONE, DESKTOP):
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(300)
        assert outside(page, "#draw", "#cancel", "#enhance", "#canvas", "#steps", "#upload") == []
        top = [page.locator(part).bounding_box()["y"] for part in ("#top", "#right", "#settings")]
        assert top == sorted(top) if width == PHONE[0] else top[0] == top[1] < top[2]


def test_uploads_stay_in_the_output_folder_and_nothing_else_can_be_read(server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        sent = http.post(
            "/gradio_api/upload", files={"files": ("../../evil.png", b"png", "image/png")}
        ).json()
        assert all(path.startswith(str(server.out)) for path in sent), sent
        for path in ("/etc/passwd", str(server.log), str(server.out / "../x"), "README.md"):
            assert http.get(f"/gradio_api/file={path}").status_code in (403, 404), path
    written = json.dumps([path.name for path in server.out.rglob("*")])
    assert "evil" not in written or ".page" in written
    assert TOKEN not in server.log.read_text()
