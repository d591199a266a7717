"""Training of a control beside a frozen network, or of a network or LoRA with a frozen control on it."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sat.adapters.factors import row_norms, some_norms
from sat.checkpoint.verify import Verify
from sat.config.build import build_empty, cast_weights, components, without_init
from sat.config.check import build
from sat.config.schema import Experiment, TrainConfig, plain
from sat.control import files
from sat.control.base import BaseModel, Control, ControlError, attach
from sat.control.files import ControlInfo
from sat.control_input import ControlInput, Controls
from sat.data.dataset import Encode, MadeExtra
from sat.data.preprocess import Preprocess
from sat.data.records import CONTROL
from sat.engine import DiffusionEngine
from sat.parallel.launch import ALONE, Axis
from sat.parallel.sequence import apply_sequence
from sat.sampling.inputs import PictureFiles
from sat.sampling.output import from_pil
from sat.sampling.prompts import Prompt
from sat.train.objectives import Objective
from sat.train.objectives.diffusion import DiffusionObjective, TrainedControl
from sat.train.optim import autocast
from sat.transformer import Transformer
from sat.util.pictures import fitted

log = logging.getLogger(__name__)

NAME = "control"
"""Name of the control in the network while it is trained."""


def described(experiment: Experiment) -> ControlInfo:
    """The control that ``adapters.control`` asks for: a new one's description, or that of ``start``."""
    config = experiment.adapters.control
    assert config is not None, "only asked for with one"
    if config.start is not None:
        info = files.read_info(config.start)
        files.check_fits(info, experiment.model, config.start, experiment.imports)
        if config.design is not None and plain(config.design) != plain(info.control):
            log.info("%s: its own design counts, %s", config.start, plain(info.control))
        return replace(info, picture=config.picture or info.picture)
    assert config.design is not None, "the section's rules ask for one"
    return ControlInfo(config.design, experiment.model, config.picture)


def without_weights(experiment: Experiment) -> Control:
    """The control without values, to ask what it takes."""
    base = BaseModel(build_empty(experiment.model, experiment.imports), experiment.model, experiment.imports)
    with torch.device("meta"), without_init():
        made: Control = build(described(experiment).control, imports=experiment.imports, base=base)
    return made


def made_pictures(experiment: Experiment) -> dict[str, MadeExtra]:
    """Preprocessing that makes the control's picture of each picture that comes without one."""
    if experiment.adapters.control is None:
        return {}
    info, data = described(experiment), experiment.data
    if info.picture is None:
        if data is not None and any(source.control is None for source in data.sources):
            raise ControlError(
                "adapters.control.picture: pictures of data.sources come without a control's: name a "
                "preprocessing that makes it, or their place in data.sources.N.control"
            )
        return {}
    made = build(info.picture, imports=experiment.imports)
    return {CONTROL: MadeExtra(made, str(plain(info.picture)))}


def encoder(experiment: Experiment, engine: DiffusionEngine, train: TrainConfig) -> Encode:
    """Encoding of the control's pictures by the engine's first stage; values as ``ControlInput`` has them."""
    return _encode(without_weights(experiment), engine, train)


def _encode(control: Control, engine: DiffusionEngine, train: TrainConfig) -> Encode:
    device = next(engine.first_stage.parameters(), torch.empty(0)).device

    def encode(pictures: Tensor) -> Tensor:
        with torch.no_grad(), autocast(train, device.type):
            return control.encode(engine.first_stage, pictures.to(device))

    return encode


def add_control(
    objective: Objective,
    experiment: Experiment,
    train: TrainConfig,
    tensor: Axis = ALONE,
    sequence: Axis = ALONE,
    *,
    load: bool = True,
) -> None:
    """Put the control on the network that ``objective`` trains; but for a LoRA, a learning one learns alone.

    A new one begins as a copy of the network's weights, the rest drawn from ``train.seed``. ``load`` false
    builds that of ``start`` without reading it. ``tensor`` and ``sequence`` share it as the network is.
    """
    config = experiment.adapters.control
    assert config is not None, "only called with one"
    if not isinstance(objective, DiffusionObjective):
        raise ControlError(
            f"{type(objective).__name__} trains without pictures for a control: set adapters.control to null"
        )
    base = BaseModel(objective.network, experiment.model, experiment.imports, tensor)
    if config.start is not None and load:
        made, _ = files.read(config.start, base, Verify(experiment.checkpoint.verify))
        log.info("%s: the control that training goes on from", config.start)
    else:
        here = next(objective.network.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(train.seed)
            made = build(described(experiment).control, imports=experiment.imports, base=base)
        for held in (*made.parameters(), *made.buffers()):
            held.data = held.data.to(here.device)
        cast_weights(made, here.dtype)
    if config.train and experiment.adapters.lora is None:  # LoRA has frozen all but its factors
        objective.requires_grad_(False)
    made.requires_grad_(config.train)
    if sequence.size > 1 and any(isinstance(module, Transformer) for module in made.modules()):
        apply_sequence(made, sequence)
    attach(objective.network, NAME, made)
    guidance = None
    if getattr(objective.network, "guidance", None) is not None:
        guidance = float(getattr(components(experiment).guider, "scale", 1.0))
        log.info("the model is distilled: the control learns at its guidance strength %g", guidance)
    encode = _encode(made, objective.engine, train)
    objective.control = TrainedControl(NAME, made, encode, config.dropout, guidance)


@dataclass(frozen=True)
class SamplePictures:
    """Pictures that steer the samples of a training, one a prompt, of ``height`` x ``width`` pixels."""

    control: TrainedControl
    files: PictureFiles
    preprocess: Preprocess | None
    height: int
    width: int

    @classmethod
    def of(cls, objective: Objective, experiment: Experiment) -> SamplePictures | None:
        """Those of ``adapters.control.samples``; None, and a line in the log, where there are none."""
        config, size = experiment.adapters.control, experiment.sampling
        if config is None or not isinstance(objective, DiffusionObjective) or objective.control is None:
            return None
        if config.samples is None:
            log.warning("samples in between are drawn without the control: name adapters.control.samples")
            return None
        picture, takes = described(experiment).picture, objective.control.module.takes
        if picture is None and takes == "inpaint":
            raise ControlError(
                "adapters.control.samples: inpainting makes its masks by adapters.control.picture"
            )
        made = None if picture is None else build(picture, imports=experiment.imports)
        files = PictureFiles(config.samples, "adapters.control.samples")
        return cls(objective.control, files, made, size.height, size.width)

    def read(self, prompt: Prompt, images: Sequence[int]) -> list[Tensor]:
        """The prompt's picture (n, 3 or 4, height, width) in [-1, 1], for each image."""
        whole = self.files.open(prompt, 0).rgb
        picture = from_pil(fitted(whole, self.height, self.width, "crop"))
        if self.preprocess is not None:
            picture = self.preprocess(picture, random.Random(prompt.index))
        return [torch.stack([picture] * len(images))]

    def encode(self, prompt: Prompt, pictures: Sequence[Tensor], device: torch.device) -> Controls:
        """The network's input."""
        (picture,) = pictures
        value = self.control.encode(picture.to(device))
        blank = bool(getattr(self.control.module, "blank", False))
        return (ControlInput(self.control.name, value, (1.0,) * len(value), blank=blank),)


def empty_pictures(
    objective: Objective, count: int, size: tuple[int, int], *, encoded: bool
) -> dict[str, Tensor]:
    """Extras of a micro-batch without data: the control's pictures of ``size``, or their encodings."""
    if not isinstance(objective, DiffusionObjective) or objective.control is None:
        return {}
    takes, (channels, h, w) = objective.control.module.takes, objective.engine.latent_shape(*size)
    whole = (3 + (takes == "inpaint"), *size)
    kept = {"latent": (channels, h, w), "inpaint": (1 + channels, h, w)}.get(str(takes), whole)
    return {CONTROL: torch.empty(count, *(kept if encoded else whole))}


@dataclass(frozen=True)
class ControlExport:
    """Writes the control under training; see :class:`sat.train.checkpoints.Export`."""

    objective: Objective
    control: Control
    info: ControlInfo
    dtype: torch.dtype

    def frozen(self) -> dict[str, Tensor]:
        """Weights of the base that tell it from others, and of the control what does not learn."""
        names = {id(p): name for name, p in self.objective.named_parameters()}
        bases = [layer.weight for _, layer in files.telling_layers(self._network)]
        own = [p for p in self.control.parameters() if not p.requires_grad]
        return {names[id(p)]: p for p in (*bases, *own) if id(p) in names}

    @property
    def _network(self) -> nn.Module:
        return self.objective.parts()["model"]

    def __call__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write ``folder/control.safetensors`` from ``weights``: tensors by their name in the objective."""
        names = {id(p): name for name, p in self.objective.named_parameters()}

        def value(tensor: Tensor) -> Tensor:
            return weights.get(names.get(id(tensor), ""), tensor.detach()).cpu()

        tensors = {n: value(t) for n, t in self.control.state_dict(keep_vars=True).items()}
        exact = {name for name, _ in self.control.named_buffers()}
        told = files.telling_layers(self._network)
        norms = {name: some_norms(row_norms(value(layer.weight))) for name, layer in told}
        files.write(folder / files.FILE, tensors, replace(self.info, norms=norms), self.dtype, exact)


def export(
    experiment: Experiment, objective: DiffusionObjective, digest: str | None, dtype: torch.dtype
) -> ControlExport:
    """The export of the control that learns; ``digest`` is of the base's files."""
    info, trained = described(experiment), objective.control
    assert trained is not None and isinstance(trained.module, Control), "the training put it there"
    outside = tuple(n for n in experiment.imports if info.control.target.startswith(f"{n}."))
    return ControlExport(objective, trained.module, replace(info, digest=digest, imports=outside), dtype)
