"""The first stage's training objective: its terms, its refusals, and that it learns."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from sat.data.batch import Batch
from sat.first_stage import AutoencoderKL
from sat.train.objectives.first_stage import FirstStageObjective, edge_error, peak_signal_to_noise
from tests.tolerances import F32


def objective(**weights: float | bool) -> FirstStageObjective:
    """Over a first stage of factor 4 with 3 latent channels."""
    net = AutoencoderKL(4, (1, 2, 2), 1, 3, 2)
    return FirstStageObjective(engine=SimpleNamespace(first_stage=net), **weights)  # type: ignore[arg-type]


def batch(image: torch.Tensor | None, count: int = 2) -> Batch:
    sizes = torch.zeros(count, 2, dtype=torch.int64)
    return Batch(["a"] * count, sizes, sizes, sizes, image=image)


def images() -> torch.Tensor:
    return torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_loss_is_the_weighted_sum_of_its_terms() -> None:
    terms = objective(pixel=0.5, edge=2.0, kl=0.1)(batch(images()), generator())
    expected = 0.5 * terms["pixel"] + 2 * terms["edge"] + 0.1 * terms["kl"]
    assert (terms["loss"] - expected).abs() < F32
    assert terms["loss"].requires_grad
    assert not any(value.requires_grad for name, value in terms.items() if name != "loss")


def test_terms_follow_their_formulas() -> None:
    trained = objective()
    terms = trained(batch(images()), generator())
    posterior = trained.first_stage.encode(images())
    latent = posterior.sample(generator=generator())
    made = trained.first_stage.decode(latent)
    assert (terms["pixel"] - torch.nn.functional.l1_loss(made, images())).abs() < F32
    assert (terms["kl"] - posterior.kl().sum() / posterior.mean.numel()).abs() < F32
    assert (terms["latent_std"] - latent.std()).abs() < F32
    assert (terms["latent_mean"] - latent.mean()).abs() < F32


def test_a_loss_of_psnr_is_minus_its_mean_over_pictures_in_tens_of_decibels() -> None:
    trained = objective(pixel=0.0, edge=0.0, kl=0.0, psnr=1.0)
    with torch.no_grad():
        made = trained.first_stage.decode(trained.first_stage.encode(images()).sample(generator=generator()))
    errors = [float((a - b).square().mean()) for a, b in zip(made, images(), strict=True)]
    expected = sum(math.log10(error / 4) for error in errors) / 2
    assert float(trained(batch(images()), generator())["loss"].detach()) == pytest.approx(expected, abs=F32)
    with pytest.raises(ValueError, match="pixel, edge or psnr must be positive"):
        objective(pixel=0.0, edge=0.0)


def test_edge_error_compares_differences_at_two_scales() -> None:
    one, other = images(), images().flip(0)
    half = [x.reshape(2, 3, 6, 2, 8, 2).mean((3, 5)) for x in (one, other)]
    expected = 0.0
    for a, b in ((one, other), half):
        expected += ((a[..., 1:, :] - a[..., :-1, :]) - (b[..., 1:, :] - b[..., :-1, :])).abs().mean() / 4
        expected += ((a[..., 1:] - a[..., :-1]) - (b[..., 1:] - b[..., :-1])).abs().mean() / 4
    assert (edge_error(one, other) - expected).abs() < F32
    assert edge_error(one + 0.3, one) < F32  # a shift of brightness has no edges


def test_psnr_is_in_decibels_of_the_range_two() -> None:
    target = torch.zeros(3, 3, 4, 4)
    made = target + torch.tensor([0.2, 0.02, 0.0]).view(3, 1, 1, 1)
    assert peak_signal_to_noise(made, target).tolist() == pytest.approx([20, 40, 100], abs=1e-3)
    assert peak_signal_to_noise(target + 5, target + 1).tolist() == pytest.approx(
        [100] * 3
    )  # white beyond white


def test_training_samples_the_latent_and_validation_takes_its_mode() -> None:
    trained = objective()
    drawn = [trained(batch(images()), torch.Generator().manual_seed(seed))["pixel"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    fixed = [
        trained.evaluate(batch(images()), torch.Generator().manual_seed(seed))["pixel"] for seed in (1, 2)
    ]
    assert fixed[0] == fixed[1]
    made = trained.first_stage(images())
    assert (fixed[0] - (made - images()).abs().mean()).abs() < F32


def test_it_saves_the_first_stage_alone() -> None:
    trained = objective()
    assert trained.parts() == {"first_stage": trained.first_stage}
    assert len(list(trained.parameters())) == len(list(trained.first_stage.parameters()))


def test_a_frozen_encoder_keeps_its_latents_while_the_decoder_learns() -> None:
    trained = objective(freeze_encoder=True)
    trained(batch(images()), generator())["loss"].backward()
    with_gradient = {name.split(".")[1] for name, p in trained.named_parameters() if p.grad is not None}
    assert with_gradient == {"decoder"}
    assert {name.split(".")[1] for name, p in trained.named_parameters() if not p.requires_grad} == {
        "encoder"
    }


def test_noise_disturbs_the_latent_in_training_only() -> None:
    plain, noisy = objective(), objective(noise=3.0)
    noisy.first_stage = plain.first_stage
    terms = [one(batch(images()), generator()) for one in (plain, noisy)]
    assert terms[1]["latent_std"] > terms[0]["latent_std"] + 1
    terms = [one.evaluate(batch(images()), generator()) for one in (plain, noisy)]
    assert terms[0]["latent_std"] == terms[1]["latent_std"]


def test_a_batch_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="the batch has only latents .*data.cache_views"):
        objective()(batch(None), generator())


@pytest.mark.parametrize(
    "weights", [{"kl": -1.0}, {"edge": -0.1}, {"noise": -1.0}, {"pixel": 0.0, "edge": 0.0}]
)
def test_weights_that_train_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must not be negative, and pixel, edge or psnr must be positive"):
        objective(**weights)


def test_it_learns_a_picture() -> None:
    trained = objective()
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-2)
    squares = torch.rand(2, 3, 4, 4, generator=generator()) * 2 - 1
    picture = batch(squares.repeat_interleave(4, 2).repeat_interleave(4, 3))
    before = trained.evaluate(picture, generator())["psnr"]
    for step in range(100):
        optimizer.zero_grad()
        trained(picture, torch.Generator().manual_seed(step))["loss"].backward()
        optimizer.step()
    assert trained.evaluate(picture, generator())["psnr"] > before + 6
