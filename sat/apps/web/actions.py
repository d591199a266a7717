"""Handlers of the page's buttons: the form as a request, drawings and pictures of each browser."""

from __future__ import annotations

import contextlib
import html
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import gradio as gr
from PIL import Image

from sat.apps.prompts.optimizer import OptimizerError, PromptOptimizer
from sat.apps.web.api import Links
from sat.apps.web.browsers import Browser, Drawing, History
from sat.apps.web.form import CUT, Form, Parts, editor
from sat.apps.web.grid import AXES, parse
from sat.apps.web.job_queue import JobQueue, QueueClosedError, QueueFullError
from sat.apps.web.markup import Markup, capital, data_url, refusal, said, say
from sat.apps.web.request import GenerationRequest, RequestError, settings_of
from sat.apps.web.service import GenerationService, fitted
from sat.sampling.output import opened

log = logging.getLogger(__name__)

GALLERY = 24  # pictures
TICK = 0.3  # seconds between looks at a job
VARIED = 0.6  # strength of variations
_COMPARED = 1024  # pixels of a given picture that is kept to be compared with
_BROWSERS = 256  # whose state is kept
_KEPT = 1 << 22  # pixels of a painted picture that a page loaded anew finds again
_REFUSED = (ValueError, QueueFullError, QueueClosedError)


class Actions:
    """Handlers of the page's buttons; drawings by browser, so that each sees and cancels its own.

    ``names`` are those of the form's fields, in the order in which their values come; ``grace``: seconds in
    which a page that was left finds its job again.
    """

    def __init__(
        self,
        service: GenerationService,
        queue: JobQueue,
        links: Links,
        optimizer: PromptOptimizer,
        names: Sequence[str],
        grace: float,
    ) -> None:
        self.service, self.queue, self.optimizer = service, queue, optimizer
        self.markup, self.form = Markup(service, links), Form(service)
        self.names, self.grace = list(names), grace
        self.history = History(service.pictures.root / ".history.json")
        self._browsers: dict[str, Browser] = {}  # by their own names
        self._sessions: dict[str, str] = {}  # browsers by open page
        self._left: set[str] = set()  # pages that were closed, until they ask again

    # -- the form

    def notices(self, request: GenerationRequest) -> list[str]:
        """Sentences about words of a request that have no effect."""
        lines = self.service.text_notices(request.prompt, request.negative_prompt)
        if request.negative_prompt and request.guidance is None:
            lines.append("the negative prompt has no effect: this model has no guidance to set")
        elif request.negative_prompt and request.guidance == 1.0:
            lines.append("the negative prompt has no effect: guidance is 1, which looks at the prompt alone")
        return lines

    def count(self, http: gr.Request, prompt: str, negative: str, guidance: float, style: str) -> str:
        """The tokens of a prompt beside those that the encoder reads, and what of it does not arrive."""
        template = self.service.page.styles.get(style or "", "{prompt}")
        text = template.replace("{prompt}", prompt or "") if (prompt or "").strip() else ""
        strength = None if self.service.guidance is None else float(guidance or 0)
        lines = self.notices(GenerationRequest(text, 0, 0, 0, strength, 0, 1, (negative or "").strip()))
        most, have = self.service.first.conditioning.max_length, self.service.tokens(text)
        told = [say(f"{have} of {most} tokens.", http)] if text and have is not None else []
        told += [say(capital(line), http) for line in lines]
        return (
            f'<p class="{"warning" if lines else ""}">{" ".join(map(html.escape, told))}</p>' if told else ""
        )

    def sizes(self, width: Any, height: Any) -> Any:  # noqa: ANN401
        """The heights that go with a width, the nearest of them chosen."""
        sides = self.service.sizes.sides(int(width))
        return gr.update(choices=sides, value=min(sides, key=lambda side: abs(side - int(height or 0))))

    def shaped(self, height: int, width: int) -> list[Any]:
        """(width, height): the nearest size that can be drawn."""
        height, width = self.service.sizes.nearest(height, width)
        return [width, gr.update(choices=self.service.sizes.sides(width), value=height)]

    def swap(self, width: Any, height: Any) -> list[Any]:  # noqa: ANN401
        """(width, height), one in the other's place."""
        return self.shaped(int(width), int(height))

    def dice(self) -> list[Any]:
        """(seed, new each time): a new one that stays."""
        return [secrets.randbelow(2**32 - self.service.limits.count), False]

    def keep(self, chosen: list[str]) -> list[Any]:
        """(seed, new each time): that of the chosen picture, or the form's, stays."""
        try:
            seed = settings_of(self.service.pictures.at(chosen[0] if chosen else "")).seed
        except RequestError:
            seed = None
        return [gr.skip() if seed is None else seed, False]

    # -- drawing

    def draw(
        self, http: gr.Request, known: str, whole: bool, change: Any, paint: Any, control: Any, *values: Any
    ) -> list[Any]:  # noqa: ANN401
        """(status, seed, timer) once the request waits; what is drawn is told by :meth:`tick`."""
        v = dict(zip(self.names, values, strict=True))
        return self._submit(http, known, whole, v, (change, paint, control), grid=False)

    def draw_grid(
        self, http: gr.Request, known: str, whole: bool, change: Any, paint: Any, control: Any, *values: Any
    ) -> list[Any]:  # noqa: ANN401
        """As :meth:`draw`, of a picture for each value of the axes."""
        v = dict(zip(self.names, values, strict=True))
        return self._submit(http, known, whole, v, (change, paint, control), grid=True)

    def _submit(
        self, http: gr.Request, known: str, whole: bool, v: Mapping[str, Any], given: tuple[Any, ...], *,
        grid: bool,
    ) -> list[Any]:  # fmt: skip
        mine = self.browser(http, known)
        try:
            request, count = self.form.request(v, *given), 0
            if grid:
                named = [(v[f"{axis}_name"], v[f"{axis}_values"]) for axis in ("down", "right")]
                names = [name for name, _ in named if name]
                if not names:
                    raise RequestError("choose a setting for the grid")
                if len(set(names)) < len(names):
                    raise RequestError(f"grid: both axes are {names[0]}: choose two settings")
                axes = [parse(name, text, self.service.limits.cells) for name, text in named if name]
                job = self.service.grid(request, axes, whole=whole)
                for axis in axes:
                    count = max(count, 1) * len(axis.values)
            else:
                job, count = self.service.job(request, whole=whole), request.count
            self.queue.submit(job, f"page {mine.name}")
        except _REFUSED as error:
            return [refusal(error, http), gr.skip(), gr.skip()]
        image = request.image or (request.control.image if request.control else None)
        if v["mode"] == "inpaint" and image is not None and image.width * image.height <= _KEPT:
            mine.painted = image, request.mask
        drawing = Drawing(job, count, request.prompt, tuple(self.notices(request)), given=image)
        return [self._wait(mine, drawing, http), request.seed, _ticking(True)]

    def enlarge(self, http: gr.Request, known: str, chosen: list[str]) -> list[Any]:
        """(status, timer): as :meth:`draw`, of the chosen pictures enlarged."""
        try:
            mine = self.browser(http, known)
            job = self.queue.submit(self.service.enlarging(chosen), f"page {mine.name}")
        except _REFUSED as error:
            return [refusal(error, http), gr.skip()]
        words = settings_of(self.service.pictures.at(chosen[0])).prompt
        return [self._wait(mine, Drawing(job, len(chosen), words), http), _ticking(True)]

    def vary(self, http: gr.Request, known: str, whole: bool, chosen: list[str], count: Any) -> list[Any]:  # noqa: ANN401
        """(status, timer): pictures like the first chosen one, by its own words and new seeds."""
        try:
            path = self.service.pictures.at(chosen[0]) if chosen else None
            if path is None:
                raise RequestError("choose a picture first")
            request, _ = fitted(settings_of(path), self.service)
            image, number = opened(path), min(self.service.limits.count, max(int(count or 1), 4))
            seed = secrets.randbelow(2**32 - self.service.limits.count)
            request = replace(request, image=image, strength=VARIED, seed=seed, count=number)
            mine = self.browser(http, known)
            job = self.queue.submit(self.service.job(request, whole=whole), f"page {mine.name}")
        except _REFUSED as error:
            return [refusal(error, http), gr.skip()]
        drawing = Drawing(job, number, request.prompt, given=image)
        return [self._wait(mine, drawing, http), _ticking(True)]

    def _wait(self, mine: Browser, drawing: Drawing, http: gr.Request) -> str:
        mine.drawings.append(drawing)
        if (before := len(mine.drawings) - 1) > 0:
            return said(f"In the queue, {before} of yours before it.", http)
        return said("Starting …", http)

    def tick(self, http: gr.Request, known: str) -> list[Any]:
        """(canvas, status, gallery, names, chosen, facts, timer): how far this browser's pictures are."""
        mine, skipped = self.browser(http, known), [gr.skip()] * 6
        if not mine.drawings:
            return [*skipped, _ticking(False)]
        now = mine.drawings[0]
        more = len(mine.drawings) - 1
        if not now.job.is_over:
            view = now.job.view()
            if (view.state, view.step) == now.seen and view.state == "drawing":
                return [*skipped, gr.skip()]
            now.seen = view.state, view.step
            done = [path for path in now.job.expected if path.is_file()]
            status = self._status(now, len(done), more, http)
            return [self.markup.progress(now, done, http), status, *[gr.skip()] * 4, gr.skip()]
        mine.drawings.pop(0)
        names = self._finished(mine, now)
        state, queued = now.job.view().state, f"{more} more in the queue." if more else ""
        if state == "failed":
            status = refusal(now.job.error or "it failed", http)
        elif state == "cancelled":
            kept = f"{len(names)} finished before, kept." if names else ""
            status = said("Cancelled.", http, kept, queued)
        else:
            status = said(f"Done: {len(names)} picture{'s' * (len(names) != 1)}.", http, queued)
        warned = (html.escape(say(capital(line), http)) for line in now.notices)
        status += "".join(f'<p class="warning">{line}</p>' for line in warned)
        shown = self.show(mine, names[:1] if names and "grid" in now.titled else names, http)
        return [
            shown[0],
            status,
            *self.gallery(mine.name, http),
            shown[1],
            shown[2],
            _ticking(bool(mine.drawings)),
        ]

    def _finished(self, mine: Browser, drawing: Drawing) -> list[str]:
        """Names of the pictures of a drawing that is over, now in the browser's history."""
        job, pictures = drawing.job, self.service.pictures
        files = job.pictures or [path for path in job.expected if path.is_file()]
        names = [pictures.name(path) for path in files]
        self.history.add(mine.name, names)
        given = drawing.given and drawing.given.convert("RGB")
        if given is not None:
            given.thumbnail((_COMPARED, _COMPARED))
        for path, name in zip(files, names, strict=True):
            if path in job.origins:
                mine.before[name] = "before it was enlarged", job.origins[path]
            if given is not None:
                mine.before[name] = "the given picture", given
        for name in list(mine.before)[: -2 * GALLERY]:
            del mine.before[name]
        if files and "grid" in settings_of(files[0]).more:
            drawing.titled = "grid"
        return names

    def cancel(self, http: gr.Request, known: str) -> None:
        """End what is being drawn for this browser, or waits first."""
        if mine := self.browser(http, known).drawings:
            self.queue.cancel(mine[0].job)

    # -- pages and their browsers

    def browser(self, http: gr.Request, known: str) -> Browser:
        """The browser of a page: the one ``known`` from before, or a new one, from its first call on."""
        session = str(http.session_hash)
        self._left.discard(session)
        name = self._sessions.setdefault(session, known or secrets.token_urlsafe(12))
        if name not in self._browsers:
            here = set(self._sessions.values())
            for old, mine in list(self._browsers.items()):
                if len(self._browsers) >= _BROWSERS and old not in here and not mine.drawings:
                    self._browsers.pop(old, None)
        return self._browsers.setdefault(name, Browser(name))

    def left(self, http: gr.Request) -> None:
        """A page was closed or loaded anew: unless it comes back in time, nobody waits for its pictures."""
        session = str(http.session_hash)
        self._left.add(session)

        def end() -> None:
            if session not in self._left:  # it came back
                return
            self._left.discard(session)
            name = self._sessions.pop(session, "")
            mine = self._browsers.get(name)
            if mine is None or name in self._sessions.values():
                return
            if mine.drawings:
                mine.ended = True
            for drawing in mine.drawings:
                self.queue.cancel(drawing.job)
                self._finished(mine, drawing)
            mine.drawings.clear()

        timer = Timer(self.grace, end)
        timer.daemon = True
        timer.start()

    def load(self, http: gr.Request, known: str, saved: list[Any] | None) -> list[Any]:
        """(browser, status, canvas, chosen, facts, gallery, names, timer, pictures, fields) from before."""
        mine = self.browser(http, known)
        for drawing in mine.drawings:
            drawing.seen = ("waiting", -1)  # show it anew
        fields: list[Any] = [gr.skip()] * len(self.names)
        if saved and len(saved) == len(fields) and self._fits(v := dict(zip(self.names, saved, strict=True))):
            v["height"] = gr.update(choices=self.service.sizes.sides(int(v["width"])), value=v["height"])
            fields = list(v.values())
        status: Any = gr.skip()
        if mine.ended:
            text = f"The page was closed for longer than {self.grace:g} s: what it was drawing was ended."
            status, mine.ended = said(text, http), False
        gallery, names = self.gallery(mine.name, http)
        shown = self.show(mine, mine.shown[-1] if mine.shown else names[:1], http)
        timer = _ticking(True) if mine.drawings else gr.skip()
        given = [gr.skip(), gr.skip()]
        for place, tab in enumerate(("image", "control")):
            with contextlib.suppress(ValueError, KeyError):  # damaged, or deleted since
                given[place] = self.form.opened(mine.uploads[tab])
        paint = gr.skip() if mine.painted is None else editor(*mine.painted)
        return [mine.name, status, *shown, gallery, names, timer, given[0], paint, given[1], *fields]

    def _fits(self, v: Mapping[str, Any]) -> bool:
        try:
            axes = {"", *AXES, *self.service.adapters}
            known = (  # by another model at the same address, perhaps not
                v["sampler"] in self.service.samplers
                and v["control"] in (*self.service.controls, None)
                and v["style"] in ("", *self.service.page.styles)
                and {v["right_name"], v["down_name"]} <= axes
            )
            return known and self.service.sizes.allows(int(v["height"]), int(v["width"]))
        except (TypeError, ValueError):
            return False

    def enhance(self, http: gr.Request, prompt: str) -> tuple[Any, str]:
        """(prompt, status): the prompt as a description, or as it was and why."""
        try:
            better = self.optimizer((prompt or "")[: self.service.limits.prompt])
        except OptimizerError as error:
            return gr.skip(), refusal(error, http)
        cut = f"What did not fit was cut: “{better.dropped}”." if better.dropped else ""
        return better.text, said(f"Rewritten from: “{prompt.strip()}”.", http, cut)

    # -- pictures given by a person

    def keep_upload(self, http: gr.Request, known: str, path: Path | None, kind: str) -> Any:  # noqa: ANN401
        """Remember the picture of a tab for a page that is loaded anew; status if it cannot be read."""
        uploads = self.browser(http, known).uploads
        uploads.pop(kind, None)
        try:
            if path is not None:
                self.form.opened(path)
                uploads[kind] = path
        except RequestError as error:
            return refusal(error, http)
        return gr.skip()

    def sees(
        self, http: gr.Request, path: Path | None, name: str, plain: bool, width: Any, height: Any
    ) -> list[Any]:  # noqa: ANN401
        """(figure, status): the picture that the control gets of a plain one."""
        if path is None or not plain or not self.form.makes(name):
            return ["", gr.skip()]
        try:
            made = self.service.control_picture(name, self.form.opened(path), int(height), int(width))
        except ValueError as error:
            return ["", refusal(error, http)]
        words, data = say("What the control sees", http), made and data_url(made, "PNG")
        picture = f'<img alt="{words}" src="{data}">'
        return [f"<figure>{picture}<figcaption>{words}</figcaption></figure>", gr.skip()]

    def mask_file(self, http: gr.Request, paint: Parts | None, path: str) -> list[Any]:
        """(editor, status): the white parts of a file, painted."""
        try:
            if paint is None or paint.background is None:
                raise RequestError("give a picture to paint on first")
            image, mask = (
                self.form.opened(paint.background),
                self.form.opened(Path(path), "mask").convert("L"),
            )
            if mask.size != image.size:
                sizes = (f"{one.width} x {one.height}" for one in (mask, image))
                text = "the mask is {}, the picture {} (width x height): they must be alike"
                raise RequestError(text.format(*sizes))
            mask = mask.point(CUT)
            if mask.getbbox() is None:
                raise RequestError("the mask is nowhere white: white is what is drawn anew")
        except ValueError as error:
            return [gr.skip(), refusal(error, http)]
        return [editor(image, mask), gr.skip()]

    def send(self, http: gr.Request, known: str, chosen: list[str], tab: str) -> list[Any]:
        """(tabs, mode, picture of the tab, status): the chosen picture as what is changed or steers."""
        try:
            path = self.service.pictures.at(chosen[0] if chosen else "")
        except RequestError as error:
            failed = refusal(error if chosen else "Choose a picture first.", http)
            return [gr.skip(), gr.skip(), gr.skip(), failed]
        image: Any = opened(path)
        self.browser(http, known).uploads[tab] = path
        status = said(f"The picture is set: {tab.capitalize()}.", http)
        return [gr.Tabs(selected=tab), tab, editor(image) if tab == "inpaint" else image, status]

    # -- pictures that were drawn

    def choose(self, http: gr.Request, known: str, names: list[str], event: gr.SelectData) -> list[Any]:
        """(canvas, chosen, facts) of a picture of the gallery."""
        index = event.index if isinstance(event.index, int) else -1
        if not 0 <= index < len(names):
            return [gr.skip(), [], ""]
        return self.show(self.browser(http, known), [names[index]], http)

    def show(self, mine: Browser, names: list[str], http: gr.Request) -> list[Any]:
        """(canvas, chosen, facts) of pictures that are there."""
        names = [name for name in names if self.service.pictures.has(name)]
        if not names:
            return [self.empty(http), [], ""]
        if mine.shown[-1:] != [names]:
            mine.shown = [*mine.shown, names][-8:]
        below = [name for name in self.history.of(mine.name) if self.service.pictures.has(name)][:GALLERY]
        return [self.markup.canvas(names, http), names, self.markup.facts(names, below, http)]

    def empty(self, http: gr.Request) -> str:
        """The canvas without a picture."""
        return f'<div class="empty">{say("Pictures appear here.", http)}</div>'

    def compare(self, http: gr.Request, known: str, chosen: list[str]) -> list[Any]:
        """(slider, status): the chosen picture beside what it was made of, or the one shown before."""
        mine, pictures = self.browser(http, known), self.service.pictures
        try:
            right = opened(pictures.at(chosen[0] if chosen else ""))
            what, source = mine.before.get(chosen[0], ("the picture shown before", None))
            if source is None:
                others = [name for names in reversed(mine.shown) for name in names if name not in chosen]
                found = next((name for name in (*others, *chosen[1:]) if pictures.has(name)), None)
                if found is None:
                    raise RequestError(
                        "there is nothing before it to compare with: show another picture first"
                    )
                source = pictures.at(found)
            left = opened(source) if isinstance(source, Path) else source.convert("RGB")
        except ValueError as error:
            return [gr.skip(), refusal(error if chosen else "Choose a picture first.", http)]
        left = left.resize(right.size, Image.Resampling.BICUBIC)
        told = say(f"Left: {what}. Right: the picture.", http)
        return [gr.update(value=(left, right), visible=True), said(told, http)]

    def ask(self, http: gr.Request, chosen: list[str]) -> list[Any]:
        """(question with its buttons, its text, status) before the chosen pictures are deleted."""
        if not chosen:
            return [gr.update(visible=False), "", refusal("Choose a picture first.", http)]
        one = len(chosen) == 1
        what = "Delete 1 picture? It" if one else f"Delete {len(chosen)} pictures? They"
        return [gr.update(visible=True), said(f"{what} cannot be brought back.", http), gr.skip()]

    def delete(self, http: gr.Request, known: str, chosen: list[str]) -> list[Any]:
        """(question, canvas, chosen, facts, gallery, names, status): the chosen pictures are deleted."""
        mine, gone = self.browser(http, known), 0
        own = set(self.history.of(mine.name))
        for name in chosen:
            if name in own and self.service.pictures.has(name):
                self.service.pictures.delete(name)
                gone += 1
        status = said(f"Deleted {gone} picture{'s' * (gone != 1)}.", http)
        gallery, names = self.gallery(mine.name, http)
        return [gr.update(visible=False), *self.show(mine, names[:1], http), gallery, names, status]

    def reuse(self, http: gr.Request, chosen: list[str]) -> list[Any]:
        """Form values and status from the first chosen picture."""
        try:
            return self._filled(self.service.pictures.at(chosen[0] if chosen else ""), http)
        except RequestError as error:
            failed = refusal(error if chosen else "Choose a picture first.", http)
            return [*[gr.skip()] * len(self.names), failed]

    def upload(self, http: gr.Request, path: str) -> list[Any]:
        """Form values and status from an uploaded PNG file, which lies in the output folder."""
        try:
            file = Path(path).resolve()
            if not file.is_relative_to(self.service.pictures.root):
                raise RequestError("this file was not uploaded")
            return self._filled(file, http)
        except RequestError as error:
            return [*[gr.skip()] * len(self.names), refusal(error, http)]

    def _filled(self, path: Path, http: gr.Request) -> list[Any]:
        request, notes = fitted(settings_of(path), self.service)
        heights = gr.update(choices=self.service.sizes.sides(request.width), value=request.height)
        known = {
            "prompt": request.prompt, "negative": request.negative_prompt, "style": "",
            "width": request.width, "height": heights, "count": 1,
            "steps": request.steps, "seed": request.seed, "new_seed": False,
            "sampler": request.sampler or self.service.sampler,
            **{f"lora {name}": request.adapters.get(name, 0.0) for name in self.service.adapters},
        }  # fmt: skip
        if request.guidance is not None:
            known["guidance"] = request.guidance
        status = said("The settings of the picture are set.", http, *notes)
        return [*(known.get(name, gr.skip()) for name in self.names), status]

    def gallery(self, browser: str, http: gr.Request) -> list[Any]:
        """[thumbnails with prompts, names] of this browser, the newest first."""
        names, small = [], []
        for name in self.history.of(browser):
            try:
                path = self.service.pictures.at(name)
                words = settings_of(path).prompt or say("no prompt", http)
                small.append((self.service.pictures.thumbnail(name), words))
            except RequestError:  # deleted since
                continue
            names.append(name)
            if len(names) == GALLERY:
                break
        return [small, names]

    # -- what is shown

    def _status(self, drawing: Drawing, done: int, more: int, http: gr.Request) -> str:
        view, queued = drawing.job.view(), f"{more} more in the queue." if more else ""
        if view.state == "waiting":
            ahead = self.queue.ahead(drawing.job)
            waits = f"Waiting: {ahead} before this one." if ahead else "Starting …"
            return said(waits, http, queued)
        now, left = time.monotonic(), ""
        if drawing.began is None:
            drawing.began = now, view.step
        began, first = drawing.began
        if view.step > first:
            seconds = (now - began) / (view.step - first) * (view.steps - view.step)
            left = f", about {f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.0f} min'} left"
        which = f" picture {min(done + 1, drawing.count)} of {drawing.count}," if drawing.count > 1 else ""
        return said(f"Drawing:{which} step {view.step} of {view.steps}{left}.", http, queued)


def _ticking(active: bool) -> Any:  # noqa: ANN401
    return gr.Timer(active=active)
