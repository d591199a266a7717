"""The page: a form on the left, the pictures on the right, and the handlers of its buttons."""

from __future__ import annotations

import base64
import html
import json
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock, Timer
from typing import Any

import gradio as gr
from PIL import Image

from sat.apps.prompts.optimizer import OptimizerError, PromptOptimizer
from sat.apps.web.api import Links
from sat.apps.web.job_queue import Job, JobQueue, QueueClosedError, QueueFullError
from sat.apps.web.request import GenerationRequest, RequestError, settings_of
from sat.apps.web.service import GenerationService, fitted
from sat.config.record import model_name
from sat.util.host import write_text
from sat.util.log import describe

log = logging.getLogger(__name__)

GALLERY = 24  # pictures
TICK = 0.3  # seconds between looks at a job
GRACE = 15.0  # seconds in which a page that is loaded anew finds its job again
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
#title {padding: 0} #title h1 {font-size: 1.3rem; font-weight: 600; margin: 0}
#tokens {padding: 0; min-height: 20px; font-size: 14px}
.gradio-container {--body-text-color-subdued: #52525b; --input-placeholder-color: #64646d;
  --primary-500: #4f46e5}
.dark .gradio-container, .dark.gradio-container {--body-text-color-subdued: #c4c4cc;
  --input-placeholder-color: #a8a8b0}
.warning {color: #92400e} .dark .warning {color: #fcd34d}
#gallery .caption-label, #gallery:has(.empty) {display: none}
#draw {background: #4338ca; color: #fff}
#settings input {min-height: 24px} #settings .reset-button {min-height: 24px; min-width: 24px}
#settings input[type=checkbox] {width: 24px; height: 24px}
@media (max-width: 720px) {
  #top {order: 1} #right {order: 2} #settings {order: 3}
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
SCRIPT = """() => {
  const id = name => document.getElementById(name);
  const live = id("status");
  if (live) { live.setAttribute("role", "status"); live.setAttribute("aria-live", "polite"); }
  document.addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      event.stopPropagation();  // Enter would also turn a checkbox over
      id("draw").click();
    }
    if (event.key === "Escape") id("cancel").click();
  }, true);
}"""
_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")


class Actions:
    """Handlers of the page's buttons; drawings by browser, so that each sees and cancels its own."""

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
        self.history = History(service.pictures.root / ".history.json")
        self._drawings: dict[str, list[Drawing]] = {}  # by browser, in order
        self._sessions: dict[str, str] = {}  # browsers by open page

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

    def browser(self, http: gr.Request, known: str) -> str:
        """The name of a page's browser: ``known`` from before, or a new one, from its first call on."""
        return self._sessions.setdefault(str(http.session_hash), known or secrets.token_urlsafe(12))

    def draw(self, http: gr.Request, known: str, whole: bool, *values: Any) -> list[Any]:  # noqa: ANN401
        """(status, seed, timer) once the request waits; what is drawn is told by :meth:`tick`."""
        try:
            request = self.request(*values)
            job = self.queue.submit(self.service.job(request, whole=whole))
        except (ValueError, QueueFullError, QueueClosedError) as error:
            return [_error(error), gr.skip(), gr.skip()]
        browser = self.browser(http, known)
        said = self.service.text_notices(request.prompt, request.negative_prompt)
        if request.negative_prompt and request.guidance in (None, 1.0):
            said.append("the negative prompt has no effect without guidance above 1")
        return [self._wait(browser, Drawing(job, request.count, tuple(said))), request.seed, _ticking(True)]

    def enlarge(self, http: gr.Request, known: str, chosen: list[str]) -> list[Any]:
        """(status, timer): as :meth:`draw`, of the chosen pictures enlarged."""
        try:
            job = self.queue.submit(self.service.enlarging(chosen))
        except (ValueError, QueueFullError, QueueClosedError) as error:
            return [_error(error), gr.skip()]
        browser = self.browser(http, known)
        return [self._wait(browser, Drawing(job, len(chosen))), _ticking(True)]

    def _wait(self, browser: str, drawing: Drawing) -> str:
        mine = self._drawings.setdefault(browser, [])
        mine.append(drawing)
        if len(mine) > 1:
            return _message(f"In the queue, {len(mine) - 1} of yours before it.")
        return _message("Starting …")

    def tick(self, http: gr.Request, known: str) -> list[Any]:
        """(canvas, status, gallery, names, chosen, facts, timer): how far this browser's pictures are."""
        browser = self.browser(http, known)
        mine, skipped = self._drawings.get(browser, []), [gr.skip()] * 6
        if not mine:
            return [*skipped, _ticking(False)]
        now = mine[0]
        if not now.job.is_over:
            view = now.job.view()
            if (view.state, view.step) == now.seen and view.state == "drawing":
                return [*skipped, gr.skip()]
            now.seen = view.state, view.step
            done = [path for path in now.job.expected if path.is_file()]
            status = self._status(now, len(done), len(mine) - 1)
            return [self._progress(now.job, done), status, *[gr.skip()] * 4, gr.skip()]
        mine.pop(0)
        files = now.job.pictures or [path for path in now.job.expected if path.is_file()]
        names = [self.service.pictures.name(path) for path in files]
        self.history.add(browser, names)
        state, more = now.job.view().state, f" {len(mine)} more in the queue." if mine else ""
        if state == "failed":
            status = _error(now.job.error or "it failed")
        elif state == "cancelled":
            kept = f" {len(names)} finished before, kept." if names else ""
            status = _message(f"Cancelled.{kept}{more}")
        else:
            status = _message(f"Done: {len(names)} picture{'s' * (len(names) != 1)}.{more}")
        status += "".join(f'<p class="warning">{html.escape(_sentence(line))}</p>' for line in now.notices)
        shown = [self._canvas(names), names, self._facts(names[0])] if names else [EMPTY, [], ""]
        return [shown[0], status, *self.gallery(browser), shown[1], shown[2], _ticking(bool(mine))]

    def cancel(self, http: gr.Request, known: str) -> None:
        """End what is being drawn for this browser, or waits first."""
        if mine := self._drawings.get(self.browser(http, known)):
            self.queue.cancel(mine[0].job)

    def left(self, http: gr.Request) -> None:
        """A page was closed or loaded anew: unless it comes back soon, nobody waits for its pictures."""
        browser, session = self._sessions.get(str(http.session_hash), ""), str(http.session_hash)

        def end() -> None:
            self._sessions.pop(session, None)
            if browser not in self._sessions.values():
                for drawing in self._drawings.pop(browser, []):
                    self.queue.cancel(drawing.job)

        timer = Timer(GRACE, end)
        timer.daemon = True
        timer.start()

    def load(self, http: gr.Request, known: str, saved: list[Any] | None) -> list[Any]:
        """(browser, gallery, names, timer, *fields): what this browser had before, if it was here."""
        browser = self.browser(http, known)
        for drawing in self._drawings.get(browser, []):
            drawing.seen = ("waiting", -1)  # show it anew
        fields: list[Any] = [gr.skip()] * (9 + len(self.adapters))
        if saved and len(saved) == len(fields) and self._fits(saved):
            fields = saved
            fields[3] = gr.update(choices=self.service.sizes.sides(int(saved[2])), value=saved[3])
        timer = _ticking(True) if self._drawings.get(browser) else gr.skip()
        return [browser, *self.gallery(browser), timer, *fields]

    def _fits(self, saved: list[Any]) -> bool:
        try:
            return self.service.sizes.allows(int(saved[3]), int(saved[2]))
        except (TypeError, ValueError):
            return False

    def count(self, prompt: str) -> str:
        """The tokens of a prompt beside those that the encoder reads, and what of it does not arrive."""
        most, have = self.service.first.conditioning.max_length, self.service.tokens(prompt or "")
        if have is None or not (prompt or "").strip():
            return ""
        told = "".join(f" {html.escape(_sentence(line))}." for line in self.service.text_notices(prompt))
        return f'<p class="{"warning" if told else ""}">{have} of {most} tokens.{told}</p>'

    def enhance(self, prompt: str) -> tuple[Any, str]:
        """(prompt, status): the prompt as a description, or as it was and why."""
        try:
            better = self.optimizer((prompt or "")[: self.service.limits.prompt])
        except OptimizerError as error:
            return gr.skip(), _error(error)
        cut = f" What did not fit was cut: “{html.escape(better.dropped)}”." if better.dropped else ""
        return better.text, _message(f"Rewritten from: “{html.escape(prompt.strip())}”.{cut}")

    def choose(self, names: list[str], event: gr.SelectData) -> tuple[Any, list[str], str]:
        """(canvas, chosen, facts) of a picture of the gallery."""
        index = event.index if isinstance(event.index, int) else -1
        if not 0 <= index < len(names):
            return gr.skip(), [], ""
        return self._canvas([names[index]]), [names[index]], self._facts(names[index])

    def reuse(self, chosen: list[str]) -> list[Any]:
        """Form values and status from the first chosen picture."""
        try:
            return self._filled(self.service.pictures.at(chosen[0] if chosen else ""))
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

    def gallery(self, browser: str) -> list[Any]:
        """[thumbnails with prompts, names] of this browser, the newest first."""
        names, small = [], []
        for name in self.history.of(browser):
            try:
                path = self.service.pictures.at(name)
                small.append((self.service.pictures.thumbnail(name), settings_of(path).prompt or "no prompt"))
            except RequestError:  # deleted since
                continue
            names.append(name)
            if len(names) == GALLERY:
                break
        return [small, names]

    def _progress(self, job: Job, done: list[Path]) -> str:
        view, picture = job.view(), ""
        if view.latents is not None and (image := self.service.preview(view.latents)) is not None:
            scale = max(1, 256 // max(image.size))  # at least 256 pixels
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
            file = BytesIO()
            image.save(file, "JPEG", quality=80)
            data = base64.b64encode(file.getvalue()).decode()
            picture = f'<img class="live" alt="Preview" src="data:image/jpeg;base64,{data}">'
        share = 100 * view.step // max(view.steps, 1)
        bar = f'<div class="bar" role="progressbar" aria-label="Drawing" aria-valuenow="{share}">'
        finished = self._canvas([self.service.pictures.name(path) for path in done]) if done else ""
        return f'{picture}{bar}<div style="width:{share}%"></div></div>{finished}'

    def _status(self, drawing: Drawing, done: int, more: int) -> str:
        job = drawing.job
        view, queued = job.view(), f" {more} more in the queue." if more else ""
        if view.state == "waiting":
            ahead = self.queue.ahead(job)
            return _message((f"Waiting: {ahead} before this one." if ahead else "Starting …") + queued)
        now, left = time.monotonic(), ""
        if drawing.began is None:
            drawing.began = now, view.step
        began, first = drawing.began
        if view.step > first:
            seconds = (now - began) / (view.step - first) * (view.steps - view.step)
            left = f", about {f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.0f} min'} left"
        which = f" picture {min(done + 1, drawing.count)} of {drawing.count}," if drawing.count > 1 else ""
        return _message(f"Drawing:{which} step {view.step} of {view.steps}{left}.{queued}")

    def _canvas(self, names: list[str]) -> str:
        items = []
        for name in names:
            try:
                words = settings_of(self.service.pictures.at(name)).prompt or "no prompt"
            except RequestError:
                words = name
            link, words = html.escape(self.links.to(name)), html.escape(words, quote=True)
            picture = f'<img alt="{words}" src="{link}">'
            items.append(f'<a href="{link}" target="_blank" title="Open the PNG file">{picture}</a>')
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


@dataclass
class Drawing:
    """A job of one browser, and what was told of it."""

    job: Job
    count: int  # pictures
    notices: tuple[str, ...] = ()
    seen: tuple[str, int] = ("waiting", -1)
    began: tuple[float, int] | None = None  # time and step when it was first seen drawing


class History:
    """Names of the pictures that each browser asked for, the newest first, in a file beside them."""

    MOST = 500
    """Names of a browser, and browsers."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        self._names: dict[str, list[str]] = {}
        try:
            found = json.loads(path.read_text("utf-8"))
            self._names = {str(key): [str(name) for name in names] for key, names in found.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, TypeError) as error:
            log.warning("%s: damaged, the page's history begins anew: %s", path, error)

    def of(self, browser: str) -> list[str]:
        """Those of ``browser``."""
        return list(self._names.get(browser, ()))

    def add(self, browser: str, names: Sequence[str]) -> None:
        """Put ``names`` first."""
        with self._lock:
            mine = [*names, *self._names.pop(browser, ())][: self.MOST]
            self._names = dict([*self._names.items(), (browser, mine)][-self.MOST :])
            write_text(self.path, json.dumps(self._names))


def _ticking(active: bool) -> Any:  # noqa: ANN401
    return gr.Timer(active=active)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


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


def _title(service: GenerationService) -> str:
    """The models and the size of their pictures."""
    names, made = " + ".join(map(model_name, service.stages)), service.first.sampling
    return f"{names}, {made.width * service.scale} x {made.height * service.scale}"


def page(service: GenerationService, queue: JobQueue, links: Links, optimizer: PromptOptimizer) -> Any:  # noqa: ANN401
    """The Gradio blocks."""
    actions = Actions(service, queue, links, optimizer, list(service.adapters))
    with gr.Blocks(title=service.name, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.HTML(f"<h1>{html.escape(_title(service))}</h1>", elem_id="title")
        with gr.Row(equal_height=False, elem_id="layout"):
            with gr.Column(elem_id="top"):  # on a phone: what to draw, the picture, the settings
                prompt = gr.Textbox(
                    label="Prompt", lines=3, max_lines=8, max_length=service.limits.prompt, elem_id="prompt",
                    placeholder="a red apple on a wooden table",
                )  # fmt: skip
                tokens = gr.HTML("", elem_id="tokens")
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
                    cancel = gr.Button("Cancel", elem_id="cancel", min_width=80)
                    enhance = gr.Button("Enhance", elem_id="enhance", min_width=80)
                status = gr.HTML("", elem_id="status")
            with gr.Column(elem_id="settings"):
                form, upload = _settings(service, prompt)
                whole = gr.Checkbox(
                    True,
                    label="Enlarge at once, by all stages",
                    visible=len(service.stages) > 1,
                    elem_id="whole",
                )
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
        names, chosen, timer = gr.State([]), gr.State([]), gr.Timer(TICK, active=False)
        browser = gr.BrowserState("", storage_key="cogview3", secret="cogview3")
        saved = gr.BrowserState([], storage_key="cogview3-form", secret="cogview3")
        # No handler goes through Gradio's queue: it can lose an event that is sent while a stream closes.
        once = {
            "queue": False, "show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None,
        }  # fmt: skip
        gr.on([draw.click, form.prompt.submit], actions.draw, [browser, whole, *form.fields],
              [status, form.seed, timer], trigger_mode="multiple", **once)  # fmt: skip
        timer.tick(actions.tick, [browser], [canvas, status, gallery, names, chosen, facts, timer], **once)
        enlarge.click(actions.enlarge, [browser, chosen], [status, timer], **once)
        cancel.click(actions.cancel, [browser], None, **once)
        enhance.click(actions.enhance, [form.prompt], [form.prompt, status], **once)
        form.prompt.change(actions.count, [form.prompt], [tokens], trigger_mode="always_last", **once)
        gallery.select(actions.choose, [names], [canvas, chosen, facts], **once)
        filled = [*form.fields, status]
        reuse.click(actions.reuse, [chosen], filled, **once)
        upload.upload(actions.upload, [upload], filled, **once)
        form.width.input(actions.sizes, [form.width, form.height], [form.height], **once)
        changes = [field.change for field in form.fields]
        gr.on(changes, None, form.fields, [saved], js="(...values) => [values]", show_progress="hidden")
        blocks.load(actions.load, [browser, saved], [browser, gallery, names, timer, *form.fields], **once)
        blocks.unload(actions.left)
    blocks.queue(max_size=256, api_open=False, default_concurrency_limit=None)
    return blocks


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
