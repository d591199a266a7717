"""A small server that speaks OpenAI's chat completions as a stream, and fails in the ways servers do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple

KEY = "sk-test-5ecret"
LONG = (
    "A single ripe red apple rests on a round wooden table near the left edge of the picture, with a short "
    "brown stem and one green leaf. Behind it stands a white wall with a small window, through which soft "
    "morning light falls on the glossy skin of the fruit and on the grain of the wood."
)


class Says(NamedTuple):
    """One answer of the server."""

    text: str = LONG
    status: int = 200
    wait: float = 0.0  # seconds before it begins
    finish: str | None = "stop"  # None: the connection ends before the answer does
    refusal: str = ""
    retry: bool = True  # say when to come again: at once


class Chat(ThreadingHTTPServer):
    """``answers`` in turn, the last one for ever; ``asked`` holds the bodies of the requests."""

    daemon_threads = True

    def __init__(self, *answers: Says) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.asked, self.keys = list(answers) or [Says()], [], []  # type: ignore[var-annotated]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def next(self) -> Says:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class _Handler(BaseHTTPRequestHandler):
    server: Chat

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        says = self.server.next()
        time.sleep(says.wait)
        if says.status != 200:
            self._error(says)
            return
        assert body["stream"] is True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in _pieces(says):
            self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
        if says.finish is not None:
            self.wfile.write(b"data: [DONE]\n\n")

    def _error(self, says: Says) -> None:
        told = json.dumps({"error": {"message": says.text, "type": "test", "code": None}}).encode()
        self.send_response(says.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(told)))
        if says.retry:
            self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None:
        pass


def _pieces(says: Says) -> Iterator[dict[str, Any]]:
    step = 7
    for start in range(0, len(says.text), step):
        yield _chunk({"content": says.text[start : start + step]}, None)
    if says.refusal:
        yield _chunk({"refusal": says.refusal}, None)
    if says.finish is not None:
        yield _chunk({}, says.finish)
        yield {**_chunk({}, None), "choices": []}  # some servers end with the usage alone


def _chunk(delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    return {
        "id": "chat-1", "object": "chat.completion.chunk", "created": 1, "model": "small",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }  # fmt: skip


@contextmanager
def chat(*answers: Says) -> Iterator[Chat]:
    """A running server."""
    server = Chat(*answers)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
