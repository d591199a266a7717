"""What fewer bits and fewer steps cost a small model in pictures, and what they save (docs/memory.md).

    python benchmarks/bench_quantize.py [--config configs/tiny.yaml] [--prompts 32] [--steps 50]

From the same noise and prompts: the root mean square of the final latent's difference from the plain run's,
over the spread of the latents; how far the classifier's features of a picture move from those of the plain
one, over how far apart those of different plain pictures are; the share of pictures in which the small
classifier finds the prompt's object; the weights' bytes; the time of a picture over the plain one's, each
pair drawn one after the other. Rows:
int8 and int4 of the network, of the text encoder and of both; where the network is one transformer, the step
cache at several thresholds, with the share of looks at the network that it computed; guidance in an interval.
Weights are not packed for oneDNN, in no row. Writes ``benchmarks/results/<machine>/quantize_<config>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL.Image import Image  # noqa: E402

from benchmarks.machine import facts, results_folder  # noqa: E402
from sat import Output, Pipeline  # noqa: E402
from sat.apps.evaluate.classifier import Classifier, prepared, score  # noqa: E402
from sat.config.load import load  # noqa: E402
from sat.models.vision.classifier import embed  # noqa: E402
from sat.offload.block_swap import tensors  # noqa: E402
from sat.sampling.prompts import read_prompt_file  # noqa: E402
from sat.transformer import Transformer  # noqa: E402

PROMPTS = ROOT / "configs" / "tiny_train_prompts.txt"
THRESHOLDS = (0.05, 0.1, 0.2, 0.3)
Overrides = list[tuple[str, Any]]


@dataclass
class Result:
    """One line of the table; ``computed`` is the share of looks at the network that a step cache computed."""

    case: str
    error: float  # of the latent, over its spread
    moved: float  # in features, over the distance of different pictures
    top1: float
    megabytes: float  # of network and text encoder
    ratio: float  # of the seconds of a picture to the plain ones
    computed: float | None = None


def cases(pipe: Pipeline) -> list[tuple[str, Overrides]]:
    """What is compared with the plain run."""
    found: list[tuple[str, Overrides]] = []
    for kind in ("int8", "int4"):
        for parts in (("network",), ("text_encoder",), ("network", "text_encoder")):
            found.append((f"{kind} {' and '.join(parts)}", [(f"memory.quantize.{p}", kind) for p in parts]))
    if isinstance(getattr(pipe.generator.engine.network, "transformer", None), Transformer):
        target = "sat.diffusion.step_cache.FirstBlock"
        for threshold in THRESHOLDS:
            node = {"target": target, "params": {"threshold": threshold}}
            found.append((f"step cache {threshold:g}", [("sampling.cache", node)]))
    guider = pipe.experiment.sampling.guider
    limited = {
        "target": "sat.diffusion.guidance.IntervalLimited",
        "params": {**guider.params, "lowest": 200.0, "highest": 800.0},
    }
    found.append(("guidance from 200 to 800", [("sampling.guider", limited)]))
    return found


def draw(pipe: Pipeline, prompt: str, steps: int) -> tuple[Output, float]:
    """A picture and its seconds."""
    began = time.perf_counter()
    output = pipe([prompt], seed=0, steps=steps)
    return output, time.perf_counter() - began


def megabytes(pipe: Pipeline) -> float:
    """Of the weights of network and text encoder."""
    engine = pipe.generator.engine
    held = tensors([engine.network, engine.conditioner.text])
    return sum(t.numel() * t.element_size() for t in held) / 1e6


def distance(classifier: Classifier, images: Sequence[Image], plain: Sequence[Image]) -> float:
    """Mean distance of the features of each pair, over the mean one of different ``plain`` pictures."""
    made, wanted = (
        embed(classifier, torch.stack([prepared(image, classifier.card.size) for image in each])).features
        for each in (images, plain)
    )
    return float((made - wanted).norm(dim=1).mean() / torch.pdist(wanted).mean())


def compare(name: str, pipe: Pipeline, plain: Pipeline, prompts: Sequence[str], steps: int) -> Result:
    """The case beside the plain run, prompt by prompt."""
    classifier = Classifier.load(ROOT / "checkpoints" / "tiny_classifier")
    outputs, references, ratios = [], [], []
    for prompt in prompts:
        reference, before = draw(plain, prompt, steps)
        output, seconds = draw(pipe, prompt, steps)
        outputs.append(output)
        references.append(reference)
        ratios.append(seconds / before)
    latents, wanted = torch.cat([o.latents for o in outputs]), torch.cat([o.latents for o in references])
    error = float((latents - wanted).square().mean().sqrt() / wanted.std())
    images = [image for output in outputs for image in output.images]
    moved = distance(classifier, images, [image for output in references for image in output.images])
    count = pipe.generator.count
    share = count.computed / count.evaluations if count.evaluations else None
    top1 = score(images, prompts, classifier).top1
    return Result(name, error, moved, top1, megabytes(pipe), statistics.median(ratios), share)


def main() -> int:
    """Draw, compare, print, write."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny.yaml")
    reader.add_argument("--prompts", type=int, default=32, help="how many of the 128 training captions")
    reader.add_argument("--steps", type=int, default=50)
    reader.add_argument("--threads", type=int, default=2)
    reader.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = reader.parse_args()
    torch.set_num_threads(args.threads)
    prompts = read_prompt_file(PROMPTS)[:: max(1, 128 // args.prompts)][: args.prompts]
    common = [*args.overrides, ("sampling.pack", False)]  # packed weights are in no list of parameters
    plain = Pipeline.open(load([args.config], common), "cpu")
    plain(prompts[:1], steps=2)  # a warm-up
    results = []
    for name, changes in [("plain", []), *cases(plain)]:
        pipe = Pipeline.open(load([args.config], [*common, *changes]), "cpu")
        results.append(compare(name, pipe, plain, prompts, args.steps))
        row = results[-1]
        computed = "" if row.computed is None else f", {row.computed:.0%} computed"
        print(
            f"{name:<32} error {row.error:.3f}, moved {row.moved:.3f}, top-1 {row.top1:.1%}, "
            f"{row.megabytes:.2f} MB, {row.ratio:.2f} of the time{computed}",
            flush=True,
        )
    out = results_folder() / f"quantize_{args.config.stem}.json"
    settings = {
        "config": args.config.name, "prompts": len(prompts), "steps": args.steps, "threads": args.threads,
    }  # fmt: skip
    out.write_text(json.dumps({**facts(settings), "rows": [asdict(r) for r in results]}, indent=1) + "\n")
    print(f"written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
