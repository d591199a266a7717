"""The contract between the training loop and an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sat.data.batch import Batch
    from sat.diffusion.draws import Draws
    from sat.engine import DiffusionEngine


@dataclass(frozen=True)
class Round:
    """One of several trainings in a row, each from the weights of the one before.

    ``params`` are laid over the objective's; ``steps`` are the sampling steps of what comes out.
    """

    name: str
    params: Mapping[str, Any]
    steps: int


class FewSteps(NamedTuple):
    """Sampling that a distilled network is for: numbers of steps, and the guidance it has learned.

    ``guidance`` is one strength that is in its weights, or the smallest and largest of an input.
    ``prediction`` is its own; None: that of the model it was made from.
    """

    method: str
    steps: tuple[int, ...]
    guidance: float | tuple[float, float]
    prediction: Literal["x0", "v"] | None = None


class Degradation(NamedTuple):
    """A way to make low-resolution images; ``name`` tells it from others, for caches."""

    name: str
    apply: Callable[[Tensor], Tensor]  # (B, 3, H, W) in [-1, 1], of the same size after it


class Objective(nn.Module):
    """A loss over batches, and the parts of the model it trains.

    The constructor of a subclass takes the engine as the keyword-only ``engine`` and freezes the parts that
    it does not train (``requires_grad_(False)``).
    """

    extras: ClassVar[frozenset[str]] = frozenset()
    """Names of the extra pictures of the data (``data.sources``) that it uses; others are refused."""

    required: ClassVar[frozenset[str]] = frozenset()
    """Those of them that every picture must have, in the pictures' size."""

    weighs: ClassVar[bool] = False
    """Losses are multiplied by ``loss_weight`` of the batch."""

    def draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Random numbers (B, …) by name that ``forward`` finds in ``batch.draws``; none by default.

        Drawn while the batch is loaded, perhaps in another thread, and sent to the device with it. Numbers of
        a picture depend on seed, step and its place in the step alone, so a step is the same however it is
        split over batches, accumulation and ranks.
        """
        return {}

    def begin(self, adapter: str | None) -> None:
        """Called before training with the name of the factors that alone are trained, or None for weights."""

    def role(self, name: str) -> str:
        """The role of a trained parameter, where several learn in turn; "" is one for all."""
        return ""

    def resting(self) -> frozenset[str]:
        """The roles whose parameters stay as they are in this ``step``, and get no gradient."""
        return frozenset()

    def turn(self) -> str:
        """The role that learns in this ``step``, where several do in turn, for the log; "" is all."""
        return ""

    def turns(self) -> Sequence[int]:
        """Steps that differ in what is computed, at full cost: all of them are measured for an estimate."""
        return (0,)

    def held_out_draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The same for ``evaluate``; by default those of ``draws``."""
        return self.draws(batch, draws)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> Mapping[str, Tensor]:
        """Scalars by name: ``loss`` is minimised, the others are logged, vectors by their finite elements.

        All randomness is in ``batch.draws``, or else comes from ``generator``, a CPU generator that the loop
        seeds for each micro-batch by its first picture's place.
        """
        raise NotImplementedError

    def evaluate(self, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Scalars by name on held-out data, without gradients; by default those of ``forward``."""
        return self.forward(batch, generator)

    step: int = 0
    """Optimizer steps done before this one; the loop sets it."""

    @classmethod
    def broken(cls, params: Mapping[str, Any], zero: int) -> Iterator[tuple[str, str]]:
        """(parameter, what is wrong) of ``params`` at ZeRO stage ``zero``, told with the config's errors."""
        yield from ()

    @classmethod
    def pictureless(cls, params: Mapping[str, Any]) -> bool:
        """True if such an objective looks at captions alone, so that data may have no pictures."""
        return False

    @classmethod
    def rounds(cls, params: Mapping[str, Any]) -> list[Round]:
        """The trainings in a row that an objective of these ``params`` asks for; none is the usual one."""
        return []

    @classmethod
    def needs(cls, params: Mapping[str, Any]) -> frozenset[str]:
        """The parts of the engine that such an objective runs even if their outputs are cached.

        By default all of them. With ``data.cache`` the others are not loaded.
        """
        return frozenset(("model", "first_stage", "text"))

    @classmethod
    def degradation(cls, params: Mapping[str, Any], engine: DiffusionEngine) -> Degradation | None:
        """The way in which such an objective makes low-resolution images; None if it needs none."""
        return None

    def degrade(self) -> Callable[[Tensor], Tensor] | None:
        """A function from images (B, 3, H, W) to low-resolution ones of that size; None if not needed."""
        return None

    def parts(self) -> dict[str, nn.Module]:
        """The trained modules by their part of a checkpoint: ``model``, ``text``, ``first_stage``."""
        raise NotImplementedError

    def few_steps(self) -> FewSteps | None:
        """Sampling that the trained network alone is for; None: any."""
        return None

    def beside(self) -> Sequence[nn.Module]:
        """Modules that it runs and that are neither trained nor of the engine, such as a teacher."""
        return ()
