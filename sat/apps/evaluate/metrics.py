"""The metrics of ``evaluate``: each lists what it lacks before anything is drawn, then takes scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import PIL.Image
import torch
from torch import Tensor

from sat.apps.evaluate.backbones import Blip, Clip, Inception, head, lacks_transformers
from sat.apps.evaluate.classifier import CARD, ENOUGH, WEIGHTS, Classifier, detail, prepared, score, wanted
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
from sat.checkpoint.files import open_file
from sat.checkpoint.format import CheckpointError
from sat.models.vision.classifier import embed

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
class MetricConfig:
    """Files and device of the metrics. ``real``: a folder of real pictures; ``weights``: of networks."""

    device: torch.device
    weights: Path = Path("weights/judges")
    classifier: Path = Path("checkpoints/tiny_judge")
    real: Path | None = None
    batch_size: int = 32


class Metric(Protocol):
    """Takes scores of pictures; made with the config once nothing is :meth:`missing`."""

    def __init__(self, config: MetricConfig) -> None: ...

    @staticmethod
    def missing(config: MetricConfig, captions: Sequence[str]) -> Iterator[str]:
        """A line for each thing that it lacks to score pictures of ``captions``."""
        ...

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """The scores of ``pictures``."""
        ...


# -- what several metrics lack


def _no_classifier(config: MetricConfig) -> Iterator[str]:
    if lacking := [name for name in (WEIGHTS, CARD) if not (config.classifier / name).is_file()]:
        yield f"{config.classifier}: no {' and no '.join(lacking)}; name a folder with --classifier"


def _no_real(config: MetricConfig, fewest: int) -> Iterator[str]:
    if config.real is None:
        yield "compares with real pictures: name their folder with --real"
    elif (count := len(pictures_below(config.real))) < fewest:
        yield f"{config.real}: holds {count} pictures, at least {fewest} are needed"


def _no_clip(folder: Path, source: str) -> Iterator[str]:
    if extra := lacks_transformers():
        yield f"needs transformers: {extra}"
    lacking = "" if (folder / "config.json").is_file() else "config.json"
    if not lacking and not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        lacking = "tokenizer.json or vocab.json"
    if lacking:
        yield f"{folder}: no {lacking}; put {source} there (docs/evaluation.md)"


# -- metrics that ship


class Retrieval:
    """Share of pictures in which the small classifier finds the thing that the caption names."""

    def __init__(self, config: MetricConfig) -> None:
        self.classifier = Classifier.load(config.classifier).to(config.device)

    @staticmethod
    def missing(config: MetricConfig, captions: Sequence[str]) -> Iterator[str]:
        """Its files, and a caption that names one of its concepts."""
        lacking = list(_no_classifier(config))
        yield from lacking
        if not lacking and captions:
            card = Classifier.load(config.classifier).card
            if not any(wanted(caption, card) for caption in captions):
                yield (
                    f"none of the {len(captions)} prompts names one of the {len(card.concepts)} things that "
                    f"{config.classifier} knows: leave it out of --scores"
                )

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """Concept top-1 and top-5, and style."""
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


class ClassifierFeatures:
    """The features of the small classifier that ships."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.name = folder.name
        self.classifier = Classifier.load(folder).to(device)

    def __call__(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """(B, width) on the CPU."""
        side = self.classifier.card.size
        return embed(self.classifier, torch.stack([prepared(image, side) for image in images])).features


class _Distances:
    """Fréchet and kernel distance, precision and recall against real pictures, in a network's features."""

    def __init__(self, extract: Extractor, prefix: str, config: MetricConfig, enough: int) -> None:
        assert config.real is not None, "checked before"
        self.extract, self.prefix, self.batch_size, self.enough = extract, prefix, config.batch_size, enough
        self.real = features_of(extract, Opened(pictures_below(config.real)), config.batch_size)

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """The four numbers."""
        made = features_of(self.extract, Opened([p.path for p in pictures]), self.batch_size)
        distance = frechet(*statistics(made), *statistics(self.real))
        shares = precision_recall(made, self.real)
        fewest, count = min(len(made), len(self.real)), len(made)
        note = noted = f"features of {self.extract.name}"
        if fewest < self.enough:
            noted += f"; {fewest} pictures: too few to compare (fewer than {self.enough})"
        prefix = f"{self.prefix} " if self.prefix else ""
        kernel = f"{prefix}kernel distance" if prefix else "KID"
        return [
            Score(f"{prefix}distance" if prefix else "FID", distance, "lower", count, (), noted),
            Score(kernel, kernel_distance(made, self.real), "lower", count, (), note),
            Score(f"{prefix}precision", shares.precision, "higher", count, (), noted),
            Score(f"{prefix}recall", shares.recall, "higher", count, (), noted),
        ]


class Features(_Distances):
    """Distances in the features of the small classifier."""

    def __init__(self, config: MetricConfig) -> None:
        super().__init__(ClassifierFeatures(config.classifier, config.device), "features", config, ENOUGH)

    @staticmethod
    def missing(config: MetricConfig, captions: Sequence[str]) -> Iterator[str]:
        """The classifier's files, and real pictures."""
        yield from _no_classifier(config)
        yield from _no_real(config, NEIGHBOURS + 1)


class Detail:
    """Fine detail against real pictures of the same size."""

    def __init__(self, config: MetricConfig) -> None:
        assert config.real is not None, "checked before"
        self.real, self.classifier = config.real, Classifier.load(config.classifier).to(config.device)

    @staticmethod
    def missing(config: MetricConfig, captions: Sequence[str]) -> Iterator[str]:
        """The classifier's files, and a real picture."""
        yield from _no_classifier(config)
        yield from _no_real(config, 1)

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """Distance of full-resolution crops and share of fine energy (1 is as real pictures have)."""
        opened = Opened([one.path for one in pictures])
        found = detail(opened, [one.caption for one in pictures], self.real, self.classifier)
        count = found.images
        few = "" if count >= ENOUGH else f"{count} pictures: too few to compare"
        scores = [Score("detail distance", found.distance, "lower", count, (), few)]
        if found.limit is not None:
            scores.append(Score("detail distance of many", found.limit, "lower", count))
        as_real = "1 is as much as real pictures have"
        return [
            *scores,
            Score("detail kernel distance", found.kernel, "lower", count),
            Score("fine energy", found.energy, "near 1", count, (), as_real),
        ]


# -- metrics with networks that do not ship


class Fid(_Distances):
    """Distances in the features of the published Inception: FID, KID, precision and recall."""

    def __init__(self, config: MetricConfig) -> None:
        super().__init__(Inception(config.weights / INCEPTION, config.device), "", config, FEW)

    @staticmethod
    def missing(config: MetricConfig, captions: Sequence[str]) -> Iterator[str]:
        """Real pictures, and the network."""
        yield from _no_real(config, NEIGHBOURS + 1)
        if not (path := config.weights / INCEPTION).is_file():
            yield f"{path}: no such file; put inception-2015-12-05.pt there (docs/evaluation.md)"


class _MeanOfPictures:
    """A metric that is the mean of a number for each picture, taken ``batch_size`` pictures at a time."""

    name: str

    def __init__(self, config: MetricConfig) -> None:
        self.batch_size = config.batch_size

    def values(self, images: Opened, texts: list[str]) -> Tensor:
        """(B) of a batch, on the CPU."""
        raise NotImplementedError

    def note(self, captions: list[str]) -> str:
        """A remark on the score."""
        return ""

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        """The mean over pictures."""
        paths, captions = [one.path for one in pictures], [one.caption for one in pictures]
        each: list[float] = []
        for start in range(0, len(pictures), self.batch_size):
            part = slice(start, start + self.batch_size)
            each += self.values(Opened(paths[part]), captions[part]).tolist()
        return [
            Score(self.name, sum(each) / len(each), "higher", len(each), tuple(each), self.note(captions))
        ]


class ClipScore(_MeanOfPictures):
    """100 times the cosine of picture and caption, not below 0 (arXiv:2104.08718, without its factor 2.5)."""

    name = "CLIP score"

    def __init__(self, config: MetricConfig) -> None:
        super().__init__(config)
        self.clip = Clip(config.weights / "clip", config.device)

    @staticmethod
    def missing(config: MetricConfig, captions: Sequence[str]) -> Iterator[str]:
        """A CLIP of transformers."""
        yield from _no_clip(config.weights / "clip", "the folder of openai/clip-vit-large-patch14")

    def values(self, images: Opened, texts: list[str]) -> Tensor:
        """100 max(0, cos)."""
        return 100 * (self.clip.images(images) * self.clip.texts(texts)).sum(-1).clamp_min(0).cpu()

    def note(self, captions: list[str]) -> str:
        """The number of captions that were cut."""
        cut = self.clip.cut(captions)
        return f"{cut} captions were cut at {self.clip.tokens} tokens" if cut else ""


class Aesthetic(_MeanOfPictures):
    """LAION's aesthetic predictor, of about 1 to 10: linears on the picture's vector of CLIP ViT-L/14."""

    name = "aesthetic"

    def __init__(self, config: MetricConfig) -> None:
        super().__init__(config)
        path = config.weights / AESTHETIC
        self.clip = Clip(config.weights / "clip", config.device)
        self.head = head(open_file(path), str(path)).to(config.device)
        width = self.head[0].in_features
        if width != self.clip.width:
            raise CheckpointError(
                f"{path}: reads vectors of {width} numbers, those of {self.clip.folder} have "
                f"{self.clip.width}; it belongs to another CLIP (ViT-L/14)"
            )

    @staticmethod
    def missing(config: MetricConfig, captions: Sequence[str]) -> Iterator[str]:
        """A CLIP of transformers, and the head."""
        yield from ClipScore.missing(config, captions)
        if not (path := config.weights / AESTHETIC).is_file():
            yield f"{path}: no such file; put sac+logos+ava1-l14-linearMSE.pth there under this name"

    @torch.inference_mode()
    def values(self, images: Opened, texts: list[str]) -> Tensor:
        """The head's output."""
        out: Tensor = self.head(self.clip.images(images)).squeeze(-1).cpu()
        return out


class Hps(_MeanOfPictures):
    """HPS v2 (arXiv:2306.09341): the cosine in a CLIP ViT-H/14 tuned on preferences; pictures seen whole."""

    name = "HPS v2"

    def __init__(self, config: MetricConfig) -> None:
        super().__init__(config)
        folder = config.weights / "hps"
        self.clip = Clip(folder, config.device, next(iter(sorted(folder.glob("HPS*.pt"))), None))

    @staticmethod
    def missing(config: MetricConfig, captions: Sequence[str]) -> Iterator[str]:
        """Config and tokenizer of a CLIP, and the published file or a folder with HPS's weights already."""
        folder = config.weights / "hps"
        yield from _no_clip(
            folder, "config and tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, and HPS_v2*.pt,"
        )
        if not list(folder.glob("HPS*.pt")) and not list(folder.glob("*.safetensors")):
            yield f"{folder}: no HPS_v2*.pt and no *.safetensors; put HPS_v2_compressed.pt there"

    def values(self, images: Opened, texts: list[str]) -> Tensor:
        """The cosine; HTML entities are read twice, as OpenCLIP's tokenizer does (``&amp;lt;`` is ``<``)."""
        clean = [" ".join(unescape(unescape(text)).split()) for text in texts]
        return (self.clip.images(images, whole=True) * self.clip.texts(clean)).sum(-1).cpu()


class Reward(_MeanOfPictures):
    """ImageReward (arXiv:2304.05977), in the published scale (mean 0, deviation 1 over its own set)."""

    name = "ImageReward"

    def __init__(self, config: MetricConfig) -> None:
        super().__init__(config)
        folder = config.weights / "image_reward"
        self.blip = Blip(folder / REWARD[0], folder / REWARD[1], folder, config.device)

    @staticmethod
    def missing(config: MetricConfig, captions: Sequence[str]) -> Iterator[str]:
        """transformers, and the published files."""
        if extra := lacks_transformers():
            yield f"needs transformers: {extra}"
        for name in REWARD:
            if not (path := config.weights / "image_reward" / name).is_file():
                origin = "bert-base-uncased" if name == "vocab.txt" else "ImageReward"
                yield f"{path}: no such file; put that of {origin} there (docs/evaluation.md)"

    def values(self, images: Opened, texts: list[str]) -> Tensor:
        """The network's output in that scale."""
        return (self.blip(list(images), texts, REWARD_TOKENS) - REWARD_MEAN) / REWARD_STD


METRICS: dict[str, type[Metric]] = {
    "retrieval": Retrieval,
    "features": Features,
    "detail": Detail,
    "fid": Fid,
    "clip": ClipScore,
    "aesthetic": Aesthetic,
    "hps": Hps,
    "image_reward": Reward,
}
"""The metrics by the names of ``--scores``; the first three ship."""


def missing(names: Sequence[str], config: MetricConfig, captions: Sequence[str]) -> list[str]:
    """Everything that the metrics ``names`` lack, one line each, beginning with the metric's name."""
    return [f"{name}: {line}" for name in names for line in METRICS[name].missing(config, captions)]
