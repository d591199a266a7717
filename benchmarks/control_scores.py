"""Scores of a control by outlines: are the outlines that were asked for in the pictures, and the object too.

``python benchmarks/control_scores.py --base configs/tiny.yaml --control FILE --data PAIRS.jsonl``

Several controls act each alone and all together.

F1 of outlines counts a pixel as found within one pixel. The autoencoder's own round trip of the real picture
is the most that can be hoped for. The object is found by the judge where it knows the caption. RMS
is the distance to the real picture, of 255. All are means over ``--seeds`` pictures of each row.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sat.apps.evaluate.classifier import Classifier, wanted  # noqa: E402
from sat.data.preprocess import Edges  # noqa: E402
from sat.pipeline import Pipeline  # noqa: E402
from sat.sampling.output import from_pil, grid, to_pil  # noqa: E402


def f1(found: Tensor, wanted: Tensor) -> float:
    """F1 of outlines (H, W), of which a pixel counts within one pixel of the other's."""

    def near(edges: Tensor) -> Tensor:
        return F.max_pool2d(edges[None], 3, 1, 1)[0]

    precision = (found * near(wanted)).sum() / found.sum().clamp_min(1)
    recall = (wanted * near(found)).sum() / wanted.sum().clamp_min(1)
    return float(2 * precision * recall / (precision + recall).clamp_min(1e-9))


def main() -> None:
    """Draw with and without the control, and print a table."""
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--base", nargs="+", required=True)
    reader.add_argument("--control", type=Path, nargs="+", required=True)
    reader.add_argument("--data", type=Path, required=True, help="a .jsonl of pictures with captions")
    reader.add_argument("--count", type=int, default=32)
    reader.add_argument("--steps", type=int, default=50)
    reader.add_argument("--scale", type=float, nargs="+", default=[1.0], help="one, or one for each control")
    reader.add_argument("--guidance", type=float, help="instead of the config's")
    reader.add_argument("--seeds", type=int, default=1)
    reader.add_argument("--guess", action="store_true", help="only the half with the prompt gets the picture")
    reader.add_argument("--outside", action="store_true", help="objects that the judge does not know")
    reader.add_argument(
        "--classifier", type=Path, default=ROOT / "checkpoints" / "tiny_judge", help="the judge"
    )
    reader.add_argument("--at-once", type=int, default=1)
    reader.add_argument("--sheet", type=Path, help="a picture of outlines, real, plain and steered ones")
    args = reader.parse_args()
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    judge = Classifier.load(args.classifier)

    def caption(row: dict[str, Any]) -> str:
        return str(row["text"] if isinstance(row["text"], str) else row["text"][0])

    if args.outside:
        rows = [row for row in rows if wanted(caption(row), judge.card) is None]
    rows = random.Random(0).sample(rows, min(args.count, len(rows)))
    captions = [caption(row) for row in rows]
    real = [Image.open(args.data.parent / row["file_name"]).convert("RGB") for row in rows]
    words = [f"sampling.steps={args.steps}", f"sampling.at_once={args.at_once}"]
    pipe = Pipeline.from_config(args.base, words)
    scales = args.scale * (len(args.control) if len(args.scale) == 1 else 1)
    if len(scales) != len(args.control):
        reader.error(f"--scale: {len(scales)} for {len(args.control)} controls")
    shared = {"image": real, "preprocess": True, "guess": args.guess}
    each = [{"control": f, "scale": s, **shared} for f, s in zip(args.control, scales, strict=True)]

    def draw(controls: list[dict[str, Any]]) -> list[Image.Image]:
        seeds = range(1, 1 + len(real) * args.seeds, len(real))
        given = {} if args.guidance is None else {"guidance": args.guidance}
        return [one for seed in seeds for one in pipe(captions, seed=seed, controls=controls, **given).images]

    drawn = {"without": draw([])}
    if len(each) > 1:
        drawn |= {f"{one['control']}": draw([one]) for one in each}
    drawn["with"] = draw(each)
    stage = pipe.generator.engine.first_stage
    with torch.no_grad():
        images = torch.stack([from_pil(one) for one in real])
        drawn["round trip"] = [
            to_pil((stage.decode(stage.encode(one[None].to(stage.dtype)).mode())[0].float() + 1) / 2)
            for one in images
        ]
    drawn["real"] = real
    edges = Edges()
    asked = [edges.edges(one) for one in images]
    told = [wanted(caption, judge.card) for caption in captions]
    named = [None if one is None else judge.card.concepts.index(one.concept) for one in told]
    for kind, pictures in drawn.items():
        tensors = torch.stack([from_pil(one) for one in pictures])
        rows_of = [place % len(real) for place in range(len(pictures))]
        scores = [f1(edges.edges(one), asked[row]) for one, row in zip(tensors, rows_of, strict=True)]
        rms = (tensors - images[rows_of]).square().mean((1, 2, 3)).sqrt().mul(127.5)
        with torch.no_grad():
            best = judge(tensors).concept.argmax(1).tolist()
        known = [
            found == named[row] for found, row in zip(best, rows_of, strict=True) if named[row] is not None
        ]
        top = f"{sum(known) / len(known):.3f} of {len(known)}" if known else "none known"
        f1s, far = sum(scores) / len(scores), float(rms.mean())
        print(f"{kind:<11} outlines F1 {f1s:.3f}   object top-1 {top}   RMS {far:.1f}", flush=True)
    if args.sheet is not None:
        lines = [to_pil(edge.expand(3, -1, -1)) for edge in asked]
        columns = [lines, real, drawn["without"], drawn["with"], drawn["round trip"]]
        shown = [one[i] for i in range(min(12, len(real))) for one in columns]
        sheet = grid(shown, 5 * 2)
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(args.sheet)


if __name__ == "__main__":
    main()
