"""Backends: the few verbs by which the loop runs, differentiates, steps and reads a trained objective.

:class:`PlainBackend` is torch alone, in one process. :mod:`sat.train.deepspeed` shares the state out over
ranks. Checkpoints, averages and the loop know the verbs only, so a run goes on under either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from sat.checkpoint.load import shards
from sat.config.schema import Component, TrainConfig
from sat.errors import UserError
from sat.parallel.launch import Mesh, Runtime
from sat.parallel.tensor import joined, summed
from sat.train.optim import Scheduler, group_of, trainable

if TYPE_CHECKING:
    from sat.data.batch import Batch
    from sat.train.objectives import Objective


class BackendError(UserError, ValueError):
    """Backend that is not installed, or does not train on this number of ranks."""


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimizer step. ``norm`` is the gradient norm over all ranks, before clipping."""

    applied: bool
    norm: Tensor | float


@dataclass(frozen=True)
class Fragment:
    """This rank's share of a trained parameter.

    ``master``: its float32 values, a flat view, from ``start`` of the flattened parameter on. ``key`` is the
    tensor that the optimizer steps; the values lie there from ``offset`` on.
    """

    master: Tensor
    start: int
    key: Tensor
    offset: int


class Backend(ABC):
    """A trained ``objective`` with its ``optimizer``.

    The verbs: ``forward``, ``backward`` and ``step`` train; ``whole`` and ``gathered`` read, ``publish``
    makes written masters count, ``unsharded`` lets ranks go different ways, ``scaler`` is the state of a loss
    scale. ``fragments`` are this rank's shares of the trained ``parameters``, which ``inner`` steps.
    ``scheduler``: ``train.schedule`` where that is a component, which may lie in ``imports``. A
    tensor-parallel rank sees its own shares of the parameters in ``split``.
    """

    def __init__(self, objective: Objective, config: TrainConfig, runtime: Runtime, mesh: Mesh) -> None:
        self.objective, self.config, self.runtime, self.mesh = objective, config, runtime, mesh
        self.parameters = trainable(objective)
        self.shapes = {name: list(p.shape) for name, p in self.parameters.items()}
        self.split = shards(objective)
        self.fragments: dict[str, Fragment] = {}
        self.scheduler: Scheduler | None = None

    def _begin(self, imports: Collection[str]) -> None:
        """Find the fragments and make the scheduler, once the optimizer is the backend's."""
        self.fragments = dict(self._fragments())
        named = isinstance(self.config.schedule, Component)
        self.scheduler = Scheduler(self.config, imports, self.inner) if named else None

    # ------------------------------------------------------------------ training

    @property
    @abstractmethod
    def inner(self) -> Optimizer:
        """Optimizer that keeps the state and steps the fragments' keys."""

    @property
    def optimizer(self) -> Optimizer:
        """Optimizer with the groups that carry the learning rate."""
        return self.inner

    @property
    def loss_scale(self) -> float:
        """Loss scale of fp16; 1 in other precisions."""
        return 1.0

    @abstractmethod
    def forward(self, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Scalars of the objective on a micro-batch; gradients of ``loss`` can be taken."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a micro-batch; with the ``last`` of a step the ranks average theirs."""

    @abstractmethod
    def step(self) -> StepResult:
        """Clip and apply the accumulated gradients, unless they are not finite."""

    def group_norms(self) -> dict[str, Tensor]:
        """``grad_norm/NAME`` of every part, or of ``train.groups`` and the rest, before clipping.

        To be asked for between ``backward`` and ``step``; every rank calls it. On ranks that share gradients
        out, each has the sum of its own shares' squares, and these are added up; so are those of tensor
        ranks, which all have what is not split.
        """
        squares: dict[str, Tensor] = {}
        for name, gradient in self._gradients():
            group = group_of(self.objective, name, self.config)
            own = gradient.float().square().sum()
            if name not in self.split:  # every tensor rank has it
                own = own / self.mesh.tensor.size
            squares[group] = squares[group] + own if group in squares else own
        names = sorted({group_of(self.objective, name, self.config) for name in self.parameters})
        zero = torch.zeros((), device=self.runtime.device)
        found = torch.stack([squares.get(name, zero) for name in names])
        if self.config.zero > 0:
            found = summed(found, self.mesh.gradient)
        found = summed(found, self.mesh.tensor)
        return {f"grad_norm/{name}": value for name, value in zip(names, found.sqrt(), strict=True)}

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, averaged gradient) of trained parameters, or of this rank's shares of them."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                yield name, parameter.grad

    def _clip(self) -> StepResult:
        """Norm of whole, averaged gradients, which are clipped in place if it is finite."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm = _total_norm([g for name, g in gradients.items() if name not in self.split])
        if self.split:  # the tensor ranks' shares together
            own = _total_norm([g for name, g in gradients.items() if name in self.split])
            norm = (norm.to(own.device).square() + summed(own.square(), self.mesh.tensor)).sqrt()
        if not bool(torch.isfinite(norm)):
            return StepResult(False, norm)
        if self.config.clip is not None:
            share = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(list(gradients.values()), share)
        return StepResult(True, norm)

    # ------------------------------------------------------------------ shares of the state

    @property
    def shard_name(self) -> str:
        """Name of this rank's files: its tensor rank and its rank among those that share the optimizer."""
        return f"{self.mesh.tensor.rank:03d}_{self.mesh.gradient.rank:05d}"

    def _fragments(self) -> Iterator[tuple[str, Fragment]]:
        """(name, share) for every trained parameter with a share on this rank; here each whole."""
        for name, parameter in self.parameters.items():
            yield name, Fragment(parameter.detach().view(-1), 0, parameter, 0)

    @property
    def whole_shapes(self) -> dict[str, list[int]]:
        """Shapes of the whole trained parameters, tensor ranks joined."""
        return {
            name: list(self.split[name].whole(shape)) if name in self.split else shape
            for name, shape in self.shapes.items()
        }

    def joined(self, name: str, value: Tensor) -> Tensor:
        """Whole parameter ``name`` from the ``value`` of each tensor rank; a collective."""
        shard = self.split.get(name)
        return value if shard is None else joined(value, shard.cut, self.mesh.tensor)

    def whole(self, name: str, shard: Tensor | None) -> Tensor:
        """Float32 parameter ``name`` of this tensor rank from all ranks' flat shares; a collective."""
        assert shard is not None, "every rank holds every parameter"
        return shard.float().view(self.shapes[name])

    @torch.no_grad()
    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 weight) one by one; every rank must go through all of them."""
        for name in self.parameters:
            fragment = self.fragments.get(name)
            yield name, self.whole(name, None if fragment is None else fragment.master)

    def publish(self) -> None:  # noqa: B027 - whole weights are their own masters
        """Copy the float32 masters, which were written to, into the weights; a collective."""

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Keep every parameter whole inside the block, so that ranks may do different things.

        Values written there are lost where parameters are shared out, and stay elsewhere.
        """
        yield

    def gathered(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) one by one, whole until the next; every rank must go through all of them."""
        yield from parameters.items()

    @property
    def scaler(self) -> dict[str, float]:
        """State of the fp16 loss scale; empty in other precisions."""
        return {}

    @scaler.setter  # noqa: B027 - where there is none
    def scaler(self, values: Mapping[str, float]) -> None: ...


class PlainBackend(Backend):
    """Torch alone: one process, float32 weights (``train.autocast`` computes in bf16), any optimizer."""

    def __init__(
        self, objective: Objective, optimizer: Optimizer, config: TrainConfig, runtime: Runtime, mesh: Mesh,
        imports: Collection[str] = (),
    ) -> None:  # fmt: skip
        check_backend(config, runtime.world)
        objective.to(runtime.device)
        super().__init__(objective, config, runtime, mesh)
        self._optimizer = optimizer
        self._begin(imports)

    @property
    def inner(self) -> Optimizer:
        """The given optimizer."""
        return self._optimizer

    def forward(self, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Scalars of the objective on a micro-batch."""
        values: Mapping[str, Tensor] = self.objective(batch, generator)
        return values

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a micro-batch, as its share of the step's mean."""
        torch.autograd.backward(loss / self.config.accumulate)

    def step(self) -> StepResult:
        """Clip and apply the accumulated gradients, unless they are not finite."""
        result = self._clip()
        if result.applied:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return result


def check_backend(config: TrainConfig, ranks: int) -> None:
    """Raise where ``train.backend`` is not there or not for so many ranks, before weights are read."""
    if config.backend == "deepspeed" and find_spec("deepspeed") is None:
        raise BackendError(
            "train.backend deepspeed needs a package: pip install deepspeed, or set train.backend to plain, "
            "which trains in one process"
        )
    if config.backend == "plain" and ranks > 1:
        raise BackendError(
            f"train.backend plain trains in one process, not in {ranks}: set it to deepspeed, or start one"
        )


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients together, as ``torch.nn.utils`` has it since torch 2.6."""
    norms = torch._foreach_norm(gradients) if gradients else [torch.zeros(())]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def build_backend(
    objective: Objective, optimizer: Optimizer, config: TrainConfig, runtime: Runtime, mesh: Mesh,
    imports: Collection[str] = (),
) -> Backend:  # fmt: skip
    """``train.backend`` around an objective."""
    if config.backend == "plain":
        return PlainBackend(objective, optimizer, config, runtime, mesh, imports)
    from sat.train.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(objective, optimizer, config, runtime, mesh, imports)
