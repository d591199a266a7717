"""The page on which pairs are judged: a small server on the loopback address.

Nothing in a request names a file. The page gets addresses of pictures that hold a keyed digest of rater, pair
and side; only those handed out lead anywhere, and neither they nor the pictures (stripped of what their files
say) tell which model drew which.
"""

from __future__ import annotations

import json
import logging
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any, NamedTuple, cast

from sat.apps.preference.study import BadRequestError, Study

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LONGEST_NAME, LONGEST_BODY = 40, 4096  # letters, bytes


class Answer(NamedTuple):
    """A response."""

    status: HTTPStatus
    kind: str
    body: bytes


class Server(ThreadingHTTPServer):
    """The study on ``port`` of the loopback address; 0 picks a free one."""

    daemon_threads = True

    def __init__(self, study: Study, port: int) -> None:
        self.study = study
        self.page = resources.files("sat.apps.preference").joinpath("page.html").read_text("utf-8")
        super().__init__((LOOPBACK, port), Handler)

    @property
    def address(self) -> str:
        """URL of the page."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "preference", ""
    timeout = 30

    def do_GET(self) -> None:  # noqa: N802 - the library's name
        """The page, or a picture whose address the page was given."""
        nonce = secrets.token_urlsafe(12)
        if not self._is_for_us():
            answer = _error(HTTPStatus.FORBIDDEN, "this page is served on the loopback address only")
        elif self.path in ("/", "/index.html"):
            text = self._server().page.replace("NONCE", nonce)
            answer = Answer(HTTPStatus.OK, "text/html; charset=utf-8", text.encode())
        elif self.path.startswith("/picture/"):
            content = self._server().study.picture(self.path.removeprefix("/picture/"))
            answer = _error(HTTPStatus.NOT_FOUND, "no such picture")
            if content is not None:
                answer = Answer(HTTPStatus.OK, "image/png", content)
        else:
            answer = _error(HTTPStatus.NOT_FOUND, "there is nothing at this address")
        self._send(answer, nonce)

    def do_POST(self) -> None:  # noqa: N802 - the library's name
        """The next question, an earlier one, or a vote."""
        try:
            answer = _error(HTTPStatus.FORBIDDEN, "not from this page")
            if self._is_for_us():
                answer = self._reply()
        except BadRequestError as error:
            answer = _error(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:
            log.error("a vote was not written: %s", error)
            answer = _error(
                HTTPStatus.INTERNAL_SERVER_ERROR, f"the vote could not be written: {error.strerror}"
            )
        self._send(answer, "")

    def _server(self) -> Server:
        return cast(Server, self.server)

    def _is_for_us(self) -> bool:
        """Refuse names that were pointed at this machine from outside, and pages of other origins."""
        port = self._server().server_address[1]
        hosts = {f"{name}:{port}" for name in (LOOPBACK, "localhost")}
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in hosts and (
            origin is None or origin.removeprefix("http://") in hosts
        )

    def _reply(self) -> Answer:  # noqa: C901 - one check a field
        """The answer to ``/task`` or ``/vote``, in JSON as the request is."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LONGEST_BODY:
            self.close_connection = True
            raise BadRequestError(f"expected JSON of at most {LONGEST_BODY} bytes")
        raw = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            raise BadRequestError("expected application/json")
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise BadRequestError("not JSON") from error
        if not isinstance(body, dict):
            raise BadRequestError("expected a JSON object")
        name, study = body.get("rater"), self._server().study
        rater = " ".join(name.split()) if isinstance(name, str) else ""  # it goes into files and tables
        if not rater or len(rater) > LONGEST_NAME or not rater.isprintable():
            raise BadRequestError(f"rater: expected a name of 1 to {LONGEST_NAME} letters")
        at = None
        if self.path == "/task":
            at = body.get("at")
            if at is not None and (not isinstance(at, int) or isinstance(at, bool)):
                raise BadRequestError("at: expected a number")
        elif self.path == "/vote":
            place, seconds = body.get("place"), body.get("seconds", 0.0)
            if place not in ("left", "right", "tie"):
                raise BadRequestError("place: expected left, right or tie")
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e6:
                raise BadRequestError("seconds: expected a number of at least 0")
            study.vote(rater, str(body.get("item")), place, round(float(seconds), 2))
        else:
            return _error(HTTPStatus.NOT_FOUND, "there is nothing at this address")
        task = json.dumps(study.task(rater, at)).encode()
        return Answer(HTTPStatus.OK, "application/json", task)

    def _send(self, answer: Answer, nonce: str) -> None:
        policy = f"default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'nonce-{nonce}'; "
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Content-Security-Policy", f"{policy}script-src 'nonce-{nonce}'; base-uri 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header(
            "Cache-Control", "private, max-age=600" if answer.kind == "image/png" else "no-store"
        )
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Requests are no news."""
        log.debug(format, *args)


def _error(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, "application/json", json.dumps({"error": text}).encode())
