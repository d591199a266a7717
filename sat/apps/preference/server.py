"""The page on which pairs are judged: a small server on the loopback address.

Nothing in a request names a file. The page gets addresses of pictures that hold a keyed digest of rater, pair
and side; only those handed out lead anywhere, and neither they nor the pictures (stripped of what their files
say) tell which model drew which.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from sat.apps.evaluate.pictures import Opened
from sat.apps.preference.pairs import QUESTIONS, Item, Pair, Side, order
from sat.apps.preference.votes import Vote, VoteFile

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LONGEST_NAME, LONGEST_BODY = 40, 4096
Place = Literal["left", "right", "tie"]


class BadRequestError(ValueError):
    """What a page asks for is not possible; the text is shown to the rater."""


class Study:
    """What raters are asked, and what they have answered so far."""

    def __init__(self, pairs: Sequence[Pair], questions: Sequence[str], seed: int, votes: VoteFile) -> None:
        self.pairs, self.questions, self.seed, self.votes = list(pairs), list(questions), seed, votes
        self._key = secrets.token_bytes(32)
        self._pictures: dict[str, Path] = {}
        self._orders: dict[str, list[Item]] = {}

    def task(self, rater: str, at: int | None = None) -> dict[str, Any]:
        """Question ``at`` of the rater's order, or the first that is not answered; what the page shows."""
        items = self._order(rater)
        answered = [self._answer(rater, item) for item in items]
        done = sum(answer is not None for answer in answered)
        if at is None:
            at = next((index for index, answer in enumerate(answered) if answer is None), len(items))
        state: dict[str, Any] = {"done": done, "of": len(items), "at": at}
        if not 0 <= at < len(items):
            return state | {"finished": done == len(items), "at": len(items)}
        item = items[at]
        right: Side = "b" if item.left == "a" else "a"
        return state | {
            "item": item.name,
            "text": item.pair.prompt.text,
            "question": QUESTIONS[item.question],
            "left": self._address(rater, item.pair, item.left),
            "right": self._address(rater, item.pair, right),
            "answer": None if (answer := answered[at]) is None else _place(answer, item),
        }

    def vote(self, rater: str, name: str, place: Place, seconds: float) -> int:
        """Keep the rater's answer to the question called ``name``; its number in the rater's order."""
        for index, item in enumerate(self._order(rater)):
            if item.name == name:
                choice = item.chosen(place)
                self.votes.add(Vote(rater, item.pair.name, item.question, choice, item.left, seconds))
                return index
        raise BadRequestError(f"no such question: {name}")

    def picture(self, token: str) -> bytes | None:
        """The picture behind an address, as PNG without what its file says about its making."""
        path = self._pictures.get(token)
        if path is None:
            return None
        (image,) = Opened([path])
        buffer = BytesIO()
        image.save(buffer, "PNG", compress_level=1)  # text fields are written only when handed over
        return buffer.getvalue()

    def _order(self, rater: str) -> list[Item]:
        if rater not in self._orders:
            self._orders[rater] = order(self.pairs, self.questions, rater, self.seed)
        return self._orders[rater]

    def _answer(self, rater: str, item: Item) -> Vote | None:
        return self.votes.votes.get((rater, item.pair.name, item.question))

    def _address(self, rater: str, pair: Pair, side: Side) -> str:
        token = hmac.new(self._key, f"{rater}\0{pair.name}\0{side}".encode(), hashlib.sha256).hexdigest()[:32]
        self._pictures[token] = pair.a if side == "a" else pair.b
        return f"/picture/{token}"


def _place(vote: Vote, item: Item) -> Place:
    """Where on the page the chosen picture stands."""
    if vote.choice == "tie":
        return "tie"
    return "left" if vote.choice == item.left else "right"


class Answer(NamedTuple):
    """What is sent back."""

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
        """Where the page is."""
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
            text = self._study().page.replace("NONCE", nonce)
            answer = Answer(HTTPStatus.OK, "text/html; charset=utf-8", text.encode())
        elif self.path.startswith("/picture/"):
            answer = self._picture(self.path.removeprefix("/picture/"))
        else:
            answer = _error(HTTPStatus.NOT_FOUND, "there is nothing at this address")
        self._send(answer, nonce)

    def do_POST(self) -> None:  # noqa: N802 - the library's name
        """The next question, an earlier one, or a vote."""
        try:
            answer = (
                self._asked() if self._is_for_us() else _error(HTTPStatus.FORBIDDEN, "not from this page")
            )
        except BadRequestError as error:
            answer = _error(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:
            log.error("a vote was not written: %s", error)
            answer = _error(
                HTTPStatus.INTERNAL_SERVER_ERROR, f"the vote could not be written: {error.strerror}"
            )
        self._send(answer, "")

    def _study(self) -> Server:
        return cast(Server, self.server)

    def _is_for_us(self) -> bool:
        """Refuse names that were pointed at this machine from outside, and pages of other origins."""
        port = self._study().server_address[1]
        hosts = {f"{name}:{port}" for name in (LOOPBACK, "localhost")}
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in hosts and (
            origin is None or origin.removeprefix("http://") in hosts
        )

    def _picture(self, token: str) -> Answer:
        content = self._study().study.picture(token)
        if content is None:
            return _error(HTTPStatus.NOT_FOUND, "no such picture")
        return Answer(HTTPStatus.OK, "image/png", content)

    def _asked(self) -> Answer:
        study = self._study().study
        told = self._body()
        rater = _rater(told.get("rater"))
        if self.path == "/task":
            at = told.get("at")
            if at is not None and (not isinstance(at, int) or isinstance(at, bool)):
                raise BadRequestError("at: expected a number")
            return _json(study.task(rater, at))
        if self.path == "/vote":
            place, seconds = told.get("place"), told.get("seconds", 0.0)
            if place not in ("left", "right", "tie"):
                raise BadRequestError("place: expected left, right or tie")
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e6:
                raise BadRequestError("seconds: expected a number of at least 0")
            study.vote(rater, str(told.get("item")), place, round(float(seconds), 2))
            return _json(study.task(rater))
        return _error(HTTPStatus.NOT_FOUND, "there is nothing at this address")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LONGEST_BODY:
            self.close_connection = True
            raise BadRequestError(f"expected JSON of at most {LONGEST_BODY} bytes")
        raw = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            raise BadRequestError("expected application/json")
        try:
            told = json.loads(raw)
        except ValueError as error:
            raise BadRequestError("not JSON") from error
        if not isinstance(told, dict):
            raise BadRequestError("expected a JSON object")
        return told

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


def _json(value: dict[str, Any]) -> Answer:
    return Answer(HTTPStatus.OK, "application/json", json.dumps(value).encode())


def _error(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, "application/json", json.dumps({"error": text}).encode())


def _rater(name: object) -> str:
    """A name that may stand in the file of votes and in tables."""
    text = " ".join(name.split()) if isinstance(name, str) else ""
    if not text or len(text) > LONGEST_NAME or not text.isprintable():
        raise BadRequestError(f"rater: expected a name of 1 to {LONGEST_NAME} letters")
    return text
