"""Training of the small classifier on augmented real pictures, and its accuracy on other augmentations."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sat.apps.evaluate.classifier import Classifier
from sat.apps.evaluate.distances import statistics
from sat.data.buckets import measure_all
from sat.data.records import HELD_OUT, BadRecord, DataError, Record, RecordSet
from sat.data.sources import read_source, read_sources
from sat.data.transforms import Transform, to_tensor
from sat.models.vision.classifier import Card, Logits, embed, top_shares

CHECK_SEED = 1 << 40  # of the augmentations that accuracy is measured on: never one that was trained on
CHECK_VIEWS = 4  # of every picture
log = logging.getLogger(__name__)
BELIEVED = 0.9  # top-1 share from which a classifier's scores mean something


@dataclass(frozen=True)
class Strength:
    """Strength of the augmentations.

    ``shift``: share of the side; ``scale``: range of the factor; ``turn``: degrees; ``light``: largest change
    of brightness and contrast; ``blur``: share of pictures blurred (by halving and doubling); ``noise``:
    largest standard deviation, of values in [-1, 1]; ``colour``: largest change of saturation, of the ink of
    each channel (half as much) and of the logarithm of the gamma; ``grey``: share without colour; ``warp``:
    largest spread of a smooth displacement, of half the side; ``mirror``: share of pictures mirrored;
    ``hide``: share of pictures with a square of one colour somewhere, up to three eighths of the side.
    """

    shift: float = 0.08
    scale: tuple[float, float] = (0.75, 1.1)
    turn: float = 8.0
    light: float = 0.1
    blur: float = 0.4
    noise: float = 0.08
    colour: float = 0.0
    grey: float = 0.0
    warp: float = 0.0
    mirror: float = 0.0
    hide: float = 0.0


STRENGTHS = {
    "plain": Strength(),
    "strong": Strength(scale=(0.65, 1.1), turn=12.0, colour=0.3, grey=0.1, warp=0.05),
    "hard": Strength(
        shift=0.1, scale=(0.6, 1.15), turn=25.0, colour=0.4, grey=0.15, warp=0.06, mirror=0.5, hide=0.3
    ),
}


def recolour(images: Tensor, strength: Strength, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] with other colours; white stays white."""
    count = len(images)

    def spread(*size: int) -> Tensor:
        return (torch.rand(*size, generator=generator) * 2 - 1) * strength.colour

    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
    grey = (images * weights).sum(1, keepdim=True)
    kept = (torch.rand(count, 1, 1, 1, generator=generator) >= strength.grey).float()
    x = grey + (images - grey) * (1 + spread(count, 1, 1, 1)) * kept
    x = 1 - (1 - x) * (1 + 0.5 * spread(count, 3, 1, 1) * kept)
    return ((x.clamp(-1, 1) + 1) / 2).pow(spread(count, 1, 1, 1).exp()) * 2 - 1


def augment(images: Tensor, strength: Strength, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] placed anew on white, some blurred, with light and noise changed."""
    count = len(images)
    if strength.colour or strength.grey:
        images = recolour(images, strength, generator)

    def uniform(low: float, high: float, size: tuple[int, ...] = (count,)) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    angle = uniform(-strength.turn, strength.turn) * (math.pi / 180)
    scale = uniform(*strength.scale)
    shift = uniform(-strength.shift, strength.shift, (count, 2)) * 2  # the grid spans 2
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    inverse = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    matrix = torch.cat([inverse, -(inverse @ shift[:, :, None])], 2)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    if strength.warp:  # 4 x 4 random displacements, smooth between
        coarse = (
            torch.randn(count, 2, 4, 4, generator=generator) * uniform(0, strength.warp)[:, None, None, None]
        )
        smooth = F.interpolate(coarse, images.shape[-2:], mode="bicubic", align_corners=False)
        grid = grid + smooth.permute(0, 2, 3, 1)
    if strength.mirror:
        sign = torch.where(torch.rand(count, generator=generator) < strength.mirror, -1.0, 1.0)
        grid = grid * torch.stack([sign, torch.ones(count)], 1)[:, None, None, :]
    moved = 1 - F.grid_sample(1 - images, grid, padding_mode="zeros", align_corners=False)  # white is 1
    soft = F.interpolate(F.avg_pool2d(moved, 2), images.shape[-2:], mode="bilinear", align_corners=False)
    blurred = (torch.rand(count, generator=generator) < strength.blur).float()[:, None, None, None]
    amount = uniform(0.3, 1.0)[:, None, None, None] * blurred
    out = moved + amount * (soft - moved)
    out = out * (1 + uniform(-strength.light, strength.light)[:, None, None, None])
    out = out + uniform(-strength.light, strength.light)[:, None, None, None]
    if strength.hide:
        side = images.shape[-1]
        half = uniform(side / 16, side * 3 / 16)[:, None]
        near = (torch.arange(side) - uniform(0, side, (2, count, 1))).abs() < half  # (2, B, S): rows, columns
        square = near[0][:, :, None] & near[1][:, None, :]  # (B, S, S)
        square = square & (torch.rand(count, 1, 1, generator=generator) < strength.hide)
        out = torch.where(square[:, None], uniform(-1, 1, (count, 3, 1, 1)), out)
    spread = uniform(0, strength.noise)[:, None, None, None]
    return (out + spread * torch.randn(out.shape, generator=generator)).clamp(-1, 1)


@dataclass(frozen=True)
class Recipe:
    """Settings of the training. ``width``: features; ``style_weight``: factor of the style's loss.

    ``judged``: concepts that the classifier is for, drawn ``often`` times as often as the others, which help
    to learn shapes and are forgotten in the end, and with a second loss among themselves; empty: all.
    ``average``: decay of the moving average of the weights that is kept; 0: the last weights. ``bf16``:
    compute in bfloat16. ``eight_bits``: as the weights are written.
    """

    steps: int = 3000
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.02
    smoothing: float = 0.1
    style_weight: float = 0.3
    width: int = 112
    seed: int = 0
    strength: Strength = Strength()
    stages: tuple[int, ...] = ()
    judged: tuple[str, ...] = ()
    often: float = 1.0
    average: float = 0.0
    bf16: bool = False
    eight_bits: bool = False
    start: Path | None = None  # a classifier to go on from


@dataclass(frozen=True)
class Labelled:
    """Pictures (B, 3, S, S) in [-1, 1] with numbers of concept and style (B)."""

    images: Tensor
    concept: Tensor
    style: Tensor

    def __len__(self) -> int:
        return len(self.images)


def read_labelled(
    records: tuple[Record, ...], size: int, concepts: tuple[str, ...], styles: tuple[str, ...]
) -> Labelled:
    """The pictures of ``records`` whose concept and style are among those given."""
    number = {label: index for index, label in enumerate(concepts)}
    style_number = {label: index for index, label in enumerate(styles)}
    known = [
        r for r in records if r.labels.get("concept") in number and r.labels.get("style") in style_number
    ]
    transform = Transform(size, size)
    images = list[Tensor]()
    for record in known:
        try:
            images.append(to_tensor(transform.load(record.file()).pixels[:size, :size]))
        except (OSError, ValueError) as error:
            raise DataError(f"{record.name}: {error}") from error
    return Labelled(
        torch.stack(images) if images else torch.empty(0, 3, size, size),
        torch.tensor([number[record.labels["concept"]] for record in known], dtype=torch.long),
        torch.tensor([style_number[record.labels["style"]] for record in known], dtype=torch.long),
    )


def train(
    data: Path | Sequence[Path],
    out: Path,
    recipe: Recipe,
    device: torch.device,
    report: Callable[[int, Mapping[str, float]], None],
) -> Card:
    """Train on the pictures of ``data`` (folders with concept and style in their tables); write to ``out``.

    The first folder gives the styles of the card, the pairs for its scores and the features' statistics;
    those after it are trained on alone. The scores: ``augmented_*`` on augmentations of the training pictures
    that were not trained on, ``heldout_*`` on the drawings in ``heldout.jsonl``, which were not trained on at
    all, both over the judged concepts. ``report`` is called with the step and running means now and then.
    """
    first, *further = [data] if isinstance(data, Path) else list(data)
    found, unseen = read_sources([(first, 1)]), first / HELD_OUT
    more = read_sources([(folder, 1) for folder in further]) if further else RecordSet(())
    kept = read_source(unseen) if unseen.is_file() else RecordSet(())
    records = found.records + more.records
    for line in (*found.told(), *more.told(), *kept.told()):
        log.warning("%s", line)
    unlabelled = next((r for r in records if not {"concept", "style"} <= r.labels.keys()), None)
    if unlabelled is not None:
        raise DataError(f"{first}: {unlabelled.path.name} has no concept and style; a classifier needs both")
    everything = tuple(dict.fromkeys(record.labels["concept"] for record in records))
    absent = [concept for concept in recipe.judged if concept not in everything]
    if absent:
        raise DataError(f"{first}: no picture of {absent[0]!r}, which the classifier is to judge")
    judged = recipe.judged or everything
    concepts = (*judged, *(concept for concept in everything if concept not in set(judged)))
    own = len(tuple(dict.fromkeys(record.labels["style"] for record in found.records)))
    styles = tuple(dict.fromkeys(record.labels["style"] for record in records))
    seen = measure_all(records[:1])[0]
    if isinstance(seen, BadRecord):
        raise DataError(str(seen))
    size = seen[0]
    learned = read_labelled(records, size, concepts, styles)
    known = read_labelled(found.records, size, judged, styles)
    others = read_labelled(kept.records, size, judged, styles)
    torch.manual_seed(recipe.seed)
    card = Card(concepts, styles, size, recipe.width, stages=recipe.stages)
    model = Classifier(card)
    if recipe.start is not None:
        other = Classifier.load(recipe.start)
        if (other.card.width, other.card.stages) != (card.width, card.stages):
            raise DataError(
                f"{recipe.start}: has {other.card.width} features, take --width and --stages of it"
            )
        model.start(other)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    began = time.perf_counter()
    _fit(model, learned, recipe, report)
    model.keep(len(judged), own)
    model.take(model.stored(recipe.eight_bits))  # scores are those of the weights in the file
    scores = measure(model, known, others, recipe.strength)
    mean, covariance = statistics(_checked(model, known, recipe.strength)[0].features)
    model.real_mean.copy_(mean)
    model.real_cov.copy_(covariance)
    training: dict[str, str | int | float] = {
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
        "seed": recipe.seed,
        "pictures": len(learned),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if recipe.start is not None:
        training["start"] = str(recipe.start)
    if further or recipe.judged:
        training["concepts"], training["styles"] = len(concepts), len(styles)
    card = replace(model.card, scores=scores, training=training)
    model.save(out, card, recipe.eight_bits)
    return card


def _fit(
    model: Classifier, known: Labelled, recipe: Recipe, report: Callable[[int, Mapping[str, float]], None]
) -> None:
    """AdamW with a short warm-up and a cosine to nothing, over shuffled epochs of augmented pictures."""
    device = model.concept.weight.device
    generator = torch.Generator().manual_seed(recipe.seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    order = torch.empty(0, dtype=torch.long)
    often = torch.ones(len(known))
    if recipe.judged:
        often[known.concept < len(recipe.judged)] = recipe.often
    model.train()
    average = copy.deepcopy(model) if recipe.average else model
    running: dict[str, float] = {}
    warm = max(1, recipe.steps * 3 // 100)
    for step in range(recipe.steps):
        while len(order) < recipe.batch_size:
            if recipe.often == 1:
                again = torch.randperm(len(known), generator=generator)
            else:
                again = torch.multinomial(often, len(known), replacement=True, generator=generator)
            order = torch.cat([order, again])
        chosen, order = order[: recipe.batch_size], order[recipe.batch_size :]
        images = augment(known.images[chosen], recipe.strength, generator)
        rate = (step + 1) / warm  # up over the first 3 %, then a cosine down to 0
        if step >= warm:
            rate = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            out = Logits(*(value.float() for value in model(images)))
        concept, style = known.concept[chosen].to(device), known.style[chosen].to(device)
        loss = _loss(out, concept, style, recipe)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        _follow(average, model, min(recipe.average, (step + 1) / (step + 10)))
        right = (out.concept.argmax(1) == concept).float().mean().item()
        for name, value in (("loss", loss.item()), ("top1", right)):
            running[name] = running.get(name, value) * 0.98 + value * 0.02
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            report(step + 1, dict(running))
    model.load_state_dict(average.state_dict())
    model.eval()


@torch.no_grad()
def _follow(average: Classifier, model: Classifier, decay: float) -> None:
    """Move the ``average`` of the weights and statistics towards those of ``model``, by 1 - ``decay``."""
    for kept, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        kept.lerp_(value, 1 - decay) if kept.is_floating_point() else kept.copy_(value)


def _loss(out: Logits, concept: Tensor, style: Tensor, recipe: Recipe) -> Tensor:
    """Cross entropies of concept and style (B), and of the judged concepts told from one another."""
    loss = F.cross_entropy(out.concept, concept, label_smoothing=recipe.smoothing)
    loss = loss + recipe.style_weight * F.cross_entropy(out.style, style)
    own = concept < len(recipe.judged)
    if own.any():
        among = out.concept[own, : len(recipe.judged)]
        loss = loss + F.cross_entropy(among, concept[own], label_smoothing=recipe.smoothing)
    return loss


def measure(model: Classifier, known: Labelled, others: Labelled, strength: Strength) -> dict[str, float]:
    """Shares right: on augmentations of ``known`` that were not trained on, and on ``others`` as they are."""
    out, repeated = _checked(model, known, strength)
    top1, top5 = top_shares(out.concept, repeated.concept)
    scores = {
        "augmented_top1": top1,
        "augmented_top5": top5,
        "augmented_style": top_shares(out.style, repeated.style, (1,))[0],
    }
    if len(others):
        unseen = embed(model, others.images)
        top1, top5 = top_shares(unseen.concept, others.concept)
        style = top_shares(unseen.style, others.style, (1,))[0]
        scores |= {"heldout_top1": top1, "heldout_top5": top5, "heldout_style": style}
    return {name: round(value, 4) for name, value in scores.items()}


def _checked(model: Classifier, known: Labelled, strength: Strength) -> tuple[Logits, Labelled]:
    """The model's answers for ``CHECK_VIEWS`` new augmentations of every picture, and those pictures."""
    generator = torch.Generator().manual_seed(CHECK_SEED)
    views = Labelled(*(torch.cat([t] * CHECK_VIEWS) for t in (known.images, known.concept, known.style)))
    changed = [augment(part, strength, generator) for part in torch.split(views.images, 256)]
    return embed(model, torch.cat(changed)), views
