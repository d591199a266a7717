"""Controls in a run: their pictures read and made, and encoded for the images that are drawn together."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sat.adapters.merge import adapter_name
from sat.checkpoint import digest
from sat.checkpoint.verify import Verify
from sat.config.build import build_empty
from sat.config.check import Context, build, convert, resolve
from sat.config.schema import RuleError
from sat.config.schema.base import ControlConfig
from sat.control.base import BaseModel, Control, ControlError, attach
from sat.control.files import ControlInfo, check_fits, empty, locate, read, read_info
from sat.control_input import ControlInput, Controls
from sat.data.preprocess import Preprocess
from sat.kernels.apply import Speed, quicken_network
from sat.parallel.launch import ALONE, Axis
from sat.sampling.inputs import PictureFiles
from sat.sampling.output import from_pil
from sat.sampling.prompts import Prompt
from sat.util.pictures import Fit, Pixels, fit_message, fitted, with_alpha

if TYPE_CHECKING:
    from sat.config.schema import Experiment, SamplingConfig
    from sat.engine import DiffusionEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControlImage:
    """A picture for a control of a call, and how strongly it acts.

    ``control`` is the name of a loaded one or its file; ``image`` a picture, its file, a folder, or a list
    with one for each image to draw. ``scale`` 0 leaves it out. ``start`` and ``end`` are shares of the noise
    range: 0 is pure noise, 1 a clean picture. ``layers`` are weights of the base's layers. ``guess``: only
    the half of guidance with the prompt gets it. ``preprocess``: ``image`` is a plain picture, of which the
    control's is made as for its training.
    """

    control: str | Path
    image: Image.Image | Path | str | Sequence[Image.Image | Path | str]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    layers: Sequence[float] | None = None
    guess: bool = False
    fit: Fit = "crop"
    preprocess: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ControlError(f"control {self.control}: scale is {self.scale}, expected a number")
        if not 0 <= self.start <= self.end <= 1:
            raise ControlError(
                f"control {self.control}: start {self.start:g} and end {self.end:g}: expected "
                f"0 <= start <= end <= 1, shares of the noise range"
            )

    @classmethod
    def of(cls, config: ControlConfig) -> ControlImage:
        """The same of an item of ``sampling.controls``."""
        assert config.image is not None, "asked for before"
        own = {name: getattr(config, name) for name in ("image", "scale", "start", "end", "layers", "guess")}
        return cls(config.path, **own, fit=config.fit, preprocess=config.preprocess)

    def open(self, prompt: Prompt, image: int, batch_size: int) -> Pixels:
        """The picture for image number ``image`` of ``prompt``."""
        given = self.image
        if isinstance(given, (list, tuple)):
            number = prompt.index * batch_size + image
            if number >= len(given):
                raise ControlError(f"control {self.control}: {len(given)} pictures, none for image {number}")
            given = given[number]
        if isinstance(given, Image.Image):
            return with_alpha(given)
        return PictureFiles(Path(str(given)), f"control {self.control}").open(prompt, image)


@dataclass(frozen=True)
class LoadedControl:
    """A control on the network, with the description in its file."""

    control: Control
    info: ControlInfo
    path: Path
    preprocess: Preprocess | None


class LoadedControls:
    """The controls on an engine's network, by name; each file once.

    ``speed`` is put on those that are loaded later, as it was on the network with its first ones.
    """

    def __init__(self, engine: DiffusionEngine, experiment: Experiment, base: BaseModel) -> None:
        self.engine, self.base, self._imports = engine, base, experiment.imports
        self.loaded: dict[str, LoadedControl] = {}
        self.speed: Speed | None = None

    @classmethod
    def of(
        cls,
        engine: DiffusionEngine,
        experiment: Experiment,
        tensor: Axis = ALONE,
        more: Collection[Path] = (),
    ) -> LoadedControls:
        """Those of ``sampling.controls`` and the files ``more``, loaded.

        ``tensor`` are the ranks that the network is split over.
        """
        base = BaseModel(engine.network, experiment.model, experiment.imports, tensor)
        made, weights = cls(engine, experiment, base), experiment.checkpoint
        for path in _files(experiment.sampling, more):
            made.load(path, verify=Verify(weights.verify))
        return made

    def load(self, path: Path, name: str | None = None, verify: Verify | None = None) -> str:
        """Put the control at ``path`` on the network; returns its name. One that is there stays."""
        for known, one in self.loaded.items():
            if one.path == path and name in (None, known):
                return known
        control, info = read(path, self.base, verify)
        name = name or adapter_name(path, self.loaded)
        preprocess = None if info.picture is None else build(info.picture, imports=self._imports)
        if self.speed is not None:
            quicken_network(control, self.speed)
        attach(self.engine.network, name, control.eval().requires_grad_(False))
        self.loaded[name] = LoadedControl(control, info, path, preprocess)
        count = sum(parameter.numel() for parameter in control.parameters())
        log.info("%s: %s %r, %.2f M weights", path, info.control.target.rpartition(".")[2], name, count / 1e6)
        return name

    def named(self, wanted: str | Path) -> str:
        """The name of the loaded control that ``wanted`` names; a file that is not loaded is."""
        return str(wanted) if str(wanted) in self.loaded else self.load(Path(wanted))


def _files(sampling: SamplingConfig, more: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys([*(item.path for item in sampling.controls), *more]))


def check_controls(experiment: Experiment, more: Iterable[Path] = ()) -> None:
    """Refuse files of ``sampling.controls`` and ``more`` that are no controls of this model, by headers."""
    for path in _files(experiment.sampling, more):
        info = read_info(path)
        check_fits(info, experiment.model, path, experiment.imports)
        design = resolve(info.control.target, {*experiment.imports, *info.imports})
        if experiment.sampling.tile is not None and not getattr(design, "in_tiles", True):
            raise ControlError(
                f"control {path}: a {design.__name__} is seen whole, which tiles do not go with: set "
                f"sampling.tile to null"
            )


# -- controls of a prompt's own


def row_controls(prompt: Prompt) -> list[ControlConfig] | None:
    """The controls in the row of ``prompt``, which stand in place of ``sampling.controls``; None: no row's.

    :class:`ControlError` for a key, a value or a file that does not do.
    """
    if prompt.row.controls is None:
        return None
    out = []
    for number, given in enumerate(prompt.row.controls):
        where = f"prompt {prompt.index}: controls.{number}"
        try:
            config, faults = convert(ControlConfig, dict(given), Context())
        except RuleError as error:
            raise ControlError(f"{where}: {error}") from error
        if faults:
            at = "".join(f".{part}" for part in faults[0].key)
            raise ControlError(f"{where}{at}: {faults[0].what}")
        assert isinstance(config, ControlConfig), "it has no faults"
        if config.image is None or not config.image.exists():
            lacks = "needs a picture" if config.image is None else f"{config.image} does not exist"
            raise ControlError(f"{where}.image: {lacks}")
        locate(config.path)
        out.append(config)
    return out


def row_files(prompts: Iterable[Prompt]) -> list[Path]:
    """Files of the controls in the rows of ``prompts``."""
    return list(dict.fromkeys(one.path for prompt in prompts for one in row_controls(prompt) or ()))


def check_pictures(experiment: Experiment, prompts: Iterable[Prompt]) -> None:
    """Look at every control of every prompt, and read its pictures once, before weights are read."""
    sampling, seen, known = (
        experiment.sampling,
        set[tuple[Path, Path, bool]](),
        dict[Path, tuple[Control, bool]](),
    )
    base: BaseModel | None = None
    for prompt in prompts:
        own = row_controls(prompt)
        for config in sampling.controls if own is None else own:
            if config.path not in known:
                base = base or BaseModel(
                    build_empty(experiment.model, experiment.imports), experiment.model, experiment.imports
                )
                made, info = empty(config.path, base)
                known[config.path] = made, info.picture is not None
            use, (control, preprocesses) = ControlImage.of(config), known[config.path]
            _check_use(use, control, preprocesses=preprocesses)
            files = PictureFiles(Path(str(config.image)), f"control {config.path}")
            for image in range(sampling.batch_size if config.scale else 0):
                key = (files.find(prompt, image), config.path, config.preprocess)
                if key not in seen:
                    seen.add(key)
                    _check_picture(use, control, files.open(prompt, image))


def _check_use(use: ControlImage, control: Control, *, preprocesses: bool) -> None:
    """Refuse settings that ``control`` has no meaning for."""
    if use.layers is not None:
        if len(use.layers) != (count := control.layers()):
            raise ControlError(
                f"control {use.control}: {len(use.layers)} weights in `layers`, expected one for each of "
                f"{count} layers of the base"
            )
        if not all(math.isfinite(weight) for weight in use.layers):
            raise ControlError(f"control {use.control}: `layers` {list(use.layers)}: expected numbers")
    if use.preprocess and not preprocesses:
        raise ControlError(
            f"control {use.control}: its file names no preprocessing: give its picture as it is"
        )


def _check_picture(use: ControlImage, control: Control, pixels: Pixels) -> None:
    if control.takes == "inpaint" and not use.preprocess and pixels.alpha is None:
        raise ControlError(
            f"control {use.control}: inpaints, so its picture is transparent where it is to be drawn anew, "
            f"and this one is nowhere"
        )


def row_fields(prompt: Prompt, image: int) -> dict[str, str]:
    """PNG fields of a picture whose prompt has controls of its own: their settings, and digests of files."""
    own, told = row_controls(prompt), []
    usual = {f.name: f.default for f in fields(ControlConfig) if f.name not in ("path", "image")}
    for config in own or ():
        found = PictureFiles(Path(str(config.image)), "a control").find(prompt, image)
        files = [f"{path.name} {_digest(path, _stamp(path))}" for path in (config.path, found)]
        set_ = [f"{k} {getattr(config, k)}" for k, v in usual.items() if getattr(config, k) != v]
        told.append(", ".join(files + set_))
    return {} if own is None else {"controls": "; ".join(told)}


def _stamp(path: Path) -> tuple[int, int]:
    found = (locate(path) if path.is_dir() else path).stat()
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=4096)
def _digest(path: Path, stamp: tuple[int, int]) -> str:
    return digest(locate(path) if path.is_dir() else path)


@dataclass(frozen=True)
class ControlPictures:
    """The controls of a call with their pictures, of ``height`` x ``width`` pixels.

    A prompt with controls of its own row has those instead, one with a size of its own pictures of that.
    """

    loaded: LoadedControls
    uses: Sequence[tuple[str, ControlImage]]  # a loaded control's name and its picture
    height: int
    width: int
    batch_size: int

    @classmethod
    def of(
        cls,
        loaded: LoadedControls,
        images: Sequence[ControlImage],
        size: tuple[int, int],
        batch_size: int,
        prompts: Iterable[Prompt] = (),
    ) -> ControlPictures | None:
        """Those of ``images`` and of rows of ``prompts`` that are not switched off; None for none."""
        made = cls(loaded, cls._acting(loaded, images), *size, batch_size)
        rows = [made.used(prompt) for prompt in prompts if prompt.row.controls is not None]
        return made if made.uses or any(rows) else None

    @staticmethod
    def _acting(loaded: LoadedControls, images: Iterable[ControlImage]) -> list[tuple[str, ControlImage]]:
        uses = []
        for image in images:
            name = loaded.named(image.control)
            one = loaded.loaded[name]
            _check_use(image, one.control, preprocesses=one.preprocess is not None)
            if image.scale:
                uses.append((name, image))
        return uses

    def used(self, prompt: Prompt) -> Sequence[tuple[str, ControlImage]]:
        """The controls that act on ``prompt``, by name."""
        own = row_controls(prompt)
        return self.uses if own is None else self._acting(self.loaded, map(ControlImage.of, own))

    def read(self, prompt: Prompt, images: Sequence[int]) -> list[Tensor]:
        """For each use its pictures (n, 3 or 4, height, width) in [-1, 1], preprocessed if they are to be."""
        return [
            torch.stack([self._picture(name, use, prompt, i) for i in images])
            for name, use in self.used(prompt)
        ]

    def _picture(self, name: str, use: ControlImage, prompt: Prompt, image: int) -> Tensor:
        pixels, one = use.open(prompt, image, self.batch_size), self.loaded.loaded[name]
        _check_picture(use, one.control, pixels)
        height, width = prompt.row.height or self.height, prompt.row.width or self.width
        if told := fit_message(pixels.rgb.size, height, width, use.fit):
            log.info("control %s: %s", use.control, told)
        picture = from_pil(fitted(pixels.rgb, height, width, use.fit))
        if one.control.takes == "inpaint" and not use.preprocess:
            assert pixels.alpha is not None, "checked above"
            alpha = from_pil(fitted(pixels.alpha, height, width, use.fit))[:1]
            return torch.cat([picture, torch.where(alpha < 0, 1.0, -1.0)])
        if use.preprocess:
            assert one.preprocess is not None, "checked before"
            return one.preprocess(picture, random.Random(f"{prompt.index}/{image}"))
        return picture

    def encode(self, prompt: Prompt, pictures: Sequence[Tensor], device: torch.device) -> Controls:
        """Inputs of the network of the ``pictures`` that were read for ``prompt``."""
        out = []
        for (name, use), given in zip(self.used(prompt), pictures, strict=True):
            control = self.loaded.loaded[name].control
            value = control.encode(self.loaded.engine.first_stage, given.to(device))
            layers = None if use.layers is None else tuple(map(float, use.layers))
            strengths = (float(use.scale),) * len(value)
            out.append(
                ControlInput(
                    name, value, strengths, use.start, use.end, layers, guess=use.guess, blank=control.blank
                )
            )
        return tuple(out)


def control_images(given: Sequence[ControlImage | Mapping[str, Any]]) -> list[ControlImage]:
    """Controls of a call, of which each may be a mapping of :class:`ControlImage`'s fields."""
    return [one if isinstance(one, ControlImage) else ControlImage(**one) for one in given]
