"""The form as a request: its fields, and the pictures that a person gave in its tabs."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageChops

from sat.apps.web.api import ApiError, uploaded
from sat.apps.web.request import ControlUse, GenerationRequest, RequestError
from sat.apps.web.service import GenerationService
from sat.util.log import describe
from sat.util.pictures import with_alpha

CUT = [0] * 128 + [255] * 128  # a mask's values, cut at half
PAINT = "#e11d48"


class Parts(NamedTuple):
    """A painted picture as the editor sends it: files, or the bytes of PNG files."""

    background: Path | bytes | None
    layers: Sequence[Path | bytes]


class Form:
    """The form as a person filled it in, for one service."""

    def __init__(self, service: GenerationService) -> None:
        self.service = service

    def request(self, v: Mapping[str, Any], *given: Any) -> GenerationRequest:  # noqa: ANN401
        """The form as a request; :class:`RequestError` for a field left empty or typed wrong."""
        service = self.service
        seed = secrets.randbelow(2**32 - service.limits.count) if v["new_seed"] else v["seed"]
        prompt, style = (v["prompt"] or "").strip(), service.page.styles.get(v["style"] or "")
        if prompt and style is not None:
            prompt = style.replace("{prompt}", prompt)
        strengths = {name: float(v[f"lora {name}"] or 0) for name in service.adapters}
        request = GenerationRequest(
            prompt,
            _whole(v["height"], "height"),
            _whole(v["width"], "width"),
            _whole(v["steps"], "steps"),
            None if service.guidance is None else float(v["guidance"]),
            _whole(seed, "seed"),
            _whole(v["count"], "pictures"),
            (v["negative"] or "").strip(),
            {name: value for name, value in strengths.items() if value},
            sampler="" if v["sampler"] == service.sampler else v["sampler"] or "",
        )
        change, paint, control = given or (None, None, None)
        if v["mode"] == "image":
            if change is None:
                raise RequestError("give a picture to change first")
            return replace(request, image=self.opened(change), strength=float(v["strength"]))
        if v["mode"] == "inpaint":
            image, mask = self.painted(paint)
            return replace(request, image=image, mask=mask, strength=float(v["inpaint_strength"]))
        if v["mode"] == "control":
            if control is None:
                raise RequestError("give a picture for the control first")
            plain = bool(v["plain"]) and self.makes(v["control"])
            use = ControlUse(
                v["control"] or "", self.opened(control), float(v["scale"]), float(v["start"]),
                float(v["end"]), plain,
            )  # fmt: skip
            return replace(request, control=use)
        return request

    def makes(self, name: str | None) -> bool:
        """True if the control makes its picture of a plain one."""
        entry = self.service.controls.get(name or "")
        return entry is not None and entry.info.picture is not None

    def opened(self, source: Path | bytes, what: str = "picture") -> Image.Image:
        """An uploaded picture, decoded whole; files lie in the output folder."""
        if isinstance(source, Path) and not source.resolve().is_relative_to(self.service.pictures.root):
            raise RequestError("this file was not uploaded")
        try:
            return uploaded(source.read_bytes() if isinstance(source, Path) else source, what)
        except (ApiError, OSError) as error:
            why = (str(error) if isinstance(error, ApiError) else describe(error)).removeprefix(f"{what}: ")
            raise RequestError(f"the {what} cannot be read: {why}") from None

    def painted(self, paint: Parts | None) -> tuple[Image.Image, Image.Image | None]:
        """The picture and its mask (L, white where painted); None if its transparent parts are the mask."""
        if paint is None or paint.background is None:
            raise RequestError("give a picture to paint on first")
        image = self.opened(paint.background)
        mask = Image.new("L", image.size, 0)
        for source in paint.layers:
            layer = self.opened(source, "mask")
            if layer.size != image.size:
                sizes = (f"{one.width} x {one.height}" for one in (layer, image))
                text = "the mask is {}, the picture {} (width x height): they must be alike"
                raise RequestError(text.format(*sizes))
            alpha = layer.convert("RGBA").getchannel("A")
            mask = ImageChops.lighter(mask, alpha.point(CUT))
        if mask.getbbox() is not None:
            return image, mask
        if with_alpha(image).alpha is not None:
            return image, None
        raise RequestError("no mask is painted: paint over what is to be drawn anew")


def _whole(value: Any, name: str) -> int:  # noqa: ANN401
    if value is None or float(value) != int(value):
        raise RequestError(f"{name}: expected a whole number, got {'nothing' if value is None else value}")
    return int(value)


def editor(image: Image.Image, mask: Image.Image | None = None) -> dict[str, Any]:
    """The editor's value: a picture, painted where ``mask`` (L) is white."""
    layers = []
    if mask is not None:
        paint = Image.new("RGBA", image.size, PAINT)
        paint.putalpha(mask)
        layers.append(paint)
    return {"background": image, "layers": layers, "composite": image}
