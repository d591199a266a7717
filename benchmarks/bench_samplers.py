"""How far samplers are from where infinitely many steps would lead, on a small model.

    python benchmarks/bench_samplers.py [--config configs/tiny.yaml] [--prompts 32]

For every sampler and number of steps, from the same noise and prompts: the root mean square of the final
latent's difference from that of DDIM at ``--reference`` steps, over the spread of the latents; the share of
pictures in which the small classifier finds the prompt's object; seconds a picture. Writes
``benchmarks/results/<machine>/samplers_<config>.json``.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.machine import facts, results_folder  # noqa: E402
from sat import Output, Pipeline  # noqa: E402
from sat.apps.evaluate.classifier import Classifier, score  # noqa: E402
from sat.diffusion.samplers import DDIM, DPMSolver2M, Heun, LinearMultistep, Sampler  # noqa: E402
from sat.sampling.prompts import read_prompt_file  # noqa: E402

PROMPTS = ROOT / "configs" / "tiny_train_prompts.txt"
CASES: list[tuple[str, Sampler, int]] = [
    ("DDIM", DDIM(), 10), ("DDIM", DDIM(), 20), ("DDIM", DDIM(), 50),
    ("DPM-Solver++ 2M", DPMSolver2M(), 10), ("DPM-Solver++ 2M", DPMSolver2M(), 20),
    ("Heun (two looks a step)", Heun(), 10), ("linear multistep", LinearMultistep(), 20),
]  # fmt: skip


@dataclass
class Result:
    """One line of the table."""

    sampler: str
    steps: int
    error: float  # of the latent, over its spread
    top1: float
    seconds: float


def draw(pipe: Pipeline, sampler: Sampler, steps: int, prompts: Sequence[str]) -> tuple[Output, float]:
    """Pictures of all prompts and the median seconds of one."""
    pipe.generator.sampler = sampler
    outputs, seconds = [], []
    for prompt in prompts:
        began = time.perf_counter()
        outputs.append(pipe([prompt], seed=0, steps=steps))
        seconds.append(time.perf_counter() - began)
    images = [image for output in outputs for image in output.images]
    return Output(images, torch.cat([output.latents for output in outputs])), statistics.median(seconds)


def main() -> int:
    """Draw, compare, print, write."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny.yaml")
    reader.add_argument("--prompts", type=int, default=32, help="how many of the 128 training captions")
    reader.add_argument("--reference", type=int, default=500, help="DDIM steps that count as converged")
    reader.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = reader.parse_args()
    torch.set_num_threads(2)
    prompts = read_prompt_file(PROMPTS)[:: max(1, 128 // args.prompts)][: args.prompts]
    classifier = Classifier.load(ROOT / "checkpoints" / "tiny_classifier")
    pipe = Pipeline.from_config(args.config, args.overrides, device="cpu")
    pipe(prompts[:1], steps=2)  # a warm-up
    reference, _ = draw(pipe, DDIM(), args.reference, prompts)
    spread = reference.latents.std()
    results = []
    for name, sampler, steps in CASES:
        output, seconds = draw(pipe, sampler, steps, prompts)
        error = float((output.latents - reference.latents).square().mean().sqrt() / spread)
        top1 = score(output.images, prompts, classifier).top1
        results.append(Result(name, steps, error, top1, seconds))
        print(
            f"{name:<24} {steps:>3} steps: error {error:.3f}, top-1 {top1:.1%}, {seconds:.2f} s", flush=True
        )
    out = results_folder() / f"samplers_{args.config.stem}.json"
    settings = {
        "config": args.config.name,
        "prompts": len(prompts),
        "reference": args.reference,
        "threads": 2,
    }
    out.write_text(json.dumps({**facts(settings), "rows": [asdict(r) for r in results]}, indent=1) + "\n")
    print(f"written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
