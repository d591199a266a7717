"""The web server: page and API on one address, with limits on requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from sat.apps.prompts.optimizer import PromptOptimizer
from sat.apps.web import Access
from sat.apps.web.api import (
    EDITS,
    GENERATIONS,
    VARIATIONS,
    ApiError,
    Links,
    api_routes,
    missing,
    picture_routes,
)
from sat.apps.web.job_queue import JobQueue
from sat.apps.web.service import GenerationService
from sat.errors import UserError
from sat.util.log import describe

log = logging.getLogger(__name__)

BODY, UPLOAD = 64 << 10, 32 << 20  # bytes of a request to the API, and of an uploaded picture
BODY_SECONDS = 30.0  # in which the body of a request to the API has to arrive
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'self'"
)
"""Nothing is fetched from anywhere else, whatever a library's page asks for."""

BODIES = {
    GENERATIONS: ("application/json", BODY),
    EDITS: ("multipart/form-data", UPLOAD),
    VARIATIONS: ("multipart/form-data", UPLOAD),
}
"""Kind and bytes at most of what is sent to an address."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def application(
    service: GenerationService,
    queue: JobQueue,
    access: Access,
    *,
    api: bool,
    optimizer: PromptOptimizer,
    grace: float = 60.0,
) -> FastAPI:
    """The page, the API (where ``api``) and their guards as one application.

    ``grace``: seconds in which a page that was left finds its job again.
    """
    root = service.pictures.root
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(root / ".page")  # uploads and thumbnails stay in the output folder
    import gradio

    from sat.apps.web.appearance import CSS, HEAD, SCRIPT, theme
    from sat.apps.web.page import i18n, page

    app = FastAPI(title=f"{service.name}", docs_url=None, redoc_url=None, openapi_url=None)
    links = Links()
    picture_routes(app, service, queue, links)
    if api:
        api_routes(app, service, queue, links, access.token)
    mounted: FastAPI = gradio.mount_gradio_app(
        app,
        page(service, queue, links, optimizer, grace),
        path="/",
        auth=None if access.password is None else access.knows,
        show_error=True,
        max_file_size=UPLOAD,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        theme=theme(),
        css=CSS,
        js=SCRIPT,
        i18n=i18n,
    )
    if not api:  # the page's framework would answer with its own

        @app.get("/docs", include_in_schema=False)
        @app.get("/openapi.json", include_in_schema=False)
        def none(request: Request) -> Response:
            return missing("GET", request.url.path).response()

    if access.is_local:  # a page elsewhere must not reach it under a name of its own
        mounted.add_middleware(
            TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"]
        )
    mounted.add_middleware(Headed, head=HEAD)
    mounted.add_middleware(Guard)  # around all else: errors of every layer pass through it
    return mounted


class Headed:
    """Puts a script in front of all others of the page; those of Gradio's ``head`` run last."""

    def __init__(self, app: App, head: str) -> None:
        self.app, self.head = app, b"<head>" + head.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] != "/":
            await self.app(scope, receive, send)
            return
        headers = [(key, value) for key, value in scope["headers"] if key.lower() != b"accept-encoding"]
        start: MutableMapping[str, Any] = {}
        parts: list[bytes] = []

        async def out(message: MutableMapping[str, Any]) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                body = b"".join(parts).replace(b"<head>", self.head, 1)
                kept = [(key, value) for key, value in start["headers"] if key.lower() != b"content-length"]
                start["headers"] = [*kept, (b"content-length", str(len(body)).encode())]
                await send(start)
                await send({"type": "http.response.body", "body": body})

        await self.app({**scope, "headers": headers}, receive, out)


class Guard:
    """Limits requests to the API, writes every error in OpenAI's form, and keeps browsers from elsewhere."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def guarded(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        try:
            refusal = None
            if scope["path"] in BODIES and scope["method"] == "POST":
                refusal, receive = await _small(scope, receive, *BODIES[scope["path"]])
            if refusal is None:
                await self.app(scope, receive, _in_form(scope, guarded))
                return
        except asyncio.CancelledError:  # the server ends, and waited long enough
            refusal = ApiError(503, "the server is closing", code="closing")
        except Exception as error:
            log.debug("%s %s", scope["method"], scope["path"][:80], exc_info=True)
            refusal = ApiError.of(error)
        if not started:
            await refusal.response()(scope, receive, guarded)
        else:
            with contextlib.suppress(Exception):  # it may have been whole already
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def _in_form(scope: Scope, send: Send) -> Send:
    """``send``, with errors in OpenAI's form: those of the API, and of paths that nobody knows.

    The page's own requests (``/gradio_api``) keep the form that it reads.
    """
    path, start, parts = scope["path"], None, list[bytes]()
    api = f"{path}/".startswith("/v1/")

    async def out(message: MutableMapping[str, Any]) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            unknown = message["status"] in (400, 404, 405) and not path.startswith("/gradio_api")
            if message["status"] >= 400 and (api or unknown):
                start = message
                return
        if start is None:
            await send(message)
            return
        parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body, status = b"".join(parts), start["status"]
        text = body[:400].decode("utf-8", "replace")
        with contextlib.suppress(ValueError):
            said = json.loads(body)
            if isinstance(said, dict) and "error" in said:
                await send(start)
                await send({"type": "http.response.body", "body": body})
                return
            text = str(said.get("detail", text))[:400] if isinstance(said, dict) else text
        error = missing(scope["method"], path) if status in (404, 405) else ApiError(status, text)
        await error.response()(scope, _nothing, send)

    return out


async def _nothing() -> MutableMapping[str, Any]:
    """No request: what answers an error reads none."""
    return {"type": "http.disconnect"}


async def _small(scope: Scope, receive: Receive, wanted: str, most: int) -> tuple[ApiError | None, Receive]:
    """(None, the body read once) if it is ``wanted`` and not too large; else (the error, ``receive``)."""
    headers = {key.lower(): value for key, value in scope["headers"]}
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != wanted.encode() or headers.get(b"content-encoding", b"identity").lower() != b"identity":
        return ApiError(415, f"expected a body of {wanted}, not compressed"), receive
    parts, size, more = [], 0, True
    ends = asyncio.get_running_loop().time() + BODY_SECONDS
    while more:
        try:
            left = ends - asyncio.get_running_loop().time()
            message = await asyncio.wait_for(receive(), left)
        except asyncio.TimeoutError:
            return ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s"), receive
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > most:
            said = f"{most >> 20} MB" if most >= 1 << 20 else f"{most >> 10} kB"
            return ApiError(413, f"the request is larger than {said}", code="too_large"), receive
    whole = {"type": "http.request", "body": b"".join(parts), "more_body": False}
    body: list[MutableMapping[str, Any]] = [whole]

    async def again() -> MutableMapping[str, Any]:
        return body.pop() if body else await receive()

    return None, again


class ListenError(UserError, OSError):
    """The address is in use, or not one of this machine."""

    exit_code = 1


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; an error that names the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        why = error.strerror or error
        raise ListenError(f"cannot listen on {host}, port {port}: {why}; --port names another") from None


def share(host: str, port: int) -> str:
    """A public address for the server on ``host``, through Gradio's relay; it needs a network."""
    from gradio import networking

    if host in ("0.0.0.0", "::"):  # all addresses: the loopback's is one of them
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    try:
        found: str = networking.setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:
        raise RuntimeError(f"sharing did not work, it needs a network: {error}") from error
    return found


def server(app: App, ready: Callable[[], None], closing: Callable[[], None]) -> uvicorn.Server:
    """The HTTP server of ``app``; its ``run(sockets=[…])`` serves until a signal, or ``should_exit``.

    ``ready`` is called once requests are answered, ``closing`` before the last of them are waited for.
    """

    class Server(uvicorn.Server):
        """Tells of its beginning and its end."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            closing()
            await super().shutdown(sockets)

    class Protocol(H11Protocol):
        """Answers bytes that are no HTTP in OpenAI's form too."""

        def send_400_response(self, msg: str) -> None:
            answer = bytes(ApiError(400, msg).response().body)
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-length: {len(answer)}\r\n"
            head += "content-type: application/json\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + answer)
            self.transport.close()

    logging.getLogger("uvicorn.error").addFilter(_one_line)
    return Server(
        uvicorn.Config(app, http=Protocol, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    )


def _one_line(record: logging.LogRecord) -> bool:
    """Leave tracebacks out of the server's log."""
    if record.exc_info and record.exc_info[1] is not None:
        record.msg, record.args = f"{record.getMessage().strip()}: {describe(record.exc_info[1])}", ()
    record.exc_info = record.exc_text = None
    return True
