"""The HTTP API in OpenAI's form, which existing clients speak."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sat.apps.web.job_queue import Job, JobQueue, QueueClosedError, QueueFullError
from sat.apps.web.request import GenerationRequest, RequestError
from sat.apps.web.service import GenerationService
from sat.config.schema.base import SizeError
from sat.util.log import describe

log = logging.getLogger(__name__)

POLL = 0.05  # seconds between looks at a job
GENERATIONS = "/v1/images/generations"
METHODS = {GENERATIONS: "POST", "/v1/models": "GET", "/health": "GET"}


class Body(BaseModel):
    """``POST /v1/images/generations``: OpenAI's fields that mean something here, and four of our own.

    Of fields that this server cannot vary, the one value that says what it does is taken.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(strict=True)] | None = None
    size: str | None = None  # WIDTHxHEIGHT, as OpenAI writes it; auto is the config's
    response_format: Literal["url", "b64_json"] | None = None
    user: str | None = None  # taken and not used
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    moderation: Literal["auto"] | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    steps: Annotated[int, Field(strict=True)] | None = None
    guidance: float | None = None
    negative_prompt: str = ""


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @classmethod
    def of(cls, error: Exception) -> ApiError:
        """The answer to ``error``; what is not the client's fault is told in one line and logged."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, QueueFullError):
            return cls(429, str(error), code="queue_full")
        if isinstance(error, QueueClosedError):
            return cls(503, str(error), code="closing")
        if isinstance(error, ValueError):
            param = "size" if isinstance(error, SizeError) else getattr(error, "param", None)
            return cls(400, describe(error), param=param)
        log.error("a request failed: %s", describe(error))
        log.debug("where", exc_info=error)
        return cls(500, describe(error))

    def response(self) -> JSONResponse:
        """The answer."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        body = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        retry = {"Retry-After": "1"}
        headers = {429: retry, 503: retry, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse({"error": body}, self.status, headers)


class Links:
    """Addresses of pictures that nobody can guess: signed with a secret of this process."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def to(self, name: str) -> str:
        """The address of picture ``name``, from the root of the server."""
        return f"/pictures/{name}?key={self._sign(name)}"

    def fits(self, name: str, key: str) -> bool:
        """True if ``key`` is that of picture ``name``."""
        return hmac.compare_digest(self._sign(name).encode(), key.encode("utf-8", "replace"))

    def _sign(self, name: str) -> str:
        return hmac.new(self._secret, name.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:32]


def picture_routes(app: FastAPI, service: GenerationService, queue: JobQueue, links: Links) -> None:
    """``GET /pictures/…`` for those who were given the address, and ``GET /health``."""

    @app.get("/pictures/{name:path}", include_in_schema=False)
    def picture(name: str, key: str = "") -> Response:
        try:
            if not links.fits(name, key):
                raise RequestError("there is no such picture")
            path = service.pictures.at(name)
        except RequestError as error:
            return ApiError(404, str(error)).response()
        return FileResponse(
            path,
            media_type="image/png",
            filename=name.replace("/", "_"),
            content_disposition_type="inline",
            headers={"Cache-Control": "private"},
        )

    @app.get("/health")
    def health() -> JSONResponse:
        alive = queue.is_alive
        body = {
            "status": "ok" if alive else "down",
            "model": service.name,
            "drawing": queue.is_busy,
            "waiting": queue.length,
            "most": queue.most,
        }
        return JSONResponse(body, 200 if alive else 503)


def api_routes(  # noqa: C901 - the handlers are in it
    app: FastAPI, service: GenerationService, queue: JobQueue, links: Links, token: str | None
) -> None:
    """``/v1``: models and image generation, behind the bearer ``token`` if there is one."""

    async def allowed(http: Request) -> None:
        if token is None:
            return
        kind, _, given = http.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), token.encode())  # as long whatever is wrong
        if not right or kind.lower() != "bearer":
            raise ApiError(
                401, "this server wants its token: Authorization: Bearer TOKEN", code="invalid_api_key"
            )

    router = APIRouter(prefix="/v1", dependencies=[Depends(allowed)])
    card = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "local"}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _known(service, name)
        return card

    @router.post("/images/generations")
    async def generations(http: Request) -> dict[str, Any]:
        try:
            body = Body.model_validate_json(await http.body())
        except ValidationError as error:
            raise unreadable(error) from None
        _known(service, body.model)
        request = request_of(body, service)
        try:
            job = queue.submit(service.job(request, whole=True))
        except (QueueFullError, QueueClosedError, ValueError) as error:
            raise ApiError.of(error) from None
        await _over(job, queue, http)
        base, data = str(http.base_url).rstrip("/"), []
        for index, path in enumerate(job.pictures):
            if body.response_format == "b64_json":
                shown = {"b64_json": base64.b64encode(path.read_bytes()).decode()}
            else:
                shown = {"url": base + links.to(service.pictures.name(path))}
            data.append({**shown, "seed": request.seed + index})  # the seed is a field of our own
        return {"created": int(time.time()), "data": data}

    @router.api_route("/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"])
    async def unknown(rest: str, http: Request) -> None:
        raise missing(http.method, f"/v1/{rest}")

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def unread(_: Request, error: RequestValidationError) -> JSONResponse:
        return unreadable(error).response()

    app.include_router(router)


def unreadable(error: ValidationError | RequestValidationError) -> ApiError:
    """The answer to a body that is no JSON, or whose fields are not those of :class:`Body`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")[:80]
    strange = first["type"] == "extra_forbidden"
    what = "is not one of this server's" if strange else first["msg"].partition(" [type=")[0][:400]
    if first["type"].startswith("literal"):
        what = f"expected {first['ctx']['expected']}, as this server does nothing else"
    return ApiError(400, f"{where or 'the request'}: {what}", param=where or None)


def missing(method: str, path: str) -> ApiError:
    """The answer to a request for a path that is not here, or not with that method."""
    wanted = METHODS.get(path)
    if wanted is not None:
        return ApiError(405, f"{path} takes {wanted}, not {method[:20]}", code="method_not_allowed")
    known = ", ".join(f"{verb} {name}" for name, verb in METHODS.items())
    return ApiError(404, f"there is no {path[:80]} here; there are {known}", code="not_found")


def request_of(body: Body, service: GenerationService) -> GenerationRequest:
    """The request in ``body``. Its ``size`` is that of the result, after all enlarging."""
    default, scale, guidance = service.first.sampling, service.scale, body.guidance
    width, height = default.width, default.height
    if body.size is not None and body.size != "auto":
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", body.size)
        if match is None:
            usual = f"{width * scale}x{height * scale}"
            raise ApiError(
                400,
                f"size: expected WIDTHxHEIGHT such as {usual}, or auto, got {body.size[:40]!r}",
                param="size",
            )
        result = int(match[1]), int(match[2])
        width, height = result[0] // scale, result[1] // scale
        if (width * scale, height * scale) != result or not service.sizes.allows(height, width):
            near = service.sizes.nearest(height, width)
            nearest = f"{near[1] * scale}x{near[0] * scale}"
            raise ApiError(
                400, f"size: this model does not draw {body.size}; the nearest is {nearest}", param="size"
            )
    if guidance is not None and service.guidance is None:
        raise ApiError(400, "guidance: this model has no strength of guidance to set", param="guidance")
    return GenerationRequest(
        prompt=body.prompt,
        height=height,
        width=width,
        steps=default.steps if body.steps is None else body.steps,
        guidance=service.guidance if guidance is None else guidance,
        seed=secrets.randbelow(2**32 - 1024) if body.seed is None else body.seed,
        count=1 if body.n is None else body.n,
        negative_prompt=body.negative_prompt,
        adapters={name: entry.strength for name, entry in service.adapters.items() if entry.strength},
    )


def _known(service: GenerationService, name: str | None) -> None:
    if name is not None and name != service.name:
        raise ApiError(
            404, f"there is no model {name[:80]!r} here, only {service.name!r}", code="model_not_found"
        )


async def _over(job: Job, queue: JobQueue, http: Request) -> None:
    """Wait until ``job`` is over; cancel it when nobody listens any more, or when the server closes."""
    try:
        while not job.is_over:
            if queue.is_closing:  # not waiting for the step that is being drawn
                raise ApiError.of(QueueClosedError("the server is closing"))
            if await http.is_disconnected():
                raise ApiError(499, "the client left")
            await asyncio.sleep(POLL)
    finally:
        queue.cancel(job)
    if job.view().state == "failed" and isinstance(job.error, Exception):
        raise ApiError.of(job.error)
    if job.view().state != "done":
        raise ApiError.of(QueueClosedError("the server is closing"))
