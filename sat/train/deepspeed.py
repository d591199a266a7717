"""DeepSpeed: its settings, its engine and its quirks. No other file reaches into it.

Its private state (``_hp_mapping``, ``grad_position``, ``parameter_offload`` and others) was proved on
``PROVED``, on CPUs with gloo. Nothing here compiles an extension: the optimizer is always torch's, and the
shared-memory collective (built at start-up otherwise, used by inference only) is switched off.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sat.config.schema import TrainConfig
from sat.parallel.launch import Mesh, Runtime
from sat.train.backend import Backend, Fragment, StepResult

if TYPE_CHECKING:
    from sat.data.batch import Batch
    from sat.train.objectives import Objective

log = logging.getLogger(__name__)

PROVED = "0.19.8"
"""Version that the tests ran on; a line tells another one."""
PERSISTENT = 100_000
"""Elements up to which ZeRO 3 leaves a parameter whole on every rank."""


def settings(config: TrainConfig, world: int, *, pins: bool = False) -> dict[str, Any]:
    """DeepSpeed's JSON for ``config``; ``world`` ranks average gradients; ``pins``: pin offloaded memory."""
    if config.dtype != "fp32" and config.zero == 0:
        # DeepSpeed's bf16 without ZeRO takes one optimizer step on zero gradients while it starts.
        raise ValueError(
            f"train.dtype {config.dtype} needs train.zero 1, 2 or 3, which keep float32 masters; got 0"
        )
    place = {"device": "cpu", "pin_memory": pins}
    zero: dict[str, Any] = {"stage": config.zero}
    if config.offload.optimizer:
        zero["offload_optimizer"] = place
    if config.offload.parameters:
        zero["offload_param"] = place
    if config.zero == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT
    return {
        "train_batch_size": config.batch_size * config.accumulate * world,
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": 0.0 if config.zero == 0 else (config.clip or 0.0),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # theirs would be compiled here; torch's runs on the CPU too
        "bf16": {"enabled": config.dtype == "bf16"},
        "fp16": {"enabled": config.dtype == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "flops_profiler": {"enabled": False},
    }


def check_dtype(config: TrainConfig, runtime: Runtime) -> None:
    """Raise where DeepSpeed cannot train in ``train.dtype`` on this device, before weights are read."""
    if config.dtype == "fp16" and not _import(runtime).accelerator.get_accelerator().is_fp16_supported():
        raise ValueError(f"train.dtype fp16 cannot be trained on {runtime.device}: set it to bf16 or fp32")


class DeepSpeedBackend(Backend):
    """DeepSpeed's engine around an objective, with the same behaviour at every ZeRO stage.

    At ZeRO 0 in float32 DeepSpeed neither reports the gradient norm nor skips steps with gradients that are
    not finite; both are done here.
    """

    def __init__(
        self, objective: Objective, optimizer: Optimizer, config: TrainConfig, runtime: Runtime, mesh: Mesh,
        imports: Collection[str] = (),
    ) -> None:  # fmt: skip
        deepspeed = _import(runtime)
        super().__init__(objective, config, runtime, mesh)
        for name, parameter in objective.named_parameters():
            if name in self.split:  # DeepSpeed counts it on every tensor rank when it takes the norm
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        for parameter in objective.parameters():  # DeepSpeed sends them as flat bytes
            parameter.data = parameter.data.contiguous()
        tables = {id(owner): dict(owner._buffers) for owner in objective.modules()}
        self.engine, _, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config=settings(config, mesh.gradient.size, pins=runtime.pins),
            mpu=mesh,
            dist_init_required=False,
        )
        for owner in objective.modules():  # half precision is for weights: tables stay as they were built
            for name, table in tables[id(owner)].items():
                owner._buffers[name] = None if table is None else table.to(runtime.device)
        self._begin(imports)

    @property
    def optimizer(self) -> Optimizer:
        """Optimizer with the groups that carry the learning rate (DeepSpeed's wrapper from ZeRO 1 on)."""
        optimizer: Optimizer = self.engine.optimizer
        return optimizer

    @property
    def inner(self) -> Optimizer:
        """Optimizer that keeps the state and steps the fragments' keys."""
        inner: Optimizer = self.engine.optimizer if self.config.zero == 0 else self.engine.optimizer.optimizer
        return inner

    @property
    def loss_scale(self) -> float:
        """Loss scale of fp16; 1 in other precisions."""
        return float(self.engine.optimizer.loss_scale) if self.config.dtype == "fp16" else 1.0

    def forward(self, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Scalars of the objective on a micro-batch."""
        values: Mapping[str, Tensor] = self.engine(batch, generator)
        return values

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a micro-batch; with the ``last`` of a step the ranks average theirs."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)
        if not last:
            self.engine.step()

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, averaged gradient), whole at stage 0, else of this rank's share."""
        if self.config.zero == 0:
            yield from super()._gradients()
            return
        from deepspeed.utils import safe_get_local_grad

        scale = self.loss_scale
        for name, parameter in self.parameters.items():
            if self.config.zero == 3:
                found = safe_get_local_grad(parameter)
            elif (mapping := parameter._hp_mapping) is None:  # type: ignore[attr-defined]
                continue
            else:
                index = parameter._index_in_param_group  # type: ignore[attr-defined]
                found = mapping.get_lp_grad_fragment(index)
            if found is not None:
                yield name, found.detach() / scale

    def step(self) -> StepResult:
        """Clip and apply the accumulated gradients, unless they are not finite."""
        if self.config.zero > 0:
            self._leave_resting()
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            return StepResult(bool(self.engine.was_step_applied()), math.nan if norm is None else norm)
        result = self._clip()  # every rank holds the averaged gradients, so each decides the same alone
        if result.applied:
            self.engine.step()
        else:
            self.engine.zero_grad()
        return result

    def _leave_resting(self) -> None:
        """Zero the gradients that ZeRO 3 keeps of roles that rest since they last learned.

        It would count them in the norm, and clip those of the others by it.
        """
        resting = self.objective.resting() if self.config.zero == 3 else frozenset()
        for name, parameter in self.parameters.items() if resting else ():
            if self.objective.role(name) in resting:
                optimizer, number = self.engine.optimizer, parameter.ds_id  # type: ignore[attr-defined]
                optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[number].zero_()
                offloaded = getattr(optimizer, "norm_for_param_grads", {})
                offloaded.pop(optimizer.get_param_id(parameter), None)

    # ------------------------------------------------------------------ shares of the state

    def _fragments(self) -> Iterator[tuple[str, Fragment]]:
        """(name, share) for every trained parameter with a share on this rank."""
        optimizer = self.engine.optimizer
        if self.config.zero == 0:
            yield from super()._fragments()
            return
        for name, parameter in self.parameters.items():
            if self.config.zero < 3:
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:
                    key = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                    start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
                    yield name, Fragment(mapping.hp_fragment.detach().view(-1), int(start), key, int(offset))
            else:
                group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = self.mesh.gradient.rank * int(count)
                own = max(0, min(int(count), parameter.ds_numel - start))  # type: ignore[attr-defined]
                if own:
                    key = optimizer.fp32_partitioned_groups_flat[group]
                    yield name, Fragment(key.detach()[offset : offset + own], start, key, int(offset))

    def whole(self, name: str, shard: Tensor | None) -> Tensor:
        """Float32 parameter ``name`` of this tensor rank from all ranks' flat shares; a collective."""
        if self.config.zero == 0:
            return super().whole(name, shard)
        shape = self.shapes[name]
        full = torch.zeros(math.prod(shape), dtype=torch.float32, device=self.runtime.device)
        if shard is not None:
            start = self.fragments[name].start
            full[start : start + shard.numel()] = shard
        if self.mesh.gradient.size > 1:
            dist.all_reduce(full, group=self.mesh.gradient.group)
        return full.view(shape)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the float32 masters, which were written to, into the weights; a collective."""
        if self.config.zero in (1, 2):
            for name, value in self.masters():
                self.parameters[name].copy_(value)
        elif self.config.zero == 3:
            optimizer = self.engine.optimizer
            optimizer.checkpoint_event_prologue()  # shares out what is whole
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Keep every parameter whole inside the block; values written there are lost.

        At ZeRO 3 DeepSpeed's hooks are off meanwhile, so that ranks may do different things. At lower stages
        nothing is done, and written values stay.
        """
        if self.config.zero < 3:
            yield
            return
        offload = self.engine.optimizer.parameter_offload
        parameters = list(self.objective.parameters())
        offload.partition_all_parameters()
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        parameters[0].all_gather(parameters)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            parameters[0].partition(parameters)  # type: ignore[attr-defined]
            offload._register_deepspeed_module(offload.module)
            self.engine.optimizer.checkpoint_event_epilogue()  # small ones are whole again

    def gathered(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) one by one, whole until the next; every rank must go through all of them."""
        for name, parameter in parameters.items():
            if self.config.zero < 3:
                yield name, parameter
                continue
            whole = parameter.ds_status.name == "AVAILABLE"  # type: ignore[attr-defined]
            if not whole:
                parameter.all_gather([parameter])  # type: ignore[attr-defined]
            yield name, parameter
            if not whole:
                parameter.partition([parameter])  # type: ignore[attr-defined]

    @property
    def scaler(self) -> dict[str, float]:
        """State of the fp16 loss scale; empty in other precisions."""
        if self.config.dtype != "fp16":
            return {}
        kept = vars(self.engine.optimizer.loss_scaler)
        return {name: value for name, value in kept.items() if name.startswith(("cur_", "last_"))}

    @scaler.setter
    def scaler(self, values: Mapping[str, float]) -> None:
        if self.config.dtype == "fp16":
            vars(self.engine.optimizer.loss_scaler).update(values)


def _import(runtime: Runtime) -> Any:
    """DeepSpeed, quiet and without building anything."""
    os.environ.setdefault("DS_ACCELERATOR", runtime.device.type)
    warnings.filterwarnings(  # its collectives go by torch's old names
        "ignore", r"`torch.distributed\.\w+` is deprecated", FutureWarning
    )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if deepspeed.__version__.partition("+")[0] != PROVED:
        log.info("deepspeed %s: sat/train/deepspeed.py was proved on %s", deepspeed.__version__, PROVED)
    return deepspeed
