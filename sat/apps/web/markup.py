"""HTML of the page: sentences in the language of who asks, pictures with their words, settings and links."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import gradio as gr
from PIL import Image

from sat.apps.web.api import Links
from sat.apps.web.browsers import Drawing
from sat.apps.web.request import RequestError, settings_of
from sat.apps.web.service import GenerationService
from sat.apps.web.texts import translated
from sat.util.log import describe


class Markup:
    """Pictures of a service's folder as they are shown."""

    def __init__(self, service: GenerationService, links: Links) -> None:
        self.service, self.links = service, links

    def progress(self, drawing: Drawing, done: Sequence[Path], http: gr.Request) -> str:
        """The preview of a drawing with a bar, and its finished pictures."""
        view, picture = drawing.job.view(), ""
        if view.latents is not None and (image := self.service.preview(view.latents)) is not None:
            scale = max(1, 256 // max(image.size))  # at least 256 pixels
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
            words = html.escape(f"{say('Preview', http)}: {drawing.prompt}", quote=True)
            picture = f'<img class="live" alt="{words}" src="{data_url(image, "JPEG")}">'
        share, label = 100 * view.step // max(view.steps, 1), say("Drawing", http)
        bar = f'<div class="bar" role="progressbar" aria-label="{label}" aria-valuenow="{share}">'
        finished = self.canvas([self.service.pictures.name(path) for path in done], http) if done else ""
        return f'{picture}{bar}<div style="width:{share}%"></div></div>{finished}'

    def canvas(self, names: Sequence[str], http: gr.Request) -> str:
        """Pictures shown large, each with its prompt, as links to their files."""
        items = []
        for name in names:
            words, kind = name, ""
            try:
                known = settings_of(self.service.pictures.at(name))
                words = known.prompt or say("no prompt", http)
                if "grid" in known.more:
                    words, kind = f"{words}: {known.more['grid']}", ' class="sheet"'
            except RequestError:
                pass
            link, words = html.escape(self.links.to(name)), html.escape(words, quote=True)
            picture = f'<img alt="{words}"{kind} src="{link}">'
            items.append(f'<a href="{link}" target="_blank" title="PNG">{picture}</a>')
        return items[0] if len(items) == 1 else f'<div class="row">{"".join(items)}</div>'

    def facts(self, names: Sequence[str], below: Sequence[str], http: gr.Request) -> str:
        """Links to files (``below`` all together), settings of the first picture, their text to be copied."""
        try:
            known = settings_of(self.service.pictures.at(names[0]))
        except RequestError as error:
            return refusal(error, http)
        rows = {
            "prompt": known.prompt, "negative prompt": known.negative_prompt or say("none", http),
            "size": say(f"{known.width} x {known.height} (width x height)", http), "steps": known.steps,
            "guidance": say("none", http) if known.guidance is None else f"{known.guidance:g}",
            "seed": known.seed, "model": known.model, "file": names[0],
        }  # fmt: skip
        if known.adapters:
            rows["LoRA"] = ", ".join(f"{name} at {strength:g}" for name, strength in known.adapters.items())
        given = ("parameters", "init_image", "mask", "edit")  # of which the page knows no file
        rows |= {name: text for name, text in known.more.items() if name not in given}
        lines = (
            f"<dt>{html.escape(say(key, http))}</dt><dd>{html.escape(str(value))}</dd>"
            for key, value in rows.items()
        )
        done = html.escape(said("The settings are copied.", http), quote=True)
        failed = refusal(
            "This browser copies nothing from an address without https: mark the text and copy it.", http
        )
        copied = (
            f'<pre hidden data-done="{done}" data-failed="{html.escape(failed, quote=True)}">'
            f"{html.escape(known.more.get('parameters', known.prompt))}</pre>"
        )
        one, these, all_ = self.links.to(names[0]), self.links.zipped(names), self.links.zipped(below)
        files = {"Download": f'{one}" download="{names[0].replace("/", "_")}'}
        if len(names) > 1:
            files = {"Download these as zip": f'{these}" download="pictures.zip'}
        files["Download all below as zip"] = f'{all_}" download="pictures.zip'
        links = "".join(
            f'<a href="{link.replace("&", "&amp;")}">{say(words, http)}</a>' for words, link in files.items()
        )
        return f"<nav>{links}</nav><dl>{''.join(lines)}</dl>{copied}"


def data_url(image: Image.Image, kind: str) -> str:
    """The address of a picture that is in it, as JPEG or PNG."""
    file = BytesIO()
    image.save(file, kind, quality=80)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def capital(text: str) -> str:
    """``text`` as the beginning of a line."""
    return text[:1].upper() + text[1:]


def say(text: str, http: gr.Request) -> str:
    """``text`` in the language of the page that asks, as its cookie says."""
    return translated(text, str(http.cookies.get("cogview3-language", "")))


def said(text: str, http: gr.Request, *more: str) -> str:
    """Sentences as they are shown."""
    return f"<p>{html.escape(' '.join(say(part, http) for part in (text, *more) if part), quote=False)}</p>"


def refusal(error: BaseException | str, http: gr.Request) -> str:
    """An error as it is shown and read out at once."""
    text = capital(error if isinstance(error, str) else describe(error))
    return f'<p class="error" role="alert">{html.escape(say(text, http))}</p>'
