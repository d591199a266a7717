"""The autoencoder's perceptual and adversarial terms against their formulas and a loop written out."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from sat.data.batch import Batch
from sat.diffusion.loss import DenoisingLoss
from sat.first_stage import AutoencoderKL
from sat.models.vision.classifier import Card, Classifier
from sat.models.vision.perceptual import (
    ClassifierFeatures,
    PatchDiscriminator,
    VGG16Features,
    adaptive_weight,
    hinge,
    perceptual_distance,
)
from sat.train.objectives.first_stage import (
    Adversarial,
    FirstStageObjective,
    Perceptual,
    edge_error,
    load_features,
)
from tests.configs import ROOT, refused
from tests.tolerances import EXACT, F32

TORCHVISION = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
"""Places of the convolutions of torchvision's vgg16 in its ``features``."""


def pictures(seed: int, count: int = 2, height: int = 24, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- features and distances


@pytest.fixture(scope="module")
def vgg() -> VGG16Features:
    torch.manual_seed(0)
    return VGG16Features().eval().requires_grad_(False)


def test_vgg16_has_torchvisions_names_and_lpips_stages(vgg) -> None:
    assert sorted({int(name.split(".")[1]) for name in vgg.state_dict()}) == TORCHVISION
    maps = vgg(pictures(0))
    assert [tuple(one.shape[1:]) for one in maps] == [
        (64, 24, 32), (128, 12, 16), (256, 6, 8), (512, 3, 4), (512, 1, 2)
    ]  # fmt: skip
    x = (pictures(0) - vgg.mean) / vgg.std
    for place in (0, 2):
        x = F.relu(F.conv2d(x, vgg.features[place].weight, vgg.features[place].bias, padding=1))
    torch.testing.assert_close(maps[0], x)
    assert min(one.min() for one in maps) == 0  # behind a rectifier


def test_weights_of_a_file_are_taken_by_torchvisions_names(vgg, tmp_path: Path) -> None:
    tensors = {name: value.contiguous() for name, value in vgg.state_dict().items()}
    tensors |= {"classifier.0.weight": torch.zeros(2, 2), "lin2.model.1.weight": torch.ones(1, 256, 1, 1)}
    save_file(tensors, tmp_path / "vgg16.safetensors")
    torch.save(tensors, tmp_path / "vgg16.pth")
    for name in ("vgg16.safetensors", "vgg16.pth"):
        found = load_features(tmp_path / name)
        assert torch.equal(found(pictures(1))[4], vgg(pictures(1))[4])
        assert [weight is not None for weight in found.weights] == [False, False, True, False, False]
    del tensors["features.7.bias"]
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"half.safetensors: no VGG16 .* names: 'features.7.bias'"):
        load_features(tmp_path / "half.safetensors")


class Two:
    """Two stages: the picture itself, and its means over pairs of places, weighed."""

    weights = (None, torch.tensor([1.0, 0.0, 2.0]))

    def __call__(self, images: Tensor) -> list[Tensor]:
        return [images, F.avg_pool2d(images, 2)]


def test_the_distance_is_that_of_lpips() -> None:
    a, b = pictures(0), pictures(1)
    expected = torch.zeros(2)
    for weights, x, y in (((1, 1, 1), a, b), ((1, 0, 2), F.avg_pool2d(a, 2), F.avg_pool2d(b, 2))):
        for n in range(2):
            for i in range(x.shape[2]):
                for j in range(x.shape[3]):
                    p, q = (v[n, :, i, j] / v[n, :, i, j].norm() for v in (x, y))
                    value = (torch.tensor(weights) * (p - q) ** 2).sum()
                    expected[n] += value / (x.shape[2] * x.shape[3])
    torch.testing.assert_close(perceptual_distance(Two(), a, b), expected, rtol=F32, atol=F32)
    assert perceptual_distance(Two(), a, a).abs().max() == 0


def test_the_classifiers_stages_are_its_own_computation() -> None:
    classifier = Classifier(Card(("a",), ("b",), 32, 28)).eval()
    maps = ClassifierFeatures(classifier)(pictures(0, height=32))
    assert [one.shape[2] for one in maps] == [16, 8, 4, 2]
    whole = classifier(pictures(0, height=32))
    torch.testing.assert_close(maps[-1].mean((2, 3)), whole.features)


def test_lpips_of_latents_is_refused_with_its_reason() -> None:
    with pytest.raises(ValueError, match="VGG takes three channels, and this loss is of latents"):
        DenoisingLoss(kind="lpips")


# -- the adversarial term


def test_hinge_and_adaptive_weight_are_their_formulas() -> None:
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.25])
    assert hinge(real, made) == ((0 + 0.5) / 2 + (0 + 1.25) / 2) / 2
    last = torch.tensor([3.0, -1.0], requires_grad=True)
    toward = torch.tensor([0.6, 0.8])
    weight = adaptive_weight(4 * (last * toward).sum(), -0.5 * (last * toward).sum(), last)
    assert weight.item() == pytest.approx(4 / (0.5 + 1e-4))
    assert adaptive_weight((last * toward).sum(), 0 * last.sum(), last) == 1e4


def test_a_discriminator_scores_patches() -> None:
    torch.manual_seed(0)
    scores = PatchDiscriminator(8, 2)(pictures(0))
    assert scores.shape == (2, 1, 4, 6)  # a quarter, less what the last two convolutions take
    assert len(list(PatchDiscriminator(8, 3).body)) == 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small classifier, saved."""
    from sat.apps.evaluate.classifier import Classifier as Saved

    torch.manual_seed(1)
    card = Card(("a", "b"), ("c",), 32, 28)
    Saved(card).save(tmp_path / "features", card)
    return tmp_path / "features"


def objective(**params: object) -> FirstStageObjective:
    torch.manual_seed(3)
    net = AutoencoderKL(4, (1, 2, 2), 1, 3, 2)
    return FirstStageObjective(engine=SimpleNamespace(first_stage=net), **params)  # type: ignore[arg-type]


def batch(image: Tensor) -> Batch:
    sizes = torch.zeros(len(image), 2, dtype=torch.int64)
    return Batch(["a"] * len(image), sizes, sizes, sizes, image=image)


def test_before_its_start_a_discriminator_has_no_effect() -> None:
    late = objective(adversarial=Adversarial(start=5, width=8, layers=2))
    plain = objective()
    late.step = 4
    terms = late(batch(pictures(0)), torch.Generator().manual_seed(0))
    terms["loss"].backward()
    expected = plain(batch(pictures(0)), torch.Generator().manual_seed(0))["loss"]
    torch.testing.assert_close(terms["loss"], expected, atol=EXACT, rtol=EXACT)
    assert "adversarial" not in terms
    assert all(p.grad is not None and not p.grad.any() for p in late.discriminator.parameters())
    late.step = 5
    assert "adversarial" in late(batch(pictures(0)), torch.Generator().manual_seed(0))


def test_only_the_first_stage_is_exported_and_validation_is_without_it(folder) -> None:
    made = objective(adversarial=Adversarial(width=8, layers=2), perceptual=Perceptual(folder))
    assert list(made.parts()) == ["first_stage"]
    assert not any("features" in name for name, _ in made.named_parameters())
    with torch.no_grad():
        terms = made.evaluate(batch(pictures(0)), torch.Generator())
    assert "perceptual" in terms
    assert "adversarial" not in terms
    expected = terms["pixel"] + terms["edge"] + 1e-4 * terms["kl"] + terms["perceptual"]
    torch.testing.assert_close(terms["loss"], expected)


def test_both_terms_train_as_two_optimizers_written_out_do(folder) -> None:
    """Three steps: decoder and discriminator each by its own loss, with the other held still."""
    settings = Adversarial(weight=0.7, start=1, width=8, layers=2)
    made = objective(adversarial=settings, perceptual=Perceptual(folder, 0.3))
    net, critic = copy.deepcopy(made.first_stage), copy.deepcopy(made.discriminator)
    features = load_features(folder).eval()
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
    ours, theirs = (torch.optim.Adam(one.parameters(), lr=1e-3) for one in (net, critic))
    for step in range(3):
        image, made.step = pictures(step), step
        optimizer.zero_grad()
        made(batch(image), torch.Generator().manual_seed(step))["loss"].backward()
        optimizer.step()

        posterior = net.encode(image)
        out = net.decode(posterior.sample(generator=torch.Generator().manual_seed(step)))
        picture = F.l1_loss(out, image) + edge_error(out, image)
        picture = picture + 0.3 * perceptual_distance(features, out, image).mean()
        loss = picture + 1e-4 * posterior.kl().sum() / posterior.mean.numel()
        if step >= 1:
            fooled = -critic(out).mean()
            (a,) = torch.autograd.grad(picture, net.decoder.head.weight, retain_graph=True)
            (b,) = torch.autograd.grad(fooled, net.decoder.head.weight, retain_graph=True)
            loss = loss + 0.7 * (a.norm() / (b.norm() + 1e-4)).item() * fooled
        ours.zero_grad()
        loss.backward()
        ours.step()
        theirs.zero_grad()
        real, fake = critic(image), critic(out.detach())
        if step >= 1:
            (0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())).backward()
        else:
            (0 * (real.mean() + fake.mean())).backward()
        theirs.step()
    for module, expected in ((made.first_stage, net), (made.discriminator, critic)):
        for value, other in zip(module.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-3, atol=F32)  # Adam divides by noise


@pytest.mark.parametrize(("params", "more", "words"), [
    ("{perceptual: {features: nowhere}}", "train.seed=0", "features nowhere: no such file or folder"),
    ("{adversarial: {}}", "train.zero=3", "weighs gradients in a whole layer, and train.zero 3"),
    ("{adversarial: {weight: 0}}", "train.seed=0", "expected a weight above 0"),
])  # fmt: skip
def test_what_cannot_be_trained_is_told_with_the_config(params, more, words) -> None:
    kind = "sat.train.objectives.first_stage.FirstStageObjective"
    told = refused(
        [ROOT / "configs" / "tiny.yaml", ROOT / "configs" / "tiny_vae.yaml"],
        ["data.sources=[{path: data/emoji_sample}]", "data.validation=[]", "train.validate_every=null",
         f"train.objective={{target: {kind}, params: {params}}}", more],
    )  # fmt: skip
    assert any(words in line for line in told), told
