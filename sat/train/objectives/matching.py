"""Distribution matching (DMD2, rCM): a few-step student whose pictures are drawn to the teacher's scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.adapters.lora import adapted, strengths
from sat.data.batch import Batch
from sat.diffusion.distillation import LevelTable, few_levels, matching_target
from sat.diffusion.draws import Draws, keyed
from sat.diffusion.loss import DenoisingLoss
from sat.diffusion.prediction import Denoiser, Network
from sat.diffusion.schedule import Level, sized
from sat.embeddings import sent
from sat.engine import DiffusionEngine
from sat.models.cogview3_unet.model import ResBlock
from sat.parallel.launch import ALONE
from sat.parallel.sequence import token_axis, token_mean
from sat.train.objectives.consistency import Consistency, Given


@dataclass(frozen=True)
class Heads:
    """A discriminator of the student's noised pictures from the data's, on features of the frozen teacher.

    ``weight`` is that of -log D in the student's loss. A small head of ``width`` sits behind the blocks at
    each of ``depths`` (shares of the network; a UNet's residual blocks count). ``penalty`` weighs the
    squared change of its logits by noise of deviation 0.1 on the data's pictures, which stands for the
    gradient penalty R1. Source: DMD2, arXiv:2405.14867, section 4.3; the penalty, arXiv:2501.08316.
    """

    weight: float = 0.03
    depths: tuple[float, ...] = (0.5, 0.75, 1.0)
    width: int = 64
    penalty: float = 0.0

    def __post_init__(self) -> None:
        good = self.depths and all(0 < depth <= 1 for depth in self.depths)
        if not self.weight > 0 or not good or self.width < 1 or self.penalty < 0:
            raise ValueError(
                f"adversarial: weight {self.weight}, depths {list(self.depths)}, width {self.width}, penalty "
                f"{self.penalty}: expected a weight above 0, shares of the depth, and at least 1 channel"
            )


class Discriminator(nn.Module):
    """Logits (B,) of a pass through a frozen ``network``: the mean over heads and places.

    Of a transformer of which ranks share the tokens, each looks at its own and the means are joined.
    """

    def __init__(self, network: nn.Module, heads: Heads, dtype: torch.dtype) -> None:
        super().__init__()
        transformer = getattr(network, "transformer", None)
        self._axis = ALONE if transformer is None else token_axis(transformer)
        if transformer is not None:
            found = [(block, int(cast(int, network.dim))) for block in transformer.blocks]
        else:
            kinds = (m for m in network.modules() if isinstance(m, ResBlock))
            found = [(block, block.conv2.out_channels) for block in kinds]
        taken = [found[math.ceil(depth * len(found)) - 1] for depth in sorted(set(heads.depths))]
        self._blocks = tuple(block for block, _ in taken)  # out of the module tree
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(wide), nn.Linear(wide, heads.width), nn.SiLU(), nn.Linear(heads.width, 1)
            )
            for _, wide in taken
        ).to(dtype)

    def forward(self, run: Callable[[], object]) -> Tensor:
        """``run`` is the pass; features are (B, L, D), or (B, C, h, w) of a UNet."""
        features: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda module, given, out: features.append(out))
            for block in self._blocks
        ]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        places = (f.flatten(2).transpose(1, 2) if f.ndim == 4 else f for f in features)  # (B, L, D)
        pairs = zip(self.heads, places, strict=True)
        logits = [token_mean(head(f).float(), self._axis) for head, f in pairs]  # (B, 1) each
        return torch.cat(logits, 1).mean(1)


CRITIC = "critic"
"""Name of the critic's role, of its copy of the network, and of its factors."""


class Matching(Consistency):
    """Student and critic learn in turn: one step in ``student_every`` is the student's, others the critic's.

    The student draws from noise in up to ``steps`` steps, by itself (noise is drawn anew between, as the
    sampler ``Renoise`` does); the prediction it ends with is noised again, and moved by the difference of two
    predictions of that: the guided teacher's, and the critic's, which learns to denoise the student's
    pictures. Levels of both are drawn within ``between``, shares of the timesteps. ``method`` ``rcm`` adds
    ``consistency_weight`` times the consistency loss to the student's, which alone is trained in the first
    ``alone`` steps (after those of ``regression``); ``dmd2`` has none.

    Full weights: teacher and critic are copies. Factors (``adapters.lora``): student and critic are two sets
    of them on one frozen network, which without them is the teacher. The critic is kept in checkpoints and
    not exported. Pictures of the data give sizes and captions; ``dmd2`` looks at nothing else of them, but
    relay at their low-resolution forms. ``adversarial`` (:class:`Heads`) adds a discriminator, which learns
    with the critic and needs the pictures.

    Source: DMD2, arXiv:2405.14867; rCM, arXiv:2510.08431.
    """

    def __init__(  # noqa: PLR0913 - its own settings, and those of consistency
        self,
        method: Literal["dmd2", "rcm"] = "dmd2",
        steps: int = 1,
        prediction: Literal["base", "x0", "v"] = "base",
        regression: int = 0,
        path: int = 8,
        student_every: int = 5,
        between: tuple[float, float] = (0.02, 0.98),
        consistency_weight: float = 100.0,
        alone: int = 0,
        adversarial: Heads | None = None,
        guidance: float | tuple[float, float] = 4.0,
        terminal: float = 0.1,
        warmup: int = 0,
        gap: float = 0.01,
        derivative: Literal["difference", "jvp"] = "difference",
        low_from: Literal["image", "first_stage"] = "image",
        *,
        engine: DiffusionEngine,
    ) -> None:
        super().__init__(
            guidance, terminal, warmup, gap, derivative, None, low_from, steps, prediction, regression, path,
            engine=engine,
        )  # fmt: skip
        if method == "dmd2" and (alone or consistency_weight != 100.0):
            raise ValueError("matching: consistency_weight and alone are of method rcm")
        if steps < 1 or student_every < 1 or alone < 0 or not 0 <= between[0] < between[1] <= 1:
            raise ValueError(
                f"matching: steps {steps}, student_every {student_every}, alone {alone}, between {between}: "
                "expected at least 1 of the first two, and two rising shares of the timesteps"
            )
        self.method, self.student_every = method, student_every
        self.between, self.consistency_weight, self.alone = between, consistency_weight, alone
        self.adversarial, self.critic = adversarial, cast("nn.Module | None", None)
        self.discriminator: Discriminator | None = None
        self.critic_loss = DenoisingLoss()
        self._visited: dict[tuple[int, int], tuple[list[Level], LevelTable]] = {}

    @classmethod
    def pictureless(cls, params: Mapping[str, Any]) -> bool:
        """``dmd2`` without a discriminator, of a process that starts from noise alone."""
        return params.get("method", "dmd2") == "dmd2" and params.get("adversarial") is None

    def latents(self, batch: Batch, noise: Tensor) -> Tensor:
        """Those of the pictures; zeros, at which nothing looks, for captions alone."""
        if batch.image is None and batch.latent_moments is None:
            return torch.zeros_like(sent(noise, next(self.network.parameters()).device))
        return super().latents(batch, noise)

    def begin(self, adapter: str | None) -> None:
        """Make the critic: a copy of the teacher, or factors that begin as the student's do."""
        super().begin(adapter)
        if self.adversarial is not None:
            network = self._teacher[0] if self._teacher else self.network
            dtype = next(self.network.parameters()).dtype
            with torch.random.fork_rng(devices=[]):  # alike on all ranks, whatever was drawn before
                torch.manual_seed(keyed("discriminator") % 2**31)
                made = Discriminator(network, self.adversarial, dtype)
            self.discriminator = made.to(next(self.network.parameters()).device)
        if adapter is None:
            self.critic = copy.deepcopy(self.engine.network).requires_grad_(True)
            return
        for _, layer in adapted(self.network):
            if adapter in layer.strengths:
                layer.add(CRITIC, layer.layer(adapter), 0.0, 0.0)
                layer.named(CRITIC).requires_grad_(True)

    def role(self, name: str) -> str:
        """That of the critic's copy or factors and of the discriminator, and the student's."""
        return (
            CRITIC
            if name.startswith((f"{CRITIC}.", "discriminator.")) or f".factors.{CRITIC}." in name
            else "student"
        )

    def resting(self) -> frozenset[str]:
        """The student in the critic's steps, and the critic in the student's."""
        return frozenset((CRITIC,)) if self._students_turn() else frozenset(("student",))

    def turn(self) -> str:
        """Student or critic."""
        return "student" if self._students_turn() else CRITIC

    def turns(self) -> Sequence[int]:
        """The student's first step beside the critic, which follows, and the critic's first."""
        first = self.regression + self.alone
        return (first, first + 1) if self.student_every > 1 else (first,)

    def _students_turn(self) -> bool:
        beside = self.step - self.regression - self.alone  # steps with the critic
        return beside < 0 or beside % self.student_every == 0

    def draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Those of consistency, noise of each step of the student, and a level and noise to look from."""
        shape, made = self.latent_shape(batch), super().draws(batch, draws)
        made |= {f"own_{i}": draws.normal(f"own_{i}", shape) for i in range(self.steps)}
        span = self.engine.process.hooks.span(self.engine.schedule)
        first, last = (min(span - 1, round(share * span)) for share in self.between)
        made["seen_at"] = first + draws.integers("seen_at", max(1, last - first))
        if self.adversarial is not None and self.adversarial.penalty:
            made["beside"] = draws.normal("beside", shape)
        return made | {"seen": draws.normal("seen", shape)}

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``loss`` of whose turn it is, also by its role, with its parts.

        The student's are ``matching``, ``consistency`` and ``fooled`` (-log D of its pictures). Of the critic
        there is ``critic_accuracy``, the share of the variance of its targets that it predicts, and with a
        discriminator ``told_apart``, its loss, and ``discriminator_accuracy``, its share of right answers.
        """
        given = self.given(batch, generator)
        if not self._students_turn():
            loss, accuracy = self.critics(given)
            made = {"critic": loss.detach(), "critic_accuracy": accuracy}
            if self.discriminator is not None:
                apart, right = self.told_apart(given)
                loss, made = (
                    loss + apart,
                    {**made, "told_apart": apart.detach(), "discriminator_accuracy": right},
                )
            return {"loss": loss, **made}
        losses: dict[str, Tensor] = {}
        if self.method == "rcm" or self.step < self.regression:
            found = self.consistency(given)
            losses = {"consistency": found["loss"], "tangent": found["tangent"]}
            if self.step < self.regression + self.alone:
                loss = self.consistency_weight * found["loss"]
                return {"loss": loss, **_detached({"student": loss, **losses})}
        x0 = self.drawn(given)
        loss = losses["matching"] = self.matching(x0, given)
        if self.adversarial is not None:
            assert self.discriminator is not None, "begin makes it"
            self.discriminator.requires_grad_(False)  # it rests
            losses["fooled"] = F.softplus(-self._logits(x0, given)).mean()
            self.discriminator.requires_grad_(True)
            loss = loss + self.adversarial.weight * losses["fooled"]
        if self.method == "rcm":
            loss = loss + self.consistency_weight * losses["consistency"]
        return {"loss": loss, **_detached({"student": loss, **losses})}

    def evaluate(self, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Consistency of the student and the critic's loss on held-out conditions."""
        given = self.given(batch, generator)
        loss, accuracy = self.critics(given)
        found = {"critic": loss, "critic_accuracy": accuracy}
        if batch.image is None and batch.latent_moments is None:
            return {"loss": loss, **found}
        return {**self.consistency(given), **found}

    def matching(self, x0: Tensor, given: Given) -> Tensor:
        """1/2 |x0 - target|^2 of the student's pictures, drawn with gradients in the last of their steps."""
        with torch.no_grad():
            level, _, x = self._looked_at(x0, given)
            real = self.teacher(x, level, given)
            target = matching_target(x0, real, self._critics_x0(x, level, given))
        return 0.5 * (x0 - target).square().mean()

    def critics(self, given: Given) -> tuple[Tensor, Tensor]:
        """Denoising loss of the critic on the student's pictures, without guidance, and its accuracy."""
        with torch.no_grad():
            x0 = self.drawn(given)
        level, eps, x = self._looked_at(x0, given)
        process, denoiser = self.engine.process, self._critic()
        with self._as_critic():
            out = denoiser.output(x, level, denoiser.network.prepare(given.cond, (x.shape[2], x.shape[3])))
        wanted = denoiser.prediction.target(x0, process.noise_seen(x0, eps, level, given.ctx), level)
        accuracy = 1 - (out.detach() - wanted).square().mean() / wanted.var()
        return self.critic_loss.error(out, wanted, level, denoiser).mean(), accuracy

    def told_apart(self, given: Given) -> tuple[Tensor, Tensor]:
        """-log(1 - D) of the student's pictures and -log D of the data's, and the share of right answers."""
        assert self.adversarial is not None, "only with heads"
        with torch.no_grad():
            x0 = self.drawn(given)
        made, real = self._logits(x0, given), self._logits(given.clean, given)
        loss = F.softplus(made).mean() + F.softplus(-real).mean()
        if self.adversarial.penalty:
            near = given.clean + 0.1 * sent(given.drawn["beside"], x0.device)
            loss = loss + self.adversarial.penalty * (self._logits(near, given) - real).square().mean()
        right = torch.cat([made < 0, real > 0]).float().mean()
        return loss, right

    def _logits(self, x0: Tensor, given: Given) -> Tensor:
        """(B,) of pictures noised as the critic sees them, by the teacher's features without guidance."""
        assert self.discriminator is not None, "only with heads"
        level, _, x = self._looked_at(x0, given)
        network = self._teacher[0] if self._teacher else self.network
        teacher = Denoiser(cast(Network, network), self._base)
        off = nullcontext() if self._adapter is None else strengths(network, {self._adapter: 0.0})
        with off:
            prepared = teacher.network.prepare(given.cond, (x.shape[2], x.shape[3]))
            made: Tensor = self.discriminator(lambda: teacher.output(x, level, prepared))
        return made

    def drawn(self, given: Given) -> Tensor:
        """The student's pictures (B, C, h, w) after some of its steps, of which the last has gradients.

        As many steps for all pictures of an optimizer step, each number in turn as often as others.
        """
        process, denoiser = self.engine.process, self.engine.denoiser
        size = (given.clean.shape[2], given.clean.shape[3])
        if size not in self._visited:
            visited = few_levels(process, sized(self.engine.schedule, size), self.steps)
            self._visited[size] = visited, LevelTable(visited)
        levels, table = self._visited[size]
        count = keyed("steps of", self.step // self.student_every) % self.steps  # before the last
        noise = [sent(given.drawn[f"own_{i}"], given.clean.device) for i in range(count + 1)]
        prepared = denoiser.network.prepare(given.seen, size)
        first = torch.zeros(len(given.clean), dtype=torch.int64, device=given.clean.device)
        x = process.start(noise[0], levels[0], given.ctx)
        for i in range(count):
            with torch.no_grad():
                x0 = denoiser(x, table.at(first + i), prepared)
                x = process.noise(x0, noise[i + 1], levels[i + 1], given.ctx)
        return denoiser(x, table.at(first + count), prepared)

    def _looked_at(self, x0: Tensor, given: Given) -> tuple[Level, Tensor, Tensor]:
        """A level, noise, and the student's pictures noised by both."""
        timestep, eps = (sent(given.drawn[name], x0.device) for name in ("seen_at", "seen"))
        level = self._levels_of((x0.shape[2], x0.shape[3]))[0].at(timestep)
        return level, eps, self.engine.process.noise(x0, eps, level, given.ctx)

    def _critic(self) -> Denoiser:
        network = self.network if self.critic is None else self.critic
        return Denoiser(cast(Network, network), self._base)

    def _as_critic(self) -> Any:
        """The network with the critic's factors in place of the student's, where they share one."""
        if self._adapter is None:
            return nullcontext()
        return strengths(self.network, {self._adapter: 0.0, CRITIC: 1.0})

    def _critics_x0(self, x: Tensor, level: Level, given: Given) -> Tensor:
        """The critic's x0 (B, C, h, w), without guidance."""
        denoiser = self._critic()
        with self._as_critic():
            return denoiser(x, level, denoiser.network.prepare(given.cond, (x.shape[2], x.shape[3])))


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}
