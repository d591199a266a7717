"""Diffusion-DPO: a network that learns which of two pictures of a caption people preferred."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.adapters.lora import strengths
from sat.conditioning.conditioner import Condition
from sat.data.batch import Batch
from sat.data.records import LOSER
from sat.diffusion.draws import GeneratorDraws
from sat.diffusion.loss import Draw
from sat.diffusion.prediction import Denoiser, Network
from sat.diffusion.process import ProcessContext
from sat.diffusion.schedule import sized
from sat.embeddings import sent
from sat.engine import DiffusionEngine
from sat.first_stage.model import Posterior
from sat.train.objectives.diffusion import DiffusionObjective


class Compared(NamedTuple):
    """Denoising errors (B,) of the preferred pictures and of the others, by the policy and the reference."""

    winner: Tensor
    loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor

    @property
    def margin(self) -> Tensor:
        """(B,) by how much more the error of the preferred pictures fell: the implicit reward's."""
        return (self.reference_winner - self.winner) - (self.reference_loser - self.loser)


class Preference(DiffusionObjective):
    """-log sigmoid(beta margin) of pairs: each record's picture is preferred to its ``loser``.

    err is the denoising loss of ``diffusion.loss``, with the same noise and timestep for both pictures, and

        margin = err_ref(winner) - err(winner) - (err_ref(loser) - err(loser))

    so that at the start, where policy and reference are one, the loss is log 2 and its gradient
    beta / 2 of that of err(winner) - err(loser). ``beta`` holds the number of timesteps: half of the value
    that papers name (5000 for SDXL). The reference is the network without the trained factors
    (``adapters.lora``), one copy of the weights; with whole weights, a copy of them. ``levels``: shares of
    the timesteps that held-out pairs are compared at. Any prediction of plain diffusion and flow.

    Source: arXiv:2311.12908, eq. 14.
    """

    extras = frozenset((LOSER,))
    required = frozenset((LOSER,))

    def __init__(
        self,
        beta: float = 2500.0,
        levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        *,
        engine: DiffusionEngine,
    ) -> None:
        super().__init__(caption_dropout=0.0, levels=levels, engine=engine)
        if not 0 < beta < float("inf"):
            raise ValueError(f"preference: beta is {beta:g}, expected a finite number above 0")
        if engine.process.input is not None:
            raise ValueError(
                "preference: a process that begins from a given picture (relay) is not trained on pairs: "
                "train the base model, whose pictures people compared"
            )
        self.beta = beta
        self._adapter: str | None = None
        self._reference: tuple[nn.Module, ...] = ()  # out of the module tree: neither trained nor saved

    def begin(self, adapter: str | None) -> None:
        """Copy the reference, unless it is the network without the trained factors."""
        self._adapter = adapter
        self._reference = () if adapter else (copy.deepcopy(self.engine.network).requires_grad_(False),)

    def beside(self) -> Sequence[nn.Module]:
        """The reference, where it is a copy."""
        return self._reference

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``loss``, ``implicit_accuracy`` (share of margins above 0), ``margin``, errors of both pictures."""
        drawn = batch.draws or self.draws(batch, GeneratorDraws(len(batch), generator))
        pair, cond = self._pair(batch, drawn["posterior"])
        return self._scored(self._compared(pair, cond, Draw(drawn["timestep"], drawn["eps"])), batch)

    def evaluate(self, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
        """The same of held-out pairs, by their mean errors over ``levels``."""
        drawn = batch.draws or self.held_out_draws(batch, GeneratorDraws(len(batch), generator))
        pair, cond = self._pair(batch, drawn["posterior"])
        each = [
            self._compared(pair, cond, Draw(torch.full((len(batch),), t), drawn[f"eps_{t}"]))
            for t in self.timesteps
        ]
        return self._scored(
            Compared(*(torch.stack(errors).mean(0) for errors in zip(*each, strict=True))), batch
        )

    def _scored(self, found: Compared, batch: Batch) -> dict[str, Tensor]:
        loss = -F.logsigmoid(self.beta * found.margin)  # (B,)
        loss = loss if batch.loss_weight is None else loss * batch.loss_weight
        margin = found.margin.detach()
        return {
            "loss": loss.mean(),
            "implicit_accuracy": (margin > 0).float().mean(),
            "margin": margin.mean(),
            "winner": found.winner.detach().mean(),
            "loser": found.loser.detach().mean(),
        }

    def _pair(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Condition]:
        """Latents (2B, C, h, w), the preferred pictures first, and the condition of both."""
        other = batch.extras.get(LOSER)
        if other is None:
            raise ValueError("a batch holds no pictures that were not preferred (data.sources.N.loser)")
        winner = self.latents(batch, noise)
        if batch.latent_moments is not None:
            loser = self._sampled(Posterior.from_moments(other), noise)
        else:
            loser = self.latents(replace(batch, image=other), noise)
        cond = self.condition(batch, winner.device)
        return torch.cat([winner, loser.to(winner)]), Condition.cat([cond, cond])

    def _compared(self, pair: Tensor, cond: Condition, draw: Draw) -> Compared:
        """Errors of both pictures at one draw of noise and timestep, by both networks."""
        twice = Draw(*(torch.cat([one, one]) for one in (sent(x, pair.device) for x in draw)))
        winner, loser = self._errors(self.network, pair, cond, twice).chunk(2)
        off = strengths(self.network, {self._adapter: 0.0}) if self._adapter else nullcontext()
        with torch.no_grad(), off:
            network = self._reference[0] if self._reference else self.network
            return Compared(winner, loser, *self._errors(network, pair, cond, twice).chunk(2))

    def _errors(self, network: nn.Module, latents: Tensor, cond: Condition, draw: Draw) -> Tensor:
        """(2B,) denoising losses by ``network``."""
        engine, size = self.engine, (latents.shape[2], latents.shape[3])
        denoiser = Denoiser(cast(Network, network), engine.prediction)
        return engine.denoising_loss(
            denoiser, latents, denoiser.network.prepare(cond, size), draw, sized(engine.schedule, size),
            engine.process, ProcessContext(None),
        )  # fmt: skip
