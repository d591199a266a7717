"""Progressive distillation: a student that takes one step where its teacher takes two, round by round."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sat.adapters.lora import adapted, strengths
from sat.conditioning.conditioner import Condition
from sat.data.batch import Batch
from sat.diffusion.distillation import SMALLEST_GAIN, LevelTable, step_gain, student_target
from sat.diffusion.draws import Draws, GeneratorDraws
from sat.diffusion.loss import DenoisingLoss, TruncatedSNR, Weighting
from sat.diffusion.prediction import Denoiser, Network
from sat.diffusion.process import ProcessContext
from sat.diffusion.schedule import Level, sized
from sat.embeddings import sent
from sat.engine import DiffusionEngine
from sat.train.objectives.base import FewSteps, Round
from sat.train.objectives.diffusion import DiffusionObjective

TEACHER = "teacher"
"""Name of the factors that a round began with."""


class Progressive(DiffusionObjective):
    """One round: the student of ``rounds[round]`` steps learns to arrive where two teacher steps do.

    ``teacher_steps`` are those of the undistilled model, ``rounds`` the students' steps, each at least half
    of those before. The teacher is the network as the round begins: a copy of it, or with factors
    (``adapters.lora``) the same network, with those that the round began with. In the first round it is
    guided. One strength ``guidance`` is folded into the student; of a pair (smallest, largest) strengths are
    drawn, which the student sees as an input (``guidance_dim`` of the model, which factors cannot add), and
    from the second round on the teacher too. Noise levels are exactly those that the student samples with.
    For plain diffusion and relay, any schedule, prediction and network.

    Source: arXiv:2202.00512, algorithm 2; arXiv:2210.03142; CogView3, arXiv:2403.05121, section 3.4.
    """

    extras = frozenset[str]()
    weighs = False

    def __init__(
        self,
        teacher_steps: int = 50,
        rounds: Sequence[int] = (25, 16, 8, 4),
        guidance: float | tuple[float, float] = (1.0, 8.0),
        weighting: Weighting | None = None,
        low_from: Literal["image", "first_stage"] = "image",
        round: int = 0,
        *,
        engine: DiffusionEngine,
    ) -> None:
        super().__init__(caption_dropout=0.0, low_from=low_from, engine=engine)
        _check(teacher_steps, rounds, guidance)
        if not 0 <= round < len(rounds):
            raise ValueError(f"distillation: round is {round}, expected 0 to {len(rounds) - 1}")
        self.embeds, self.guidance = pair(guidance)
        if self.embeds and getattr(engine.network, "guidance", None) is None:
            raise ValueError(
                "distillation embeds a pair of guidance strengths: set model.params.guidance_dim, as "
                "configs/distill.yaml does, or give one strength, which is folded in"
            )
        whole = engine.denoising_loss
        if whole.kind != "l2" or whole.timesteps is not None or whole.stratified:
            raise ValueError(
                "distillation has squared errors at the student's own levels: leave kind, timesteps and "
                "stratified out of diffusion.loss.params"
            )
        self.steps = rounds[round]
        self.guided = round == 0
        self.loss = DenoisingLoss(weighting or TruncatedSNR())
        self._round, self._adapter = round, cast("str | None", None)
        self._teacher: tuple[nn.Module, ...] = ()  # out of the module tree: neither trained nor saved
        levels = engine.process.hooks.levels(engine.schedule, self.steps)
        for level, next_level in zip(levels, levels[1:], strict=False):
            if abs(step_gain(engine.process, level, next_level)) < SMALLEST_GAIN:
                raise ValueError(
                    f"distillation: the step from timestep {level.timestep:g} to {next_level.timestep:g} "
                    f"is too short"
                )
        self._tables: dict[tuple[int, int], tuple[LevelTable, LevelTable]] = {}

    def _levels_of(self, size: tuple[int, int]) -> tuple[LevelTable, LevelTable]:
        """The student's levels for a latent of ``size`` (h, w), and the teacher's between them."""
        if size not in self._tables:
            hooks, schedule = self.engine.process.hooks, sized(self.engine.schedule, size)
            levels, middles = hooks.levels(schedule, self.steps), hooks.levels(schedule, 2 * self.steps)[1::2]
            self._tables[size] = LevelTable(levels), LevelTable(middles)
        return self._tables[size]

    def begin(self, adapter: str | None) -> None:
        """Make the teacher: a copy, the network without factors, or with those of the round before."""
        self._adapter = adapter
        if adapter is None:
            self._teacher = (copy.deepcopy(self.engine.network).requires_grad_(False),)
        for _, layer in adapted(self.network) if adapter is not None and self._round else ():
            if adapter in layer.strengths:
                layer.add(TEACHER, layer.layer(adapter), 0.0, 0.0)
                layer.named(TEACHER).requires_grad_(False)

    def few_steps(self) -> FewSteps:
        """The round's number alone."""
        return FewSteps("progressive", (self.steps,), self.guidance if self.embeds else self.guidance[0])

    @classmethod
    def rounds(cls, params: Mapping[str, Any]) -> list[Round]:
        """One round for each number of steps."""
        steps = params.get("rounds", (25, 16, 8, 4))
        _check(params.get("teacher_steps", 50), steps, params.get("guidance", (1.0, 8.0)))
        return [Round(f"steps_{count}", {"round": i}, count) for i, count in enumerate(steps)]

    def beside(self) -> Sequence[nn.Module]:
        """The teacher, where it is a copy."""
        return self._teacher

    def draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Noise of the posteriors, the student's steps, noise and guidance strengths."""
        shape = self.latent_shape(batch)
        made = {"posterior": draws.normal("posterior", shape)}
        if self.engine.process.input is not None:
            made["low_res"] = draws.normal("low_res", shape)
        made |= {"place": draws.integers("place", self.steps), "eps": draws.normal("eps", shape)}
        smallest, largest = self.guidance
        return made | {"strength": smallest + (largest - smallest) * draws.uniform("strength")}

    def held_out_draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """As in training."""
        return self.draws(batch, draws)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``loss``: mean over the batch."""
        engine = self.engine
        process, denoiser = engine.process, engine.denoiser
        drawn = batch.draws or self.draws(batch, GeneratorDraws(len(batch), generator))
        x0, low_res = self.latents(batch, drawn["posterior"]), self.low_res(batch, drawn.get("low_res"))
        cond, ctx = self.condition(batch, x0.device), ProcessContext(low_res)
        place, eps, strength = (sent(drawn[name], x0.device) for name in ("place", "eps", "strength"))

        levels = self._levels_of(_size(x0))[0]
        level, next_level = levels.at(place), levels.at(place + 1)  # fields (B, 1, 1, 1)
        x = process.noise(x0, eps, level, ctx)  # (B, C, h, w)
        arrived = self._two_steps(x, place, cond, strength, ctx)
        target_x0 = student_target(process, x, arrived, level, next_level, ctx).float()

        seen = cond.guided(strength) if self.embeds else cond
        prepared = denoiser.network.prepare(seen, _size(x))
        out = denoiser.output(x, level, prepared)
        target_eps = (x - level.alpha * target_x0) / level.sigma  # x = alpha x0 + sigma eps
        target = denoiser.prediction.target(target_x0, target_eps, level)
        return {"loss": self.loss.error(out, target, level, denoiser).mean()}

    def evaluate(self, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The same on held-out data."""
        return self.forward(batch, generator)

    @torch.no_grad()
    def _two_steps(
        self, x: Tensor, place: Tensor, cond: Condition, strength: Tensor, ctx: ProcessContext
    ) -> Tensor:
        """The teacher's x (B, C, h, w) after the student's step ``place`` (B,), through the middle level."""
        process, network = self.engine.process, self._teacher[0] if self._teacher else self.network
        teacher, rows = Denoiser(cast(Network, network), self.engine.prediction), cond
        if self.guided:
            rows = Condition.cat([self.engine.conditioner.null(cond), cond])
        elif self.embeds:
            rows = cond.guided(strength)

        def predict(x: Tensor, level: Level) -> Tensor:
            if not self.guided:
                return teacher(x, level, prepared)
            twice = Level(*(torch.cat([field, field]) for field in level))  # type: ignore[list-item]
            uncond, with_text = teacher(torch.cat([x, x]), twice, prepared).chunk(2)
            return uncond + strength[:, None, None, None] * (with_text - uncond)

        levels, middles = self._levels_of(_size(x))
        level, middle, next_level = levels.at(place), middles.at(place), levels.at(place + 1)
        own = {self._adapter: 0.0, TEACHER: 1.0} if self._adapter else {}
        with strengths(network, own):
            prepared = teacher.network.prepare(rows, _size(x))
            x = process.step(x, predict(x, level), level, middle, ctx)
            return process.step(x, predict(x, middle), middle, next_level, ctx)


def pair(guidance: float | Sequence[float]) -> tuple[bool, tuple[float, float]]:
    """True for strengths to draw from, and the smallest and largest of them."""
    if isinstance(guidance, (int, float)):
        return False, (guidance, guidance)
    return True, (guidance[0], guidance[1])


def _check(teacher_steps: int, rounds: Sequence[int], guidance: float | Sequence[float]) -> None:
    before = teacher_steps
    if not rounds:
        raise ValueError(
            "distillation: rounds is empty, expected the students' steps, such as [25, 16, 8, 4]"
        )
    for steps in rounds:
        if not before / 2 <= steps < before or steps < 1:
            raise ValueError(
                f"distillation: a round goes from {before} steps to {steps}; expected {-(-before // 2)} to "
                f"{before - 1}: a student takes one step where its teacher takes at most two"
            )
        before = steps
    smallest, largest = pair(guidance)[1]
    if not 0 <= smallest <= largest:
        raise ValueError(
            f"distillation: guidance is {[smallest, largest]}, expected 0 <= smallest <= largest"
        )


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]
