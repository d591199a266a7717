"""Consistency distillation (sCM): a student whose x0 is the same at every level of its teacher's path."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from sat.adapters.lora import strengths
from sat.conditioning.conditioner import Condition
from sat.data.batch import Batch
from sat.diffusion.distillation import (
    LevelTable,
    angle,
    consistency_target,
    derivative,
    nearer_levels,
    tangent,
)
from sat.diffusion.draws import Draws, GeneratorDraws
from sat.diffusion.loss import AngleWeighting, DenoisingLoss, LearnedWeighting, Weighting
from sat.diffusion.prediction import Denoiser, Network, Preconditioned
from sat.diffusion.process import ProcessContext
from sat.diffusion.schedule import Level, sized
from sat.embeddings import sent
from sat.engine import DiffusionEngine
from sat.train.objectives.base import FewSteps
from sat.train.objectives.diffusion import DiffusionObjective


class Given(NamedTuple):
    """A batch: what was drawn for it, its clean latents, and its condition for teacher and student."""

    drawn: Mapping[str, Tensor]
    clean: Tensor  # (B, C, h, w) float32
    cond: Condition
    seen: Condition  # with the guidance strength, where it is an input
    strength: Tensor  # (B,)
    ctx: ProcessContext


class Consistency(DiffusionObjective):
    """The student learns in one training to draw in any small number of steps, by ``Renoise`` or DDIM.

    Full weights, with a copy of the network as teacher; or factors (``adapters.lora``), where the teacher is
    the same network with them off. The teacher is guided by ``guidance``: one strength is folded into the
    student, a pair is drawn between and seen by it (``guidance_dim`` of the model). Levels are drawn as
    ``diffusion.loss`` says; a ``terminal`` share of the pictures is at the noisiest, which one step draws
    from. Over the first ``warmup`` steps the derivative through the network comes in. ``steps`` is the
    largest number of sampling steps that the result is for.

    ``derivative``: ``difference`` takes one more prediction, nearer on the teacher's path by an angle of
    ``gap`` (atan of noise over signal); ``jvp`` is exact, by torch's plain attention (``train.attention``
    torch; packed frozen weights have no forward derivative). Works over any process, schedule and prediction.

    ``weighting`` of the error is even over the angle; ``LearnedWeighting`` learns beside the student.

    ``prediction``: ``v`` or ``x0`` is the student's own in place of its base's, for one step from a base that
    predicts eps or flow (:class:`~sat.diffusion.prediction.Preconditioned`). Its weights learn that in the
    first ``regression`` steps, in which the guided teacher draws a picture in ``path`` steps from the noise,
    and the student's x0 at one of their levels learns that picture; ``warmup`` comes after.
    Source: sCM, arXiv:2410.11081; the difference along the teacher is rCM's, arXiv:2510.08431.
    """

    extras = frozenset[str]()
    weighs = False

    def __init__(  # noqa: PLR0913 - its settings
        self,
        guidance: float | tuple[float, float] = 4.0,
        terminal: float = 0.1,
        warmup: int = 0,
        gap: float = 0.01,
        derivative: Literal["difference", "jvp"] = "difference",
        weighting: Weighting | None = None,
        low_from: Literal["image", "first_stage"] = "image",
        steps: int = 4,
        prediction: Literal["base", "x0", "v"] = "base",
        regression: int = 0,
        path: int = 8,
        *,
        engine: DiffusionEngine,
    ) -> None:
        super().__init__(caption_dropout=0.0, low_from=low_from, engine=engine)
        self.embeds = not isinstance(guidance, (int, float))
        self.guidance = cast("tuple[float, float]", guidance if self.embeds else (guidance, guidance))
        if not 0 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"consistency: guidance is {guidance}, expected 0 <= smallest <= largest")
        if self.embeds and getattr(engine.network, "guidance", None) is None:
            raise ValueError(
                "consistency: a pair of guidance strengths is an input of the student: set "
                "model.params.guidance_dim, or give one strength, which is folded in"
            )
        if not 0 <= terminal <= 1 or not 0 < gap < 0.5 or warmup < 0 or steps < 1:
            raise ValueError(
                f"consistency: terminal {terminal:g}, gap {gap:g}, warmup {warmup} and steps {steps}: "
                "expected a share of 0 to 1, an angle above 0 and below 0.5, and two numbers of steps"
            )
        if regression < 0 or path < 1 or (prediction != "base" and not regression):
            raise ValueError(
                f"consistency: prediction {prediction}, regression {regression}, path {path}: a student in "
                "another prediction than its base's learns it in the first `regression` steps: above 0"
            )
        if engine.denoising_loss.kind != "l2":
            raise ValueError("consistency has squared errors: leave kind out of diffusion.loss.params")
        self.terminal, self.warmup, self.gap, self.derivative = terminal, warmup, gap, derivative
        self.method, self.steps, self.regression, self.path = "consistency", steps, regression, path
        self.prediction: Literal["x0", "v"] | None = None if prediction == "base" else prediction
        self._base = engine.prediction  # the teacher's, and the critic's
        if self.prediction is not None:
            engine.prediction = Preconditioned(self._base, self.prediction)  # the student's, also for samples
        self.loss = DenoisingLoss(weighting or AngleWeighting())
        self.weighting = weighting if isinstance(weighting, LearnedWeighting) else None
        self._adapter: str | None = None
        self._teacher: tuple[nn.Module, ...] = ()  # out of the module tree: neither trained nor saved
        self._tables: dict[tuple[int, int], tuple[LevelTable, LevelTable]] = {}
        self._paths: dict[tuple[int, int], tuple[list[Level], LevelTable]] = {}

    def begin(self, adapter: str | None) -> None:
        """Copy the teacher, unless it is the network without the trained factors."""
        self._adapter = adapter
        if self.weighting is not None:
            self.weighting.requires_grad_(True)
        self._teacher = () if adapter else (copy.deepcopy(self.engine.network).requires_grad_(False),)

    def few_steps(self) -> FewSteps:
        """Any number up to ``steps``."""
        smallest, largest = self.guidance
        strength = (smallest, largest) if self.embeds else smallest
        return FewSteps(self.method, tuple(range(1, self.steps + 1)), strength, self.prediction)

    def beside(self) -> Sequence[nn.Module]:
        """The teacher, where it is a copy."""
        return self._teacher

    def draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Noise of the posteriors, timesteps, noise, guidance strengths."""
        shape = self.latent_shape(batch)
        made = {"posterior": draws.normal("posterior", shape)}
        if self.engine.process.input is not None:
            made["low_res"] = draws.normal("low_res", shape)
        made |= self.engine.draw(shape, draws)._asdict()
        last = self.engine.process.hooks.span(self.engine.schedule) - 1
        made["timestep"] = made["timestep"].masked_fill(draws.uniform("terminal") < self.terminal, last)
        smallest, largest = self.guidance
        return made | {"strength": smallest + (largest - smallest) * draws.uniform("strength")}

    def held_out_draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The same."""
        return self.draws(batch, draws)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``loss`` of the student, and ``tangent``, how far from consistent it is (root mean square)."""
        return self.consistency(self.given(batch, generator))

    def given(self, batch: Batch, generator: torch.Generator | None = None) -> Given:
        """The batch as student and teacher see it."""
        drawn = batch.draws or self.draws(batch, GeneratorDraws(len(batch), generator))
        clean, low_res = self.latents(batch, drawn["posterior"]), self.low_res(batch, drawn.get("low_res"))
        cond, strength = self.condition(batch, clean.device), sent(drawn["strength"], clean.device)
        seen = cond.guided(strength) if self.embeds else cond
        return Given(drawn, clean, cond, seen, strength, ProcessContext(low_res))

    def consistency(self, given: Given) -> dict[str, Tensor]:
        """``loss`` and ``tangent`` at the drawn levels."""
        if self.step < self.regression and self.training:
            return self._regression(given)
        process, denoiser, ctx = self.engine.process, self.engine.denoiser, given.ctx
        place, eps = (sent(given.drawn[name], given.clean.device) for name in ("timestep", "eps"))
        size = (given.clean.shape[2], given.clean.shape[3])
        here, near = self._levels_of(size)
        level, nearer = here.at(place), near.at(place)  # fields (B, 1, 1, 1)
        x = process.noise(given.clean, eps, level, ctx)  # (B, C, h, w)
        teacher = self.teacher(x, level, given)
        x_near = process.step(x, teacher, level, nearer, ctx)  # on the teacher's path

        prepared = denoiser.network.prepare(given.seen, size)
        out = denoiser.output(x, level, prepared)
        with torch.no_grad():
            x0 = denoiser.prediction.to_x0(out, x, level)
            h = (angle(level) - angle(nearer)).to(x)
            if self.derivative == "jvp":
                change = self._exact(x, x_near, level, nearer, given)
            else:
                change = (x0 - denoiser(x_near, nearer, prepared)) / h  # dx0/dt
            done = self.step - self.regression
            warm = min(1.0, done / self.warmup) if self.warmup and self.training else 1.0
            g = tangent(x0, teacher, change, level, warm)
            target = consistency_target(x0, g, level)
        return {"loss": self._error(out, target, x, level), "tangent": g.square().mean().sqrt()}

    def _error(self, out: Tensor, target: Tensor, x: Tensor, level: Level) -> Tensor:
        """Weighted squared error of the student's output ``out`` from that of the x0 ``target``."""
        denoiser, eps = self.engine.denoiser, (x - level.alpha * target) / level.sigma
        wanted = denoiser.prediction.target(target, eps, level)  # x = alpha target + sigma eps
        error = self.loss.error(out, wanted, level, denoiser).mean()
        return error if self.weighting is None else error - self.weighting.log(level).mean()

    def _regression(self, given: Given) -> dict[str, Tensor]:
        """``loss`` of a student whose x0, at a level of the teacher's path from noise, learns its end."""
        process, denoiser, ctx = self.engine.process, self.engine.denoiser, given.ctx
        timestep, eps = (sent(given.drawn[name], given.clean.device) for name in ("timestep", "eps"))
        size = (given.clean.shape[2], given.clean.shape[3])
        if size not in self._paths:
            visited = process.hooks.levels(sized(self.engine.schedule, size), self.path)
            self._paths[size] = visited, LevelTable(visited)
        levels, table = self._paths[size]
        with torch.no_grad():
            path, first = [process.start(eps, levels[0], ctx)], torch.zeros_like(timestep)
            for i in range(self.path):
                x0 = self.teacher(path[i], table.at(first + i), given)
                path.append(process.step(path[i], x0, levels[i], levels[i + 1], ctx))
        span = process.hooks.span(self.engine.schedule)
        place = (span - 1 - timestep) * self.path // span  # of the path's levels, 0 is the noisiest
        x, level = torch.stack(path)[place, torch.arange(len(eps), device=eps.device)], table.at(place)
        out = denoiser.output(x, level, denoiser.network.prepare(given.seen, size))
        with torch.no_grad():
            apart = (denoiser.prediction.to_x0(out, x, level) - path[-1]).square().mean().sqrt()
        return {"loss": self._error(out, path[-1], x, level), "tangent": apart}

    def _exact(self, x: Tensor, x_near: Tensor, level: Level, nearer: Level, given: Given) -> Tensor:
        """dx0/dt (B, C, h, w) by torch's forward derivative, along the way from ``nearer``."""
        denoiser, h = self.engine.denoiser, (angle(level) - angle(nearer)).to(x)
        prepared = denoiser.network.prepare(given.seen, (x.shape[2], x.shape[3]))
        slopes = Level(*((a - b) / h.reshape(a.shape) for a, b in zip(level, nearer, strict=True)))  # type: ignore[operator,union-attr]
        try:
            return derivative(lambda x, at: denoiser(x, at, prepared), x, level, (x - x_near) / h, slopes)[1]
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"consistency: derivative jvp: {type(self.network).__name__} has an operator without it "
                f"({str(error).splitlines()[0][:120]}): take derivative difference"
            ) from error

    def evaluate(self, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The same on held-out data."""
        return self.forward(batch, generator)

    def _levels_of(self, size: tuple[int, int]) -> tuple[LevelTable, LevelTable]:
        """The training levels for a latent of ``size`` (h, w), and those nearer by ``gap``."""
        if size not in self._tables:
            levels = nearer_levels(self.engine.process, sized(self.engine.schedule, size), self.gap)
            self._tables[size] = LevelTable(levels[0]), LevelTable(levels[1])
        return self._tables[size]

    @torch.no_grad()
    def teacher(self, x: Tensor, level: Level, given: Given) -> Tensor:
        """The guided teacher's x0 (B, C, h, w): x0_null + strength (x0_text - x0_null)."""
        network = self._teacher[0] if self._teacher else self.network
        off = strengths(network, {self._adapter: 0.0}) if self._adapter else nullcontext()
        with off:
            teacher = Denoiser(cast(Network, network), self._base)
            rows = Condition.cat([given.cond.null(), given.cond])
            prepared = teacher.network.prepare(rows, (x.shape[2], x.shape[3]))
            twice = Level(*(torch.cat([field, field]) for field in level))  # type: ignore[list-item]
            null, text = teacher(torch.cat([x, x]), twice, prepared).chunk(2)
        return null + given.strength[:, None, None, None] * (text - null)
