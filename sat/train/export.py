"""What a checkpoint holds beside the state: the trained parts as a native folder, or the adapter.

And where the whole model is that a run came to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sat.checkpoint.digest import digest
from sat.checkpoint.format import DTYPES, PARTS, CheckpointError, InMemory, Part
from sat.checkpoint.formats import detect
from sat.checkpoint.save import Options, save_native
from sat.config.load import load_full
from sat.config.schema import CheckpointConfig, Experiment, plain
from sat.engine import DiffusionEngine
from sat.train.checkpoints import Export
from sat.train.lora import AdapterExport
from sat.train.objectives import Objective
from sat.train.resume import NATIVE, RunFolder


def exporter(
    experiment: Experiment, weights: CheckpointConfig, engine: DiffusionEngine, objective: Objective
) -> Export:
    """Writes the trained parts as a native checkpoint folder, for sampling or another training.

    Of LoRA only the adapter is written, which names the model and the ``weights`` it belongs to.
    """
    assert experiment.train is not None, "only a training exports"
    dtype, lora = DTYPES[experiment.train.dtype], experiment.adapters.lora
    if lora is not None:
        paths = {"model": weights.source("model"), "text": weights.source("text")}
        base = {"model": plain(experiment.model), "text": plain(experiment.conditioning.text)}
        digests = {part: None if path is None else digest(path) for part, path in paths.items()}
        return AdapterExport(objective, lora, base, digests, dtype)
    described = ("model", "diffusion", "conditioning", "first_stage")
    sections = {name: plain(getattr(experiment, name)) for name in described}
    tokenizer = engine.conditioner.tokenizer
    return ModelExport(objective, sections, None if tokenizer is None else tokenizer.path, dtype)


@dataclass(frozen=True)
class ModelExport:
    """Writes the parts that ``objective`` trains; see :class:`sat.train.checkpoints.Export`.

    ``sections`` are those of the config that describe them; ``tokenizer`` is copied beside them.
    """

    objective: Objective
    sections: Mapping[str, Any]
    tokenizer: Path | None
    dtype: torch.dtype

    def frozen(self) -> dict[str, Tensor]:
        """What the parts hold beside what learns."""
        inside = {id(p) for module in self.objective.parts().values() for p in module.parameters()}
        return {
            name: p
            for name, p in self.objective.named_parameters()
            if id(p) in inside and not p.requires_grad
        }

    def __call__(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """A native folder of ``weights`` and the parts' tables."""
        names = {id(parameter): name for name, parameter in self.objective.named_parameters()}
        parts: dict[Any, InMemory] = {}
        for part, module in self.objective.parts().items():
            tensors = {
                key: weights[names[id(value)]] if id(value) in names else value.detach().cpu()
                for key, value in module.state_dict(keep_vars=True).items()
            }
            parts[part] = InMemory(tensors, exact=[name for name, _ in module.named_buffers()])
        save_native(folder, parts, self.sections, options=Options(dtype=self.dtype), tokenizer=self.tokenizer)


class Outcome(NamedTuple):
    """Where a run's model is: ``trained`` its newest checkpoint, ``parts`` those of other paths.

    A part of path None was drawn at random and not trained.
    """

    trained: Path
    parts: dict[Part, Path | None]
    tokenizer: Path | None


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is what a training wrote."""
    return (folder / "resolved.yaml").is_file() and (folder / "checkpoints").is_dir()


def outcome(run: Path) -> Outcome:
    """What the training in ``run`` came to, with the parts it left as they were."""
    saved = RunFolder(run).saved()
    if not saved:
        raise CheckpointError(f"{run}: this training has no whole checkpoint yet")
    native = saved[-1].path / NATIVE
    experiment = load_full([run / "resolved.yaml"]).experiment
    began = experiment.train.init_from if experiment.train is not None else None
    weights, held = began or experiment.checkpoint, detect(native).parts(native)
    others = {part: weights.source(part) for part in PARTS if part not in held}
    return Outcome(native, others, experiment.conditioning.tokenizer)
