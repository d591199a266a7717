"""Training of a denoising network, and of its text encoder if asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition, Sizes
from sat.control_input import ControlInput
from sat.data.batch import Batch
from sat.data.records import CONTROL, MASK
from sat.diffusion.draws import Draws, GeneratorDraws
from sat.diffusion.loss import Draw
from sat.embeddings import sent
from sat.engine import DiffusionEngine
from sat.first_stage.model import Posterior
from sat.train.objectives.base import Degradation, Objective


@dataclass(frozen=True)
class TrainedControl:
    """A control on the network: its pictures' encoding, and the share of pictures that do without it.

    ``guidance`` is the strength that a distilled network is told; None: it takes none.
    """

    name: str
    module: nn.Module
    encode: Callable[[Tensor], Tensor]
    dropout: float
    guidance: float | None = None


class DiffusionObjective(Objective):
    """The engine's denoising loss on captioned images, or on cached latent moments.

    ``caption_dropout``: share of captions replaced by zeros, which teaches the unconditional half of
    guidance. ``train_text``: the text encoder learns too; otherwise it and the first stage are frozen and
    run without gradients. ``levels``: noise levels of validation, as shares of the schedule's
    timesteps (0 nearly clean, 1 nearly pure noise).

    Relay is trained where the engine's process has it: the low-resolution image is the image itself, shrunk
    and enlarged. ``low_from`` ``first_stage`` lets the shrunk image pass the autoencoder, so that it looks
    like what a base model draws.

    A mask of the data (``data.sources``) weighs the loss by place: 1 where it is white, ``unmasked`` where it
    is black. ``mask_mean`` divides by the weights' mean over the picture, so that a small part counts as much
    as a whole picture. ``loss_weight`` of a source weighs the losses of its pictures.

    ``timestep_buckets``: the training loss is logged for that many equal parts of the timesteps too, by the
    first and last of each (``loss_t0_249`` …), a mean over its pictures.

    Validation gives the loss at each level with the right captions (``loss``, ``loss_500`` …) and with the
    captions of other images of the batch (``shuffled``, …): the gap says how much the text is used.
    """

    extras = frozenset((MASK, CONTROL))
    weighs = True

    def __init__(
        self,
        caption_dropout: float = 0.1,
        train_text: bool = False,
        levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        low_from: Literal["image", "first_stage"] = "image",
        timestep_buckets: int = 0,
        unmasked: float = 0.0,
        mask_mean: bool = False,
        *,
        engine: DiffusionEngine,
    ) -> None:
        super().__init__()
        if not 0 <= unmasked <= 1:
            raise ValueError(
                f"unmasked is {unmasked}: expected a weight of 0 to 1 for what a mask leaves out"
            )
        self.unmasked, self.mask_mean = unmasked, mask_mean
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout is {caption_dropout}: expected a share of 0 to 1")
        if bad := [level for level in levels if not 0 <= level < 1]:
            raise ValueError(f"levels {bad} of validation: expected shares of 0 to below 1")
        span = engine.process.hooks.span(engine.schedule)
        if not 0 <= timestep_buckets <= span:
            raise ValueError(f"timestep_buckets is {timestep_buckets}: expected 0 to {span} (the timesteps)")
        self.edges = [span * i // timestep_buckets for i in range(timestep_buckets + 1) if timestep_buckets]
        if engine.denoising_loss.timesteps is not None:
            engine.denoising_loss.cumulative(engine.schedule, span)  # impossible chances are told now
        # The engine is kept out of the module tree: what is frozen must be neither cast nor saved nor sent.
        self._engine = (engine.requires_grad_(False),)
        self.network = engine.network.requires_grad_(True)
        self.text: nn.Module | None = engine.conditioner.text.requires_grad_(True) if train_text else None
        self.caption_dropout = caption_dropout
        self.levels = tuple(levels)
        self.low_from = low_from
        self.control: TrainedControl | None = None

    @property
    def engine(self) -> DiffusionEngine:
        """The engine of the trained network."""
        return self._engine[0]

    def parts(self) -> dict[str, nn.Module]:
        """The network, and the text encoder if it learns."""
        return {"model": self.network} | ({} if self.text is None else {"text": self.text})

    def draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Noise of the posteriors, captions to drop, timesteps and noise."""
        shape = self.latent_shape(batch)
        made = {"posterior": draws.normal("posterior", shape)}
        if self.caption_dropout:
            made["drop"] = draws.uniform("drop") < self.caption_dropout
        if self.control is not None and self.control.dropout:
            made["control"] = draws.uniform("control") >= self.control.dropout
        if self.engine.process.input is not None:
            made["low_res"] = draws.normal("low_res", shape)
        return made | self.engine.draw(shape, draws)._asdict()

    def held_out_draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Noise of the posteriors, and ``eps_…`` for each level."""
        shape = self.latent_shape(batch)
        made = {"posterior": draws.normal("posterior", shape)}
        if self.engine.process.input is not None:
            made["low_res"] = draws.normal("low_res", shape)
        return made | {f"eps_{t}": self.engine.draw(shape, draws.child(t)).eps for t in self.timesteps}

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``loss``: mean over the batch; (B,) losses of every bucket, NaN for the images of others."""
        drawn = batch.draws or self.draws(batch, GeneratorDraws(len(batch), generator))
        latents = self.latents(batch, drawn["posterior"])
        cond = self.condition(batch, latents.device)
        if self.caption_dropout:
            cond = self.engine.conditioner.dropped(cond, sent(drawn["drop"], latents.device))
        cond = self.controlled(cond, batch, drawn.get("control"))
        low_res = self.low_res(batch, drawn.get("low_res"))
        draw = Draw(sent(drawn["timestep"], latents.device), drawn["eps"])
        weight = self.weight(batch, latents)
        each = self.engine.loss(latents, cond, draw=draw, low_res=low_res, weight=weight)  # (B,)
        weighted = each if batch.loss_weight is None else each * batch.loss_weight
        losses, other = {"loss": weighted.mean()}, torch.full_like(each, torch.nan)
        for first, end in pairwise(self.edges):
            inside = (draw.timestep >= first) & (draw.timestep < end)
            losses[f"loss_t{first}_{end - 1}"] = torch.where(inside, each.detach(), other)
        return losses

    def evaluate(self, batch: Batch, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Losses at fixed levels, with right and with shuffled captions and the same noise."""
        drawn = batch.draws or self.held_out_draws(batch, GeneratorDraws(len(batch), generator))
        latents = self.latents(batch, drawn["posterior"])
        low_res = self.low_res(batch, drawn.get("low_res"))
        weight = self.weight(batch, latents)
        cond = self.controlled(self.condition(batch, latents.device), batch)
        mask = None if cond.text_mask is None else cond.text_mask.roll(1, 0)
        shuffled = replace(cond, text=cond.text.roll(1, 0), text_mask=mask)
        losses: dict[str, Tensor] = {}
        for name, text in (("loss", cond), ("shuffled", shuffled)):
            for timestep in self.timesteps:
                every = torch.full((len(batch),), timestep, device=latents.device)
                draw = Draw(every, drawn[f"eps_{timestep}"])
                losses[f"{name}_{timestep}"] = self.engine.loss(
                    latents, text, draw=draw, low_res=low_res, weight=weight
                ).mean()
            losses[name] = torch.stack([v for k, v in losses.items() if k.startswith(f"{name}_")]).mean()
        return losses

    def controlled(self, cond: Condition, batch: Batch, kept: Tensor | None = None) -> Condition:
        """``cond`` with the control's pictures of the batch; those of rows that are not ``kept`` count 0."""
        if self.control is None:
            return cond
        given = batch.extras.get(CONTROL)
        if given is None:
            raise ValueError("a batch holds no pictures for the control (data.sources.N.control)")
        if batch.latent_moments is None:  # as they are, not encoded by a cache
            with torch.no_grad():
                given = self.control.encode(given.to(cond.text.device))
        device, strengths = cond.text.device, (1.0,) * len(batch)
        kept = None if kept is None else sent(kept.float(), device)
        own = ControlInput(self.control.name, given.to(device), strengths, kept=kept)
        if self.control.guidance is not None:
            strength = torch.full((len(batch),), self.control.guidance, device=device)
            cond = replace(cond, guidance=strength)
        return replace(cond, controls=(own,))

    def weight(self, batch: Batch, latents: Tensor) -> Tensor | None:
        """Weights (B, 1, h, w) of the places of ``latents`` by the batch's masks; None without any."""
        mask = batch.extras.get(MASK)
        if mask is None:
            return None
        mask = mask.to(latents.device)
        mask = F.interpolate(mask, (latents.shape[2], latents.shape[3]), mode="area")  # mean over a cell
        weight = self.unmasked + (1 - self.unmasked) * mask
        if not self.mask_mean:
            return weight
        return weight / weight.mean((1, 2, 3), keepdim=True).clamp_min(1e-6)  # an empty mask stays empty

    @property
    def timesteps(self) -> list[int]:
        """Timesteps of validation, by ``levels``."""
        span = self.engine.process.hooks.span(self.engine.schedule)
        return [int(level * span) for level in self.levels]

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        """(C, h, w) of the batch's latents."""
        if batch.latent_moments is not None:
            _, channels, h, w = batch.latent_moments.shape
            return channels // 2, h, w
        if batch.image is not None:
            return self.engine.latent_shape(*batch.image.shape[2:])
        height, width = batch.target_size[0].tolist()  # captions alone, on the CPU
        return self.engine.latent_shape(height, width)

    @torch.no_grad()
    def latents(self, batch: Batch, noise: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) float32, sampled from cached moments or from the encoded images."""
        if batch.latent_moments is not None:
            return self._sampled(Posterior.from_moments(batch.latent_moments), noise)
        if batch.image is None:
            raise ValueError("a batch holds neither images nor latent moments")
        return self._sampled(self.engine.first_stage.encode(batch.image), noise)

    def _sampled(self, posterior: Posterior, noise: Tensor) -> Tensor:
        """A scaled sample (B, C, h, w) float32 of the posterior, by unit ``noise``."""
        noise = sent(noise, posterior.mean.device)
        return posterior.sample(noise).float() * self.engine.first_stage.scale_factor

    @torch.no_grad()
    def low_res(self, batch: Batch, noise: Tensor | None) -> Tensor | None:
        """Scaled latents (B, C, h, w) of the low-resolution images, for relay; None for plain diffusion."""
        degrade = self.degrade()
        if degrade is None or noise is None:
            return None
        if batch.low_moments is not None:
            return self._sampled(Posterior.from_moments(batch.low_moments), noise)
        if batch.image is None:
            raise ValueError("relay needs images, or a cache with low-resolution moments")
        return self._sampled(self.engine.first_stage.encode(degrade(batch.image)), noise)

    def degrade(self) -> Callable[[Tensor], Tensor] | None:
        """Shrinking and enlarging of images (B, 3, H, W) by the factor of the process's input."""
        found = self.degradation({"low_from": self.low_from}, self.engine)
        return None if found is None else found.apply

    @classmethod
    def needs(cls, params: Mapping[str, Any]) -> frozenset[str]:
        """The network, and the text encoder if it learns."""
        return frozenset(("model", "text") if params.get("train_text") else ("model",))

    @classmethod
    def degradation(cls, params: Mapping[str, Any], engine: DiffusionEngine) -> Degradation | None:
        """As ``degrade``; ``params`` may have ``low_from``."""
        wanted = engine.process.input
        if wanted is None:
            return None
        by_first_stage = params.get("low_from") == "first_stage"

        def degraded(images: Tensor) -> Tensor:
            small = wanted.shrink(images)
            if by_first_stage:
                first_stage = engine.first_stage
                small = first_stage.decode(first_stage.encode(small).mode()).to(small.dtype).clamp(-1, 1)
            return wanted.enlarge(small)

        return Degradation(f"relay {wanted.factor} {'first_stage' if by_first_stage else 'image'}", degraded)

    def condition(self, batch: Batch, device: torch.device) -> Condition:
        """Text and sizes of the batch; gradients reach the text encoder only if it learns."""
        sizes = Sizes(batch.original_size, batch.crop, batch.target_size)
        if batch.text is not None:
            if self.text is not None:
                raise ValueError("the text encoder learns (train_text): its embeddings cannot be cached")
            mask = None if batch.text_mask is None else batch.text_mask.to(device)
            return Condition(batch.text.to(device), sent(self.engine.conditioner.size(*sizes), device), mask)
        with nullcontext() if self.text is not None else torch.no_grad():
            return self.engine.conditioner.condition(batch.caption, sizes, device)
