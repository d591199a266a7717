"""The page: a form on the left, the pictures on the right, and the handlers of its buttons."""

from __future__ import annotations

import asyncio
import base64
import html
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sat.apps.prompts.optimizer import OptimizerError, PromptOptimizer
from sat.apps.web.api import Links
from sat.apps.web.job_queue import Job, JobQueue, QueueClosedError, QueueFullError
from sat.apps.web.request import GenerationRequest, RequestError, settings_of
from sat.apps.web.service import GenerationService, fitted
from sat.util.log import describe

log = logging.getLogger(__name__)

GALLERY = 24  # pictures
POLL = 0.15  # seconds between looks at a job
EMPTY = '<div class="empty">Pictures appear here.</div>'
CSS = """
.gradio-container {width: 100% !important; max-width: 1200px !important; min-width: 0; margin: auto;
  padding: 12px !important}
.gradio-container .app, .gradio-container main, .gradio-container .wrap {min-width: 0; max-width: 100%}
.gradio-container .app {padding: 0 !important}
#layout {display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); grid-template-rows: auto 1fr}
#layout > * {min-width: 0 !important}
#right {grid-column: 2; grid-row: 1 / 3}
#settings {grid-column: 1; grid-row: 2}
@media (max-width: 720px) {
  #layout {display: flex; flex-flow: column nowrap}
  #layout > * {width: 100% !important; max-width: 100%; flex: none}
  #gallery .grid-wrap {max-height: 230px !important; overflow-y: auto}
}
#canvas {width: 100%; min-height: 120px; padding: 0}
#canvas img {width: min(100%, 512px); display: block; margin: 0 auto 8px; border-radius: 8px}
#canvas .row {display: flex; flex-wrap: wrap; gap: 8px; justify-content: center}
#canvas .row a {flex: 0 1 240px} #canvas .row img {width: 100%}
#canvas .empty {border: 1px dashed var(--border-color-primary); border-radius: 8px; padding: 48px 16px;
  text-align: center; color: var(--body-text-color-subdued)}
#canvas .bar {height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden;
  max-width: 512px; margin: 0 auto}
#canvas .bar div {height: 100%; background: var(--primary-500)}
#status {padding: 0; min-height: 24px} #status p {margin: 0; overflow-wrap: anywhere}
#status .error {color: #b91c1c} .dark #status .error {color: #fca5a5}
#facts {padding: 0}
#facts dl {display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 0; font-size: 14px}
#facts dt {color: var(--body-text-color-subdued)} #facts dd {margin: 0; overflow-wrap: anywhere}
#gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)) !important}
#gallery, #gallery .grid-wrap {height: auto !important; min-height: 0 !important}
"""
_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")


class Actions:
    """Handlers of the page's buttons; jobs by session, so that each can cancel its own."""

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
        """The form as a request; :class:`RequestError` for a field left empty or typed wrong."""
        prompt, negative, width, height, count, steps, guidance, seed, new_seed, *strengths = values
        if new_seed:
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
        except (ValueError, QueueFullError, QueueClosedError) as error:
            yield gr.skip(), _error(error), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        async for update in self._follow(job, http, request.seed):
            yield update

    async def enlarge(self, http: gr.Request, chosen: str) -> AsyncIterator[tuple[Any, ...]]:
        """As :meth:`draw`, of the chosen picture enlarged."""
        try:
            job = self.queue.submit(self.service.enlarging(chosen or ""))
        except (ValueError, QueueFullError, QueueClosedError) as error:
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
                    yield canvas, self._status(job), shown, gr.skip(), gr.skip(), gr.skip()
                await asyncio.sleep(POLL)
        finally:
            self.queue.cancel(job)  # the page was closed; nothing happens to a job that is over
            if self._jobs.get(session) is job:
                del self._jobs[session]
        state = job.view().state
        if state == "done":
            names = [self.service.pictures.name(path) for path in job.pictures]
            done = _message(f"Done: {len(names)} picture{'s' * (len(names) != 1)}.")
            yield (self._canvas(names), done, shown, await self.gallery(), names[0], self._facts(names[0]))
        elif state == "failed":
            yield EMPTY, _error(job.error or "it failed"), shown, gr.skip(), gr.skip(), gr.skip()
        else:
            yield EMPTY, _message("Cancelled."), shown, await self.gallery(), gr.skip(), gr.skip()

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
        return better.text, _message(f"Rewritten from: “{html.escape(prompt.strip())}”.{cut}")

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
        request, notes = fitted(settings_of(path), self.service)
        heights = gr.update(choices=self.service.sizes.sides(request.width), value=request.height)
        status = _message("The settings of the picture are set. " + " ".join(html.escape(n) for n in notes))
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
            scale = max(1, 256 // max(image.size))  # at least 256 pixels
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
            file = BytesIO()
            image.save(file, "JPEG", quality=80)
            data = base64.b64encode(file.getvalue()).decode()
            picture = f'<img class="live" alt="preview" src="data:image/jpeg;base64,{data}">'
        share = 100 * view.step // max(view.steps, 1)
        bar = f'<div class="bar" role="progressbar" aria-valuenow="{share}">'
        return f'{picture}{bar}<div style="width:{share}%"></div></div>'

    def _status(self, job: Job) -> str:
        view = job.view()
        if view.state == "waiting":
            ahead = self.queue.ahead(job)
            return _message(f"Waiting: {ahead} before this one." if ahead else "Starting …")
        return _message(f"Drawing: step {view.step} of {view.steps}.")

    def _canvas(self, names: list[str]) -> str:
        items = [
            f'<a href="{html.escape(self.links.to(name))}" target="_blank" title="Open the PNG file">'
            f'<img alt="picture" src="{html.escape(self.links.to(name))}"></a>'
            for name in names
        ]
        return items[0] if len(items) == 1 else f'<div class="row">{"".join(items)}</div>'

    def _facts(self, name: str) -> str:
        try:
            known = settings_of(self.service.pictures.at(name))
        except RequestError as error:
            return _error(error)
        rows = {
            "prompt": known.prompt, "negative prompt": known.negative_prompt or "none",
            "size": f"{known.width} x {known.height} (width x height)", "steps": known.steps,
            "guidance": "none" if known.guidance is None else f"{known.guidance:g}", "seed": known.seed,
            "model": known.model, "file": name,
        }  # fmt: skip
        if known.adapters:
            rows["LoRA"] = ", ".join(f"{name} at {strength:g}" for name, strength in known.adapters.items())
        return "<dl>" + "".join(
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in rows.items()
        ) + "</dl>"  # fmt: skip


def _message(text: str) -> str:
    return f"<p>{text}</p>"


def _error(error: BaseException | str) -> str:
    text = error if isinstance(error, str) else describe(error)
    return f'<p class="error" role="alert">{html.escape(text[:1].upper() + text[1:])}</p>'


# -- layout


def theme() -> Any:  # noqa: ANN401 - Gradio has no types
    """Gradio's plain theme in fonts that are on every machine."""
    return gr.themes.Base(primary_hue="indigo", font=_FONTS, font_mono=("ui-monospace", "monospace"))


@dataclass(frozen=True)
class Form:
    """The fields of a request, in the order of their values."""

    prompt: Any
    negative: Any
    width: Any
    height: Any
    count: Any
    steps: Any
    guidance: Any
    seed: Any
    new_seed: Any  # each time
    adapters: dict[str, Any]

    @property
    def fields(self) -> list[Any]:
        """All of them."""
        return [self.prompt, self.negative, self.width, self.height, self.count, self.steps, self.guidance,
                self.seed, self.new_seed, *self.adapters.values()]  # fmt: skip


def page(service: GenerationService, queue: JobQueue, links: Links, optimizer: PromptOptimizer) -> Any:  # noqa: ANN401
    """The Gradio blocks."""
    actions = Actions(service, queue, links, optimizer, list(service.adapters))
    with gr.Blocks(title=service.name, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        with gr.Row(equal_height=False, elem_id="layout"):
            with gr.Column(elem_id="top"):  # on a phone: what to draw, the picture, the settings
                prompt = gr.Textbox(
                    label="Prompt", lines=3, max_lines=8, max_length=service.limits.prompt, elem_id="prompt",
                    placeholder="What is to be seen?",
                )  # fmt: skip
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
                    cancel = gr.Button("Cancel", elem_id="cancel", min_width=80)
                    enhance = gr.Button("Enhance", elem_id="enhance", min_width=80)
                status = gr.HTML("", elem_id="status")
            with gr.Column(elem_id="right"):
                canvas = gr.HTML(EMPTY, elem_id="canvas")
                facts = gr.HTML("", elem_id="facts")
                with gr.Row():
                    reuse = gr.Button("Use its settings", size="sm", elem_id="reuse", min_width=120)
                    enlarge = gr.Button(
                        "Enlarge it",
                        size="sm",
                        elem_id="enlarge",
                        min_width=120,
                        visible=len(service.stages) > 1,
                    )
                gallery = gr.Gallery(
                    label="Pictures", show_label=False, columns=6, allow_preview=False, object_fit="cover",
                    buttons=[], interactive=False, elem_id="gallery",
                )  # fmt: skip
            with gr.Column(elem_id="settings"):
                form, upload = _settings(service, prompt)
        names, chosen = gr.State([]), gr.State("")
        quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        shown = [canvas, status, form.seed, gallery, names, chosen, facts]
        drawing = {"outputs": shown, "trigger_mode": "once", **quiet}
        # Handlers that answer once bypass Gradio's queue: it can lose an event that is sent while the stream
        # of the one before it closes, and the page would wait for ever.
        once = {"queue": False, **quiet}
        gr.on([draw.click, form.prompt.submit], _flat(actions.draw), form.fields, **drawing)
        enlarge.click(_flat(actions.enlarge), [chosen], **drawing)
        cancel.click(actions.cancel, None, None, **once)
        enhance.click(actions.enhance, [form.prompt], [form.prompt, status], **once)
        gallery.select(actions.choose, [names], [canvas, chosen, facts], **once)
        filled = [*form.fields, status]
        reuse.click(actions.reuse, [chosen], filled, **once)
        upload.upload(actions.upload, [upload], filled, **once)
        form.width.input(actions.sizes, [form.width, form.height], [form.height], **once)
        blocks.load(actions.gallery, None, [gallery, names], **once)
        blocks.unload(actions.cancel)
    blocks.queue(max_size=256, api_open=False, default_concurrency_limit=None)
    return blocks


def _flat(draw: Callable[..., AsyncIterator[tuple[Any, ...]]]) -> Callable[..., AsyncIterator[list[Any]]]:
    """``draw`` with (gallery, names) taken apart for Gradio's outputs."""

    async def run(request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:  # noqa: ANN401
        async for canvas, status, seed, gallery, chosen, facts in draw(request, *values):
            pair = gallery if isinstance(gallery, tuple) else (gr.skip(), gr.skip())
            yield [canvas, status, seed, *pair, chosen, facts]

    return run


def _settings(service: GenerationService, prompt: Any) -> tuple[Form, Any]:  # noqa: ANN401
    """The other fields, with those of LoRA files if there are any, and the button that reads a PNG file."""
    sampling, most, sizes, strength = service.first.sampling, service.limits, service.sizes, service.guidance
    with gr.Row():
        width = gr.Dropdown(sizes.sides(), value=sampling.width, label="Width", elem_id="width", min_width=80)
        height = gr.Dropdown(
            sizes.sides(sampling.width), value=sampling.height, label="Height", elem_id="height", min_width=80
        )
        count = gr.Number(
            1, label="Pictures", minimum=1, maximum=most.count, precision=0, elem_id="count", min_width=80
        )
    with gr.Row():
        seed = gr.Number(sampling.seed, label="Seed", precision=0, elem_id="seed", min_width=120)
        new_seed = gr.Checkbox(True, label="New seed each time", elem_id="anew", min_width=120)
    steps = gr.Slider(
        1, max(most.steps, sampling.steps), value=sampling.steps, step=1, label="Steps", elem_id="steps"
    )
    guidance = gr.Slider(
        0, max(20.0, strength or 0.0), value=strength or 0.0, step=0.1, label="Guidance", elem_id="guidance",
        visible=strength is not None,
    )  # fmt: skip
    negative = gr.Textbox(
        sampling.negative_prompt, label="Negative prompt", max_length=most.prompt, elem_id="negative",
        placeholder="What is not to be seen",
    )  # fmt: skip
    adapters = {}
    with gr.Accordion("LoRA", open=True, visible=bool(service.adapters), elem_id="lora"):
        for name, entry in service.adapters.items():
            adapters[name] = gr.Slider(
                -most.strength, most.strength, value=entry.strength, step=0.05, label=name, info="0: not used"
            )
    upload = gr.UploadButton(
        "Settings from a PNG", file_types=[".png"], type="filepath", size="sm", elem_id="upload"
    )
    return Form(prompt, negative, width, height, count, steps, guidance, seed, new_seed, adapters), upload
