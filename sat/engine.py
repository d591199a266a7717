"""The engine: one network, its conditioner and its first stage, under one schedule and one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sat.conditioning.conditioner import Condition, Conditioner
from sat.diffusion.draws import Draws, GeneratorDraws
from sat.diffusion.guidance import Denoise, Guider
from sat.diffusion.loss import DenoisingLoss, Draw
from sat.diffusion.prediction import Denoiser, Network, Prediction
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.samplers import Sampler, StepCallback, Trajectory
from sat.diffusion.schedule import Level, Schedule, sized
from sat.diffusion.tiles import Tile, Tiled, tile_size
from sat.embeddings import sent
from sat.errors import UserError
from sat.first_stage.model import AutoencoderKL
from sat.first_stage.tiling import Tiling, Work, decode_tiled, encode_tiled, one_by_one

if TYPE_CHECKING:
    from sat.mixins.edit import Edit


class NonFiniteError(UserError, ArithmeticError):
    """A latent became infinite or NaN while sampling."""

    exit_code = 1


class DiffusionEngine(nn.Module):
    """Samples images and computes training losses for any network of the family.

    Latents are the network's: the first stage's times its ``scale_factor``. The schedule, the sampler's state
    and guidance are float32 whatever the dtype of the weights.
    """

    def __init__(
        self,
        network: nn.Module,  # of the contract sat.diffusion.prediction.Network
        conditioner: Conditioner,  # captions and sizes -> Condition
        first_stage: AutoencoderKL,  # images <-> latents
        schedule: Schedule,  # levels of sampling and training
        prediction: Prediction,  # of the network: eps, v or x0
        process: Process | None = None,  # None is plain diffusion
        loss: DenoisingLoss | None = None,  # None is the official loss
    ) -> None:
        super().__init__()
        self.network = network
        self.conditioner = conditioner
        self.first_stage = first_stage
        self.process = process or Process()
        self.schedule = schedule
        self.prediction = prediction
        self._loss = loss

    @cached_property
    def denoising_loss(self) -> DenoisingLoss:
        """The loss of training, made when it is first asked for."""
        return self._loss or DenoisingLoss()

    @property
    def denoiser(self) -> Denoiser:
        """The network behind the contract ``denoise(x, level, prepared) -> x0``."""
        return Denoiser(cast(Network, self.network), self.prediction)

    @property
    def hooks(self) -> str:
        """The owners of the hooks of network and process, for printing and for ``run.json``."""
        return f"{getattr(self.network, 'hooks', '')}\n{self.process.resolved}".strip()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image of ``height`` x ``width`` pixels."""
        factor = self.first_stage.factor
        return self.first_stage.channels, height // factor, width // factor

    @torch.inference_mode()
    def sample(  # noqa: PLR0913 - all that one picture depends on
        self,
        cond: Condition,
        uncond: Condition,
        noise: Tensor,
        *,
        steps: int,
        guider: Guider,
        sampler: Sampler,
        low_res: Tensor | None = None,
        noise_sampler: Callable[[], Tensor] | None = None,
        tile: int | None = None,
        callback: StepCallback | None = None,
        reuse: AbstractContextManager[None] | None = None,
        edit: Edit | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) float32 from unit noise of the same shape.

        ``low_res``: the low-resolution image's latent, for relay. ``noise_sampler`` draws unit noise like
        ``noise``, for samplers that need more of it. ``tile``: the side, in latent cells, of the overlapping
        squares that a larger latent is denoised by; the conditions are then those of one square. ``reuse`` is
        a step cache over this engine's network (:mod:`sat.diffusion.step_cache`). ``edit`` is a picture to
        change instead of drawing one from noise alone (:mod:`sat.mixins.edit`).

        Raises :class:`NonFiniteError` when a prediction is not finite: at once on the CPU, after the last
        step on an accelerator, where looking earlier would stall the device.
        """
        size = whole = (noise.shape[2], noise.shape[3])
        schedule = sized(self.schedule, size if tile is None else tile_size(size, tile))
        process, ctx = self.process, ProcessContext(low_res)
        if edit is not None:
            process, ctx = edit.around(process, schedule, steps), edit.context(ctx, noise)
        levels = process.hooks.levels(schedule, steps)
        rows = guider.rows(cond, uncond)  # (B or 2 B): those with the condition last
        timesteps = [float(level.timestep) for level in levels[:-1]]
        denoiser = self.denoiser
        prepared: dict[Any, Any] = {}  # by number of rows, all or those with the condition, by controls, tile

        def predict(x: Tensor, level: Level, at: Tile | None = None) -> Tensor:
            """The network's x0 for all rows, or for the last ones; ``at``: of a part of the latent."""
            share = level.noise_share if rows.controls else 0.0
            place = [(side.start, side.stop) for side in at or () if rows.controls]
            key = len(x), tuple(own.acts(share) for own in rows.controls), tuple(place)
            if key not in prepared:
                part = rows.rows(slice(len(rows) - len(x), None)).at(share)
                if at is not None:
                    part = replace(part, controls=tuple(own.cut(at, whole) for own in part.controls))
                prepared[key] = denoiser.network.prepare(part, size, timesteps)
            return denoiser(x, level, prepared[key])

        denoise: Denoise = predict
        if tile is not None and max(size) > tile:
            denoise, size = Tiled(predict, tile), tile_size(size, tile)
        finite: list[tuple[Level, Tensor]] = []  # of each evaluation

        def guided(x: Tensor, level: Level) -> Tensor:
            """The guided x0 (B, C, h, w)."""
            x0 = guider(denoise, x, level)
            finite.append((level, torch.isfinite(x0).all()))
            if noise.device.type == "cpu" and not finite[-1][1]:
                raise self._not_finite(finite)
            return x0

        level_at_sigma = partial(process.hooks.level_at_sigma, schedule)
        path = Trajectory(levels, process, ctx, level_at_sigma)
        if noise_sampler is not None:
            path = replace(path, noise_sampler=noise_sampler)
        with reuse or nullcontext():
            latents = sampler(guided, noise.float(), path, callback)
        if finite and not torch.stack([ok for _, ok in finite]).all():  # none where no step is taken
            raise self._not_finite(finite)
        return latents

    def _not_finite(self, evaluated: Sequence[tuple[Level, Tensor]]) -> NonFiniteError:
        """The error of the first evaluation that is not finite, with what to try."""
        step = [bool(ok) for _, ok in evaluated].index(False)
        parameter = next(self.network.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        advice = {
            torch.float16: "float16 is too narrow for these weights: try sampling.dtype=bf16 or fp32",
            torch.bfloat16: "try sampling.dtype=fp32, and check the weights with convert.py",
        }.get(dtype, "the weights or the initial latents hold values that are not finite")
        return NonFiniteError(
            f"the latent is not finite at step {step + 1} (timestep {evaluated[step][0].timestep:g}, "
            f"{str(dtype).removeprefix('torch.')}): {advice}"
        )

    @torch.inference_mode()
    def decode(
        self, latents: Tensor, *, batch: int = 1, tile: int | None = None, work: Work = one_by_one
    ) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32 in [0, 1].

        ``batch`` images are decoded at a time; ``tile`` is a side in latent cells, None decodes images whole.
        ``work`` does the tiles.
        """
        z = latents / self.first_stage.scale_factor
        if tile is None and len(z) <= batch:
            images = self.first_stage.decode(z)
        else:
            images = decode_tiled(self.first_stage, z, Tiling(tile, batch=batch), work)
        return images.float().add(1).div_(2).clamp_(0, 1)

    @torch.inference_mode()
    def encode(
        self, images: Tensor, noise: Tensor, *, tile: int | None = None, work: Work = one_by_one
    ) -> Tensor:
        """Latents (B, C, h, w) float32 of images (B, 3, H, W) in [-1, 1], sampled with unit ``noise``.

        ``tile`` and ``work`` as in :meth:`decode`. The official relay samples its input's latent too.
        """
        posterior = encode_tiled(self.first_stage, images, Tiling(tile), work)
        return posterior.sample(noise.to(posterior.mean)).float() * self.first_stage.scale_factor

    def draw(self, shape: Sequence[int], draws: Draws) -> Draw:
        """Timesteps and noise for clean latents of ``shape`` (C, h, w), where ``draws`` makes them."""
        schedule = sized(self.schedule, (shape[1], shape[2]))
        return self.denoising_loss.draw(shape, self.process.hooks.span(schedule), draws, schedule)

    def loss(
        self,
        latents: Tensor,
        cond: Condition,
        *,
        generator: torch.Generator | None = None,
        timestep: Tensor | None = None,
        low_res: Tensor | None = None,
        draw: Draw | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """(B,) float32 denoising loss of clean latents (B, C, h, w), for ``draw`` or one made here.

        ``weight`` (B, 1, h, w) of their places. ``timestep`` (B,) fixes the timesteps, for validation at
        given noise levels; otherwise they are drawn.
        """
        if draw is None:
            draw = self.draw(latents.shape[1:], GeneratorDraws(len(latents), generator, latents.device))
        if timestep is not None:
            draw = draw._replace(timestep=timestep)
        draw = Draw(sent(draw.timestep, latents.device), sent(draw.eps, latents.device))
        denoiser, ctx = self.denoiser, ProcessContext(low_res)
        size = (latents.shape[2], latents.shape[3])
        prepared, schedule = denoiser.network.prepare(cond, size), sized(self.schedule, size)
        process = self.process
        return self.denoising_loss(denoiser, latents, prepared, draw, schedule, process, ctx, weight)
