"""The HTTP API in OpenAI's form, which existing clients speak."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import html
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Annotated, Any, Literal, TypeVar
from zipfile import ZipFile

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from sat.apps.web.job_queue import Job, JobQueue, QueueClosedError, QueueFullError
from sat.apps.web.request import GenerationRequest, RequestError
from sat.apps.web.service import GenerationService
from sat.config.schema.base import SizeError
from sat.util.log import describe
from sat.util.pictures import PictureError, check_shape, open_picture, with_alpha

log = logging.getLogger(__name__)

POLL = 0.05  # seconds between looks at a job
GENERATIONS, EDITS, VARIATIONS = (f"/v1/images/{name}" for name in ("generations", "edits", "variations"))
METHODS = {GENERATIONS: "POST", EDITS: "POST", VARIATIONS: "POST", "/v1/models": "GET", "/health": "GET"}
METHODS |= {"/metrics": "GET", "/docs": "GET", "/openapi.json": "GET"}
EXTRAS = "the packages of the page: pip install 'cogview3[web]'"

Nothing = Literal[None]


class Body(BaseModel):
    """``POST /v1/images/generations``: OpenAI's fields, and four of our own.

    Of fields that this server cannot vary, the values that say what it does are taken; null is as if absent.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(strict=True)] | None = None
    size: str | None = None  # WIDTHxHEIGHT, as OpenAI writes it; auto is the config's
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None  # quality of jpeg and webp
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None  # previews on the way, with stream
    user: str | None = None  # whose turn it is: users of one address take turns
    safety_identifier: str | None = None  # the same
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None  # there is none
    style: Nothing = None
    complexity: Nothing = None
    frame_count: Nothing = None
    frame_duration_ms: Nothing = None
    svg: Nothing = None
    seed: Annotated[int, Field(strict=True)] | None = None
    steps: Annotated[int, Field(strict=True)] | None = None
    guidance: float | None = None
    negative_prompt: str | None = None


class VariationForm(Body):
    """``POST /v1/images/variations``: the same fields, ``prompt`` not needed, and ``strength`` (0.6)."""

    prompt: str = ""
    n: int | None = None
    seed: int | None = None
    steps: int | None = None
    strength: float | None = None  # 0 keeps the picture, 1 draws another


class EditForm(VariationForm):
    """``POST /v1/images/edits``: the same fields; with a mask ``strength`` is 1 unless given."""

    prompt: str
    input_fidelity: Literal["low"] | None = None
    markup: Nothing = None


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

    def zipped(self, names: Sequence[str]) -> str:
        """The address of pictures as one zip file."""
        listed = ",".join(names)
        return f"/pictures.zip?names={listed}&key={self._sign(f'zip {listed}')}"

    def fits(self, name: str, key: str) -> bool:
        """True if ``key`` is that of picture ``name`` (``zip``, a space and names: of those as one file)."""
        return hmac.compare_digest(self._sign(name).encode(), key.encode("utf-8", "replace"))

    def _sign(self, name: str) -> str:
        return hmac.new(self._secret, name.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:32]


def picture_routes(app: FastAPI, service: GenerationService, queue: JobQueue, links: Links) -> None:
    """``GET /pictures/…`` for those who were given the address, and ``GET /health``."""

    @app.get("/pictures/{name:path}", include_in_schema=False)
    def picture(name: str, key: str = "", format: str = "png", quality: int = 90) -> Response:  # noqa: A002
        try:
            if not links.fits(name, key):
                raise RequestError("there is no such picture")
            path = service.pictures.at(name)
        except RequestError as error:
            return ApiError(404, str(error)).response()
        if format in ("jpeg", "webp"):
            return Response(in_format(path, format, max(0, min(quality, 100))), media_type=f"image/{format}")
        return FileResponse(
            path,
            media_type="image/png",
            filename=name.replace("/", "_"),
            content_disposition_type="inline",
            headers={"Cache-Control": "private"},
        )

    @app.get("/pictures.zip", include_in_schema=False)
    def pictures(names: str, key: str = "") -> Response:
        if not links.fits(f"zip {names}", key):
            return ApiError(404, "there are no such pictures").response()
        out = SpooledTemporaryFile(max_size=1 << 24)  # noqa: SIM115 - closed once it is sent
        with ZipFile(out, "w") as archive:  # PNG files are compressed already
            for name in names.split(","):
                with contextlib.suppress(RequestError):  # deleted since
                    archive.write(service.pictures.at(name), name)
        out.seek(0)
        headers = {"Content-Disposition": 'attachment; filename="pictures.zip"', "Cache-Control": "private"}
        return StreamingResponse(iter(lambda: out.read(1 << 16), b""), 200, headers, "application/zip")

    @app.get("/health")
    def health() -> JSONResponse:
        """State of the server."""
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
        """The one model."""
        return {"object": "list", "data": [card]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model, if it is this one."""
        _known(service, name)
        return card

    async def answer(http: Request, body: Body, request: GenerationRequest) -> Response:
        _known(service, body.model)
        if body.partial_images and not body.stream:
            raise ApiError(400, "partial_images: only with stream: true", param="partial_images")
        try:
            who = body.safety_identifier or body.user or ""
            job = queue.submit(service.job(request, whole=True), f"{http.client and http.client.host} {who}")
        except (QueueFullError, ValueError, QueueClosedError) as error:
            raise ApiError.of(error) from None
        kind = "image_edit" if request.image is not None else "image_generation"
        shown = Shown(service, links, body, request, kind)
        if body.stream:
            return StreamingResponse(shown.events(job, queue, http), media_type="text/event-stream")
        await _over(job, queue, http)
        data = [shown.item(path, i, str(http.base_url)) for i, path in enumerate(job.pictures)]
        notes = service.text_notices(request.prompt, request.negative_prompt)
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": data,
                **shown.facts,
                "usage": shown.usage(),
                **({"warnings": notes} if notes else {}),
            }
        )

    @router.post("/images/generations", openapi_extra=_schema(Body))
    async def generations(http: Request) -> Response:
        """Pictures of a prompt."""
        try:
            body = Body.model_validate_json(await http.body())
        except ValidationError as error:
            raise unreadable(error) from None
        return await answer(http, body, request_of(body, service))

    @router.post("/images/edits", openapi_extra=_schema(EditForm, "mask"))
    async def edits(http: Request) -> Response:
        """A picture changed by a prompt; where a mask is transparent only, if there is one."""
        body, image, mask = await form_of(http, EditForm)
        return await answer(http, body, request_of(body, service, image, mask))

    @router.post("/images/variations", openapi_extra=_schema(VariationForm))
    async def variations(http: Request) -> Response:
        """Pictures like another, whose own prompt is used if it was drawn here."""
        body, image, _ = await form_of(http, VariationForm)
        return await answer(http, body, request_of(body, service, image))

    _pages(app, service, queue, Depends(allowed))
    app.include_router(router)


def _pages(app: FastAPI, service: GenerationService, queue: JobQueue, guard: Any) -> None:
    """Counters, the API's description, and errors in OpenAI's form."""

    @app.get("/metrics", include_in_schema=True, dependencies=[guard])
    def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(measured(service, queue), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json", include_in_schema=False)
    def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return Response(described(app.openapi()), media_type="text/html; charset=utf-8")

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def unread(_: Request, error: RequestValidationError) -> JSONResponse:
        return unreadable(error).response()


def _schema(form: type[Body], *files: str) -> dict[str, Any]:
    """The request body of ``form`` for the OpenAPI document; of forms, with ``image`` and ``files``."""
    schema = form.model_json_schema()
    kind = "application/json"
    if form is not Body:
        kind = "multipart/form-data"
        schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in ("image", *files)}
        schema["required"] = [*schema.get("required", ()), "image"]
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


F = TypeVar("F", bound=VariationForm)


async def form_of(  # noqa: C901 - one fault after the other
    http: Request, kind: type[F]
) -> tuple[F, Image.Image, Image.Image | None]:
    """(fields, picture, mask) of a multipart request; the mask is L, white where it was transparent."""
    fields: dict[str, str] = {}
    files: dict[str, list[bytes]] = {"image": [], "mask": []}
    try:
        async with http.form(max_files=8, max_fields=64) as form:
            for key, value in form.multi_items():
                if isinstance(value, str):
                    fields |= {key: value} if value != "null" else {}
                elif (name := key.removesuffix("[]")) in files:
                    files[name].append(await value.read())
                else:
                    raise ApiError(400, f"{key[:40]}: no file is taken here", param=key[:40])
        body = kind.model_validate(fields)
    except (MultiPartException, HTTPException) as error:
        raise ApiError(400, f"the form cannot be read: {getattr(error, 'detail', error)}") from None
    except ValidationError as error:
        raise unreadable(error) from None
    for name, found in files.items():
        if not int(name == "image") <= len(found) <= 1:
            what = f"{name}: expected one picture, got {len(found)}; this model changes one"
            raise ApiError(400, what, param=name)
    image = uploaded(files["image"][0], "image")
    mask = uploaded(files["mask"][0], "mask") if files["mask"] else None
    if mask is not None:
        alpha = with_alpha(mask).alpha
        if alpha is None:
            raise ApiError(400, "mask: nothing of it is transparent: what is, is drawn anew", param="mask")
        if mask.size != image.size:
            sizes = " and ".join(f"{one.width}x{one.height}" for one in (mask, image))
            raise ApiError(400, f"mask: expected the size of the image, got {sizes}", param="mask")
        mask = ImageOps.invert(alpha)
    return body, image, mask


def uploaded(data: bytes, name: str) -> Image.Image:
    """The picture in ``data``, decoded whole and turned as its EXIF says; its text fields are kept."""
    try:
        with open_picture(BytesIO(data)) as picture:
            check_shape((picture.height, picture.width))
            own = dict(picture.info)
            turned = ImageOps.exif_transpose(picture)
            turned.load()
    except PictureError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from None
    turned.info |= {key: own[key] for key in ("prompt", "seed") if key in own}
    return turned


class Shown:
    """Pictures of one request as its answer has them; ``kind``: the stem of its events' names."""

    def __init__(
        self, service: GenerationService, links: Links, body: Body, request: GenerationRequest, kind: str
    ) -> None:
        self.service, self.links, self.body, self.request, self.kind = service, links, body, request, kind
        self.format = body.output_format or "png"
        self.quality = 90 if body.output_compression is None else body.output_compression
        scale = service.scale
        self.size = (request.width * scale, request.height * scale)
        self.facts = {
            "size": "{}x{}".format(*self.size),
            "quality": "auto",
            "background": "opaque",
            "output_format": self.format,
        }

    def item(self, path: Path, index: int, base: str) -> dict[str, Any]:
        """Picture ``index`` of an answer; its seed is a field of our own."""
        seed = {"seed": self.request.seed + index}
        if self.body.response_format == "b64_json":
            return {"b64_json": base64.b64encode(self.written(path)).decode(), **seed}
        name = self.links.to(self.service.pictures.name(path))
        quality = self.body.output_compression
        more = (
            ""
            if self.format == "png"
            else f"&format={self.format}&quality={90 if quality is None else quality}"
        )
        return {"url": base.rstrip("/") + name + more, **seed}

    def written(self, picture: Path | Image.Image) -> bytes:
        """Its bytes in the wanted format."""
        return in_format(picture, self.format, self.quality)

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt that the text encoder reads; pictures are not counted in tokens."""
        most = self.service.first.conditioning.max_length
        tokens = min(self.service.tokens(self.request.prompt) or 0, most)
        return {
            "input_tokens": tokens, "output_tokens": 0, "total_tokens": tokens,
            "input_tokens_details": {"text_tokens": tokens, "image_tokens": 0},
        }  # fmt: skip

    async def events(self, job: Job, queue: JobQueue, http: Request) -> AsyncIterator[str]:
        """Server-sent events: ``partial_images`` previews, then each finished picture."""
        wanted, sent = self.body.partial_images or 0, 0
        try:
            over = asyncio.ensure_future(_over(job, queue, http))
            while not over.done():
                await asyncio.wait([over], timeout=POLL)
                view = job.view()
                due = sent < wanted and view.step * (wanted + 1) >= (sent + 1) * view.steps > 0
                if due and view.latents is not None:
                    preview = await asyncio.to_thread(self.service.preview, view.latents)
                    if preview is not None:
                        large = preview.resize(self.size, Image.Resampling.BICUBIC)
                        yield self._event("partial_image", large, {"partial_image_index": sent})
                        sent += 1
            over.result()
            for index, path in enumerate(job.pictures):
                more = {"usage": self.usage(), "seed": self.request.seed + index}
                yield self._event("completed", path, more)
        except ApiError as error:  # the status was sent already
            body = bytes(error.response().body).decode()
            yield f"event: error\ndata: {body}\n\n"
        finally:
            queue.cancel(job)

    def _event(self, name: str, picture: Path | Image.Image, more: Mapping[str, Any]) -> str:
        kind = f"{self.kind}.{name}"
        data = base64.b64encode(self.written(picture)).decode()
        body = {"type": kind, "b64_json": data, "created_at": int(time.time()), **self.facts, **more}
        return f"event: {kind}\ndata: {json.dumps(body)}\n\n"


def in_format(picture: Path | Image.Image, form: str, quality: int) -> bytes:
    """A picture as png, jpeg or webp (``quality`` 0 to 100); a PNG file as it is, settings included."""
    if isinstance(picture, Path):
        if form == "png":
            return picture.read_bytes()
        with open_picture(picture) as opened:
            picture = opened.convert("RGB")
    out = BytesIO()
    picture.save(out, form.upper(), **({} if form == "png" else {"quality": quality}))
    return out.getvalue()


def measured(service: GenerationService, queue: JobQueue) -> bytes:
    """The counters of ``queue`` as Prometheus reads them."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    except ImportError as error:
        raise ApiError(501, f"metrics need {EXTRAS}", code="not_installed") from error

    class Counters:
        """State of this moment."""

        def collect(self) -> Iterator[Metric]:
            jobs = CounterMetricFamily("cogview3_jobs", "Jobs by how they ended", labels=["state", "model"])
            for state in ("done", "failed", "cancelled"):
                jobs.add_metric([state, service.name], queue.ended[state])
            yield jobs
            yield CounterMetricFamily("cogview3_pictures", "Pictures drawn", value=queue.pictures)
            yield CounterMetricFamily("cogview3_drawing_seconds", "Time spent on jobs", value=queue.seconds)
            yield GaugeMetricFamily("cogview3_waiting", "Jobs that wait", value=queue.length)
            yield GaugeMetricFamily("cogview3_waiting_most", "Jobs that may wait", value=queue.most)
            yield GaugeMetricFamily("cogview3_drawing", "1 while a job is drawn", value=int(queue.is_busy))

    registry = CollectorRegistry()
    registry.register(Counters())
    text: bytes = generate_latest(registry)
    return text


def described(schema: Mapping[str, Any]) -> str:
    """A page about the addresses of an OpenAPI document and their fields; it loads nothing from elsewhere."""
    parts = []
    for path, verbs in schema["paths"].items():
        for verb, one in verbs.items():
            words = html.escape(one.get("description") or one.get("summary", ""))
            parts.append(f"<h2><code>{verb.upper()} {html.escape(path)}</code></h2><p>{words}</p>")
            for kind, content in one.get("requestBody", {}).get("content", {}).items():
                form = content["schema"]
                rows = "".join(
                    f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(_values(field))}</td>"
                    f"<td>{'needed' if name in form.get('required', ()) else ''}</td></tr>"
                    for name, field in form["properties"].items()
                )
                head = "<tr><th scope=col>field</th><th scope=col>values</th><th scope=col></th></tr>"
                parts.append(f"<p>{kind}</p><table>{head}{rows}</table>")
    title = html.escape(str(schema["info"]["title"]))
    style = (
        "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}td,th{padding:2px 12px}"
    )
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>API of {title}</title>"
        f"<style>{style}</style></head><body><main><h1>API of {title}</h1>"
        f'<p>In OpenAI\'s form; the same as <a href="/openapi.json">openapi.json</a>.</p>{"".join(parts)}'
        "</main></body></html>"
    )


def _values(field: Mapping[str, Any]) -> str:
    """The values of a field of a JSON schema, in words."""
    if "anyOf" in field:
        return " or ".join(filter(None, (_values(one) for one in field["anyOf"])))
    if "enum" in field or "const" in field:
        return ", ".join(map(str, field.get("enum", [field.get("const")])))
    low, high = field.get("minimum"), field.get("maximum")
    kind = "file" if field.get("format") == "binary" else str(field.get("type", ""))
    return f"{kind} {low} to {high}" if high is not None else kind


def unreadable(error: ValidationError | RequestValidationError) -> ApiError:
    """The answer to a body that is no JSON, or whose fields are not those of :class:`Body`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")[:80]
    strange = first["type"] == "extra_forbidden"
    what = "is not one of this server's" if strange else first["msg"].partition(" [type=")[0][:400]
    if first["type"] == "missing":
        what = "is needed"
    elif first["type"] == "none_required" or (
        first["type"].startswith("literal") and first["ctx"]["expected"] == "None"
    ):
        what = "this server has none of it: leave it out, or null"
    elif first["type"].startswith("literal"):
        what = f"expected {first['ctx']['expected']}, as this server does nothing else"
    return ApiError(400, f"{where or 'the request'}: {what}", param=where or None)


def missing(method: str, path: str) -> ApiError:
    """The answer to a request for a path that is not here, or not with that method."""
    wanted = METHODS.get(path)
    if wanted is not None:
        return ApiError(405, f"{path} takes {wanted}, not {method[:20]}", code="method_not_allowed")
    known = ", ".join(f"{verb} {name}" for name, verb in METHODS.items())
    return ApiError(404, f"there is no {path[:80]} here; there are {known}", code="not_found")


def request_of(
    body: Body,
    service: GenerationService,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> GenerationRequest:
    """The request in ``body``. Its ``size`` is that of the result, after all enlarging.

    ``auto`` is the config's, or the nearest to that of the ``image`` to change. Without words, a picture that
    was drawn here has its own.
    """
    default, scale, guidance = service.first.sampling, service.scale, body.guidance
    width, height = default.width, default.height
    prompt, strength = body.prompt, None
    if image is not None:
        height, width = service.sizes.nearest(round(image.height / scale), round(image.width / scale))
        prompt = prompt or str(image.info.get("prompt", ""))
        strength = body.strength if isinstance(body, VariationForm) else None
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
        prompt=prompt,
        height=height,
        width=width,
        steps=default.steps if body.steps is None else body.steps,
        guidance=service.guidance if guidance is None else guidance,
        seed=secrets.randbelow(2**32 - 1024) if body.seed is None else body.seed,
        count=1 if body.n is None else body.n,
        negative_prompt=body.negative_prompt or "",
        adapters={name: entry.strength for name, entry in service.adapters.items() if entry.strength},
        image=image,
        mask=mask,
        strength=strength,
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
