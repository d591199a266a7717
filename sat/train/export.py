"""What a checkpoint holds beside the state: the trained parts as a native folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat.checkpoint.format import InMemory
from sat.checkpoint.save import Options, save_native
from sat.train.objectives import Objective


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
