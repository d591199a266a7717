"""The model from Python: ``Pipeline.from_config([...])`` once, then call it with prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sat.adapters import lora
from sat.config.build import adaptable, build_cache, build_engine, build_guider, build_sampler
from sat.config.cascade import Cascade, Stage, load_cascade
from sat.config.load import load
from sat.config.schema import Experiment, Precision, SamplingConfig
from sat.config.yaml_source import ConfigError, Problem
from sat.diffusion.guidance import Guider
from sat.diffusion.process import ProcessInput
from sat.diffusion.samplers import StepCallback
from sat.estimate.budget import apply_budget
from sat.kernels.apply import Speed, quicken
from sat.offload.block_swap import offload_schedule, offloaded_parts
from sat.parallel.cfg_parallel import CfgParallel
from sat.parallel.launch import pick_device
from sat.parallel.mesh import ALONE, Mesh, data_ranks
from sat.parallel.sequence import apply_sequence
from sat.sampling.generator import Generator, InitialNoise, SamplingParams, with_strength
from sat.sampling.inputs import InputFolder, checked_latents
from sat.sampling.prompts import check_text, checked_prompts
from sat.util.images import from_pil

log = logging.getLogger(__name__)

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What ``sampling.dtype`` names."""


@dataclass(frozen=True)
class Output:
    """Pictures and their latents, prompt by prompt, ``batch_size`` of each."""

    images: list[Image.Image]
    latents: Tensor  # (B, C, h, w) float32 on the CPU, as the first stage decodes them


class Pipeline:
    """A loaded model that draws pictures for prompts.

    >>> pipe = Pipeline.from_config(["configs/tiny.yaml"], device="cpu")
    >>> pipe(["a red apple"], seed=0).images[0].save("apple.png")
    """

    def __init__(self, generator: Generator, guider: Guider, experiment: Experiment) -> None:
        self.generator = generator
        self.guider = guider
        self.experiment = experiment

    @classmethod
    def from_config(
        cls,
        bases: str | Path | Sequence[str | Path],
        overrides: Sequence[str | tuple[str, Any]] = (),
        device: str | torch.device | None = None,
        dtype: Precision | torch.dtype | None = None,
    ) -> Pipeline:
        """The model that the YAML files ``bases`` describe, laid over one another, with its weights.

        ``overrides`` are ``"section.key=value"`` or ``("section.key", value)``. ``device`` and ``dtype`` win
        over ``parallel.device`` and ``sampling.dtype``.
        """
        paths = [bases] if isinstance(bases, (str, Path)) else list(bases)
        extra: list[str | tuple[str, Any]] = list(overrides)
        if dtype is not None:
            extra.append(("sampling.dtype", precision(dtype)))
        experiment = load(paths, extra)
        return cls.open(experiment, device)

    @classmethod
    def open(cls, experiment: Experiment, device: str | torch.device | None = None) -> Pipeline:
        """The model of a loaded config, with its weights; ``device`` wins over ``parallel.device``."""
        place = torch.device(device) if device is not None else pick_device(experiment.parallel.device)
        if experiment.memory.budget is not None:
            experiment = budgeted(keep_text_encoder(experiment), place)
        return cls(*open_generator(experiment, place), experiment)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.generator.device

    @property
    def drawer(self) -> Generator:
        """The generator, by its name before 0.2; write ``generator``."""
        return self.generator

    @property
    def adapters(self) -> dict[str, float]:
        """The adapters in use (``adapters.load``) by name, with their strengths."""
        parts = adaptable(self.generator.engine).values()
        return {n: s for part in parts for _, layer in lora.adapted(part) for n, s in layer.strengths.items()}

    def set_strength(self, name: str, strength: float) -> None:
        """How much the adapter ``name`` counts in the next pictures: 0 not at all, 1 as trained."""
        if name not in self.adapters:
            raise ValueError(f"no adapter {name!r} is loaded; there are {', '.join(self.adapters) or 'none'}")
        for part in adaptable(self.generator.engine).values():
            if name in lora.names(part):
                lora.set_strength(part, name, strength)

    def __call__(  # noqa: PLR0913 - the arguments people vary from one cell of a notebook to the next
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        batch_size: int = 1,
        latents: Tensor | None = None,
        callback: StepCallback | None = None,
        images: Sequence[Image.Image] | None = None,
    ) -> Output:
        """``batch_size`` pictures of each prompt; image i uses ``seed`` + i. What is None is the config's.

        ``height`` and ``width`` are pixels. ``latents`` is unit noise to start from instead of the seed's:
        (B, C, h, w) with B = ``batch_size``, used for every prompt, or one for each image.
        ``images`` are what a relay model enlarges: one for each picture to draw, prompt by prompt.
        ``callback(step, total, preview)`` is called after each step, ``total`` over all images, ``preview``
        the predicted latents (b, C, h, w) of the images being drawn.
        """
        requested = self._requested(height, width, steps, seed, batch_size)
        texts = checked_prompts([prompts] if isinstance(prompts, str) else prompts)
        if not texts:
            raise ValueError("no prompt: give at least one")
        negative = requested.negative_prompt if negative_prompt is None else negative_prompt
        check_text(negative, "the negative prompt")
        guider = with_strength(self.guider, guidance)
        params = SamplingParams(requested.height, requested.width, requested.steps, guider, requested.tile)
        low = None if images is None else _low(images, len(texts) * batch_size)
        shape = self.generator.engine.latent_shape(params.height, params.width)
        given = None if latents is None else checked_latents(latents, shape, len(texts), batch_size)
        noise = InitialNoise(requested.seed, shape, batch_size, given)
        report = _counted(callback, len(texts) * -(-batch_size // self.generator.at_once) * params.steps)
        drawn = [
            self.generator.latents(
                encoded,
                noise.of(prompt, range(batch_size)),
                params,
                report,
                None if low is None else low[prompt.index * batch_size : (prompt.index + 1) * batch_size],
            )
            for prompt, encoded in zip(
                texts, self.generator.encode([t.text for t in texts], negative), strict=True
            )
        ]
        return Output([image for z in drawn for image in self.generator.images(z)], torch.cat(drawn))

    def _requested(
        self, height: int | None, width: int | None, steps: int | None, seed: int | None, batch_size: int
    ) -> SamplingConfig:
        """The sampling section with what the call changes; its own rules check it."""
        sampling = self.experiment.sampling
        return replace(
            sampling,
            height=sampling.height if height is None else height,
            width=sampling.width if width is None else width,
            steps=sampling.steps if steps is None else steps,
            seed=sampling.seed if seed is None else seed,
            batch_size=batch_size,
        )


@dataclass(frozen=True)
class CascadeOutput:
    """Pictures of every stage by its name, in order; ``images`` are the last stage's."""

    stages: dict[str, list[Image.Image]]

    @property
    def images(self) -> list[Image.Image]:
        """The pictures of the last stage."""
        return list(self.stages.values())[-1]


class CascadePipeline:
    """Several models in a row, each enlarging the pictures of the one before.

    >>> draw = CascadePipeline.from_config("configs/tiny_cascade.yaml", device="cpu")
    >>> draw(["a red apple"], seed=0).images[0].save("apple.png")

    A stage's weights are loaded when it draws and freed after, unless ``keep_loaded``.
    """

    def __init__(
        self, cascade: Cascade, device: torch.device | str | None = None, *, keep_loaded: bool = False
    ) -> None:
        self.cascade, self.device, self.keep_loaded = cascade, device, keep_loaded
        self._loaded: dict[str, Pipeline] = {}

    @classmethod
    def from_config(
        cls,
        bases: str | Path | Sequence[str | Path],
        overrides: Sequence[str | tuple[str, Any]] = (),
        device: str | torch.device | None = None,
        *,
        keep_loaded: bool = False,
    ) -> CascadePipeline:
        """The cascade that the YAML files describe; ``overrides`` as on the command line."""
        paths = [bases] if isinstance(bases, (str, Path)) else list(bases)
        return cls(load_cascade(paths, list(overrides)), device, keep_loaded=keep_loaded)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | None = None,
        negative_prompt: str | None = None,
        batch_size: int = 1,
    ) -> CascadeOutput:
        """``batch_size`` pictures of each prompt, drawn by all stages in turn; image i uses ``seed`` + i."""
        drawn: dict[str, list[Image.Image]] = {}
        for stage in self.cascade.stages:
            before = list(drawn.values())[-1] if drawn else None
            pipeline = self._open(stage)
            out = pipeline(
                prompts, seed=seed, negative_prompt=negative_prompt, batch_size=batch_size, images=before
            )
            drawn[stage.name] = out.images
            if not self.keep_loaded:
                del pipeline
        return CascadeOutput(drawn)

    def _open(self, stage: Stage) -> Pipeline:
        if stage.name in self._loaded:
            return self._loaded[stage.name]
        pipeline = Pipeline.open(stage.experiment, self.device)
        if self.keep_loaded:
            self._loaded[stage.name] = pipeline
        return pipeline


def keep_text_encoder(experiment: Experiment) -> Experiment:
    """``experiment`` for prompts that come one by one: the text encoder waits on the CPU instead of going."""
    memory = experiment.memory
    if memory.text_encoder == "keep" and memory.budget is not None:  # or the budget would have it go
        return replace(experiment, memory=replace(memory, text_encoder="cpu"))
    if memory.text_encoder != "free":
        return experiment
    log.info("asking for prompts needs the text encoder again: memory.text_encoder is cpu instead of free")
    return replace(experiment, memory=replace(experiment.memory, text_encoder="cpu"))


def budgeted(experiment: Experiment, device: torch.device) -> Experiment:
    """``experiment`` with what its ``memory.budget`` needs on ``device``, said in one line of the log."""
    picked = apply_budget(experiment, device)
    if picked is None:
        return experiment
    log.info("%s", picked)
    return picked.experiment


def open_generator(
    experiment: Experiment, device: torch.device, mesh: Mesh | None = None
) -> tuple[Generator, Guider]:
    """The engine of ``experiment`` with its weights on ``device``, ready to draw, and its guider.

    ``mesh``: the ranks that share the work; None is this process alone, which must be all that is asked for.
    """
    sampling, memory = experiment.sampling, experiment.memory
    if mesh is None:
        data_ranks(1, **experiment.parallel.sizes)
    waiting = offloaded_parts(memory, device)
    engine = build_engine(
        experiment, device=device, dtype=DTYPES[sampling.dtype], mesh=mesh, offloaded=waiting
    )
    engine.conditioner.moves_encoder = "text" not in waiting
    wanted = (sampling.attention, sampling.pack, sampling.fold, sampling.compile, sampling.graphs)
    message = quicken(engine, Speed(*wanted), device)
    generator = Generator(
        engine,
        build_sampler(experiment),
        device=device,
        text_memory=memory.text_encoder,
        at_once=sampling.at_once,
        decode_batch=memory.decode_batch,
        decode_tile=memory.decode_tile,
        team=ALONE if mesh is None else mesh.team,
    )
    generator.speed = message
    generator.offload = offload_schedule(engine, memory, device)
    generator.cache = build_cache(experiment)
    guider = build_guider(experiment)
    if mesh is not None:
        apply_sequence(engine.network, mesh.sequence)
        if mesh.guidance.size > 1:
            guider = CfgParallel(guider, mesh.guidance)
    return generator, guider


def input_folder(sampling: SamplingConfig, wanted: ProcessInput | None) -> InputFolder | None:
    """The pictures that a process wants; None without one. An error where only one of the two is there."""
    if wanted is None:
        if sampling.input_dir is not None:
            what = (
                f"is {sampling.input_dir}, but this model draws from noise alone: "
                f"only a relay model enlarges pictures"
            )
            raise ConfigError([Problem("", "sampling.input_dir", what)])
        return None
    if sampling.input_dir is None:
        if not wanted.required:
            return None
        what = (
            "this model enlarges pictures: name the output folder of a base model's run here, or draw both "
            "with a cascade (configs/cascade.yaml)"
        )
        raise ConfigError([Problem("", "sampling.input_dir", what)])
    height, width = wanted.size(sampling.height, sampling.width)
    return InputFolder(sampling.input_dir, height, width, sampling.batch_size)


def _low(images: Sequence[Image.Image], count: int) -> Tensor:
    """(count, 3, h, w) in [-1, 1]."""
    if len(images) != count:
        raise ValueError(
            f"{len(images)} images are given to enlarge, expected one for each of {count} pictures"
        )
    return torch.stack([from_pil(image) for image in images])


def precision(dtype: Precision | torch.dtype) -> Precision:
    """The name of ``dtype`` in a config."""
    for name, value in DTYPES.items():
        if dtype in (name, value):
            return name
    raise ValueError(f"dtype is {dtype!r}: expected {', '.join(DTYPES)}")


def _counted(callback: StepCallback | None, total: int) -> StepCallback | None:
    """``callback`` told of steps counted over all images instead of over those drawn together."""
    if callback is None:
        return None
    tell, done = callback, 0

    def step(now: int, of: int, preview: Tensor) -> None:
        nonlocal done
        done += 1
        tell(done, total, preview)

    return step
