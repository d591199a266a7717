"""The page: a form on the left, the pictures on the right, and what their buttons call."""

from __future__ import annotations

import html
from abc import ABCMeta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

from sat.apps.prompts.optimizer import PromptOptimizer
from sat.apps.web.actions import TICK, Actions
from sat.apps.web.api import Links
from sat.apps.web.appearance import COPY, OTHER_LANGUAGE, OTHER_THEME
from sat.apps.web.form import PAINT, Parts
from sat.apps.web.grid import AXES
from sat.apps.web.job_queue import JobQueue
from sat.apps.web.service import GenerationService
from sat.apps.web.texts import CHINESE, CHINESE_TAG
from sat.config.record import model_name
from sat.sampling.edit import STRENGTH
from sat.sampling.prompts import read_prompt_file

Fields = dict[str, Any]
"""The fields of a request by name, in the order of their values."""

ASPECTS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")
"""Shapes with a button each, width to height."""

ONCE: dict[str, Any] = {
    "queue": False, "show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None,
}  # fmt: skip
"""No handler goes through Gradio's queue: it can lose an event that is sent while a stream closes."""

i18n = gr.I18n(**{"en": {text: text for text in CHINESE}, CHINESE_TAG: CHINESE})


def t(text: str) -> Any:  # noqa: ANN401
    """``text`` in the language of the browser; it stands in the table of :mod:`sat.apps.web.texts`."""
    assert text in CHINESE, f"{text!r} has no Chinese"
    return i18n(text)


def _picture(_: Any, payload: Any) -> Path | None:  # noqa: ANN401
    """The file of a picture as it was sent: our own reader opens it, Gradio's any format."""
    return None if payload is None or payload.path is None else Path(payload.path)


def _painted(self: Any, payload: Any) -> Parts | None:  # noqa: ANN401
    """The picture of an editor as it was sent, and what was painted."""

    def source(one: Any) -> Path | bytes | None:  # noqa: ANN401
        return one if one is None or isinstance(one, bytes) else Path(one.path)

    sent = payload
    if payload is not None and payload.id is not None:  # the parts came before the event
        sent = self.blob_storage.pop(payload.id, None)
    if sent is None:
        return None
    layers = [found for layer in sent.layers or [] if (found := source(layer)) is not None]
    return Parts(source(sent.background), layers)


def _component(base: Any, preprocess: Any) -> Any:  # noqa: ANN401
    """``base`` whose value is what ``preprocess`` makes of what was sent.

    Not by a class statement, at which Gradio writes a stub file beside the source.
    """
    own = {"preprocess": preprocess, "is_template": True, "__module__": __name__}
    return ABCMeta.__new__(type(base), base.__name__, (base,), own)


Upload, Paint = _component(gr.Image, _picture), _component(gr.ImageEditor, _painted)


def page(
    service: GenerationService, queue: JobQueue, links: Links, optimizer: PromptOptimizer, grace: float
) -> Any:  # noqa: ANN401
    """The Gradio blocks."""
    form: Fields = {}
    with gr.Blocks(title=service.name, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        _head(service)
        with gr.Row(equal_height=False, elem_id="layout"):
            with gr.Column(elem_id="top"):  # on a phone: what to draw, the picture, the settings
                prompt, tokens, draw, cancel, enhance, status = _ask(service, form)
                tabs, example, given, seen, mask_file = _tabs(service, form)
            with gr.Column(elem_id="settings"):
                gr.HTML(t("<h2>Settings</h2>"), elem_classes="heading", padding=False)
                shapes, swap, dice, keep, draw_grid, upload, whole = _settings(service, form)
            with gr.Column(elem_id="right"):
                right = _shown(service)
                doing, gallery, ask = right.doing, right.gallery, right.ask
        names, chosen, timer = gr.State([]), gr.State([]), gr.Timer(TICK, active=False)
        browser = gr.BrowserState("", storage_key="cogview3", secret="cogview3")
        saved = gr.BrowserState([], storage_key="cogview3-form", secret="cogview3")
        actions = Actions(service, queue, links, optimizer, list(form), grace)
        fields, shown, mode = list(form.values()), [right.canvas, chosen, right.facts], form["mode"]
        pictures = [given["image"], given["inpaint"], given["control"]]

        everything = [browser, whole, *pictures, *fields]
        gr.on([draw.click, prompt.submit], actions.draw, everything, [status, form["seed"], timer],
              trigger_mode="multiple", **ONCE)  # fmt: skip
        draw_grid.click(actions.draw_grid, everything, [status, form["seed"], timer], **ONCE)
        ticked = [right.canvas, status, gallery, names, chosen, right.facts, timer]
        timer.tick(actions.tick, [browser], ticked, **ONCE)
        cancel.click(actions.cancel, [browser], None, **ONCE)
        enhance.click(actions.enhance, [prompt], [prompt, status], **ONCE)
        counted = [prompt, form["negative"], form["guidance"], form["style"]]
        gr.on([one.change for one in counted], actions.count, counted, [tokens], trigger_mode="always_last",
              **ONCE)  # fmt: skip
        if example is not None:
            example.click(lambda sample: sample[0], [example], [prompt], **ONCE)
        size = [form["width"], form["height"]]
        form["width"].input(actions.sizes, size, [form["height"]], **ONCE)
        for button, (height, width) in shapes:
            button.click(lambda high=height, wide=width: actions.shaped(high, wide), None, size, **ONCE)
        swap.click(actions.swap, size, size, **ONCE)
        dice.click(actions.dice, None, [form["seed"], form["new_seed"]], **ONCE)
        keep.click(actions.keep, [chosen], [form["seed"], form["new_seed"]], **ONCE)
        filled = [*fields, status]
        upload.upload(actions.upload, [upload], filled, **ONCE)

        for kind in ("image", "control"):
            gr.on([given[kind].upload, given[kind].clear], actions.keep_upload,
                  [browser, given[kind], gr.State(kind)], [status], **ONCE)  # fmt: skip
        if service.controls:
            sees = [given["control"], form["control"], form["plain"], *size]
            gr.on([one.change for one in sees], actions.sees, sees, [seen, status], **ONCE)
        mask_file.upload(actions.mask_file, [given["inpaint"], mask_file], [given["inpaint"], status], **ONCE)

        gallery.select(actions.choose, [browser, names], shown, **ONCE)
        doing["enlarge"].click(actions.enlarge, [browser, chosen], [status, timer], **ONCE)
        varied = [browser, whole, chosen, form["count"]]
        doing["vary"].click(actions.vary, varied, [status, timer], **ONCE)
        doing["reuse"].click(actions.reuse, [chosen], filled, **ONCE)
        for tab in ("image", "inpaint", "control"):
            doing[tab].click(actions.send, [browser, chosen, gr.State(tab)],
                             [tabs, mode, given[tab], status], **ONCE)  # fmt: skip
        doing["compare"].click(actions.compare, [browser, chosen], [right.slider, status], **ONCE)
        chosen.change(lambda: gr.update(visible=False), None, [right.slider], **ONCE)
        doing["copy"].click(None, None, [status], js=COPY, show_progress="hidden")
        doing["delete"].click(actions.ask, [chosen], [ask, right.asked, status], **ONCE)
        right.really.click(actions.delete, [browser, chosen], [ask, *shown, gallery, names, status], **ONCE)

        gr.on([field.change for field in fields], None, fields, [saved], js="(...values) => [values]",
              show_progress="hidden")  # fmt: skip
        loaded = [browser, status, *shown, gallery, names, timer, *pictures, *fields]
        blocks.load(actions.load, [browser, saved], loaded, **ONCE).then(
            None, [mode], [tabs], js="mode => ({selected: mode || 'text', __type__: 'update'})",
            show_progress="hidden",
        )  # fmt: skip
        blocks.unload(actions.left)
    blocks.queue(max_size=256, api_open=False, default_concurrency_limit=None)
    return blocks


def _title(service: GenerationService) -> str:
    """The models and the size of their pictures."""
    names, made = " + ".join(map(model_name, service.stages)), service.first.sampling
    return f"{names}, {made.width * service.scale} x {made.height * service.scale}"


def _head(service: GenerationService) -> None:
    """The title, and the buttons of language and theme, which the browser obeys by itself."""
    with gr.Row(elem_id="head"):
        gr.HTML(f"<h1>{html.escape(_title(service))}</h1>", elem_id="title", padding=False)
        other = gr.Button(t("中文"), size="sm", elem_id="language")
        light = gr.Button(t("Light or dark"), size="sm", elem_id="theme")
    other.click(None, None, None, js=OTHER_LANGUAGE)
    light.click(None, None, None, js=OTHER_THEME)


def _ask(service: GenerationService, form: Fields) -> tuple[Any, Any, Any, Any, Any, Any]:
    """The prompt, its tokens, the buttons Draw, Cancel and Enhance, and the status line."""
    form["prompt"] = prompt = gr.Textbox(
        label=t("Prompt"), lines=3, max_lines=8, max_length=service.limits.prompt,
        elem_id="prompt", placeholder=t("a red apple"),
    )  # fmt: skip
    tokens = gr.HTML("", elem_id="tokens", padding=False)
    with gr.Row():
        draw = gr.Button(t("Draw"), variant="primary", elem_id="draw", min_width=80)
        cancel = gr.Button(t("Cancel"), elem_id="cancel", min_width=80)
        enhance = gr.Button(t("Enhance"), elem_id="enhance", min_width=80)
    return prompt, tokens, draw, cancel, enhance, gr.HTML("", elem_id="status", padding=False)


def _shown(service: GenerationService) -> SimpleNamespace:
    """The pictures: the large one, its buttons and facts, and the gallery of all."""
    gr.HTML(t("<h2>Pictures</h2>"), elem_classes="heading", padding=False)
    canvas = gr.HTML("", elem_id="canvas", padding=False)
    slider = gr.ImageSlider(
        label=t("Before and after"), visible=False, interactive=False, buttons=[], format="png",
        elem_id="slider",
    )  # fmt: skip
    doing = _buttons(len(service.stages) > 1, bool(service.controls))
    with gr.Column(visible=False, elem_id="ask") as ask:
        asked = gr.HTML("", padding=False)
        with gr.Row():
            really = gr.Button(t("Really delete"), size="sm", elem_id="delete_yes")
            spare = gr.Button(t("Keep it"), size="sm", elem_id="delete_no")
    spare.click(lambda: gr.update(visible=False), None, [ask], **ONCE)
    facts = gr.HTML("", elem_id="facts", padding=False)
    gallery = gr.Gallery(
        label=t("Pictures"), show_label=False, columns=6, allow_preview=False, object_fit="cover",
        buttons=[], interactive=False, format="png", elem_id="gallery",
    )  # fmt: skip
    return SimpleNamespace(
        canvas=canvas, slider=slider, doing=doing, ask=ask, asked=asked, really=really,
        facts=facts, gallery=gallery,
    )  # fmt: skip


def _tabs(service: GenerationService, form: Fields) -> tuple[Any, Any, dict[str, Any], Any, Any]:
    """The ways to begin a picture: the tabs, examples, pictures by tab, the control's own, a mask's file."""
    about, sampling, given = service.page, service.first.sampling, dict[str, Any]()
    example = None
    form["mode"] = mode = gr.Textbox("text", visible=False)
    picture = {"sources": ["upload", "clipboard"], "height": 240, "buttons": [], "format": "png",
               "placeholder": t("Drop an image file here to upload")}  # fmt: skip
    with gr.Tabs(selected="text", elem_id="tabs") as tabs:
        with gr.Tab(t("Text"), id="text") as text:
            if about.about:
                CHINESE.setdefault(about.about, about.about_zh or about.about)
                i18n.translations_dict["en"][about.about] = about.about
                i18n.translations_dict[CHINESE_TAG][about.about] = CHINESE[about.about]
                gr.HTML(i18n(about.about), elem_id="about", padding=False)
            if about.examples is not None:
                example = gr.Dataset(
                    label=t("Examples: click one"), components=[gr.Textbox(visible=False)], type="values",
                    samples=[[one] for one in read_prompt_file(about.examples)], samples_per_page=12,
                    elem_id="examples",
                )  # fmt: skip
        with gr.Tab(t("Image"), id="image") as image:
            given["image"] = Upload(label=t("Picture to change"), elem_id="change", **picture)
            form["strength"] = gr.Slider(
                0, 1, STRENGTH, step=0.05, label=t("Strength"), elem_id="strength",
                info=t("0 keeps the picture, 1 draws another"),
            )  # fmt: skip
        with gr.Tab(t("Inpaint"), id="inpaint") as inpaint:
            size = max(2, min(sampling.height, sampling.width) // 8)
            gr.HTML(t("Paint over what is to be drawn anew."), elem_classes="hint", padding=False)
            given["inpaint"] = Paint(
                label=t("Picture to paint on"), elem_id="paint", height=380,
                sources=["upload", "clipboard"], transforms=(), layers=False, buttons=[], format="png",
                placeholder=t("Drop an image file here to upload"),
                brush=gr.Brush(default_size=size, colors=[PAINT], color_mode="fixed"),
            )  # fmt: skip
            mask_file = gr.UploadButton(
                t("Mask from a file (white is drawn anew)"), file_types=["image"], type="filepath", size="sm",
                elem_id="mask_file",
            )  # fmt: skip
            form["inpaint_strength"] = gr.Slider(
                0, 1, 1, step=0.05, label=t("Strength"), info=t("0 keeps the picture, 1 draws another"),
                elem_id="inpaint_strength",
            )  # fmt: skip
        with gr.Tab(t("Control"), id="control", visible=bool(service.controls)) as control:
            names = list(service.controls)
            form["control"] = gr.Dropdown(
                names, value=names[0] if names else None, label=t("Control network"), visible=len(names) > 1,
                elem_id="control_name",
            )  # fmt: skip
            given["control"] = Upload(label=t("Picture for the control"), elem_id="steer", **picture)
            seen = gr.HTML("", elem_id="sees", padding=False)
            entry = service.controls[names[0]].config if names else None
            form["plain"] = gr.Checkbox(
                True, label=t("It is a plain picture: make the control's of it"), elem_id="plain"
            )
            most = service.limits.scale
            form["scale"] = gr.Slider(
                0, most, entry.scale if entry else 1, step=0.05, label=t("Control strength"), elem_id="scale"
            )
            with gr.Row():
                form["start"] = gr.Slider(
                    0, 1, entry.start if entry else 0, step=0.05, label=t("Acts from (0: pure noise)"),
                    elem_id="start", min_width=140,
                )  # fmt: skip
                form["end"] = gr.Slider(
                    0, 1, entry.end if entry else 1, step=0.05, label=t("Acts to (1: clean picture)"),
                    elem_id="end", min_width=140,
                )  # fmt: skip
    for tab, name in ((text, "text"), (image, "image"), (inpaint, "inpaint"), (control, "control")):
        tab.select(None, None, [mode], js=f"() => '{name}'", show_progress="hidden")
    return tabs, example, given, seen, mask_file


def _shapes(service: GenerationService) -> dict[str, tuple[int, int]]:
    """Sizes (height, width) of about the config's area, for those of :data:`ASPECTS` that the model draws."""
    made, found = service.first.sampling, dict[str, tuple[int, int]]()
    area = made.height * made.width
    for name in ASPECTS:
        wide, high = map(int, name.split(":"))
        height = (area * high / wide) ** 0.5
        size = service.sizes.nearest(round(height), round(height * wide / high))
        if abs(size[1] * high / (size[0] * wide) - 1) < 0.1:
            found[name] = size
    return found


def _settings(service: GenerationService, form: Fields) -> tuple[list[Any], Any, Any, Any, Any, Any, Any]:
    """The other fields; shapes with their sizes, swap, dice, keep, the grid's, a PNG file's, all stages."""
    sampling, most, sizes, strength = service.first.sampling, service.limits, service.sizes, service.guidance
    shapes = _shapes(service)
    with gr.Row(visible=len(sizes.sides()) > 1, elem_id="shapes"):
        buttons = [(gr.Button(name, size="sm", min_width=48), size) for name, size in shapes.items()]
        swap = gr.Button(t("Swap"), size="sm", min_width=64, elem_id="swap")
    with gr.Row():
        form["width"] = gr.Dropdown(
            sizes.sides(), value=sampling.width, label=t("Width"), elem_id="width", min_width=80
        )
        form["height"] = gr.Dropdown(
            sizes.sides(sampling.width), value=sampling.height, label=t("Height"), elem_id="height",
            min_width=80,
        )  # fmt: skip
        form["count"] = gr.Number(
            1, label=t("Pictures"), minimum=1, maximum=most.count, precision=0, elem_id="count", min_width=80
        )
    with gr.Row():
        form["seed"] = gr.Number(sampling.seed, label=t("Seed"), precision=0, elem_id="seed", min_width=150)
        form["new_seed"] = gr.Checkbox(True, label=t("New seed each time"), elem_id="anew", min_width=120)
    with gr.Row():
        dice = gr.Button(t("Dice"), size="sm", elem_id="dice", min_width=60)
        keep = gr.Button(t("Keep"), size="sm", elem_id="keep", min_width=60)
    form["steps"] = gr.Slider(
        1, max(most.steps, sampling.steps), value=sampling.steps, step=1, label=t("Steps"), elem_id="steps"
    )
    form["guidance"] = gr.Slider(
        0, max(20.0, strength or 0.0), value=strength or 0.0, step=0.1, label=t("Guidance"),
        elem_id="guidance", visible=strength is not None,
    )  # fmt: skip
    with gr.Row():
        form["sampler"] = gr.Dropdown(
            list(service.samplers),
            value=service.sampler,
            label=t("Sampler"),
            elem_id="sampler",
            min_width=120,
        )
        form["style"] = gr.Dropdown(
            [(t("none"), ""), *((name, name) for name in service.page.styles)], value="", label=t("Style"),
            elem_id="style", min_width=120,
        )  # fmt: skip
    form["negative"] = gr.Textbox(
        sampling.negative_prompt, label=t("Negative prompt"), max_length=most.prompt, elem_id="negative",
        placeholder=t("What is not to be seen"),
    )  # fmt: skip
    with gr.Accordion("LoRA", open=True, visible=bool(service.adapters), elem_id="lora"):
        for name, entry in service.adapters.items():
            form[f"lora {name}"] = gr.Slider(
                -most.strength, most.strength, value=entry.strength, step=0.05, label=name,
                info=t("0: not used"),
            )  # fmt: skip
    axes = [name for name in AXES if name != "control" or service.controls]
    axes = [name for name in axes if name != "guidance" or strength is not None]
    choices = [(t("none"), ""), *((t(name), name) for name in axes), *((n, n) for n in service.adapters)]
    with gr.Accordion(t("Grid"), open=False, elem_id="grid"):
        for axis, words in (("right", "To the right"), ("down", "Downwards")):
            with gr.Row():
                form[f"{axis}_name"] = gr.Dropdown(
                    choices, value="", label=t(words), elem_id=f"{axis}_name", min_width=100
                )
                form[f"{axis}_values"] = gr.Textbox(
                    "", label=t("Values, such as 1,3,5 or 0..3"), elem_id=f"{axis}_values", min_width=140
                )
        draw_grid = gr.Button(t("Draw the grid"), size="sm", elem_id="grid_draw")
    upload = gr.UploadButton(
        t("Settings from a PNG"), file_types=[".png"], type="filepath", size="sm", elem_id="upload"
    )
    cascade = len(service.stages) > 1
    whole = gr.Checkbox(True, label=t("Enlarge at once, by all stages"), visible=cascade, elem_id="whole")
    return buttons, swap, dice, keep, draw_grid, upload, whole


def _buttons(cascade: bool, controls: bool) -> dict[str, Any]:
    """The buttons for what is done with the pictures that are shown, by name."""
    with gr.Row(elem_id="doing"):
        words = {
            "reuse": "Use its settings", "enlarge": "Enlarge it", "vary": "Variations", "image": "Change it",
            "inpaint": "Paint on it", "control": "Control by it", "compare": "Compare",
            "copy": "Copy settings", "delete": "Delete",
        }  # fmt: skip
        there = {"enlarge": cascade, "control": controls}
        return {
            name: gr.Button(t(text), size="sm", elem_id=name, min_width=96, visible=there.get(name, True))
            for name, text in words.items()
        }
