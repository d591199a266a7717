"""The models behind page and API: the requests they allow, drawing, and previews of unfinished pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from sat.adapters.files import is_adapter
from sat.adapters.merge import AdapterRef, adapter_name, load_adapters
from sat.apps.web.grid import changed
from sat.apps.web.job_queue import Batch, CancelledError, Job
from sat.apps.web.preview import ControlEntry, LatentPreview
from sat.apps.web.request import GenerationRequest, Limits, Pictures, RequestError, Settings, settings_of
from sat.checkpoint import digest
from sat.checkpoint.files import SAFETENSORS, TORCH
from sat.checkpoint.verify import Verify
from sat.conditioning.conditioner import notices
from sat.config.build import adaptable, components, find_tokenizer
from sat.config.cascade import Cascade
from sat.config.few_steps import FewStepError, settle_few_steps
from sat.config.record import (
    adapter_differences,
    adapter_digest,
    label,
    model_name,
    weight_digests,
)
from sat.config.schema import Component, Experiment, LoadConfig, PageConfig, SamplingConfig, plain
from sat.config.schema.base import ControlConfig, RuleError, SizeError, SizeRule
from sat.config.settle import CHOICES
from sat.config.yaml_source import Key
from sat.errors import UserError
from sat.offload.block_swap import offloaded_parts
from sat.parallel.launch import launch
from sat.pipeline import Pipeline, StageLoader, keep_text_encoder
from sat.sampling.generator import SamplingParams, strength
from sat.sampling.inputs import InputList
from sat.sampling.output import (
    GridAxis,
    OutputFolder,
    labelled_grid,
    opened,
    prove_writable,
    read_png_text,
    write_png,
)
from sat.sampling.prompts import Prompt, PromptError, Row, check_text
from sat.util.pictures import open_picture

if TYPE_CHECKING:
    from sat.sampling.controls import ControlPictures
    from sat.sampling.edit import EditInput

log = logging.getLogger(__name__)

SAMPLERS = {
    "DDIM": "DDIM", "Euler": "Euler", "Heun": "Heun", "DPM++ 2M": "DPMSolver2M", "LMS": "LinearMultistep",
    "Euler a": "EulerAncestral", "DPM++ 2S a": "DPMSolver2SAncestral",
}  # fmt: skip
"""Samplers by the names that people know; "a" draws noise at its steps (ancestral)."""


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
        controls: Sequence[Path] = (),
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
        self.controls = self._offered(controls)
        self.stages[0] = replace(self.first, sampling=replace(self.first.sampling, controls=[]))
        own = self.first.sampling.sampler
        last = own.target.rpartition(".")[2]
        self.samplers = {
            label: own if name == last else Component(f"sat.diffusion.samplers.{name}")
            for label, name in SAMPLERS.items()
        }
        self.sampler = next((label for label, name in SAMPLERS.items() if name == last), last)
        self.samplers[self.sampler] = own
        self.tokenizer = find_tokenizer(self.first.conditioning, self.first.checkpoint, self.first.imports)
        self._digests: dict[int, Mapping[str, object]] = {}
        self._given = tuple(self.stages)  # as configured; ``stages`` learn what was auto
        self._worn: tuple[str, ...] = ()  # adapters that the first stage is loaded with
        self._stages = StageLoader(self._load, keep_loaded=keep)
        self._preview: LatentPreview | None = None

    def _offered(self, paths: Sequence[Path]) -> dict[str, ControlEntry]:
        """Controls of the config, of ``paths``, and of the folder beside the weights, ``NAME_control``."""
        given = [*self.first.sampling.controls, *map(ControlConfig, paths)]
        if self.first.sampling.tile is not None:  # shows parts of a picture at a time
            if given:
                raise RequestError("controls do not go with sampling.tile: set it to null, or leave them out")
            return {}
        source = self.first.checkpoint.source("model")
        beside = None if source is None else source.with_name(f"{source.name}_control")
        if not given and (beside is None or not beside.is_dir()):
            return {}
        from sat.control.base import ControlError
        from sat.control.files import check_fits, is_control, read_info

        found = dict[str, ControlEntry]()
        own = sorted(beside.iterdir()) if beside is not None and beside.is_dir() else []
        for config in [*given, *(ControlConfig(path) for path in own if is_control(path))]:
            if config.image is not None:
                log.warning("sampling.controls: %s is not used: people give their own pictures", config.image)
            if any(entry.config.path.samefile(config.path) for entry in found.values()):
                continue
            try:
                info = read_info(config.path)
                check_fits(info, self.first.model, config.path, self.first.imports)
            except ControlError as error:
                if config in given:
                    raise
                log.warning("%s; it is not offered", error)
                continue
            found[adapter_name(config.path, found)] = ControlEntry(replace(config, image=None), info)
        return found

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
    def page(self) -> PageConfig:
        """Words of the page about this model."""
        return self.first.page or PageConfig()

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
                raise self._strange("LoRA", name, self.adapters)
        if request.sampler and request.sampler not in self.samplers:
            raise self._strange("sampler", request.sampler, self.samplers)
        if (use := request.control) is not None:
            if use.name not in self.controls:
                raise self._strange("control", use.name, self.controls)
            if use.preprocess and self.controls[use.name].info.picture is None:
                raise RequestError(f"the control {use.name} makes no picture of a plain one: give its own")
        self._settled(0, request)

    def _settled(self, index: int, request: GenerationRequest) -> Experiment:
        """The config of stage ``index`` for ``request``, with what distilled weights set."""
        stage = self.stages[index]
        guider, given = stage.sampling.guider, request.guidance
        if given is not None and strength(components(stage).guider) is not None:
            guider = Component(guider.target, {**guider.params, "scale": float(given)})
        load = [LoadConfig(self.adapters[n].path, s) for n, s in request.adapters.items() if s]
        adapters = replace(stage.adapters, load=[*stage.adapters.load, *load]) if load else stage.adapters

        def typed(key: Key) -> bool:  # what is not the usual
            if key[-1] == "steps":
                return request.steps != stage.sampling.steps
            return bool(request.sampler) if key[-1] == "sampler" else guider != stage.sampling.guider

        try:
            sampling = replace(
                stage.sampling, prompt=[request.prompt], prompt_file=None, share=None, latents=None,
                input_dir=None, negative_prompt=request.negative_prompt, height=request.height,
                width=request.width, steps=request.steps, seed=request.seed, batch_size=request.count,
                guider=guider,
            )  # fmt: skip
            if request.sampler:
                sampling = replace(sampling, sampler=self.samplers[request.sampler])
            made = replace(stage, sampling=sampling, adapters=adapters)  # which checks its rules
            if load:
                made, told = settle_few_steps(made, typed)
                for line in told:
                    log.info("%s", line)
        except (FewStepError, RuleError) as error:
            raise RequestError(str(error)) from error
        if replace(made.diffusion, prediction=stage.diffusion.prediction) != stage.diffusion:
            raise RequestError("this LoRA was distilled at levels that the loaded schedule does not visit")
        return made

    @staticmethod
    def _strange(kind: str, name: str, known: Iterable[str]) -> RequestError:
        return RequestError(f"there is no {kind} {name!r}; there are {', '.join(known) or 'none'}")

    def control_picture(self, name: str, image: Image.Image, height: int, width: int) -> Image.Image | None:
        """The picture that the control ``name`` gets of a plain one, or None; from any thread."""
        if (entry := self.controls.get(name)) is None:
            raise self._strange("control", name, self.controls)
        if entry.info.picture is None:
            return None
        return entry.picture(image, height, width, self.first.imports)

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
        work, steps = self._drawing([request], whole=whole)
        last = len(self.stages) if whole else 1
        most = min(stage.sampling.at_once for stage in self.stages[:last])
        if most == 1 or request.image is not None or request.control is not None:
            return Job(work, steps)
        alike = replace(request, prompt="", seed=0, count=1)
        key = (whole, repr(replace(alike, adapters=dict(sorted(request.adapters.items())))))
        return Job(work, steps, Batch(key, request.count, most, request, partial(self._draw_alike, last)))

    def _draw_alike(self, last: int, jobs: Sequence[Job]) -> None:
        """Draw jobs whose requests differ in prompt, seed and number alone, all their pictures at once."""
        requests = [job.batch.request for job in jobs if job.batch is not None]
        paths: list[list[Path]] = []
        for index in range(last):
            own = requests if not index else [self._enlarged(index, request) for request in requests]
            before, paths = paths, self._draw_together(index, own, paths, jobs)
            for job, large, small in zip(jobs, paths, before, strict=False):
                job.origins.update((a, job.origins.get(b, b)) for a, b in zip(large, small, strict=True))
        for job, made in zip(jobs, paths, strict=True):
            job.pictures = made

    def _draw_together(
        self,
        index: int,
        requests: Sequence[GenerationRequest],
        inputs: Sequence[Sequence[Path]],
        jobs: Sequence[Job],
    ) -> list[list[Path]]:
        """The pictures of stage ``index``, of each request a list."""
        set_up = [self._set_up(index, request) for request in requests]
        now, first = set_up[0][0], set_up[0][1].next_index()
        prompts = [Prompt(first + k, request.prompt.strip()) for k, request in enumerate(requests)]
        counts, wanted, given = [r.count for r in requests], now.pipeline.generator.engine.process.input, None
        if inputs and wanted is not None:
            most = max(counts)
            files = [path for own in inputs for path in (*own, *[own[-1]] * (most - len(own)))]
            given = InputList(*wanted.size(requests[0].height, requests[0].width), files, most, first=first)
        for job, prompt, (_, folder, *_) in zip(jobs, prompts, set_up, strict=True):
            job.expected = [folder.image_path(prompt, image) for image in range(folder.batch_size)]

        def step(done: int, of: int, latents: Tensor) -> None:
            parts = torch.split(latents, counts) if len(latents) == sum(counts) else [latents] * len(jobs)
            for job, part in zip(jobs, parts, strict=True):
                with suppress(CancelledError):  # the others go on
                    job.step(done, of, part)
            if all(job.is_unwanted for job in jobs):
                raise CancelledError

        seeds = [replace(p, row=Row(seed=r.seed)) for p, r in zip(prompts, requests, strict=True)]
        images = [(prompt, range(count)) for prompt, count in zip(seeds, counts, strict=True)]
        drawn = now.pipeline.generator.generate(
            images, set_up[0][2], inputs=given, callback=step, together=True
        )
        for picture in drawn:
            place = picture.prompt.index - first
            if picture.image is not None:
                set_up[place][1].write_image(prompts[place], picture.index, picture.image)
        return [
            folder.finish(prompt)[: folder.batch_size]
            for prompt, (_, folder, *_) in zip(prompts, set_up, strict=True)
        ]

    def grid(self, request: GenerationRequest, axes: Sequence[GridAxis], *, whole: bool = False) -> Job:
        """A picture for each pair of values of one or two ``axes`` (downwards, to the right), and a sheet.

        The sheet is the first of the job's pictures; it has the settings of its first cell.
        """
        count, cells = math.prod(len(axis.values) for axis in axes), [replace(request, count=1)]
        if count > self.limits.cells:
            raise RequestError(f"the grid has {count} pictures, more than {self.limits.cells}")
        for axis in axes:
            cells = [changed(self, cell, axis, i) for cell in cells for i in range(len(axis.values))]
        drawing, steps = self._drawing(cells, whole=whole)

        def work(job: Job) -> list[Path]:
            paths = drawing(job)
            down, right = axes if len(axes) == 2 else (GridAxis("", [""]), axes[0])
            pictures, across = [opened(path) for path in paths], len(right.values)
            rows = [pictures[start : start + across] for start in range(0, count, across)]
            told = " ".join(f"{axis.name}={','.join(map(str, axis.values))}" for axis in axes)
            path = self.pictures.new("grid")
            fields = {**(read_png_text(paths[0]) or {}), "grid": told}
            write_png(path, labelled_grid(rows, down, right), fields)
            return [path, *paths]

        return Job(work, steps)

    def _drawing(
        self, requests: Sequence[GenerationRequest], *, whole: bool
    ) -> tuple[Callable[[Job], list[Path]], int]:
        """The work of a job that draws ``requests``, stage by stage, and its steps; checked here."""
        for request in requests:
            self.check(request)
        if (one := requests[0]).image is not None:
            prompt = Prompt(0, one.prompt)
            if (edits := self._edits(0, one, prompt)) is not None:
                edits.check([prompt], 1)
        last = len(self.stages) if whole else 1
        steps = 0
        for request in requests:
            parts = [request.steps, *(stage.sampling.steps for stage in self.stages[1:last])]
            chunks = [-(-request.count // stage.sampling.at_once) for stage in self.stages[:last]]
            steps += sum(a * b for a, b in zip(parts, chunks, strict=True))

        def work(job: Job) -> list[Path]:
            drawn: list[list[Path]] = []
            for index in range(last):
                before, drawn = drawn, []
                for number, request in enumerate(requests):
                    asked = self._enlarged(index, request) if index else request
                    given = before[number] if index else None
                    job.kept = [path for paths in drawn for path in paths]
                    drawn.append(self._draw(index, asked, given, job, last=index + 1 == last))
                    if given is not None:
                        job.origins.update(
                            (a, job.origins.get(b, b)) for a, b in zip(drawn[-1], given, strict=True)
                        )
            return [path for paths in drawn for path in paths]

        return work, steps

    def enlarging(self, names: Sequence[str]) -> Job:
        """The enlarging of pictures of the folder, each with its own prompt and seed."""
        if not names:
            raise RequestError("choose a picture first")
        parts = [self._enlarging(self.pictures.at(name)) for name in names]

        def work(job: Job) -> list[Path]:
            made: list[Path] = []
            for index, request, path in parts:
                job.kept = list(made)
                made += self._draw(index, request, [path], job)
                job.origins[made[-1]] = path
            return made

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
            sampler="",
            control=None,
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
        now, folder, params, held = self._set_up(index, request)
        generator = now.pipeline.generator
        prompt = Prompt(folder.next_index(), request.prompt.strip())
        edits = self._edits(index, request, prompt)
        if edits is not None:
            edits = replace(edits, puts_back=last)
            told, fields = self._fields(request), edits.fields
            folder = replace(folder, more=lambda p, i: {**fields(p, i), **told})
        given, wanted = None, generator.engine.process.input
        if inputs is not None and wanted is not None:
            size = wanted.size(params.height, params.width)
            given = InputList(*size, inputs, request.count, first=prompt.index)
        job.expected = [*job.kept, *(folder.image_path(prompt, image) for image in range(request.count))]
        planned = request.steps * -(-request.count // generator.at_once)

        def step(done: int, of: int, latents: Tensor) -> None:
            nonlocal planned
            job.correct(of - planned)
            planned = of
            job.step(done, of, latents)

        written = generator.save(
            folder, [prompt], params, inputs=given, controls=held, edits=edits, callback=step
        )
        return written[: request.count]  # without the sheet

    def _set_up(
        self, index: int, request: GenerationRequest
    ) -> tuple[_Open, OutputFolder, SamplingParams, ControlPictures | None]:
        """Stage ``index`` with adapters and sampler of ``request``, its folder, parameters and control."""
        now = self._adapted(index, [name for name, value in request.adapters.items() if value])
        for name, own in now.attached.items():
            now.pipeline.set_strength(own, request.adapters.get(name, 0.0))

        experiment = self._settled(index, request)
        sampling = experiment.sampling
        held = self._control(now.pipeline, request, sampling)
        if request.control is not None:
            use = request.control
            acts = replace(
                self.controls[use.name].config,
                scale=use.scale, start=use.start, end=use.end, preprocess=use.preprocess,
            )  # fmt: skip
            sampling = replace(sampling, controls=[acts])
        experiment = replace(experiment, sampling=sampling)

        about = label(experiment, weights=self._weights(index, experiment))
        folder = OutputFolder(self.pictures.root, about, request.count, sampling.grid_columns)
        prove_writable(folder.root)
        told, made = self._fields(request), components(experiment)
        now.pipeline.generator.sampler = made.sampler
        now.pipeline.generator.engine.prediction = made.prediction  # that of a few-step LoRA may be its own
        folder = replace(folder, more=lambda *_: told)
        return now, folder, SamplingParams.of(sampling, made.guider), held

    def _control(
        self, pipeline: Pipeline, request: GenerationRequest, sampling: SamplingConfig
    ) -> ControlPictures | None:
        """The control of ``request`` with its picture; its file is read when it is first used."""
        if (use := request.control) is None:
            return None
        config = self.controls[use.name].config
        image = {
            "control": config.path, "layers": config.layers, "guess": config.guess, "fit": config.fit,
            **{name: getattr(use, name) for name in ("image", "scale", "start", "end", "preprocess")},
        }  # fmt: skip
        return pipeline.control_pictures(sampling, [image])

    def _fields(self, request: GenerationRequest) -> dict[str, str]:
        """Text fields that ``sample.py`` has none of: another sampler than the config's, and a control."""
        told = {}
        if request.sampler not in ("", self.sampler):
            told["sampler"] = request.sampler
        if (use := request.control) is not None:
            told["control"] = f"{use.name} at {use.scale:g}, {use.start:g} to {use.end:g} of the noise"
        return told

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
        if controls := experiment.sampling.controls:
            found["controls"] = [digest(item.path) for item in controls]
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
        device = launch(stage.parallel.device).device
        if index == 0 and self.controls and offloaded_parts(stage.memory, device):  # takes none later
            named = [entry.config for entry in self.controls.values()]
            stage = replace(stage, sampling=replace(stage.sampling, controls=named))
        pipeline = Pipeline.open(stage, device)
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
    sampler = known.more.get("sampler", "")
    if sampler and sampler not in service.samplers:
        notes.append(f"It was drawn with the sampler {sampler}, which is not offered here.")
        sampler = ""
    return GenerationRequest(
        known.prompt, height, width, steps, guidance, seed, 1, known.negative_prompt, adapters,
        sampler=sampler,
    ), notes  # fmt: skip
