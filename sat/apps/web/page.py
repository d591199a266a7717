"""What happens on the page when something is pressed; how it looks is in ``layout.py``."""

from __future__ import annotations

import asyncio
import base64
import html
import logging
import secrets
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sat.apps.prompts.optimizer import OptimizerError, PromptOptimizer
from sat.apps.web.api import Links
from sat.apps.web.job_queue import Job, JobQueue, QueueFullError
from sat.apps.web.request import GenerationRequest, RequestError, settings_of
from sat.apps.web.service import GenerationService, fitted
from sat.util.log import describe

log = logging.getLogger(__name__)

GALLERY = 24  # pictures
_LOOK = 0.15  # seconds between looks at a job

EMPTY = '<div class="empty">Pictures appear here.</div>'


class Page:
    """What happens when something is pressed; jobs by session, so that each can cancel its own."""

    def __init__(
        self,
        service: GenerationService,
        queue: JobQueue,
        links: Links,
        optimizer: PromptOptimizer,
        names: list[str],
    ) -> None:
        self.service, self.queue, self.links, self.optimizer = service, queue, links, optimizer
        self.adapters = names
        self._jobs: dict[str, Job] = {}

    def request(self, *values: Any) -> GenerationRequest:  # noqa: ANN401 - the values of Form.fields
        """The form as a request; :class:`RequestError` for what was left empty or typed wrong."""
        prompt, negative, width, height, count, steps, guidance, seed, anew, *strengths = values
        if anew:
            seed = secrets.randbelow(2**32 - self.service.limits.count)

        def whole(value: Any, name: str) -> int:  # noqa: ANN401
            if value is None or float(value) != int(value):
                raise RequestError(
                    f"{name}: expected a whole number, got {'nothing' if value is None else value}"
                )
            return int(value)

        return GenerationRequest(
            (prompt or "").strip(),
            whole(height, "height"),
            whole(width, "width"),
            whole(steps, "steps"),
            None if self.service.guidance is None else float(guidance),
            whole(seed, "seed"),
            whole(count, "pictures"),
            (negative or "").strip(),
            {name: float(value) for name, value in zip(self.adapters, strengths, strict=True) if value},
        )

    async def draw(self, http: gr.Request, *values: Any) -> AsyncIterator[tuple[Any, ...]]:  # noqa: ANN401
        """(canvas, status, seed, gallery, chosen, facts) again and again until the pictures are there."""
        try:
            request = self.request(*values)
            job = self.queue.submit(self.service.job(request))
        except (ValueError, QueueFullError) as error:
            yield gr.skip(), _error(error), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        async for update in self._follow(job, http, request.seed):
            yield update

    async def enlarge(self, http: gr.Request, chosen: str) -> AsyncIterator[tuple[Any, ...]]:
        """As :meth:`draw`, of the chosen picture enlarged."""
        try:
            job = self.queue.submit(self.service.enlarging(chosen or ""))
        except (ValueError, QueueFullError) as error:
            known = error if chosen else "Choose a picture first."
            yield gr.skip(), _error(known), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        async for update in self._follow(job, http, None):
            yield update

    async def _follow(self, job: Job, http: gr.Request, seed: int | None) -> AsyncIterator[tuple[Any, ...]]:
        session = str(http.session_hash)
        self.cancel(http)  # one job at a time for each page
        self._jobs[session] = job
        shown = gr.skip() if seed is None else seed
        seen = -1
        try:
            while not job.is_over:
                view = job.view()
                if view.step != seen or view.state == "waiting":
                    seen = view.step
                    canvas = await asyncio.to_thread(self._progress, job)
                    yield canvas, self._told(job), shown, gr.skip(), gr.skip(), gr.skip()
                await asyncio.sleep(_LOOK)
        finally:
            self.queue.cancel(job)  # the page was closed; nothing happens to a job that is over
            if self._jobs.get(session) is job:
                del self._jobs[session]
        state = job.view().state
        if state == "done":
            names = [self.service.pictures.name(path) for path in job.pictures]
            yield (self._canvas(names), _said(f"Done: {_count(len(names))}."), shown, await self.gallery(),
                   names[0], self._facts(names[0]))  # fmt: skip
        elif state == "failed":
            yield EMPTY, _error(job.error or "it failed"), shown, gr.skip(), gr.skip(), gr.skip()
        else:
            yield EMPTY, _said("Cancelled."), shown, await self.gallery(), gr.skip(), gr.skip()

    def cancel(self, http: gr.Request) -> None:
        """End the job of this page, if it has one."""
        job = self._jobs.get(str(http.session_hash))
        if job is not None:
            self.queue.cancel(job)

    def enhance(self, prompt: str) -> tuple[Any, str]:
        """(prompt, status): the prompt as a description, or as it was and why."""
        try:
            better = self.optimizer((prompt or "")[: self.service.limits.prompt])
        except OptimizerError as error:
            return gr.skip(), _error(error)
        cut = f" What did not fit was cut: “{html.escape(better.dropped)}”." if better.dropped else ""
        return better.text, _said(f"Rewritten from: “{html.escape(prompt.strip())}”.{cut}")

    async def choose(self, names: list[str], event: gr.SelectData) -> tuple[Any, str, str]:
        """(canvas, chosen, facts) of a picture of the gallery."""
        index = event.index if isinstance(event.index, int) else -1
        if not 0 <= index < len(names):
            return gr.skip(), "", ""
        return self._canvas([names[index]]), names[index], self._facts(names[index])

    def reuse(self, chosen: str) -> list[Any]:
        """Form values and status from the chosen picture."""
        try:
            return self._filled(self.service.pictures.at(chosen or ""))
        except RequestError as error:
            return [
                *([gr.skip()] * (9 + len(self.adapters))),
                _error(error if chosen else "Choose a picture first."),
            ]

    def upload(self, path: str) -> list[Any]:
        """Form values and status from an uploaded PNG file, which lies in the output folder."""
        try:
            file = Path(path).resolve()
            if not file.is_relative_to(self.service.pictures.root):
                raise RequestError("this file was not uploaded")
            return self._filled(file)
        except RequestError as error:
            return [*([gr.skip()] * (9 + len(self.adapters))), _error(error)]

    def sizes(self, width: Any, height: Any) -> Any:  # noqa: ANN401
        """The heights that go with a width, the nearest of them chosen."""
        sides = self.service.sizes.sides(int(width))
        return gr.update(choices=sides, value=min(sides, key=lambda side: abs(side - int(height or 0))))

    def _filled(self, path: Path) -> list[Any]:
        said = settings_of(path)
        request, notes = fitted(said, self.service)
        heights = gr.update(choices=self.service.sizes.sides(request.width), value=request.height)
        status = _said("The settings of the picture are set. " + " ".join(html.escape(n) for n in notes))
        return [request.prompt, request.negative_prompt, request.width, heights, 1, request.steps,
                request.guidance if request.guidance is not None else gr.skip(), request.seed, False,
                *(request.adapters.get(name, 0.0) for name in self.adapters), status]  # fmt: skip

    async def gallery(self) -> tuple[list[Image.Image], list[str]]:
        """(thumbnails, names), the newest first."""
        names = self.service.pictures.newest(GALLERY)
        small = await asyncio.to_thread(lambda: [self.service.pictures.thumbnail(name) for name in names])
        return small, names

    def _progress(self, job: Job) -> str:
        view = job.view()
        picture = ""
        if view.latents is not None and (image := self.service.preview(view.latents)) is not None:
            picture = f'<img class="live" alt="preview" src="{_inline(image)}">'
        share = 100 * view.step // max(view.steps, 1)
        bar = f'<div class="bar" role="progressbar" aria-valuenow="{share}">'
        return f'{picture}{bar}<div style="width:{share}%"></div></div>'

    def _told(self, job: Job) -> str:
        view = job.view()
        if view.state == "waiting":
            ahead = self.queue.ahead(job)
            return _said(f"Waiting: {ahead} before this one." if ahead else "Starting …")
        return _said(f"Drawing: step {view.step} of {view.steps}.")

    def _canvas(self, names: list[str]) -> str:
        items = [
            f'<a href="{html.escape(self.links.to(name))}" target="_blank" title="Open the PNG file">'
            f'<img alt="picture" src="{html.escape(self.links.to(name))}"></a>'
            for name in names
        ]
        return items[0] if len(items) == 1 else f'<div class="row">{"".join(items)}</div>'

    def _facts(self, name: str) -> str:
        try:
            said = settings_of(self.service.pictures.at(name))
        except RequestError as error:
            return _error(error)
        rows = {
            "prompt": said.prompt, "negative prompt": said.negative_prompt or "none",
            "size": f"{said.width} x {said.height} (width x height)", "steps": said.steps,
            "guidance": "none" if said.guidance is None else f"{said.guidance:g}", "seed": said.seed,
            "model": said.model, "file": name,
        }  # fmt: skip
        if said.adapters:
            rows["LoRA"] = ", ".join(f"{name} at {strength:g}" for name, strength in said.adapters.items())
        return "<dl>" + "".join(
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in rows.items()
        ) + "</dl>"  # fmt: skip


def _said(text: str) -> str:
    return f"<p>{text}</p>"


def _error(error: BaseException | str) -> str:
    text = error if isinstance(error, str) else describe(error)
    return f'<p class="error" role="alert">{html.escape(text[:1].upper() + text[1:])}</p>'


def _count(number: int) -> str:
    return "1 picture" if number == 1 else f"{number} pictures"


def _inline(image: Image.Image) -> str:
    """The picture, at least 256 pixels, as an address that holds it."""
    scale = max(1, 256 // max(image.size))
    file = BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=80
    )
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
