"""The model from Python: ``Pipeline.from_config([...])`` once, then call it with prompts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from sat.adapters import lora
from sat.config.build import adaptable, build_engine, components
from sat.config.cascade import Cascade, load_cascade
from sat.config.load import load
from sat.config.schema import Experiment, Precision, RegionsConfig, SamplingConfig
from sat.config.settle import settle_dtype, settle_sampling, tell_slow
from sat.diffusion.guidance import Guider
from sat.diffusion.samplers import StepCallback
from sat.estimate.budget import apply_budget
from sat.kernels.apply import Speed, quicken
from sat.offload.block_swap import offload_schedule, offloaded_parts
from sat.parallel.cfg_parallel import CfgParallel
from sat.parallel.launch import ALONE, Mesh, data_ranks, exact, free_memory, pick_device
from sat.parallel.sequence import apply_sequence
from sat.sampling.generator import EncodedPrompt, Generator, SamplingParams, Strong
from sat.sampling.inputs import InputList, checked_latents
from sat.sampling.prompts import Prompt, check_text, checked_prompts

if TYPE_CHECKING:
    from sat.sampling.controls import ControlImage, ControlPictures, LoadedControls
    from sat.sampling.edit import EditInput

log = logging.getLogger(__name__)

GivenPicture = Image.Image | Sequence[Image.Image]
"""One picture for all that are drawn, or one for each, prompt by prompt."""

T = TypeVar("T")

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""torch's types by their names in ``sampling.dtype``."""


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

    def __init__(
        self,
        generator: Generator,
        guider: Guider,
        experiment: Experiment,
        controls: LoadedControls | None = None,
    ) -> None:
        self.generator = generator
        self.guider = guider
        self.experiment = experiment
        self._controls = controls

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
    def open(
        cls,
        experiment: Experiment,
        device: str | torch.device | None = None,
        mesh: Mesh | None = None,
        *,
        once: bool = False,
        controls: Collection[Path] = (),
    ) -> Pipeline:
        """The model of a loaded config, with its weights; ``device`` wins over ``parallel.device``.

        ``mesh``: the ranks that share the work; None is this process, which must be all that the config asks
        for. ``once``: all prompts come at the start, so that a memory budget may let the text encoder go.
        ``controls`` are files of controls beside those of ``sampling.controls``.
        """
        place = exact(device) if device is not None else pick_device(experiment.parallel.device)
        main = mesh is None or mesh.rank == 0
        experiment = settle_dtype(experiment, place, main=main)
        tell_slow(experiment.sampling.dtype, "sampling.dtype=fp32", place)
        if experiment.memory.budget is not None:
            picked = apply_budget(experiment if once else keep_text_encoder(experiment), place)
            if picked is not None:
                log.info("%s", picked)
                experiment = picked.experiment
        sampling, memory = experiment.sampling, experiment.memory
        if mesh is None:
            data_ranks(1, **experiment.parallel.sizes)
        if sampling.controls or controls:
            from sat.sampling.controls import LoadedControls, check_controls

            check_controls(experiment, controls)  # before weights are read
        waiting, dtype = offloaded_parts(memory, place), DTYPES[sampling.dtype]
        engine = build_engine(experiment, device=place, dtype=dtype, mesh=mesh, offloaded=waiting)
        engine.conditioner.moves_encoder = "text" not in waiting
        loaded = None
        if sampling.controls or controls:
            tensor = ALONE if mesh is None else mesh.tensor
            loaded = LoadedControls.of(engine, experiment, tensor, controls)
        if mesh is not None and mesh.sequence.size > 1:
            apply_sequence(engine.network, mesh.sequence)
        height, width = engine.latent_shape(sampling.height, sampling.width)[1:]
        experiment = settle_sampling(experiment, engine, (height, width), place, main=main)
        sampling, light = experiment.sampling, components(experiment)
        wanted = (sampling.attention, sampling.pack, sampling.fold, sampling.compile, sampling.graphs,
                  sampling.convolutions)  # fmt: skip
        generator = Generator(
            engine,
            light.sampler,
            place,
            text_memory=memory.text_encoder,
            at_once=sampling.at_once,
            decode_batch=memory.decode_batch,
            decode_tile=memory.decode_tile,
            team=ALONE if mesh is None else mesh.team,
            rank=0 if mesh is None else mesh.rank,
            speed=quicken(engine, Speed(*wanted), place),
            offload=offload_schedule(engine, memory, place) if waiting else None,
            cache=light.cache,
        )
        guider = light.guider
        if mesh is not None and mesh.guidance.size > 1:
            guider = CfgParallel(guider, mesh.guidance)
        return cls(generator, guider, experiment, loaded)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
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

    @property
    def controls(self) -> LoadedControls:
        """The trained controls on the network; ``load`` adds one."""
        if self._controls is None:
            from sat.sampling.controls import LoadedControls

            if self.generator.offload is not None or self.generator.team.size > 1:
                raise ValueError(
                    "the network's weights are offloaded or shared by ranks: name its controls in "
                    "sampling.controls when it is opened"
                )
            self._controls = LoadedControls.of(self.generator.engine, self.experiment)
        if self._controls.speed is None:  # of what is loaded from now on
            s = self.experiment.sampling
            self._controls.speed = Speed(s.attention, s.pack, False, s.compile)
        return self._controls

    def control_pictures(
        self,
        sampling: SamplingConfig,
        given: Sequence[ControlImage | Mapping[str, Any]] | None = None,
        prompts: Sequence[Prompt] = (),
    ) -> ControlPictures | None:
        """The ``given`` controls of a call or the config's, and those of ``prompts``' rows; None for none."""
        rows = any(prompt.row.controls for prompt in prompts)
        if given is None and not sampling.controls and not rows:
            return None
        from sat.sampling.controls import ControlImage, ControlPictures, control_images

        images = (
            [ControlImage.of(one) for one in sampling.controls] if given is None else control_images(given)
        )
        return ControlPictures.of(
            self.controls, images, (sampling.height, sampling.width), sampling.batch_size, prompts
        )

    def encode(self, prompts: Sequence[str], negative_prompt: str | None = None) -> list[EncodedPrompt]:
        """Encoder outputs of ``prompts``, for calls of any pipeline that :meth:`same_text` is true of."""
        negative = self.experiment.sampling.negative_prompt if negative_prompt is None else negative_prompt
        check_text(negative, "the negative prompt")
        return self.generator.encode([prompt.text for prompt in checked_prompts(prompts)], negative)

    def set_strength(self, name: str, strength: float) -> None:
        """Set the weight of the adapter ``name`` in the next pictures: 0 turns it off, 1 is as trained."""
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
        controls: Sequence[ControlImage | Mapping[str, Any]] | None = None,
        image: GivenPicture | None = None,
        mask: GivenPicture | None = None,
        strength_map: GivenPicture | None = None,
        strength: float | None = None,
        edits: EditInput | None = None,
        regions: RegionsConfig | None = None,
        encoded: Sequence[EncodedPrompt] | None = None,
    ) -> Output:
        """``batch_size`` pictures of each prompt; image i uses ``seed`` + i. ``None`` is the config's value.

        ``height`` and ``width`` are pixels. ``latents`` is unit noise to start from instead of the seed's:
        (B, C, h, w) with B = ``batch_size``, used for every prompt, or one for each image.
        A relay model enlarges ``images``: one for each picture to draw, prompt by prompt.
        ``controls``: pictures for trained controls, each a ``ControlImage`` or a mapping of its fields
        (``control``, ``image``, ``scale``, ``start``, ``end``, …); a file that is not loaded yet is.
        ``image`` is a picture to change, or one for each to draw: as far as ``strength`` says, where ``mask``
        is white, or each place as far as ``strength_map`` is bright; ``sampling.fit`` brings it to size
        (docs/edit.md). ``edits`` stands for all four. ``regions`` are prompts for parts of the picture.
        ``encoded``: of :meth:`encode`, which takes the negative prompt then, one for each prompt.
        ``callback(step, total, preview)`` is called after each step, ``total`` over all images, ``preview``
        the predicted latents (b, C, h, w) of the images being drawn.
        """
        given = (("height", height), ("width", width), ("steps", steps), ("seed", seed),
                 ("negative_prompt", negative_prompt), ("strength", strength),
                 ("regions", regions))  # fmt: skip
        changed: dict[str, Any] = {key: value for key, value in given if value is not None}
        sampling = replace(self.experiment.sampling, batch_size=batch_size, **changed)  # its rules check it
        texts = checked_prompts([prompts] if isinstance(prompts, str) else prompts)
        if not texts:
            raise ValueError("no prompt: give at least one")
        check_text(sampling.negative_prompt, "the negative prompt")
        if encoded is not None and negative_prompt is not None:
            raise ValueError("a negative prompt beside `encoded`, which holds one: give it to encode()")
        guider = self.guider
        if guidance is not None:
            if not isinstance(guider, Strong):
                kind = type(guider).__name__
                raise ValueError(f"guidance {guidance:g} is asked for, but {kind} has no strength to set")
            guider = copy.copy(guider)
            guider.scale = float(guidance)
        engine, count, inputs = self.generator.engine, len(texts) * batch_size, None
        if latents is not None:
            shape = engine.latent_shape(sampling.height, sampling.width)
            latents = checked_latents(latents, shape, len(texts), batch_size)
        if images is not None:
            wanted = engine.process.input
            if wanted is None:
                raise ValueError("images are given to enlarge, but this model draws from noise alone")
            if len(images) != count:
                raise ValueError(
                    f"{len(images)} images are given to enlarge, expected one for each of {count} pictures"
                )
            inputs = InputList(*wanted.size(sampling.height, sampling.width), images, batch_size)
        pictures = {"init_image": image, "mask": mask, "strength_map": strength_map}
        edits = edits or _edits(sampling, texts, pictures)
        if edits is not None:
            edits.check(texts, batch_size)
        params = SamplingParams.of(sampling, guider, latents)
        requests = [(prompt, range(batch_size)) for prompt in texts]
        held = self.control_pictures(sampling, controls)
        drawn = list(self.generator.generate(
            requests, params, inputs=inputs, controls=held, edits=edits, callback=callback, encoded=encoded
        ))  # fmt: skip
        shown = [one.image for one in drawn if one.image is not None]
        return Output(shown, torch.stack([one.latents for one in drawn]))


def same_text(one: Experiment, other: Experiment) -> bool:
    """True if two settled experiments encode a prompt to the same bits, by weights of the same file."""

    def made(experiment: Experiment) -> tuple[object, ...]:
        own, sampling = experiment, experiment.sampling
        return (own.conditioning, own.adapters, own.memory, own.checkpoint.source("text"),
                own.checkpoint.random, sampling.dtype, sampling.negative_prompt,
                sampling.regions)  # fmt: skip

    source, random, *_, regions = made(one)[3:]
    return made(one) == made(other) and source is not None and random is None and regions is None


def _edits(
    sampling: SamplingConfig, prompts: Sequence[Prompt], pictures: Mapping[str, GivenPicture | None]
) -> EditInput | None:
    """The pictures to change that a caller or the config names; None for none."""
    given = {key: value for key, value in pictures.items() if value is not None}
    named = (sampling.init_image, sampling.mask, sampling.strength_map, sampling.strength, sampling.outpaint)
    if not given and all(value is None for value in named):
        return None
    from sat.sampling.edit import EditInput, PictureList  # only where there are any

    lists: dict[str, PictureList] = {}
    for key, value in given.items():
        one = [value] if isinstance(value, Image.Image) else list(value)
        if len(one) not in (1, count := len(prompts) * sampling.batch_size):
            raise ValueError(f"{len(one)} pictures are given as {key}, expected 1 or {count}")
        lists[key] = PictureList(one, key, sampling.batch_size)
    return EditInput.of(sampling, prompts, lists)


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
        self.cascade = cascade
        self.stages = StageLoader(
            lambda index: Pipeline.open(cascade.stages[index].experiment, device), keep_loaded=keep_loaded
        )

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
        image: GivenPicture | None = None,
        mask: GivenPicture | None = None,
        strength_map: GivenPicture | None = None,
        strength: float | None = None,
    ) -> CascadeOutput:
        """``batch_size`` pictures of each prompt, drawn by all stages in turn; image i uses ``seed`` + i.

        The first stage changes ``image`` as :class:`Pipeline` does; later ones keep what is outside its mask.
        """
        drawn: dict[str, list[Image.Image]] = {}
        encoded, encoder = None, None  # by whom: stages of one text encoder ask it once
        before, texts = None, checked_prompts([prompts] if isinstance(prompts, str) else prompts)
        first = self.cascade.stages[0].experiment.sampling
        first = replace(
            first, batch_size=batch_size, strength=first.strength if strength is None else strength
        )
        edits = _edits(first, texts, {"init_image": image, "mask": mask, "strength_map": strength_map})
        for number, stage in enumerate(self.cascade.stages):
            own, sampling = edits, stage.experiment.sampling
            if edits is not None and number:
                own = edits.following(sampling, sampling.height // first.height)[0]
            last = number + 1 == len(self.cascade.stages)
            pipe = self.stages.open(number)
            if encoder is None or not same_text(encoder, pipe.experiment):
                encoder, words = pipe.experiment, [text.text for text in texts]
                encoded = None if sampling.regions is not None else pipe.encode(words, negative_prompt)
            before = drawn[stage.name] = pipe(
                prompts, seed=seed, batch_size=batch_size, images=before,
                negative_prompt=negative_prompt if encoded is None else None,
                edits=None if own is None else replace(own, puts_back=last),
                encoded=encoded,
            ).images  # fmt: skip
            self.stages.free()
        return CascadeOutput(drawn)


class StageLoader(Generic[T]):
    """Loaded stages of a cascade, made by ``load``: one at a time, or all with ``keep_loaded``."""

    def __init__(self, load: Callable[[int], T], *, keep_loaded: bool = False) -> None:
        self._load, self._keep = load, keep_loaded
        self._loaded: dict[int, T] = {}

    def open(self, index: int) -> T:
        """Stage ``index``, loaded in place of the one before, or beside it."""
        if index not in self._loaded:
            self.free()
            self._loaded[index] = self._load(index)
        return self._loaded[index]

    def drop(self, index: int) -> None:
        """Forget stage ``index``, so that it is loaded anew."""
        if self._loaded.pop(index, None) is not None:
            free_memory()

    def free(self) -> None:
        """Drop what is loaded, unless all is to be kept."""
        if self._loaded and not self._keep:
            self._loaded.clear()
            free_memory()


def keep_text_encoder(experiment: Experiment) -> Experiment:
    """``experiment`` for prompts that come one by one: its text encoder waits on the CPU between them."""
    memory = experiment.memory
    if memory.text_encoder == "keep" and memory.budget is not None:  # or the budget would have it go
        return replace(experiment, memory=replace(memory, text_encoder="cpu"))
    if memory.text_encoder != "free":
        return experiment
    log.info("asking for prompts needs the text encoder again: memory.text_encoder is cpu instead of free")
    return replace(experiment, memory=replace(experiment.memory, text_encoder="cpu"))


def precision(dtype: Precision | torch.dtype) -> Precision:
    """The name of ``dtype`` in a config."""
    for name, value in DTYPES.items():
        if dtype in (name, value):
            return cast(Precision, name)
    raise ValueError(f"dtype is {dtype!r}: expected {', '.join(DTYPES)}")
