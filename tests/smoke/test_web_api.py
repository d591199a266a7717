"""Edits, variations, streams, formats and descriptions of the HTTP API, by the official client."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.sampling import ROOT
from tests.web import TOKEN, Server, serving

pytest.importorskip("gradio", reason="the web page is an extra")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="the official client tries the API")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
SEED = {"seed": 7}
_CLIENTS = (ROOT / "node_modules/openai/index.mjs", Path(environ.get("OPENAI_JS", "-")))
JAVASCRIPT = next(filter(Path.is_file, _CLIENTS), None) if shutil.which("node") else None


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """The small cascade, 4 steps and then 1."""
    with serving(
        tmp_path_factory.mktemp("api") / "out", "--base", "configs/tiny_cascade.yaml", "--api",
        "--keep-loaded", "sampling.steps=4", "cascade.relay.sampling.steps=1", "parallel.device=cpu",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def images(server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0, timeout=120) as made:
        yield made.images


def png(picture: Image.Image) -> tuple[str, bytes, str]:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "picture.png", out.getvalue(), "image/png"


def opened(item: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """128 x 128, a different colour everywhere."""
    y, x = np.mgrid[:128, :128]
    return Image.fromarray(np.stack([2 * x, 2 * y, 255 - x - y // 2], -1).astype(np.uint8))


def holed(photo: Image.Image) -> Image.Image:
    """A mask whose left half is transparent."""
    mask = photo.convert("RGBA")
    mask.paste((0, 0, 0, 0), (0, 0, 64, 128))
    return mask


def test_a_mask_is_obeyed_to_the_pixel(images, photo) -> None:
    made = images.edit(
        image=png(photo), mask=png(holed(photo)), prompt="a red apple", response_format="b64_json",
        extra_body=SEED,
    )  # fmt: skip
    out, before = np.asarray(opened(made.data[0])).astype(int), np.asarray(photo).astype(int)
    assert (out[:, 64:] == before[:, 64:]).all()
    assert abs(out[:, :64] - before[:, :64]).mean() > 10


def test_strength_says_how_far_an_edit_goes(images, photo) -> None:
    def apart(strength: float) -> float:
        made = images.edit(
            image=[png(photo)], prompt="a red apple", response_format="b64_json",
            extra_body={**SEED, "strength": strength},
        )  # fmt: skip
        (item,) = made.data
        return float(abs(np.asarray(opened(item)).astype(int) - np.asarray(photo).astype(int)).mean())

    assert apart(0.25) < apart(1.0)


def test_a_variation_takes_the_prompt_of_a_picture_drawn_here(images, photo) -> None:
    drawn = images.generate(prompt="a green cup", response_format="b64_json", extra_body=SEED)
    file = ("a.png", base64.b64decode(drawn.data[0].b64_json), "image/png")
    made = images.create_variation(image=file, n=2, response_format="b64_json", size="128x128")
    assert [opened(item).text["prompt"] for item in made.data] == ["a green cup"] * 2
    other = images.create_variation(image=png(photo), response_format="b64_json")
    assert opened(other.data[0]).text["prompt"] == ""


def test_streams_send_previews_and_then_the_picture(images, photo) -> None:
    stream = images.generate(prompt="a red apple", stream=True, partial_images=2, extra_body=SEED)
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed" and set(kinds[:-1]) <= {"image_generation.partial_image"}
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))
    assert {opened(event).size for event in events} == {(128, 128)}
    plain = images.generate(prompt="a red apple", response_format="b64_json", extra_body=SEED)
    assert events[-1].b64_json == plain.data[0].b64_json
    assert events[-1].usage.input_tokens > 1
    edited = list(images.edit(image=png(photo), prompt="a red apple", stream=True))
    assert edited[-1].type == "image_edit.completed"


def test_formats_and_values_that_ask_for_what_is_done_are_taken(server, images) -> None:
    fields = {
        "prompt": "a red apple", "n": None, "size": "auto", "quality": "standard", "background": "auto",
        "moderation": "low", "output_compression": 70, "stream": False, "style": None, "user": "me",
        "safety_identifier": "me", "partial_images": 0, "model": None, "frame_count": None,
        "negative_prompt": None, "seed": 7,
    }  # fmt: skip
    post = f"{server.url}/v1/images/generations"
    for kind in ("jpeg", "webp", "png"):
        answer = httpx.post(post, json={**fields, "output_format": kind}, headers=HEADERS, timeout=120)
        assert answer.status_code == 200, answer.text
        got = httpx.get(answer.json()["data"][0]["url"])
        assert got.headers["content-type"] == f"image/{kind}"
        assert Image.open(io.BytesIO(got.content)).format == kind.upper()


@pytest.mark.parametrize(
    ("change", "param", "match"),
    [
        ({"quality": "hd"}, "quality", "expected 'auto' or 'standard'"),
        ({"style": "vivid"}, "style", "none of it"),
        ({"output_format": "gif"}, "output_format", "expected 'png', 'jpeg' or 'webp'"),
        ({"background": "transparent"}, "background", "expected 'auto' or 'opaque'"),
        ({"partial_images": 2}, "partial_images", "only with stream"),
        ({"output_compression": 101}, "output_compression", "less than or equal to 100"),
    ],
)
def test_what_is_not_done_is_refused_by_name(images, change, param, match) -> None:
    with pytest.raises(openai.BadRequestError, match=match) as caught:
        images.generate(prompt="a red apple", **change)
    assert caught.value.param == param


def test_edits_that_cannot_be_are_refused_by_name(images, photo) -> None:
    def refused(match: str, param: str, **change: Any) -> None:
        with pytest.raises(openai.BadRequestError, match=match) as caught:
            images.edit(**{"image": png(photo), "prompt": "a red apple", **change})
        assert caught.value.param == param

    refused("expected the size of the image, got 64x64 and 128x128", "mask",
            mask=png(holed(photo).resize((64, 64))))  # fmt: skip
    refused("nothing of it is transparent", "mask", mask=png(photo))
    refused("not a picture", "image", image=("a.png", b"no picture", "image/png"))
    refused("expected one picture, got 2", "image", image=[png(photo), png(photo)])
    refused("strength: expected 0 to 1", "strength", extra_body={"strength": 2})
    refused("input_fidelity: expected 'low'", "input_fidelity", input_fidelity="high")
    refused("colour: is not one", "colour", extra_body={"colour": "red"})


def test_prompts_that_do_not_arrive_whole_are_told(server) -> None:
    post = f"{server.url}/v1/images/generations"
    answer = httpx.post(post, json={"prompt": "红苹果"}, headers=HEADERS, timeout=120).json()
    assert "does not know" in answer["warnings"][0]


def test_the_api_describes_itself_and_nothing_else(server) -> None:
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert sorted(schema["paths"]) == [
        "/health", "/metrics", "/v1/images/edits", "/v1/images/generations", "/v1/images/variations",
        "/v1/models", "/v1/models/{name}",
    ]  # fmt: skip
    page = httpx.get(f"{server.url}/docs").text
    assert "POST /v1/images/edits" in page and "negative_prompt" in page and "gradio" not in page.lower()
    assert "http" not in page.replace(server.url, "")
    assert "gradio" not in json.dumps(schema).lower()


def test_metrics_count_what_was_drawn(server, images) -> None:
    pytest.importorskip("prometheus_client", reason="part of the extra `web`")

    def drawn() -> float:
        text = httpx.get(f"{server.url}/metrics", headers=HEADERS).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values["cogview3_waiting"]) == 0
        return float(values["cogview3_pictures_total"])

    assert httpx.get(f"{server.url}/metrics").status_code == 401
    before = drawn()
    images.generate(prompt="a red apple", n=2)
    assert drawn() == before + 2


@pytest.mark.skipif(JAVASCRIPT is None, reason="npm install openai, or its index.mjs in OPENAI_JS")
def test_the_javascript_client_gets_the_same(server, images) -> None:
    words = ["node", ROOT / "tests/smoke/openai_client.mjs", JAVASCRIPT, server.url, TOKEN]
    said = json.loads(subprocess.run(words, check=True, capture_output=True, timeout=300).stdout)
    made = images.generate(prompt="a red apple", response_format="b64_json", extra_body=SEED).data[0]
    here = Image.open(io.BytesIO(base64.b64decode(said["made"])))
    assert np.array_equal(np.asarray(here), np.asarray(opened(made)))
    assert (said["model"], said["edited"], said["varied"]) == ("tiny_cascade", 2, 2)
    previews = said["stream"], said["edits"]
    assert [kinds[-1] for kinds in previews] == ["image_generation.completed", "image_edit.completed"]
    assert [set(kinds[:-1]) for kinds in previews] == [
        {"image_generation.partial_image"}, {"image_edit.partial_image"}
    ]  # fmt: skip
    assert said["style"] == [400, "style"] and said["broken"] == [400, "image"]
