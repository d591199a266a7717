"""The web server: page and API on one address, with limits on requests."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sat.apps.prompts.optimizer import PromptOptimizer
from sat.apps.web import Access
from sat.apps.web.api import ApiError, Links, api_routes, picture_routes
from sat.apps.web.job_queue import JobQueue
from sat.apps.web.service import GenerationService

log = logging.getLogger(__name__)

BODY, UPLOAD = 64 << 10, 32 << 20  # bytes of a request to the API, and of an uploaded picture
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'self'"
)
"""Nothing is fetched from anywhere else, whatever a library's page asks for."""

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
) -> FastAPI:
    """The page, the API (where ``api``) and their guards as one application."""
    root = service.pictures.root
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(root / ".page")  # uploads and thumbnails stay in the output folder
    import gradio

    from sat.apps.web.page import CSS, page, theme

    app = FastAPI(title=f"{service.name}", docs_url=None, redoc_url=None, openapi_url=None)
    links = Links()
    picture_routes(app, service, queue, links)
    if api:
        api_routes(app, service, queue, links, access.token)
    mounted: FastAPI = gradio.mount_gradio_app(
        app,
        page(service, queue, links, optimizer),
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
    )
    mounted.add_middleware(Guard)
    if access.is_local:  # a page elsewhere must not reach it under a name of its own
        mounted.add_middleware(
            TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"]
        )
    return mounted


class Guard:
    """Limits requests to the API, and forbids browsers to fetch anything from elsewhere."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        if scope["path"].startswith("/v1/") and scope["method"] == "POST":
            refusal, receive = await _small(scope, receive)
            if refusal is not None:
                await refusal.response()(scope, receive, guarded)
                return
        await self.app(scope, receive, guarded)


async def _small(scope: Scope, receive: Receive) -> tuple[ApiError | None, Receive]:
    """(None, the body read once) if it is JSON and not too large; else (the error, ``receive``)."""
    headers = {key.lower(): value for key, value in scope["headers"]}
    if not headers.get(b"content-type", b"").lower().startswith(b"application/json"):
        return ApiError(415, "expected a body of application/json"), receive
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > BODY:
            return ApiError(413, f"the request is larger than {BODY >> 10} kB", code="too_large"), receive
    whole = {"type": "http.request", "body": b"".join(parts), "more_body": False}
    body: list[MutableMapping[str, Any]] = [whole]

    async def again() -> MutableMapping[str, Any]:
        return body.pop() if body else await receive()

    return None, again


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; an error that names the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"cannot listen on {host}, port {port}: {why}; --port names another") from None


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


def run(app: FastAPI, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until a signal; ``ready`` is called when requests are answered."""
    import uvicorn

    class Server(uvicorn.Server):
        """Calls ``ready`` once it is up."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    Server(config).run(sockets=[listening])
