"""The scores: what each needs, said before anything is drawn, and how each is taken of a set of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import PIL.Image
import torch
from torch import Tensor

from sat.apps.evaluate.backbones import Blip, Clip, Inception, head, lacks_transformers
from sat.apps.evaluate.detail import Detail as DetailScores
from sat.apps.evaluate.detail import detail
from sat.apps.evaluate.distances import (
    NEIGHBOURS,
    Extractor,
    features_of,
    frechet,
    kernel_distance,
    precision_recall,
    statistics,
)
from sat.apps.evaluate.pictures import Opened, Picture, pictures_below
from sat.apps.evaluate.retrieval import ENOUGH, prepared, score, wanted
from sat.checkpoint.files import open_file
from sat.checkpoint.format import CheckpointError
from sat.models.vision.classifier import CARD, WEIGHTS, Classifier, embed

FEW = 2048
"""Pictures under which the covariance of Inception's 2048 features has not full rank."""

AESTHETIC, INCEPTION = "aesthetic.pth", "inception.pt"
REWARD = ("ImageReward.pt", "med_config.json", "vocab.txt")
REWARD_TOKENS, REWARD_MEAN, REWARD_STD = 35, 0.16717362830052426, 1.0333394966054072
"""As published with ImageReward (arXiv:2304.05977): caption length, and the scale its values are given in."""


class Score(NamedTuple):
    """One number of a set of pictures; ``each``: of every picture in order, None where it has none."""

    name: str
    value: float
    better: Literal["higher", "lower", "near 1"]
    pictures: int
    each: tuple[float | None, ...] = ()
    note: str = ""


def best_of(scores: Sequence[Score]) -> Score:
    """The best of one score of several sets of pictures."""
    order: dict[str, Callable[[Score], float]] = {
        "higher": lambda score: -score.value,
        "lower": lambda score: score.value,
        "near 1": lambda score: abs(score.value - 1),
    }
    return min(scores, key=order[scores[0].better])


@dataclass(frozen=True)
class Setting:
    """Where judges find what they need. ``real`` is a folder of real pictures, ``weights`` of judges'."""

    device: torch.device
    weights: Path = Path("weights/judges")
    classifier: Path = Path("checkpoints/tiny_classifier")
    real: Path | None = None
    batch_size: int = 32


class Judge(Protocol):
    """Takes scores of pictures."""

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """The scores of ``pictures``."""
        ...


class Kind(NamedTuple):
    """A judge by its name: what is missing for it, one line each, and how it is made."""

    lacks: Callable[[Setting, Sequence[str]], Iterator[str]]  # setting, captions
    make: Callable[[Setting], Judge]


def _each(values: Sequence[Tensor]) -> tuple[float, ...]:
    return tuple(torch.cat(list(values)).tolist())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _batches(pictures: Sequence[Picture], size: int) -> Iterator[tuple[Opened, list[str]]]:
    for start in range(0, len(pictures), size):
        part = pictures[start : start + size]
        yield Opened([one.path for one in part]), [one.caption for one in part]


class Retrieval:
    """The small classifier that ships, asked whether it finds what the caption names."""

    def __init__(self, setting: Setting) -> None:
        self.classifier = Classifier.load(setting.classifier).to(setting.device)

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """Concept top-1 and top-5, style, distance to the classifier's own real pictures."""
        names = [str(index) for index in range(len(pictures))]
        images = Opened([one.path for one in pictures])
        found = score(images, [one.caption for one in pictures], self.classifier, names)
        seen = {int(one.where): one for one in found.judged}
        top1 = tuple(float(seen[i].found) if i in seen else None for i in range(len(pictures)))
        top5 = tuple(
            float(seen[i].wanted.concept in seen[i].best) if i in seen else None for i in range(len(pictures))
        )
        unknown = f"{len(found.unknown)} captions name nothing it knows" if found.unknown else ""
        scores = [
            Score("retrieval top-1", found.top1, "higher", found.images, top1, unknown),
            Score("retrieval top-5", found.top5, "higher", found.images, top5, unknown),
        ]
        if found.style is not None:
            scores.append(Score("retrieval style", found.style, "higher", found.styled))
        return scores


def _lacks_classifier(setting: Setting) -> Iterator[str]:
    missing = [name for name in (WEIGHTS, CARD) if not (setting.classifier / name).is_file()]
    if missing:
        yield f"{setting.classifier}: no {' and no '.join(missing)}; name a folder with --classifier"


def _lacks_retrieval(setting: Setting, captions: Sequence[str]) -> Iterator[str]:
    lacking = list(_lacks_classifier(setting))
    yield from lacking
    if not lacking and captions:
        card = Classifier.load(setting.classifier).card
        if not any(wanted(caption, card) for caption in captions):
            yield (
                f"none of the {len(captions)} prompts names one of the {len(card.concepts)} things that "
                f"{setting.classifier} knows: leave it out of --scores"
            )


def _lacks_real(setting: Setting, fewest: int) -> Iterator[str]:
    if setting.real is None:
        yield "compares with real pictures: name their folder with --real"
    elif (count := len(pictures_below(setting.real))) < fewest:
        yield f"{setting.real}: holds {count} pictures, at least {fewest} are needed"


class Features:
    """Fréchet and kernel distance, precision and recall against real pictures, in a network's features."""

    def __init__(self, extract: Extractor, prefix: str, setting: Setting, enough: int) -> None:
        assert setting.real is not None, "checked before"
        self.extract, self.prefix, self.setting, self.enough = extract, prefix, setting, enough
        self.real = features_of(extract, Opened(pictures_below(setting.real)), setting.batch_size)

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """The four numbers."""
        made = features_of(self.extract, Opened([p.path for p in pictures]), self.setting.batch_size)
        distance = frechet(*statistics(made), *statistics(self.real))
        shares = precision_recall(made, self.real)
        fewest, count = min(len(made), len(self.real)), len(made)
        few = (
            ""
            if fewest >= self.enough
            else f"{fewest} pictures: too few to compare (fewer than {self.enough})"
        )
        note = f"features of {self.extract.name}"
        noted = "; ".join(part for part in (note, few) if part)
        prefix = f"{self.prefix} " if self.prefix else ""
        kernel = f"{prefix}kernel distance" if prefix else "KID"
        return [
            Score(f"{prefix}distance" if prefix else "FID", distance, "lower", count, (), noted),
            Score(kernel, kernel_distance(made, self.real), "lower", count, (), note),
            Score(f"{prefix}precision", shares.precision, "higher", count, (), noted),
            Score(f"{prefix}recall", shares.recall, "higher", count, (), noted),
        ]


class ClassifierFeatures:
    """The features of the small classifier that ships."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.name = folder.name
        self.classifier = Classifier.load(folder).to(device)

    def __call__(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """(B, width) on the CPU."""
        side = self.classifier.card.size
        return embed(self.classifier, torch.stack([prepared(image, side) for image in images])).features


class Detail:
    """Fine detail against real pictures of the same size."""

    def __init__(self, setting: Setting) -> None:
        assert setting.real is not None, "checked before"
        self.real, self.classifier = setting.real, Classifier.load(setting.classifier).to(setting.device)

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """Distance of full-resolution crops and share of fine energy (1 is as real pictures have)."""
        opened = Opened([one.path for one in pictures])
        found = detail(opened, [one.caption for one in pictures], self.real, self.classifier)
        few = "" if found.images >= ENOUGH else f"{found.images} pictures: too few to compare"
        return [
            Score("detail distance", found.distance, "lower", found.images, (), few),
            *_of_many(found),
            Score("detail kernel distance", found.kernel, "lower", found.images),
            Score(
                "fine energy", found.energy, "near 1", found.images, (), "1 is as much as real pictures have"
            ),
        ]


def _of_many(found: DetailScores) -> list[Score]:
    """The extrapolated distance, where there is one."""
    if found.limit is None:
        return []
    return [Score("detail distance of many", found.limit, "lower", found.images)]


def _clip_folder(setting: Setting) -> Path:
    return setting.weights / "clip"


def _lacks_clip(folder: Path, what: str) -> Iterator[str]:
    if extra := lacks_transformers():
        yield f"needs transformers: {extra}"
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    if not missing and not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        missing = ["tokenizer.json or vocab.json"]
    if missing:
        yield f"{folder}: no {missing[0]}; put {what} there (docs/evaluation.md)"


class ClipScore:
    """100 times the cosine of picture and caption, not below 0 (arXiv:2104.08718, without its factor 2.5)."""

    def __init__(self, setting: Setting) -> None:
        self.clip, self.batch_size = Clip(_clip_folder(setting), setting.device), setting.batch_size

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """The mean over pictures."""
        each = _each(
            [
                100 * (self.clip.images(images) * self.clip.texts(texts)).sum(-1).clamp_min(0).cpu()
                for images, texts in _batches(pictures, self.batch_size)
            ]
        )
        cut = self.clip.cut([one.caption for one in pictures])
        note = f"{cut} captions were cut at {self.clip.tokens} tokens" if cut else ""
        return [Score("CLIP score", _mean(each), "higher", len(each), each, note)]


class Aesthetic:
    """LAION's aesthetic predictor: linears on the picture's vector of CLIP ViT-L/14."""

    def __init__(self, setting: Setting) -> None:
        path = setting.weights / AESTHETIC
        self.clip, self.batch_size = Clip(_clip_folder(setting), setting.device), setting.batch_size
        self.head = head(open_file(path), str(path)).to(setting.device)
        width = self.head[0].in_features
        if width != self.clip.width:
            raise CheckpointError(
                f"{path}: judges vectors of {width} numbers, those of {self.clip.folder} have "
                f"{self.clip.width}; it belongs to another CLIP (ViT-L/14)"
            )

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """The mean over pictures, of about 1 to 10."""
        each = _each(
            [
                self.head(self.clip.images(images)).squeeze(-1).cpu()
                for images, _ in _batches(pictures, self.batch_size)
            ]
        )
        return [Score("aesthetic", _mean(each), "higher", len(each), each)]


class Hps:
    """HPS v2 (arXiv:2306.09341): the cosine in a CLIP ViT-H/14 tuned on preferences."""

    def __init__(self, setting: Setting) -> None:
        folder = setting.weights / "hps"
        self.clip = Clip(folder, setting.device, _hps_file(folder))
        self.batch_size = setting.batch_size

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """The mean over pictures, seen whole, as published."""
        each = _each(
            [
                (self.clip.images(images, whole=True) * self.clip.texts(texts)).sum(-1).cpu()
                for images, texts in _batches(pictures, self.batch_size)
            ]
        )
        return [Score("HPS v2", _mean(each), "higher", len(each), each)]


def _hps_file(folder: Path) -> Path | None:
    """The published file in ``folder``; None where the folder's own weights are HPS's already."""
    return next(iter(sorted(folder.glob("HPS*.pt"))), None)


class Reward:
    """ImageReward (arXiv:2304.05977)."""

    def __init__(self, setting: Setting) -> None:
        folder = setting.weights / "image_reward"
        self.blip = Blip(folder / REWARD[0], folder / REWARD[1], folder, setting.device)
        self.batch_size = setting.batch_size

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """The mean over pictures, in the published scale (mean 0, deviation 1 over its own set)."""
        each = _each(
            [
                (self.blip(list(images), texts, REWARD_TOKENS) - REWARD_MEAN) / REWARD_STD
                for images, texts in _batches(pictures, self.batch_size)
            ]
        )
        return [Score("ImageReward", _mean(each), "higher", len(each), each)]


def _lacks_features(setting: Setting, captions: Sequence[str]) -> Iterator[str]:
    yield from _lacks_classifier(setting)
    yield from _lacks_real(setting, NEIGHBOURS + 1)


def _lacks_detail(setting: Setting, captions: Sequence[str]) -> Iterator[str]:
    yield from _lacks_classifier(setting)
    yield from _lacks_real(setting, 1)


def _lacks_fid(setting: Setting, captions: Sequence[str]) -> Iterator[str]:
    yield from _lacks_real(setting, NEIGHBOURS + 1)
    if not (path := setting.weights / INCEPTION).is_file():
        yield f"{path}: no such file; put inception-2015-12-05.pt there (docs/evaluation.md)"


def _lacks_clip_score(setting: Setting, captions: Sequence[str]) -> Iterator[str]:
    yield from _lacks_clip(_clip_folder(setting), "the folder of openai/clip-vit-large-patch14")


def _lacks_aesthetic(setting: Setting, captions: Sequence[str]) -> Iterator[str]:
    yield from _lacks_clip_score(setting, captions)
    if not (path := setting.weights / AESTHETIC).is_file():
        yield f"{path}: no such file; put sac+logos+ava1-l14-linearMSE.pth there under this name"


def _lacks_hps(setting: Setting, captions: Sequence[str]) -> Iterator[str]:
    folder = setting.weights / "hps"
    yield from _lacks_clip(
        folder, "config and tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, and HPS_v2*.pt,"
    )
    if _hps_file(folder) is None and not list(folder.glob("*.safetensors")):
        yield f"{folder}: no HPS_v2*.pt and no *.safetensors; put HPS_v2_compressed.pt there"


def _lacks_reward(setting: Setting, captions: Sequence[str]) -> Iterator[str]:
    if extra := lacks_transformers():
        yield f"needs transformers: {extra}"
    for name in REWARD:
        if not (path := setting.weights / "image_reward" / name).is_file():
            origin = "bert-base-uncased" if name == "vocab.txt" else "ImageReward"
            yield f"{path}: no such file; put that of {origin} there (docs/evaluation.md)"


def _features(setting: Setting) -> Judge:
    return Features(ClassifierFeatures(setting.classifier, setting.device), "features", setting, ENOUGH)


def _fid(setting: Setting) -> Judge:
    return Features(Inception(setting.weights / INCEPTION, setting.device), "", setting, FEW)


KINDS: dict[str, Kind] = {
    "retrieval": Kind(_lacks_retrieval, Retrieval),
    "features": Kind(_lacks_features, _features),
    "detail": Kind(_lacks_detail, Detail),
    "fid": Kind(_lacks_fid, _fid),
    "clip": Kind(_lacks_clip_score, ClipScore),
    "aesthetic": Kind(_lacks_aesthetic, Aesthetic),
    "hps": Kind(_lacks_hps, Hps),
    "image_reward": Kind(_lacks_reward, Reward),
}
"""The judges by the names of ``--scores``; the first three ship."""


def lacking(names: Sequence[str], setting: Setting, captions: Sequence[str]) -> list[str]:
    """What the judges ``names`` miss, one line each, beginning with the judge's name."""
    return [f"{name}: {line}" for name in names for line in KINDS[name].lacks(setting, captions)]
