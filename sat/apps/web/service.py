"""The models behind page and API: the requests they allow, drawing, and previews of unfinished pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sat.adapters.files import is_adapter
from sat.adapters.merge import AdapterRef, adapter_name, load_adapters
from sat.apps.web.job_queue import Job
from sat.apps.web.request import GenerationRequest, Limits, Pictures, RequestError, Settings, settings_of
from sat.checkpoint.files import SAFETENSORS, TORCH
from sat.checkpoint.verify import Verify
from sat.conditioning.conditioner import notices
from sat.config.build import adaptable, components, find_tokenizer
from sat.config.cascade import Cascade
from sat.config.record import (
    adapter_differences,
    adapter_digest,
    label,
    model_name,
    weight_digests,
)
from sat.config.schema import Component, Experiment, LoadConfig, plain
from sat.config.schema.base import SizeError, SizeRule
from sat.config.settle import CHOICES
from sat.engine import DiffusionEngine
from sat.errors import UserError
from sat.parallel.launch import launch
from sat.pipeline import Pipeline, StageLoader, keep_text_encoder
from sat.sampling.generator import SamplingParams, strength
from sat.sampling.inputs import InputList
from sat.sampling.output import OutputFolder, prove_writable, to_pil
from sat.sampling.prompts import Prompt, PromptError, check_text
from sat.util.pictures import open_picture

if TYPE_CHECKING:
    from sat.sampling.edit import EditInput

log = logging.getLogger(__name__)


class LatentPreview:
    """A 3 x C matrix and three offsets: each latent cell becomes the mean colour of its pixels.

    ``weight`` (3, C) and ``bias`` (3,) are float64 on the CPU; colours are in [0, 1].
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    @torch.inference_mode()
    def fit(cls, engine: DiffusionEngine) -> LatentPreview:
        """Least squares from latents of made-up pictures to their colours: no decoding, no data.

        The 12 pictures of 16 x 16 cells are shaded discs on white and on coloured grounds, always the same.
        """
        factor, device = engine.first_stage.factor, next(engine.first_stage.parameters()).device
        generator, side = torch.Generator().manual_seed(0), 16 * factor
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")

        def unit(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        drawings = []
        for index in range(12):
            image = (unit(3, 1, 1) * 2 - 1 if index % 2 else torch.ones(3, 1, 1)).expand(3, side, side)
            for _ in range(6):
                colour, (left, top, size) = unit(3, 1, 1) * 2 - 1, unit(3).tolist()
                radius = (0.08 + 0.25 * size) * side
                across, down = (x - left * side) / radius, (y - top * side) / radius
                shaded = (colour + 0.2 * (across + down)).clamp(-1, 1)
                image = torch.where(across**2 + down**2 < 1, shaded, image)
            drawings.append(image)
        images = torch.stack(drawings)  # (12, 3, side, side) in [-1, 1]
        shape = (len(images), *engine.latent_shape(side, side))
        latents = engine.encode(images.to(device), torch.zeros(shape, device=device)).double().cpu()
        cells = F.avg_pool2d(images, factor).add(1).div(2).double()
        a = rearrange(latents, "b c h w -> (b h w) c")
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)  # with an offset
        gram = a.T @ a + 1e-3 * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        found = torch.linalg.solve(gram, a.T @ rearrange(cells, "b c h w -> (b h w) c"))
        return cls(found[:-1].T.contiguous(), found[-1])

    @torch.inference_mode()
    def colours(self, latents: Tensor) -> Tensor:
        """(B, 3, h, w) float32 in [0, 1] on the CPU, of latents (B, C, h, w) anywhere."""
        z = latents.double().cpu()
        out = torch.einsum("kc,bchw->bkhw", self.weight, z) + self.bias[:, None, None]
        return out.clamp(0, 1).float()

    def images(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of h x w pixels."""
        return [to_pil(image) for image in self.colours(latents)]


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter that can be used: its file, and its strength unless a request sets another."""

    path: Path
    strength: float


@dataclass(frozen=True)
class _Open:
    """A loaded stage."""

    pipeline: Pipeline
    preview: LatentPreview
    attached: dict[str, str]  # adapters on it: our name -> the model's name for it


class GenerationService:
    """Draws with the stages of a cascade (or the one model); one at a time is loaded, or with ``keep`` all.

    Methods that draw or open run on the drawing thread, those that check on any.
    """

    def __init__(
        self,
        cascade: Cascade,
        root: Path,
        name: str,
        *,
        adapters: Path | None = None,
        limits: Limits | None = None,
        keep: bool = False,
    ) -> None:
        self.name = name
        self.limits = limits or Limits()
        self.pictures = Pictures(root)
        self.stages = [keep_text_encoder(stage.experiment) for stage in cascade.stages]
        inputs = [components(stage).process.input for stage in self.stages]
        self.factors = [1 if wanted is None else wanted.factor for wanted in inputs]
        first = self.stages[0].sampling
        if first.init_image is not None or first.regions is not None:
            what = "init_image" if first.init_image is not None else "regions"
            raise RequestError(f"sampling.{what}: pages draw what a request asks for: set it to null")
        if self.factors[0] != 1:
            raise RequestError(
                "this model only enlarges pictures: name a cascade that begins with a base model"
            )
        self.adapters: dict[str, AdapterEntry] = {}  # those of the config, then those in the folder
        if not self.first.adapters.merge:  # attached when requested, at the requested strength
            for item in self.first.adapters.load:
                name = adapter_name(item.path, self.adapters)
                self.adapters[name] = AdapterEntry(item.path, item.strength)
            self.stages[0] = replace(self.first, adapters=replace(self.first.adapters, load=[]))
        if adapters is not None:
            if not adapters.is_dir():
                raise RequestError(f"{adapters}: no such folder of LoRA files")
            for path in sorted(adapters.iterdir()):
                if is_adapter(path):
                    self.adapters[adapter_name(path, self.adapters)] = AdapterEntry(path, 0.0)
                elif path.is_dir() or path.suffix in (*SAFETENSORS, *TORCH):
                    log.warning("%s: holds no readable adapter and is not offered", path)
        self.tokenizer = find_tokenizer(self.first.conditioning, self.first.checkpoint, self.first.imports)
        self._digests: dict[int, Mapping[str, object]] = {}
        self._given = tuple(self.stages)  # as configured; ``stages`` learn what was auto
        self._worn: tuple[str, ...] = ()  # adapters that the first stage is loaded with
        self._stages = StageLoader(self._load, keep_loaded=keep)
        self._preview: LatentPreview | None = None

    # -- what may be requested

    @property
    def first(self) -> Experiment:
        """The config of the model that draws from noise."""
        return self.stages[0]

    @property
    def sizes(self) -> SizeRule:
        """The sizes it draws, before enlarging."""
        return self.first.sampling.sizes

    @property
    def scale(self) -> int:
        """Factor by which the pictures of the last stage are larger."""
        return math.prod(self.factors)

    @property
    def guidance(self) -> float | None:
        """The strength of guidance in the config; None where there is none to set."""
        return strength(components(self.first).guider)

    def check(self, request: GenerationRequest) -> None:
        """Raise with a sentence unless ``request`` can be drawn."""
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
            try:
                check_text(text, f"the {name.replace('_', ' ')}")
            except PromptError as error:
                raise RequestError(str(error), name) from None
        self.limits.check(request)
        self.sizes.check(request.height, request.width)
        for name in request.adapters:
            if name not in self.adapters:
                raise RequestError(
                    f"there is no LoRA {name!r}; there are {', '.join(self.adapters) or 'none'}"
                )

    def enlarger(self, size: tuple[int, int], above: int = 0) -> int | None:
        """The stage after ``above`` that enlarges pictures of (height, width) ``size``: nearest in size."""
        distance: dict[int, float] = {}
        for index in range(above + 1, len(self.stages)):
            made, factor = self.stages[index].sampling, self.factors[index]
            height, width = factor * size[0], factor * size[1]
            if made.sizes.allows(height, width):
                distance[index] = abs(math.log(height * width / (made.height * made.width)))
        return min(distance, key=distance.__getitem__, default=None)

    # -- drawing

    def open(self) -> GenerationService:
        """Load the first stage, so that the first request does not wait; on the drawing thread."""
        launch(self.first.parallel.device)  # the device, and denormals flushed, for this thread
        self._open(0)
        return self

    def job(self, request: GenerationRequest, *, whole: bool = False) -> Job:
        """The drawing of ``request``; ``whole``: through all stages, as ``sample.py`` does."""
        self.check(request)
        if request.image is not None:
            prompt = Prompt(0, request.prompt)
            if (edits := self._edits(0, request, prompt)) is not None:
                edits.check([prompt], 1)
        last = len(self.stages) if whole else 1
        parts = [request.steps, *(stage.sampling.steps for stage in self.stages[1:last])]
        chunks = [-(-request.count // stage.sampling.at_once) for stage in self.stages[:last]]

        def work(job: Job) -> list[Path]:
            paths = self._draw(0, request, None, job, last=last == 1)
            for index in range(1, last):
                paths = self._draw(index, self._enlarged(index, request), paths, job, last=index + 1 == last)
            return paths

        return Job(work, sum(a * b for a, b in zip(parts, chunks, strict=True)))

    def enlarging(self, names: Sequence[str]) -> Job:
        """The enlarging of pictures of the folder, each with its own prompt and seed."""
        if not names:
            raise RequestError("choose a picture first")
        parts = [self._enlarging(self.pictures.at(name)) for name in names]

        def work(job: Job) -> list[Path]:
            return [
                made for index, request, path in parts for made in self._draw(index, request, [path], job)
            ]

        return Job(work, sum(request.steps for _, request, _ in parts))

    def _enlarging(self, path: Path) -> tuple[int, GenerationRequest, Path]:
        known = settings_of(path)
        with open_picture(path) as picture:
            size = (picture.height, picture.width)
        drawn = self.stage_of(known)
        index = self.enlarger(size, above=drawn)
        if index is None:
            what = f"a picture of {size[0]} x {size[1]} (height x width)"
            if drawn:
                raise RequestError(f"{what} that was enlarged already: no further stage enlarges it")
            raise RequestError(f"nothing here enlarges {what}")
        request = GenerationRequest(
            known.prompt, *size, 1, None, known.seed or 0, negative_prompt=known.negative_prompt
        )
        return index, self._enlarged(index, request, before=1), path

    def stage_of(self, known: Settings) -> int:
        """The stage that drew a picture with the settings ``known``; 0 for those of other models."""
        names = [model_name(stage) for stage in self.stages]
        return names.index(known.model) if known.model in names else 0

    def preview(self, latents: Tensor) -> Image.Image | None:
        """A small picture of predicted latents; from any thread."""
        made = self._preview
        return None if made is None else made.images(latents[:1])[0]

    def _enlarged(
        self, index: int, request: GenerationRequest, before: int | None = None
    ) -> GenerationRequest:
        """The request to stage ``index`` that enlarges ``request``, which ``before`` enlarged already."""
        scale = self.factors[index] * (math.prod(self.factors[:index]) if before is None else before)
        stage = self.stages[index]
        return replace(
            request,
            height=request.height * scale,
            width=request.width * scale,
            steps=stage.sampling.steps,
            guidance=None,
            adapters={},
        )

    def _edits(self, index: int, request: GenerationRequest, prompt: Prompt) -> EditInput | None:
        """The pictures that stage ``index`` changes."""
        if request.image is None:
            return None
        from sat.sampling.edit import EditInput, PictureList  # only where there are any

        pictures, first = {"init_image": request.image, "mask": request.mask}, self.first.sampling
        lists = {key: PictureList([one], key, request.count) for key, one in pictures.items() if one}
        scale = math.prod(self.factors[: index + 1])
        sampling = replace(
            first, batch_size=request.count, height=request.height // scale, width=request.width // scale,
            strength=request.strength, init_image=None, mask=None, strength_map=None, outpaint=None,
        )  # fmt: skip
        edits = EditInput.of(sampling, [prompt], lists)
        if edits is not None and index:
            stage = self.stages[index].sampling
            own = replace(
                stage, batch_size=request.count, height=request.height, width=request.width, outpaint=None
            )
            edits = edits.following(own, scale)[0]
        return edits

    def _draw(
        self,
        index: int,
        request: GenerationRequest,
        inputs: Sequence[Path] | None,
        job: Job,
        *,
        last: bool = True,
    ) -> list[Path]:
        """The pictures of stage ``index``, numbered after all others in the folder."""
        now = self._adapted(index, [name for name, value in request.adapters.items() if value])
        stage, generator = self.stages[index], now.pipeline.generator
        for name, own in now.attached.items():
            now.pipeline.set_strength(own, request.adapters.get(name, 0.0))

        guider = stage.sampling.guider
        if request.guidance is not None and strength(components(stage).guider) is not None:
            guider = Component(guider.target, {**guider.params, "scale": float(request.guidance)})
        sampling = replace(
            stage.sampling, prompt=[request.prompt], prompt_file=None, share=None, latents=None,
            input_dir=None, negative_prompt=request.negative_prompt, height=request.height,
            width=request.width, steps=request.steps, seed=request.seed, batch_size=request.count,
            guider=guider,
        )  # fmt: skip
        load = [LoadConfig(self.adapters[n].path, s) for n, s in request.adapters.items() if s]
        adapters = replace(stage.adapters, load=[*stage.adapters.load, *load]) if load else stage.adapters
        experiment = replace(stage, sampling=sampling, adapters=adapters)  # which checks its rules

        about = label(experiment, weights=self._weights(index, experiment))
        folder = OutputFolder(self.pictures.root, about, request.count, sampling.grid_columns)
        prove_writable(folder.root)
        prompt = Prompt(folder.next_index(), request.prompt.strip())
        edits = self._edits(index, request, prompt)
        if edits is not None:
            edits = replace(edits, puts_back=last)
            folder = replace(folder, more=edits.fields)
        given, wanted = None, generator.engine.process.input
        if inputs is not None and wanted is not None:
            size = wanted.size(sampling.height, sampling.width)
            given = InputList(*size, inputs, request.count, first=prompt.index)
        params = SamplingParams.of(sampling, components(experiment).guider)
        job.expected = [folder.image_path(prompt, image) for image in range(request.count)]
        planned = request.steps * -(-request.count // generator.at_once)

        def step(done: int, of: int, latents: Tensor) -> None:
            nonlocal planned
            job.correct(of - planned)
            planned = of
            job.step(done, of, latents)

        written = generator.save(folder, [prompt], params, inputs=given, edits=edits, callback=step)
        return written[: request.count]  # without the sheet

    def text_notices(self, *texts: str) -> list[str]:
        """Sentences about words that do not reach the text encoder; from any thread."""
        found = [notices(self.tokenizer, text) for text in texts if text.strip() and self.tokenizer]
        return [line for lines in found for line in lines]

    def tokens(self, text: str) -> int | None:
        """Number of tokens of ``text``, those too many included; None without a tokenizer."""
        return None if self.tokenizer is None else len(self.tokenizer.encode(text))

    def _adapted(self, index: int, names: Sequence[str]) -> _Open:
        """Stage ``index`` with the adapters ``names`` on it, which others may be beside at strength 0.

        Weights that were compiled, recorded or offloaded take no further adapter: there the stage is loaded
        anew with exactly ``names``, as ``sample.py`` loads it.
        """
        now, stage = self._open(index), self.stages[index]
        made, missing = stage.sampling, [name for name in names if name not in now.attached]
        fixed = made.compile or made.graphs or now.pipeline.generator.offload is not None
        if not missing and not (fixed and set(now.attached) != set(names)):
            return now
        parts = {"model": plain(stage.model), "text": plain(stage.conditioning.text)}
        try:
            for name in missing:
                for found in adapter_differences(self.adapters[name].path, parts, stage.imports):
                    if found.fatal:
                        raise RequestError(found.what)
            if fixed:
                log.info(
                    "loading the model anew, %s", f"with {', '.join(names)}" if names else "without LoRA"
                )
                self._worn = tuple(names)
                del now  # the weights go before they are read again
                self._stages.drop(index)
                return self._open(index)
            how, wanted = Verify(stage.checkpoint.verify), adaptable(now.pipeline.generator.engine)
            for name in missing:
                reference = AdapterRef(self.adapters[name].path, 0.0)
                (now.attached[name],) = load_adapters(wanted, [reference], verify=how)
        except (UserError, ValueError) as error:
            self._worn, text = (), str(error)
            for name in missing:  # where it lies is nothing to visitors
                text = text.replace(str(self.adapters[name].path), f"the LoRA {name}")
            raise RequestError(text) from error
        return now

    def _weights(self, index: int, experiment: Experiment) -> Mapping[str, object]:
        """Fingerprints of the weights in use; checkpoints are read once, adapters are small."""
        if index not in self._digests:
            stage = self.stages[index]
            self._digests[index] = weight_digests(replace(stage, adapters=replace(stage.adapters, load=[])))
        found = dict(self._digests[index])
        if load := experiment.adapters.load:
            found["adapters"] = [[adapter_digest(item.path), item.strength] for item in load]
        return found

    def _open(self, index: int) -> _Open:
        """Stage ``index``, loaded in place of the one before, or beside it."""
        now = self._stages.open(index)
        self._preview = now.preview
        return now

    def _load(self, index: int) -> _Open:
        stage, own = self._given[index], dict[str, str]()
        if index == 0 and self._worn:
            for name in self._worn:
                own[name] = adapter_name(self.adapters[name].path, own.values())
            worn = [LoadConfig(self.adapters[name].path, 0.0) for name in self._worn]
            load = [*stage.adapters.load, *worn]
            stage = replace(stage, adapters=replace(stage.adapters, load=load, merge=False))
        pipeline = Pipeline.open(stage, launch(stage.parallel.device).device)
        made = pipeline.experiment.sampling  # what was auto is named in labels
        chosen = {name: getattr(made, name) for name in CHOICES}
        stage = self._given[index]
        self.stages[index] = replace(stage, sampling=replace(stage.sampling, **chosen))
        log.info("%s is loaded on %s", model_name(self.stages[index]), pipeline.device)
        return _Open(pipeline, LatentPreview.fit(pipeline.generator.engine), own)


def fitted(known: Settings, service: GenerationService) -> tuple[GenerationRequest, list[str]]:
    """The request that repeats a picture as well as this model can, and a sentence for every change."""
    default, limits, notes = service.first.sampling, service.limits, list[str]()
    if stage := service.stage_of(known):  # of its settings, those of the enlarging are nothing to the first
        scale = math.prod(service.factors[: stage + 1])
        small = [None if side is None else side // scale for side in (known.height, known.width)]
        known = known._replace(
            height=small[0], width=small[1], steps=None, guidance=None, model=model_name(service.first)
        )
        notes.append("The picture is an enlarged one: steps and guidance are the first stage's usual ones.")
    height, width = known.height or default.height, known.width or default.width
    try:
        service.sizes.check(height, width)
    except SizeError as error:
        height, width = service.sizes.nearest(height, width)
        notes.append(f"{error}, which is set instead.")
    if known.model and known.model != model_name(service.first):
        notes.append(f"The picture is from another model, {known.model}: this one draws it differently.")
    folded = {adapter_name(item.path): item.strength for item in service.first.adapters.load}
    adapters = {}
    for name, value in known.adapters.items():
        if name in service.adapters:
            adapters[name] = max(-limits.strength, min(value, limits.strength))
        elif folded.get(name) != value:
            notes.append(f"It was drawn with the LoRA {name}, which is not offered here.")
    guidance = service.guidance
    if guidance is not None and known.guidance is not None:
        guidance = known.guidance
    steps, seed = min(known.steps or default.steps, limits.steps), min(known.seed or 0, 2**32 - 1)
    return GenerationRequest(
        known.prompt, height, width, steps, guidance, seed, 1, known.negative_prompt, adapters
    ), notes
