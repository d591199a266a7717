"""The engine: one network, its conditioner and its first stage, under one schedule and one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sat.conditioning.condition import Condition
from sat.conditioning.conditioner import Conditioner
from sat.diffusion.guidance import Guider
from sat.diffusion.loss import DenoisingLoss
from sat.diffusion.prediction import Denoiser, Network, Prediction
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.samplers import Sampler, StepCallback, Trajectory
from sat.diffusion.schedule import Level, Schedule
from sat.diffusion.tiles import Tiled, tile_size
from sat.first_stage.model import AutoencoderKL, Posterior
from sat.first_stage.tiling import (
    Tiling,
    Work,
    decode_sliced,
    decode_tiled,
    encode_sliced,
    encode_tiled,
    one_by_one,
)


class NonFiniteError(ArithmeticError):
    """A latent became infinite or NaN while sampling."""


class DiffusionEngine(nn.Module):
    """Samples images and computes training losses for any network of the family.

    Latents are the network's: the first stage's times its ``scale_factor``. The schedule, the sampler's state
    and guidance are float32 whatever the dtype of the weights.
    """

    def __init__(
        self,
        network: nn.Module,
        conditioner: Conditioner,
        first_stage: AutoencoderKL,
        schedule: Schedule,
        prediction: Prediction,
        process: Process | None = None,
        loss: DenoisingLoss | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.conditioner = conditioner
        self.first_stage = first_stage
        self.process = process or Process()
        self.schedule = schedule
        self.prediction = prediction
        self.denoising_loss = loss or DenoisingLoss()

    @property
    def denoiser(self) -> Denoiser:
        """The network behind the contract ``denoise(x, level, prepared) -> x0``."""
        return Denoiser(cast(Network, self.network), self.prediction)

    @property
    def hooks(self) -> str:
        """Who owns each hook of the network and of the process, for printing and for ``run.json``."""
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
    ) -> Tensor:
        """Latents (B, C, h, w) float32 from unit noise of the same shape.

        ``low_res``: the low-resolution image's latent, for relay. ``noise_sampler`` draws unit noise like
        ``noise``, for samplers that need more of it. ``tile``: the side, in latent cells, of the overlapping
        squares that a larger latent is denoised by; the conditions are then those of one square. ``reuse`` is
        a step cache over this engine's network (:mod:`sat.diffusion.step_cache`).

        Raises :class:`NonFiniteError` when a prediction is not finite: at once on the CPU, after the last
        step on an accelerator, where looking earlier would stall the device.
        """
        levels = self.process.hooks.levels(self.schedule, steps)
        rows = guider.rows(cond, uncond)
        timesteps = [float(level.timestep) for level in levels[:-1]]
        size = (noise.shape[2], noise.shape[3])
        tiles = tile is not None and max(size) > tile
        if tile is not None:
            size = tile_size(size, tile)
        prepared: dict[int, Any] = {}  # by number of rows: all, or those with the condition

        def ready(count: int) -> Any:
            if count not in prepared:
                part = rows.rows(slice(len(rows) - count, None))
                prepared[count] = self.network.prepare(part, size, timesteps)  # type: ignore[operator]
            return prepared[count]

        watch = _FiniteWatch(noise.device, next(self.network.parameters(), noise).dtype)
        denoiser = self.denoiser

        def predict(x: Tensor, level: Level) -> Tensor:
            return denoiser(x, level, ready(len(x)))

        seen = Tiled(predict, tile) if tiles and tile is not None else predict

        def guided(x: Tensor, level: Level) -> Tensor:
            x0 = guider(seen, x, level)
            watch.see(x0, level)
            return x0

        path = Trajectory(
            levels,
            self.process,
            ProcessContext(low_res),
            partial(self.process.hooks.level_at_sigma, self.schedule),
        )
        if noise_sampler is not None:
            path = replace(path, noise_sampler=noise_sampler)
        with reuse or nullcontext():
            out = sampler(guided, noise.float(), path, callback)
        watch.finish()
        return out

    @torch.inference_mode()
    def decode(
        self, latents: Tensor, *, batch: int = 1, tile: int | None = None, work: Work = one_by_one
    ) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32 in [0, 1].

        ``batch`` images are decoded at a time; ``tile`` is a side in latent cells, None decodes images whole.
        ``work`` does the tiles.
        """
        z = latents / self.first_stage.scale_factor
        if tile is None:
            images = decode_sliced(self.first_stage, z, batch)
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
        if tile is None:
            posterior = encode_sliced(self.first_stage, images)
        else:
            posterior = encode_tiled(self.first_stage, images, Tiling(tile), work)
        return posterior.sample(noise.to(posterior.mean)).float() * self.first_stage.scale_factor

    def latents(self, posterior: Posterior, generator: torch.Generator | None = None) -> Tensor:
        """A scaled sample (B, C, h, w) float32 of the first stage's posterior."""
        return posterior.sample(generator=generator).float() * self.first_stage.scale_factor

    def loss(
        self,
        latents: Tensor,
        cond: Condition,
        *,
        generator: torch.Generator | None = None,
        timestep: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """(B,) float32 denoising loss of clean latents (B, C, h, w).

        ``timestep`` (B,) fixes the timesteps, for validation at given noise levels; otherwise they are drawn.
        """
        draw = self.denoising_loss.draw(latents, self.process.hooks.span(self.schedule), generator)
        if timestep is not None:
            draw = draw._replace(timestep=timestep)
        prepared = self.network.prepare(cond, tuple(latents.shape[2:]))  # type: ignore[operator]
        return self.denoising_loss(
            self.denoiser, latents, prepared, draw, self.schedule, self.process, ProcessContext(low_res)
        )


class _FiniteWatch:
    """Notices the first step whose prediction is not finite, without stalling an accelerator."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.at_once = device.type == "cpu"
        self.dtype = dtype
        self.seen: list[tuple[Level, Tensor]] = []

    def see(self, x0: Tensor, level: Level) -> None:
        self.seen.append((level, torch.isfinite(x0).all()))
        if self.at_once and not self.seen[-1][1]:
            self.finish()

    def finish(self) -> None:
        flags = torch.stack([ok for _, ok in self.seen]).tolist()
        if all(flags):
            return
        step = flags.index(False)
        advice = {
            torch.float16: "float16 is too narrow for these weights: try sampling.dtype=bf16 or fp32",
            torch.bfloat16: "try sampling.dtype=fp32, and check the weights with convert.py",
        }.get(self.dtype, "the weights or the initial latents hold values that are not finite")
        name = str(self.dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"the latent is not finite at step {step + 1} "
            f"(timestep {self.seen[step][0].timestep:g}, {name}): {advice}"
        )
