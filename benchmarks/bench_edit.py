"""Changing pictures with a small model: what stays, what changes, and whether the object is still found.

    python benchmarks/bench_edit.py [--config configs/tiny.yaml] [--prompts 64]

Sources are the model's own pictures of the prompts (seed 0), changed with seed 1.

* Inpainting with the same prompt, a box of half the side in the middle: the judge's object top-1 over that of
  text-to-image with seed 1; pixels that differ outside the mask (none); mean squared difference of neighbours
  across its border over that of neighbours inside, and the same of the sources, which have no border there.
* Strength over eleven values, with the prompt of the next picture: rank correlation of strength and distance
  (RMS of pixels) to the source of each of 32 pictures, averaged; top-1 of the source's object; the latter at
  ``noise`` 0.3 over that of the sources, with their own prompts and with the next one's.

Writes ``benchmarks/results/<machine>/edit_<config>.json``; with ``--sheets FOLDER`` draws the pictures of
docs/edit.md there instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.machine import facts, results_folder  # noqa: E402
from sat import Pipeline  # noqa: E402
from sat.apps.evaluate.classifier import Classifier, score  # noqa: E402
from sat.config.schema import RegionConfig, RegionsConfig  # noqa: E402
from sat.sampling.output import grid  # noqa: E402
from sat.sampling.prompts import read_prompt_file  # noqa: E402

PROMPTS = ROOT / "configs" / "tiny_train_prompts.txt"
STRENGTHS = [i / 10 for i in range(11)]
MOST_MONOTONE = 32
"""Pictures whose distance is followed over all strengths."""


@dataclass
class Inpainting:
    """The first paragraph of the table."""

    top1: float
    of_text_to_image: float  # top1 over that of text-to-image
    changed_outside: int  # pixels
    border: float  # gradient energy across the border over that inside
    border_unedited: float  # the same of the sources, which have no border there


@dataclass
class Strength:
    """The second paragraph."""

    rms: list[float]  # mean distance to the source at each of STRENGTHS, in 0…255
    spearman: float  # mean over pictures
    top1: list[float]  # of the source's object
    kept: float  # top-1 of the sources' objects at noise 0.3 with their own prompts, over that of the sources
    kept_other: float  # the same with the next one's prompts


def draw(pipe: Pipeline, prompts: Sequence[str], seed: int = 0, **edit: object) -> list[Image.Image]:
    """A picture of each prompt; lists in ``edit`` have one for each."""
    made: list[Image.Image] = []
    for i, prompt in enumerate(prompts):
        own = {key: value[i] if isinstance(value, list) else value for key, value in edit.items()}
        made += pipe(prompt, seed=seed, **own).images  # type: ignore[arg-type]
    return made


def middle(height: int, width: int) -> Image.Image:
    """The mask: a box of half the side."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 255
    return Image.fromarray(mask)


def border_energy(images: Sequence[Image.Image], mask: Image.Image) -> float:
    """Mean squared difference of neighbours across the mask's border, over that of neighbours inside it."""
    inside = np.asarray(mask) > 0
    across, within = [0.0, 0], [0.0, 0]
    for image in images:
        pixels = np.asarray(image).astype(np.float64)
        for axis in (0, 1):
            energy = np.diff(pixels, axis=axis) ** 2
            count = np.diff(inside.astype(int), axis=axis)
            both = np.delete(inside, -1, axis) & np.delete(inside, 0, axis)
            for total, where in ((across, count != 0), (within, both)):
                total[0] += float(energy[where].sum())
                total[1] += int(where.sum())
    return (across[0] / across[1]) / (within[0] / within[1])


def inpainting(pipe: Pipeline, prompts: Sequence[str], classifier: Classifier) -> Inpainting:
    """Redraw the middle of the model's own pictures."""
    sources, plain = draw(pipe, prompts), draw(pipe, prompts, 1)
    mask = middle(sources[0].height, sources[0].width)
    images = draw(pipe, prompts, 1, image=sources, mask=mask)
    outside = np.asarray(mask) == 0
    changed = sum(
        int((np.asarray(a) != np.asarray(b)).any(-1)[outside].sum())
        for a, b in zip(images, sources, strict=True)
    )
    found = score(images, prompts, classifier).top1
    share = found / score(plain, prompts, classifier).top1
    return Inpainting(found, share, changed, border_energy(images, mask), border_energy(sources, mask))


def spearman(values: NDArray[np.float64]) -> float:
    """Rank correlation of a series with its place."""
    ranks = values.argsort().argsort()
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


def strengths(
    pipe: Pipeline, prompts: Sequence[str], classifier: Classifier, values: Sequence[float]
) -> Strength:
    """Change the model's own pictures ever more, each with the next one's prompt."""
    sources, followed = draw(pipe, prompts), min(len(prompts), MOST_MONOTONE)
    others = [*prompts[1:], prompts[0]]
    distances, top1 = [], []
    for value in values:
        images = draw(pipe, others[:followed], 1, image=sources[:followed], strength=value)
        pairs = zip(images, sources[:followed], strict=True)
        distances.append(
            [np.sqrt(((np.asarray(a, np.float64) - np.asarray(b)) ** 2).mean()) for a, b in pairs]
        )
        top1.append(score(images, prompts[:followed], classifier).top1)
    series = np.array(distances)  # (strengths, pictures)
    spearmans = [spearman(row) for row in series.T]
    own = score(sources, prompts, classifier).top1
    kept = {
        name: score(draw(pipe, texts, 1, image=sources, strength=0.3), prompts, classifier).top1 / own
        for name, texts in (("own", prompts), ("other", others))
    }
    mean = float(np.mean(spearmans))
    return Strength(series.mean(1).round(2).tolist(), mean, top1, kept["own"], kept["other"])


def sheets(pipe: Pipeline, folder: Path) -> None:
    """The three pictures of docs/edit.md."""
    apple, pizza = (draw(pipe, [text], seed)[0] for text, seed in (("a red apple", 0), ("a pizza", 2)))
    half, ramp = np.zeros((64, 64), np.uint8), np.tile(np.linspace(0, 255, 64), (64, 1)).astype(np.uint8)
    half[:, 32:] = 255
    mask, grey = Image.fromarray(half), Image.fromarray(ramp)
    green = ["a green apple"]
    split = [RegionConfig(text, None, box) for text, box in (
        ("blue heart", [0.0, 0.0, 0.5, 1.0]), ("yellow heart", [0.5, 0.0, 1.0, 1.0]),
    )]  # fmt: skip
    apples = [
        RegionConfig(text, None, area.box) for text, area in zip(["a red apple", *green], split, strict=True)
    ]
    rows = {
        "edit_strength": [apple, *(draw(pipe, green, image=apple, strength=s)[0]
                                   for s in (0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0))],
        "edit_masks": [
            pizza, mask, draw(pipe, ["a watermelon"], image=pizza, mask=mask)[0],
            draw(pipe, ["a pizza"], 5, image=pizza, mask=mask)[0], apple, grey,
            draw(pipe, green, image=apple, strength_map=grey)[0],
            draw(pipe, ["a lemon"], image=apple, strength_map=grey)[0],
        ],
        "edit_regions": [
            draw(pipe, ["heart"])[0], draw(pipe, ["heart"], regions=RegionsConfig(split))[0],
            draw(pipe, ["an apple"])[0], draw(pipe, ["an apple"], regions=RegionsConfig(apples))[0],
        ],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in rows.items():
        made = [one.convert("RGB").resize((96, 96), Image.Resampling.LANCZOS) for one in images]
        grid(made, columns=len(made)).save(folder / f"{name}.png", optimize=True)


def main() -> int:
    """Draw, judge, print, write."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny.yaml")
    reader.add_argument("--prompts", type=int, default=64, help="how many of the 128 training captions")
    reader.add_argument(
        "--sheets", type=Path, metavar="FOLDER", help="draw the page's pictures, and nothing else"
    )
    reader.add_argument("--threads", type=int, default=2)
    reader.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = reader.parse_args()
    torch.set_num_threads(args.threads)
    prompts = read_prompt_file(PROMPTS)[:: max(1, 128 // args.prompts)][: args.prompts]
    classifier = Classifier.load(ROOT / "checkpoints" / "tiny_classifier")
    pipe = Pipeline.from_config(args.config, args.overrides, device="cpu")
    if args.sheets is not None:
        sheets(pipe, args.sheets)
        return 0
    box = inpainting(pipe, prompts, classifier)
    print(
        f"inpainting: top-1 {box.top1:.1%}, {box.of_text_to_image:.1%} of text-to-image's; "
        f"{box.changed_outside} pixels changed outside; border energy {box.border:.2f} of inside "
        f"({box.border_unedited:.2f} in the unedited pictures, {box.border / box.border_unedited:.2f} of it)",
        flush=True,
    )
    follow = strengths(pipe, prompts, classifier, STRENGTHS)
    print("strength  " + " ".join(f"{value:6.1f}" for value in STRENGTHS))
    print("RMS       " + " ".join(f"{value:6.1f}" for value in follow.rms))
    print("top-1     " + " ".join(f"{value:6.1%}" for value in follow.top1))
    print(
        f"Spearman {follow.spearman:.4f}; noise 0.3 keeps {follow.kept:.1%} of the sources' top-1 "
        f"({follow.kept_other:.1%} with another prompt)"
    )
    path = results_folder() / f"edit_{args.config.stem}.json"
    about = {"config": str(args.config.name), "overrides": args.overrides, "prompts": len(prompts)}
    out = {**facts(about), "inpainting": asdict(box), "strength": asdict(follow)}
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
