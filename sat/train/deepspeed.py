"""The only place that knows DeepSpeed: its settings, its engine, and its quirks.

Nothing here compiles an extension: the optimizer is always torch's, and the shared-memory collective (built
at start-up otherwise, used by inference only) is switched off.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sat.config.schema import TrainConfig
from sat.parallel.launch import Runtime
from sat.parallel.mesh import Mesh
from sat.train.optim import trainable

if TYPE_CHECKING:
    from sat.train.objectives import Objective

log = logging.getLogger(__name__)

STATE = "state"  # DeepSpeed's tag: the folder of its files inside a checkpoint


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. ``norm`` is the gradient norm before clipping, over all ranks."""

    applied: bool
    norm: Tensor | float


def settings(config: TrainConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's JSON for ``config``; ``world`` ranks average their gradients."""
    if config.dtype != "fp32" and config.zero == 0:
        # DeepSpeed's bf16 without ZeRO takes one optimizer step on zero gradients while it starts.
        raise ValueError(
            f"train.dtype {config.dtype} needs train.zero 1 or 2, which keep float32 masters; got 0"
        )
    return {
        "train_batch_size": config.batch_size * config.accumulate * world,
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": 0.0 if config.zero == 0 else (config.clip or 0.0),
        "zero_optimization": {"stage": config.zero},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.dtype == "bf16"},
        "fp16": {"enabled": config.dtype == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "flops_profiler": {"enabled": False},
    }


class TrainEngine:
    """A DeepSpeed engine around an objective, with the same behaviour at every ZeRO stage.

    At ZeRO 0 in float32 DeepSpeed neither reports the gradient norm nor skips a step whose gradients are not
    finite; both are done here.
    """

    def __init__(
        self, objective: Objective, optimizer: Optimizer, config: TrainConfig, runtime: Runtime, mesh: Mesh
    ) -> None:
        deepspeed = _import(runtime)
        self.config, self.runtime, self.mesh = config, runtime, mesh
        self.objective = objective
        self.parameters = trainable(objective)
        for parameter in objective.parameters():  # DeepSpeed sends them as flat bytes
            parameter.data = parameter.data.contiguous()
        tables = {id(owner): dict(owner._buffers) for owner in objective.modules()}
        self.engine, _, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config=settings(config, mesh.gradient.size),
            mpu=mesh,
            dist_init_required=False,
        )
        for owner in objective.modules():  # half precision is for weights: tables stay as they were built
            for name, table in tables[id(owner)].items():
                owner._buffers[name] = None if table is None else table.to(runtime.device)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose groups carry the learning rate (DeepSpeed's wrapper at ZeRO 1 and 2)."""
        optimizer: Optimizer = self.engine.optimizer
        return optimizer

    @property
    def loss_scale(self) -> float:
        """The fp16 loss scale in use; 1 in other precisions."""
        return float(getattr(self.engine.optimizer, "cur_scale", 1.0)) if self.config.dtype == "fp16" else 1.0

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of one micro-batch; ``last`` closes the step, and ranks average theirs."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)
        if not last:
            self.engine.step()

    def step(self) -> StepResult:
        """Clip and apply the accumulated gradients, unless they are not finite."""
        if self.config.zero == 0:
            return self._plain_step()
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return StepResult(bool(self.engine.was_step_applied()), float("nan") if norm is None else norm)

    def _plain_step(self) -> StepResult:
        """ZeRO 0, float32: every rank holds the averaged gradients, so each decides the same alone."""
        limit = float("inf") if self.config.clip is None else self.config.clip
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        if not bool(torch.isfinite(norm)):
            self.engine.zero_grad()
            return StepResult(False, norm)
        self.engine.step()
        return StepResult(True, norm)

    def master(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's float32 master values of ``parameter``, flat; None when another rank has all of it.

        A view: writing to it would change the optimizer's copy. At ZeRO 0 the parameter itself.
        """
        if self.config.zero == 0:
            return parameter.detach().view(-1)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return None if mapping is None else mapping.get_hp_fragment().view(-1)

    def master_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """(start, length) of ``master(parameter)`` inside the flattened parameter."""
        if self.config.zero == 0:
            return 0, parameter.numel()
        address = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
        return int(address.start), int(address.numel)

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into ``folder / STATE``; every rank calls it.

        DeepSpeed's own ``latest`` file is written before all ranks are done, so it is not written at all:
        the caller's marker commits the checkpoint.
        """
        self.engine.save_checkpoint(
            str(folder), tag=STATE, save_latest=False, exclude_frozen_parameters=True, client_state={}
        )

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote; every rank calls it."""
        path, _ = self.engine.load_checkpoint(str(folder), tag=STATE, load_module_strict=False)
        if path is None:
            raise RuntimeError(f"{folder / STATE}: DeepSpeed found no checkpoint there")


def _import(runtime: Runtime) -> Any:
    """DeepSpeed, quiet and without building anything."""
    os.environ.setdefault("DS_ACCELERATOR", runtime.device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
