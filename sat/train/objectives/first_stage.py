"""Training of the first stage: reconstruct the image through a sampled latent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.checkpoint.eight_bits import Whole
from sat.checkpoint.files import open_file
from sat.data.batch import Batch
from sat.diffusion.draws import Draws, GeneratorDraws
from sat.embeddings import sent
from sat.first_stage.model import AutoencoderKL, Posterior
from sat.models.vision.classifier import Card, Classifier
from sat.models.vision.perceptual import (
    ClassifierFeatures,
    Features,
    PatchDiscriminator,
    VGG16Features,
    adaptive_weight,
    hinge,
    perceptual_distance,
)
from sat.train.objectives.base import Objective


class HasFirstStage(Protocol):
    """The part of an engine that this objective uses."""

    first_stage: AutoencoderKL


@dataclass(frozen=True)
class Perceptual:
    """A term in the ``features`` of a frozen network, times ``weight``.

    ``features``: a file of VGG16 under torchvision's names (with LPIPS's weights of stages or without), or a
    folder of the small classifier, another one than the judge of the scores.
    """

    features: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"perceptual: weight is {self.weight}, expected more than 0")


@dataclass(frozen=True)
class Adversarial:
    """A discriminator's hinge loss from step ``start`` on, times ``weight`` and an adaptive weight.

    At adaptive weight alone it pulls as hard at the decoder's last layer as the terms of the picture do. The
    discriminator has ``width`` channels and ``layers`` halvings.
    """

    weight: float = 0.5
    start: int = 0
    width: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        if not self.weight > 0 or self.start < 0 or min(self.width, self.layers) < 1:
            raise ValueError(
                f"adversarial: weight {self.weight}, start {self.start}, width {self.width}, layers "
                f"{self.layers}: expected a weight above 0, a step, and at least 1 channel and layer"
            )


class FirstStageObjective(Objective):
    """``pixel`` x L1 + ``edge`` x image gradients at two scales - ``psnr`` x PSNR + ``kl`` x KL, each a mean.

    ``pixel``, ``edge``: weights of the absolute error of the pixels (in [-1, 1]) and of their horizontal and
    vertical differences, at full and at half size. ``psnr``: of each picture's PSNR before clamping, in units
    of 10 dB, so that a loss of it alone is log10 of the squared error. ``kl``: of the divergence per latent
    value, in nats.
    Logged beside ``loss``: ``pixel``, ``edge``, ``kl``, ``psnr`` (dB, of the clamped sampled reconstruction),
    ``latent_mean`` and ``latent_std`` (of all latent values; 1 / latent_std is a fitting ``scale_factor``).

    ``perceptual`` adds a distance in the features of a frozen network. ``adversarial`` adds a patch
    discriminator, which learns in the same step as the decoder and is not exported; ``train.groups`` names it
    by ``discriminator.*``. Validation is without it.

    ``freeze_encoder``: train the decoder alone. Latents stay what they are, so a diffusion model of them
    stays valid while its pictures get sharper. ``noise``: deviation of further noise on the latents that are
    decoded in training, in their units, so that the decoder forgives a diffusion model's errors.

    Training reconstructs from a sampled latent, validation from its mode. The convolutions run channels-last,
    which on a CPU in bf16 is several times faster.
    """

    def __init__(  # noqa: PLR0913 - the fields of the YAML component
        self,
        pixel: float = 1.0,
        edge: float = 1.0,
        kl: float = 1e-4,
        noise: float = 0.0,
        freeze_encoder: bool = False,
        perceptual: Perceptual | None = None,
        adversarial: Adversarial | None = None,
        psnr: float = 0.0,
        *,
        engine: HasFirstStage,
    ) -> None:
        super().__init__()
        if min(pixel, edge, psnr, kl, noise) < 0 or pixel + edge + psnr <= 0:
            raise ValueError(
                f"train.objective: pixel {pixel}, edge {edge}, psnr {psnr}, kl {kl}, noise {noise} must not "
                f"be negative, and pixel, edge or psnr must be positive"
            )
        self.first_stage = engine.first_stage
        like = next(self.first_stage.parameters())
        self.perceptual, self.adversarial = perceptual, adversarial
        self._features: Sequence[nn.Module] = ()  # out of the module tree: neither trained nor saved
        if perceptual is not None:
            self._features = (_like(load_features(perceptual.features), like).requires_grad_(False).eval(),)
        self.discriminator: nn.Module | None = None
        if adversarial is not None:
            made = PatchDiscriminator(adversarial.width, adversarial.layers)
            self.discriminator = _like(made.to(like.dtype), like)
        self.pixel, self.edge, self.psnr, self.kl, self.noise = pixel, edge, psnr, kl, noise
        if freeze_encoder:
            self.first_stage.encoder.requires_grad_(False)
            self.first_stage.quant.requires_grad_(False)

    @classmethod
    def broken(cls, params: Mapping[str, Any], zero: int) -> Iterator[tuple[str, str]]:
        """Features that are not there, and a discriminator where weights are shared out."""
        perceptual = params.get("perceptual")
        path = perceptual.get("features") if isinstance(perceptual, Mapping) else None
        if path is not None and not Path(path).exists():
            yield "perceptual", f"features {path}: no such file or folder"
        if params.get("adversarial") is not None and zero == 3:
            yield "adversarial", "weighs gradients in a whole layer, and train.zero 3 shares it out: use 2"

    def beside(self) -> Sequence[nn.Module]:
        """The frozen network of the perceptual term."""
        return self._features

    def parts(self) -> dict[str, nn.Module]:
        """The part that a checkpoint of this training holds."""
        return {"first_stage": self.first_stage}

    def draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Noise of the posterior, and further noise on its latents."""
        image, first_stage = self._images(batch), self.first_stage
        shape = (first_stage.channels, *(side // first_stage.factor for side in image.shape[2:]))
        made = {"posterior": draws.normal("posterior", shape)}
        return made | ({"noise": draws.normal("noise", shape)} if self.noise else {})

    def held_out_draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """None: held-out images go through the mode."""
        return {}

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``loss`` and the logged terms, float32 scalars; the latent is drawn by ``batch.draws``."""
        image = self._images(batch)
        drawn = batch.draws or self.draws(batch, GeneratorDraws(len(batch), generator))
        posterior = self.first_stage.encode(image)
        latent = posterior.sample(sent(drawn["posterior"], image.device))
        if self.noise:
            latent = latent + self.noise * sent(drawn["noise"], image.device).to(latent.dtype)
        return self._terms(image, posterior, latent)

    def evaluate(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The same of held-out images, through the mode of the latent; ``generator`` is not drawn from."""
        image = self._images(batch)
        posterior = self.first_stage.encode(image)
        return self._terms(image, posterior, posterior.mode())

    def _images(self, batch: Batch) -> Tensor:
        """The batch's images (B, 3, H, W), channels-last in memory."""
        if batch.image is None:
            raise ValueError(
                "train.objective: the first stage trains on images, but the batch has only latents "
                "(set data.cache_views to 0)"
            )
        return batch.image.contiguous(memory_format=torch.channels_last)

    def _terms(self, image: Tensor, posterior: Posterior, latent: Tensor) -> dict[str, Tensor]:
        """The loss and its parts for images (B, 3, H, W) reconstructed from ``latent`` (B, C, h, w)."""
        made, target = self.first_stage.decode(latent).float(), image.float()  # (B, 3, H, W)
        pixel = (made - target).abs().mean()
        edge = edge_error(made, target)
        kl = posterior.kl().mean() / latent[0].numel()  # nats per latent value
        picture = self.pixel * pixel + self.edge * edge
        if self.psnr:  # -PSNR / 10 = log10(mean squared error / 2^2), of values in [-1, 1]
            error = (made - target).square().mean(dim=(1, 2, 3)).clamp_min(4e-10)  # (B,)
            picture = picture + self.psnr * torch.log10(error / 4).mean()
        more: dict[str, Tensor] = {}
        if self.perceptual is not None:
            features = cast(Features, self._features[0])
            distance = perceptual_distance(features, made, target).mean()
            picture, more["perceptual"] = picture + self.perceptual.weight * distance, distance.detach()
        loss = picture + self.kl * kl
        if self.discriminator is not None and torch.is_grad_enabled():
            added, told = self._adversarial(made, target, picture)
            loss, more = loss + added, more | told
        with torch.no_grad():
            latent_std, latent_mean = torch.std_mean(latent.float())
            psnr = peak_signal_to_noise(made, target).mean()
        return {
            "loss": loss,
            "pixel": pixel.detach(),
            "edge": edge.detach(),
            "kl": kl.detach(),
            "psnr": psnr,
            "latent_mean": latent_mean,
            "latent_std": latent_std,
            **more,
        }

    def _adversarial(self, made: Tensor, target: Tensor, picture: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of decoder and discriminator, added up, and what is logged of them.

        The discriminator is constant to the decoder's loss, and the pictures are to the discriminator's.
        """
        network, settings = cast(nn.Module, self.discriminator), cast(Adversarial, self.adversarial)
        if self.step < settings.start:
            return sum(p.sum() for p in network.parameters()) * torch.zeros_like(picture), {}  # no gradient
        dtype = next(network.parameters()).dtype
        fixed = {name: p.detach() for name, p in network.named_parameters()}
        fooled = -torch.func.functional_call(network, fixed, (made.to(dtype),)).float().mean()
        last = self.first_stage.decoder.head.weight
        weight = adaptive_weight(picture, fooled, last)
        told_apart = hinge(network(target.to(dtype)).float(), network(made.detach().to(dtype)).float())
        told = {"adversarial": fooled.detach(), "discriminator": told_apart.detach(), "adaptive": weight}
        return settings.weight * weight * fooled + told_apart, told


def load_features(path: Path) -> nn.Module:
    """The frozen network at ``path``: VGG16 from a file, or the small classifier from its folder."""
    if path.is_dir():
        card = path / "classifier.json"
        if not card.is_file():
            raise ValueError(
                f"{path}: no classifier.json; name a folder of the small classifier, or a file of VGG16"
            )
        classifier = Classifier(Card.of(json.loads(card.read_text("utf-8"))))
        with open_file(path / "classifier.safetensors") as tensors:
            classifier.load_state_dict(dict(Whole(tensors)))
        return ClassifierFeatures(classifier.float())
    network = VGG16Features()
    with open_file(path) as tensors:
        try:
            network.take({name: tensors[name] for name in tensors})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return network.float()


def _like(module: nn.Module, like: Tensor) -> nn.Module:
    """``module`` where ``like`` is; without data if that has none, for estimates."""
    mode = getattr(like, "fake_mode", None)
    if mode is None:
        return module.to(like.device)
    for owner in module.modules():
        for name, value in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            found = mode.from_tensor(value.detach())
            own = nn.Parameter(found) if isinstance(value, nn.Parameter) else found
            (owner._parameters if isinstance(value, nn.Parameter) else owner._buffers)[name] = own
    return module


def edge_error(made: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error () of neighbouring-pixel differences, both ways, at full and half size, averaged.

    Images are (B, C, H, W), H and W at least 4. Differences are linear: the error is differenced.
    """
    error = made - target
    half = F.avg_pool2d(error, 2)
    terms = [scale.diff(dim=dim).abs().mean() for scale in (error, half) for dim in (2, 3)]
    return torch.stack(terms).mean()


def peak_signal_to_noise(made: Tensor, target: Tensor) -> Tensor:
    """PSNR (B,) in dB of images (B, C, H, W) in [-1, 1]; ``made`` is clamped first. At most 100 dB."""
    mse = (made.clamp(-1, 1) - target).square().mean(dim=(1, 2, 3)) / 4
    return -10 * torch.log10(mse.clamp_min(1e-10))
