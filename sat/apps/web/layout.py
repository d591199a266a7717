"""How the page looks: what to draw on the left, what becomes of it on the right."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from sat.apps.prompts.optimizer import PromptOptimizer
from sat.apps.web.api import Links
from sat.apps.web.job_queue import JobQueue
from sat.apps.web.page import EMPTY, Page
from sat.apps.web.service import GenerationService

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


def theme() -> Any:  # noqa: ANN401 - Gradio has no types
    """Gradio's plain theme in fonts that are on every machine."""
    return gr.themes.Base(primary_hue="indigo", font=_FONTS, font_mono=("ui-monospace", "monospace"))


@dataclass(frozen=True)
class Form:
    """The fields that say what to draw, in the order in which their values come."""

    prompt: Any
    negative: Any
    width: Any
    height: Any
    count: Any
    steps: Any
    guidance: Any
    seed: Any
    anew: Any  # a new seed each time
    adapters: dict[str, Any]

    @property
    def fields(self) -> list[Any]:
        """All of them."""
        return [self.prompt, self.negative, self.width, self.height, self.count, self.steps, self.guidance,
                self.seed, self.anew, *self.adapters.values()]  # fmt: skip


def page(service: GenerationService, queue: JobQueue, links: Links, optimizer: PromptOptimizer) -> Any:  # noqa: ANN401
    """The Gradio blocks."""
    does = Page(service, queue, links, optimizer, list(service.adapters))
    with gr.Blocks(title=service.name, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        with gr.Row(equal_height=False, elem_id="layout"):
            with gr.Column(elem_id="top"):  # on a phone: what to draw, the picture, the settings
                prompt, buttons, status = _top(service)
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
                form, buttons["upload"] = _settings(service, prompt)
        names, chosen = gr.State([]), gr.State("")
        quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        shown = [canvas, status, form.seed, gallery, names, chosen, facts]
        drawing = {"outputs": shown, "trigger_mode": "once", **quiet}
        # What answers once is asked directly: Gradio's queue can lose an event that is sent while the stream
        # of the one before it closes, and the page would wait for ever.
        once = {"queue": False, **quiet}
        gr.on([buttons["draw"].click, form.prompt.submit], _flat(does.draw), form.fields, **drawing)
        enlarge.click(_flat(does.enlarge), [chosen], **drawing)
        buttons["cancel"].click(does.cancel, None, None, **once)
        buttons["enhance"].click(does.enhance, [form.prompt], [form.prompt, status], **once)
        gallery.select(does.choose, [names], [canvas, chosen, facts], **once)
        filled = [*form.fields, status]
        reuse.click(does.reuse, [chosen], filled, **once)
        buttons["upload"].upload(does.upload, [buttons["upload"]], filled, **once)
        form.width.input(does.sizes, [form.width, form.height], [form.height], **once)
        blocks.load(does.gallery, None, [gallery, names], **once)
        blocks.unload(does.cancel)
    blocks.queue(max_size=256, api_open=False, default_concurrency_limit=None)
    return blocks


def _flat(draw: Callable[..., AsyncIterator[tuple[Any, ...]]]) -> Callable[..., AsyncIterator[list[Any]]]:
    """``draw`` with (gallery, names) taken apart for Gradio's outputs."""

    async def run(request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:  # noqa: ANN401
        async for canvas, status, seed, gallery, chosen, facts in draw(request, *values):
            pair = gallery if isinstance(gallery, tuple) else (gr.skip(), gr.skip())
            yield [canvas, status, seed, *pair, chosen, facts]

    return run


def _top(service: GenerationService) -> tuple[Any, dict[str, Any], Any]:
    """The prompt, the buttons below it by name, and the line that says what happens."""
    prompt = gr.Textbox(
        label="Prompt", lines=3, max_lines=8, max_length=service.limits.prompt, elem_id="prompt",
        placeholder="What is to be seen?",
    )  # fmt: skip
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
        cancel = gr.Button("Cancel", elem_id="cancel", min_width=80)
        enhance = gr.Button("Enhance", elem_id="enhance", min_width=80)
    return prompt, {"draw": draw, "cancel": cancel, "enhance": enhance}, gr.HTML("", elem_id="status")


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
        anew = gr.Checkbox(True, label="New seed each time", elem_id="anew", min_width=120)
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
    return Form(prompt, negative, width, height, count, steps, guidance, seed, anew, adapters), upload
