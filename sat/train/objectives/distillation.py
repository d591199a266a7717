"""Distillation to few steps by one of four methods, each with a class of its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from sat.diffusion.loss import Weighting
from sat.engine import DiffusionEngine
from sat.train.objectives.base import Round
from sat.train.objectives.consistency import Consistency
from sat.train.objectives.diffusion import DiffusionObjective
from sat.train.objectives.matching import Heads, Matching
from sat.train.objectives.progressive import Progressive

METHODS: Mapping[str, type[DiffusionObjective]] = {
    "progressive": Progressive, "consistency": Consistency, "dmd2": Matching, "rcm": Matching
}  # fmt: skip


class Distillation(DiffusionObjective):
    """A student of few steps by ``method``; null is that method's default, and others' settings are refused.

    ``progressive``: rounds, in each of which the student takes one step for two of its teacher's.
    ``consistency`` (sCM): in one training the student's x0 becomes the same at every level of the teacher's
    path. ``dmd2``: a student and a critic learn in turn, until the student's pictures have the teacher's
    scores. ``rcm``: both at once. All train whole weights or factors (``adapters.lora``).

    ``guidance`` is the teacher's strength: one is folded into the student, a pair is drawn between and
    becomes an input (``guidance_dim`` of the model). ``steps`` is the largest
    number of sampling steps that the student is for; ``progressive`` has ``rounds`` of them, from
    ``teacher_steps``. Of ``consistency`` and ``rcm``: the share ``terminal`` of pictures at the noisiest
    level, the steps ``warmup`` over which the ``derivative`` through the network comes in, and its ``gap``.
    Of all three: the first ``regression`` steps, in which the student's x0 learns where the teacher's path
    of ``path`` steps ends, and ``prediction`` ``x0`` or ``v`` in place of the base's, which is learned there,
    for one clean step from a base that predicts eps or flow.
    Of ``dmd2`` and ``rcm``: one step in ``student_every`` is the student's, and levels are drawn within the
    shares ``between`` of the timesteps; ``adversarial`` adds a discriminator
    (:class:`sat.train.objectives.matching.Heads`). Of ``rcm``: ``consistency_weight``, and ``alone``, first
    steps without the critic. Any process, schedule and prediction. docs/distill.md says which to choose.
    """

    extras = frozenset[str]()
    weighs = False

    def __new__(  # noqa: PLR0913 - the settings of four methods
        cls,
        method: Literal["progressive", "consistency", "dmd2", "rcm"] = "progressive",
        steps: int | None = None,
        guidance: float | tuple[float, float] | None = None,
        teacher_steps: int | None = None,
        rounds: Sequence[int] | None = None,
        round: int | None = None,
        weighting: Weighting | None = None,
        terminal: float | None = None,
        warmup: int | None = None,
        gap: float | None = None,
        derivative: Literal["difference", "jvp"] | None = None,
        prediction: Literal["base", "x0", "v"] | None = None,
        regression: int | None = None,
        path: int | None = None,
        student_every: int | None = None,
        between: tuple[float, float] | None = None,
        consistency_weight: float | None = None,
        alone: int | None = None,
        adversarial: Heads | None = None,
        low_from: Literal["image", "first_stage"] = "image",
        *,
        engine: DiffusionEngine,
    ) -> Any:
        """The objective of ``method``, which is of another class."""
        given = {name: value for name, value in locals().items() if name not in ("cls", "engine")}
        kind, own, strange = cls._own(given)
        if strange:
            raise ValueError(f"distillation: {', '.join(strange)}: not of method {method}")
        return kind(**own, engine=engine)

    @classmethod
    def _own(cls, params: Mapping[str, Any]) -> tuple[type[DiffusionObjective], dict[str, Any], list[str]]:
        """The class of the method of ``params``, those of them that it takes, and the names of the others."""
        kind = METHODS[params.get("method", "progressive")]
        given = {name: value for name, value in params.items() if value is not None}
        takes = inspect.signature(kind).parameters
        own = {name: value for name, value in given.items() if name in takes}
        return kind, own, sorted(given.keys() - own.keys() - {"method"})

    @classmethod
    def broken(cls, params: Mapping[str, Any], zero: int) -> Iterator[tuple[str, str]]:
        """Those of the method, and settings of other methods."""
        kind, own, strange = cls._own(params)
        for name in strange:
            yield name, f"is not of method {params.get('method', 'progressive')}: leave it out"
        yield from kind.broken(own, zero)

    @classmethod
    def pictureless(cls, params: Mapping[str, Any]) -> bool:
        """That of the method."""
        kind, _, _ = cls._own(params)
        return kind.pictureless(params)

    @classmethod
    def rounds(cls, params: Mapping[str, Any]) -> list[Round]:
        """Those of ``progressive``; the others are one training."""
        kind, own, _ = cls._own(params)
        return kind.rounds(own)
