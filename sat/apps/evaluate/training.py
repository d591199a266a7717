"""Training of the small classifier on augmented real pictures, and its accuracy on other augmentations."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
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
    largest standard deviation, of values in [-1, 1].
    """

    shift: float = 0.08
    scale: tuple[float, float] = (0.75, 1.1)
    turn: float = 8.0
    light: float = 0.1
    blur: float = 0.4
    noise: float = 0.08


def augment(images: Tensor, strength: Strength, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] placed anew on white, some blurred, with light and noise changed."""
    count = len(images)

    def uniform(low: float, high: float, size: tuple[int, ...] = (count,)) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    angle = uniform(-strength.turn, strength.turn) * (math.pi / 180)
    scale = uniform(*strength.scale)
    shift = uniform(-strength.shift, strength.shift, (count, 2)) * 2  # the grid spans 2
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    inverse = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    matrix = torch.cat([inverse, -(inverse @ shift[:, :, None])], 2)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - images, grid, padding_mode="zeros", align_corners=False)  # white is 1
    soft = F.interpolate(F.avg_pool2d(moved, 2), images.shape[-2:], mode="bilinear", align_corners=False)
    blurred = (torch.rand(count, generator=generator) < strength.blur).float()[:, None, None, None]
    amount = uniform(0.3, 1.0)[:, None, None, None] * blurred
    out = moved + amount * (soft - moved)
    out = out * (1 + uniform(-strength.light, strength.light)[:, None, None, None])
    out = out + uniform(-strength.light, strength.light)[:, None, None, None]
    spread = uniform(0, strength.noise)[:, None, None, None]
    return (out + spread * torch.randn(out.shape, generator=generator)).clamp(-1, 1)


@dataclass(frozen=True)
class Recipe:
    """Settings of the training. ``width``: features; ``style_weight``: factor of the style's loss."""

    steps: int = 3000
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.02
    smoothing: float = 0.1
    style_weight: float = 0.3
    width: int = 112
    seed: int = 0
    strength: Strength = Strength()


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
    data: Path,
    out: Path,
    recipe: Recipe,
    device: torch.device,
    report: Callable[[int, Mapping[str, float]], None],
) -> Card:
    """Train on the pictures of ``data`` (a folder with concept and style in its table); write to ``out``.

    The card's scores: ``augmented_*`` on augmentations of the training pictures that were not trained on,
    ``heldout_*`` on the drawings in ``heldout.jsonl``, which were not trained on at all. ``report`` is called
    with the step and running means now and then.
    """
    found, unseen = read_sources([(data, 1)]), data / HELD_OUT
    kept = read_source(unseen) if unseen.is_file() else RecordSet(())
    records = found.records
    for line in (*found.told(), *kept.told()):
        log.warning("%s", line)
    unlabelled = next((r for r in records if not {"concept", "style"} <= r.labels.keys()), None)
    if unlabelled is not None:
        raise DataError(f"{data}: {unlabelled.path.name} has no concept and style; a classifier needs both")
    concepts = tuple(dict.fromkeys(record.labels["concept"] for record in records))
    styles = tuple(dict.fromkeys(record.labels["style"] for record in records))
    seen = measure_all(records[:1])[0]
    if isinstance(seen, BadRecord):
        raise DataError(str(seen))
    size = seen[0]
    known = read_labelled(records, size, concepts, styles)
    others = read_labelled(kept.records, size, concepts, styles)
    torch.manual_seed(recipe.seed)
    card = Card(concepts, styles, size, recipe.width)
    model = Classifier(card).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    began = time.perf_counter()
    _fit(model, known, recipe, report)
    scores = measure(model, known, others, recipe.strength)
    mean, covariance = statistics(_checked(model, known, recipe.strength)[0].features)
    model.real_mean.copy_(mean)
    model.real_cov.copy_(covariance)
    training = {
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
        "seed": recipe.seed,
        "pictures": len(known),
        "seconds": round(time.perf_counter() - began, 1),
    }
    card = replace(card, scores=scores, training=training)
    model.save(out, card)
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
    model.train()
    running: dict[str, float] = {}
    warm = max(1, recipe.steps * 3 // 100)
    for step in range(recipe.steps):
        while len(order) < recipe.batch_size:
            order = torch.cat([order, torch.randperm(len(known), generator=generator)])
        chosen, order = order[: recipe.batch_size], order[recipe.batch_size :]
        images = augment(known.images[chosen], recipe.strength, generator)
        rate = (step + 1) / warm  # up over the first 3 %, then a cosine down to 0
        if step >= warm:
            rate = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate
        out: Logits = model(images.to(device).contiguous(memory_format=torch.channels_last))
        concept, style = known.concept[chosen].to(device), known.style[chosen].to(device)
        loss = F.cross_entropy(out.concept, concept, label_smoothing=recipe.smoothing)
        loss = loss + recipe.style_weight * F.cross_entropy(out.style, style)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        right = (out.concept.argmax(1) == concept).float().mean().item()
        for name, value in (("loss", loss.item()), ("top1", right)):
            running[name] = running.get(name, value) * 0.98 + value * 0.02
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            report(step + 1, dict(running))
    model.eval()


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
