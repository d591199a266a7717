"""Sixty of the requests of :mod:`tests.attack.requests`, against the API in this process."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest

pytest.importorskip("fastapi", reason="the web page is an extra")

from fastapi import FastAPI

from sat.apps.web.api import Links, api_routes, picture_routes
from sat.apps.web.job_queue import Job, JobQueue
from sat.apps.web.request import GenerationRequest
from sat.apps.web.serve import Guard, bind, server
from sat.apps.web.service import GenerationService
from sat.config.cascade import load_cascade
from tests.attack.requests import Case, answer, attack, closing, fault, request
from tests.configs import ROOT

TOKEN = "t0ken"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)


class Quick(GenerationService):
    """The small model's rules; a step takes a millisecond and draws nothing."""

    def job(self, request: GenerationRequest, *, whole: bool = False) -> Job:
        self.check(request)

        def work(job: Job) -> list[Path]:
            for step in range(request.steps):
                time.sleep(0.001)
                job.step(step, request.steps, None)  # type: ignore[arg-type]
            folder = self.pictures.root / f"{time.monotonic_ns()}_a"
            folder.mkdir(parents=True)
            paths = [folder / f"{index:09d}.png" for index in range(request.count)]
            for path in paths:
                path.write_bytes(PNG)
            return paths

        return Job(work, request.steps)


@contextmanager
def running(root: Path, most: int = 8) -> Iterator[tuple[str, JobQueue, list[bool]]]:
    """The address of the API, its queue, and a flag that ends the server when it becomes true."""
    service = Quick(load_cascade([ROOT / "configs/tiny.yaml"], ["parallel.device=cpu"]), root, "tiny")
    queue = JobQueue(lambda: None, most)
    queue.open()
    app, links, up = FastAPI(openapi_url=None, docs_url=None, redoc_url=None), Links(), Event()
    picture_routes(app, service, queue, links)
    api_routes(app, service, queue, links, TOKEN)
    app.add_middleware(Guard)
    listening = bind("127.0.0.1", 0)
    serving = server(app, up.set, lambda: queue.close(0))
    thread = Thread(target=serving.run, kwargs={"sockets": [listening]})
    thread.start()
    assert up.wait(10)
    stop: list[bool] = []

    def watch() -> None:
        while not stop:
            time.sleep(0.01)
        serving.should_exit = True

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", queue, stop
    finally:
        stop.append(True)
        watcher.join()
        thread.join(20)
        queue.close()
        assert not thread.is_alive()


def test_every_request_gets_a_picture_or_an_error_in_openais_form(tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    with running(tmp_path) as (url, queue, _):
        failures, ends = asyncio.run(attack(url, TOKEN, 60, 1, sizes=("64x64",), together=20, patience=20))
        assert not failures, "\n".join(map(str, failures))
        assert ends["200"] >= 5 and sum(ends.values()) == 60
        good = Case("after all", request({"prompt": "a", "steps": 1}, token=TOKEN), {200}, pictures=1)
        last = asyncio.run(answer(url, good, 20))
        assert last is not None and fault(good, *last) is None
        assert queue.length == 0
    assert "Traceback" not in caplog.text


def test_a_server_that_closes_says_so_to_those_who_wait(tmp_path, caplog) -> None:
    with running(tmp_path) as (url, _, stop):
        started = time.monotonic()
        failures = asyncio.run(closing(url, TOKEN, lambda: stop.append(True), waiting=6))
        assert not failures, "\n".join(map(str, failures))
    assert time.monotonic() - started < 5
    assert "Traceback" not in caplog.text and "Cancel" not in caplog.text


def test_a_full_queue_answers_429_and_draws_the_others_in_order(tmp_path) -> None:
    with running(tmp_path, most=3) as (url, _, _stop):

        async def flood() -> list[tuple[int, dict[str, str], bytes]]:
            body = {"prompt": "a", "steps": 60}
            tasks = []
            for index in range(8):
                case = Case("", request({**body, "seed": index}, token=TOKEN), {200, 429})
                tasks.append(asyncio.ensure_future(answer(url, case, 30)))
                await asyncio.sleep(0.005)
            return [got for task in tasks if (got := await task) is not None]

        got = asyncio.run(flood())
    assert sorted({status for status, _, _ in got}) == [200, 429]
    assert all(headers["retry-after"] == "1" for status, headers, _ in got if status == 429)
    drawn = [json.loads(body)["data"][0] for status, _, body in got if status == 200]
    order = [int(item["url"].split("/pictures/")[1].split("_")[0]) for item in drawn]
    assert order == sorted(order) and [item["seed"] for item in drawn] == sorted(i["seed"] for i in drawn)


@pytest.mark.parametrize(
    ("sent", "status", "param", "match"),
    [
        ({"prompt": "a", "n": 10**400}, 400, "n", "pictures: expected 1 to 8"),
        ({"prompt": "a", "seed": -(10**3000)}, 400, "seed", "more than 15 digits"),
        (b'{"prompt": "a", "steps": ' + b"9" * 5000 + b"}", 400, None, ""),
        (b'{"prompt": "\xff"}', 400, None, "Invalid JSON: invalid unicode"),
        (b"[" * 1000, 400, None, "Invalid JSON: recursion limit"),
        ({"prompt": "a\0b"}, 400, "prompt", "NUL"),
        ({"prompt": "a", "size": "65x64"}, 400, "size", "the nearest is 64x64"),
        ({"prompt": "a", "quality": "hd"}, 400, "quality", "expected 'auto'"),
        ({"prompt": "a", "k" * 5000: 1}, 400, "k" * 80, "is not one of this server's"),
    ],
    ids=range(9),
)
def test_what_cannot_be_drawn_names_its_field(server_url, sent, status, param, match) -> None:
    got = asyncio.run(answer(server_url, Case("", request(sent, token=TOKEN), {status}), 20))
    assert got is not None
    error = json.loads(got[2])["error"]
    assert (got[0], error["type"]) == (status, "invalid_request_error")
    assert match in error["message"] and len(error["message"]) < 400
    assert match == "" or error["param"] == param


@pytest.mark.parametrize(
    ("method", "path", "status", "match"),
    [
        ("POST", "/v1/audio/speech", 404, "there are POST /v1/images/generations"),
        ("GET", "/v1/images/generations", 405, "takes POST, not GET"),
        ("GET", "/nothing", 404, "there is no /nothing here"),
        ("DELETE", "/health", 405, "takes GET, not DELETE"),
        ("BREW", "/v1/models", 405, "takes GET, not BREW"),
    ],
)
def test_unknown_paths_and_methods_are_told_in_openais_form(server_url, method, path, status, match) -> None:
    got = asyncio.run(answer(server_url, Case("", request(b"", method, path, TOKEN), {status}), 20))
    assert got is not None and got[0] == status
    assert match in json.loads(got[2])["error"]["message"]


def test_fields_that_ask_for_what_is_done_anyway_are_taken(server_url) -> None:
    same = {"quality": "auto", "background": "auto", "output_format": "png", "stream": False}
    case = Case("", request({"prompt": "a", "steps": 1, **same, "partial_images": 0}, token=TOKEN), {200})
    got = asyncio.run(answer(server_url, case, 20))
    assert got is not None and got[0] == 200, got


@pytest.fixture(scope="module")
def server_url(tmp_path_factory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("api")) as (url, _, _stop):
        yield url
