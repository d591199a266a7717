"""Progressive distillation: a student that takes one step where its teacher takes two, round by round."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

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


class Progressive(DiffusionObjective):
    """One round: the student of ``rounds[round]`` steps learns to arrive where two teacher steps do.

    ``teacher_steps`` are those of the undistilled model, ``rounds`` the students' steps, each at least half
    of those before. The teacher is the network as the round begins. In the first round it is guided:
    strengths are drawn from ``guidance`` (smallest, largest) and both teacher and student see the same, the
    student as an input (``guidance_dim`` of the model); from the second on the teacher takes it as an input
    too. Noise levels are exactly those that the student samples with. For plain diffusion and relay, any
    schedule, prediction and network.

    Source: arXiv:2202.00512, algorithm 2; arXiv:2210.03142; CogView3, arXiv:2403.05121, section 3.4.
    """

    extras = frozenset[str]()
    weighs = False

    def __init__(
        self,
        teacher_steps: int = 50,
        rounds: Sequence[int] = (25, 16, 8, 4),
        guidance: tuple[float, float] = (1.0, 8.0),
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
        if getattr(engine.network, "guidance", None) is None:
            raise ValueError(
                "distillation embeds the guidance strength: set model.params.guidance_dim, as "
                "configs/distill.yaml does"
            )
        whole = engine.denoising_loss
        if whole.kind != "l2" or whole.timesteps is not None or whole.stratified:
            raise ValueError(
                "distillation has squared errors at the student's own levels: leave kind, timesteps and "
                "stratified out of diffusion.loss.params"
            )
        self.steps = rounds[round]
        self.guided = round == 0
        self.guidance = guidance
        self.loss = DenoisingLoss(weighting or TruncatedSNR())
        # Out of the module tree, like the engine: neither trained nor saved.
        self._teacher = (copy.deepcopy(engine.network).requires_grad_(False),)
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

    def few_steps(self) -> FewSteps:
        """The round's number alone."""
        return FewSteps("progressive", (self.steps,), self.guidance)

    @classmethod
    def rounds(cls, params: Mapping[str, Any]) -> list[Round]:
        """One round for each number of steps."""
        steps = params.get("rounds", (25, 16, 8, 4))
        _check(params.get("teacher_steps", 50), steps, params.get("guidance", (1.0, 8.0)))
        return [Round(f"steps_{count}", {"round": i}, count) for i, count in enumerate(steps)]

    def beside(self) -> Sequence[nn.Module]:
        """The teacher."""
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

        prepared = denoiser.network.prepare(cond.guided(strength), _size(x))
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
        process = self.engine.process
        teacher = Denoiser(cast(Network, self._teacher[0]), self.engine.prediction)
        rows = (
            Condition.cat([self.engine.conditioner.null(cond), cond])
            if self.guided
            else cond.guided(strength)
        )
        prepared = teacher.network.prepare(rows, _size(x))

        def predict(x: Tensor, level: Level) -> Tensor:
            if not self.guided:
                return teacher(x, level, prepared)
            twice = Level(*(torch.cat([field, field]) for field in level))  # type: ignore[list-item]
            uncond, with_text = teacher(torch.cat([x, x]), twice, prepared).chunk(2)
            return uncond + strength[:, None, None, None] * (with_text - uncond)

        levels, middles = self._levels_of(_size(x))
        level, middle, next_level = levels.at(place), middles.at(place), levels.at(place + 1)
        x = process.step(x, predict(x, level), level, middle, ctx)
        return process.step(x, predict(x, middle), middle, next_level, ctx)


def _check(teacher_steps: int, rounds: Sequence[int], guidance: Sequence[float]) -> None:
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
    if not 0 <= guidance[0] <= guidance[1]:
        raise ValueError(f"distillation: guidance is {list(guidance)}, expected 0 <= smallest <= largest")


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]
