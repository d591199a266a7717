"""The paper's table at desk scale: base and what enlarges it, undistilled and distilled, in one run.

    python benchmarks/bench_cascade.py [--runs runs] [--per-prompt 4] [--sheets OUT] [--enlarge-only]

Every row draws the 128 training captions (``configs/tiny_train_prompts.txt``), ``--per-prompt`` pictures
each, to 128 pixels, and is scored by the small classifier: retrieval top-1 and top-5, feature distance of the
shrunk pictures, feature distance of full-resolution crops against real pictures (``data/emoji/core128``), and
the energy of fine detail over theirs. Seconds per picture are medians over single pictures, the rows
interleaved, after a warm-up, weights loaded, two threads. Rows whose weights are not there are left out and
named.

A second table enlarges real pictures of 128 pixels, shrunk and passed through the autoencoder as a base
model's are, and compares with the originals: no chance is in it but relay's own. Writes
``benchmarks/results/<machine>/cascade.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.machine import facts, results_folder  # noqa: E402
from sat import Pipeline  # noqa: E402
from sat.apps.evaluate.classifier import (  # noqa: E402
    Classifier,
    detail_distance,
    fine_energy,
    real_pictures,
    score,
)
from sat.diffusion.process import ProcessInput  # noqa: E402
from sat.first_stage.model import AutoencoderKL  # noqa: E402
from sat.sampling.output import from_pil, grid, to_pil, write_png  # noqa: E402
from sat.sampling.prompts import read_prompt_file  # noqa: E402
from sat.train.objectives.first_stage import peak_signal_to_noise  # noqa: E402

PROMPTS = ROOT / "configs" / "tiny_train_prompts.txt"
REAL = ROOT / "data" / "emoji" / "core128"
SIDE = 128


@dataclass(frozen=True)
class Stage:
    """One model: its config, and overrides such as its weights."""

    config: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the table. Without a second stage the picture is enlarged by bicubic interpolation."""

    name: str
    base: Stage
    relay: Stage | None = None
    scored: bool = True


@dataclass
class Result:
    """What a row came to."""

    name: str
    looks: str
    seconds: list[float] = field(default_factory=list)
    base_seconds: list[float] = field(default_factory=list)
    top1: float | None = None
    top5: float | None = None
    distance: float | None = None
    detail: float | None = None
    fine: float | None = None


def rows(runs: Path) -> list[Row]:
    """The table's rows; weights of intermediate rounds come from ``runs``."""
    base, relay = Stage("configs/tiny_base.yaml"), Stage("configs/tiny_relay.yaml")
    base4, relay1 = Stage("configs/tiny_base_distill.yaml"), Stage("configs/tiny_relay_distill.yaml")
    base8 = Stage(base4.config, ("sampling.steps=8", *weights(runs / "tiny_base_distill/steps_8")))
    relay2 = Stage(relay1.config, ("sampling.steps=2", *weights(runs / "tiny_relay_distill/steps_2")))
    large = (
        "sampling.sizes={min: 64, max: 128, multiple: 32, max_area: 16384}",
        "sampling.height=128",
        "sampling.width=128",
    )
    return [
        Row("base 50 + bicubic", base),
        Row("base 50 + plain SR", base, Stage("configs/tiny_sr.yaml", weights(runs / "tiny_sr"))),
        Row("base 50 + relay 12", base, relay),
        Row("distilled 8 + 2", base8, relay2),
        Row("distilled 4 + 1", base4, relay1),
        Row("distilled 4 + bicubic", base4),
        Row("Plus 50 + bicubic", Stage("configs/tiny.yaml")),
        # What relay saves: the base network at the full size, from noise. It was not trained there.
        Row("base 50 at 128 pixels (time only)", Stage(base.config, large), scored=False),
    ]


def weights(run: Path) -> tuple[str, ...]:
    """The override that names a run's last checkpoint; a path that does not exist if there is none."""
    found = sorted((run / "checkpoints").glob("step_*/native"))
    return (f"checkpoint.model={found[-1] if found else run / 'checkpoints' / 'none'}",)


class Drawn:
    """A row with its models loaded."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.base = load(row.base)
        self.relay = None if row.relay is None else load(row.relay)

    def small(self, prompts: Sequence[str], batch: int) -> list[Image.Image]:
        """The base model's pictures."""
        return self.base(prompts, seed=0, batch_size=batch).images

    def large(self, small: Sequence[Image.Image], prompts: Sequence[str], batch: int) -> list[Image.Image]:
        """``small`` pictures brought to ``SIDE`` pixels."""
        if self.relay is not None:
            return self.relay(prompts, seed=0, batch_size=batch, images=small).images
        return [
            picture if picture.width == SIDE else picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            for picture in small
        ]


def load(stage: Stage) -> Pipeline:
    """The stage's model."""
    return Pipeline.from_config(ROOT / stage.config, stage.overrides, device="cpu")


def looks(row: Row) -> str:
    """How often a network looks at a picture, by stage; guidance doubles it."""

    def count(stage: Stage) -> str:
        pipeline = load(stage)
        double = type(pipeline.guider).__name__ in ("ClassifierFree", "IntervalLimited")
        return f"{pipeline.experiment.sampling.steps}{' x 2' if double else ''}"

    return " + ".join([count(row.base), *([] if row.relay is None else [count(row.relay)])])


def measure(drawn: Sequence[Drawn], results: Sequence[Result], prompts: Sequence[str], repeats: int) -> None:
    """Seconds per single picture, the rows taking turns."""
    for index in range(repeats + 1):
        prompt = [prompts[index % len(prompts)]]
        for one, result in zip(drawn, results, strict=True):
            began = time.perf_counter()
            small = one.small(prompt, 1)
            between = time.perf_counter()
            one.large(small, prompt, 1)
            if index:  # the first is a warm-up
                result.seconds.append(time.perf_counter() - began)
                result.base_seconds.append(between - began)


class Scorer:
    """Scores rows; pictures of a base stage are drawn once for all rows that have it."""

    def __init__(self, prompts: Sequence[str], per_prompt: int) -> None:
        self.prompts, self.per_prompt = prompts, per_prompt
        self.classifier = Classifier.load(ROOT / "checkpoints" / "tiny_classifier")
        self.real = real_pictures(REAL, [(SIDE, SIDE)])
        self._small: dict[Stage, list[list[Image.Image]]] = {}

    def __call__(self, drawn: Drawn, result: Result) -> list[Image.Image]:
        """Fill in the scores of a row; its first picture of every prompt."""
        for pipeline in (drawn.base, drawn.relay):
            if pipeline is not None:
                pipeline.generator.at_once = 16
        base, count = drawn.row.base, self.per_prompt
        if base not in self._small:
            self._small[base] = [drawn.small([prompt], count) for prompt in self.prompts]
        made: list[Image.Image] = []
        for prompt, small in zip(self.prompts, self._small[base], strict=True):
            made += drawn.large(small, [prompt], count)
        captions = [prompt for prompt in self.prompts for _ in range(count)]
        scores = score(made, captions, self.classifier)
        result.top1, result.top5, result.distance = scores.top1, scores.top5, scores.distance
        result.detail = detail_distance(made, self.real, self.classifier)
        result.fine = fine_energy(made, self.real)
        return made[::count]


@dataclass
class Enlarged:
    """How near enlarged real pictures come to the originals: known ones, and pairs held out of training."""

    name: str
    fine: float  # energy of fine detail, over that of the originals
    detail: float  # feature distance at full resolution
    psnr: float  # dB
    fine_held_out: float
    detail_held_out: float
    psnr_held_out: float


UNGUIDED = "sampling.guider={target: sat.diffusion.guidance.Unguided}"
ALONE = "sampling.back_projections=0"
TRIALS = {
    "relay 12, not projected back": Stage("configs/tiny_relay.yaml", (ALONE,)),
    "the same, no guidance": Stage("configs/tiny_relay.yaml", (ALONE, UNGUIDED)),
    "the same, no guidance, 1 step": Stage("configs/tiny_relay.yaml", (ALONE, UNGUIDED, "sampling.steps=1")),
    "relay distilled, 1, not projected back": Stage("configs/tiny_relay_distill.yaml", (ALONE,)),
}
"""Second stages of the second table alone: where relay loses what it was given."""
SECOND = {"relay 12": "tiny_relay", "relay distilled, 1": "tiny_relay_distill"}
"""Those that ship, by their config."""


def enlarge(stages: Mapping[str, Pipeline]) -> list[Enlarged]:
    """The second table: bicubic interpolation and ``stages``, over real pictures."""
    classifier = Classifier.load(ROOT / "checkpoints" / "tiny_classifier")
    sets = [_pairs(REAL / "metadata.jsonl", 6), _pairs(REAL / "heldout.jsonl", 1)]
    first_stage = next(iter(stages.values())).generator.engine.first_stage
    lows = [_as_drawn(first_stage, [picture for _, picture in pairs]) for pairs in sets]
    bicubic = [[low.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for low in some] for some in lows]
    given = ProcessInput("low_res", 2)
    projected = [
        [_projected(given, large, low) for large, low in zip(*both, strict=True)]
        for both in zip(bicubic, lows, strict=True)
    ]
    made = {"bicubic": bicubic, "bicubic, projected back": projected}
    for name, relay in stages.items():
        made[name] = [
            [
                relay([caption], seed=0, images=[low]).images[0]
                for (caption, _), low in zip(pairs, some, strict=True)
            ]
            for pairs, some in zip(sets, lows, strict=True)
        ]
    out = []
    for name, by_set in made.items():
        numbers: list[float] = []
        for pictures, pairs in zip(by_set, sets, strict=True):
            real = [picture for _, picture in pairs]
            both = (torch.stack([from_pil(p) for p in some]) for some in (pictures, real))
            numbers += [
                fine_energy(pictures, real),
                detail_distance(pictures, real, classifier),
                float(peak_signal_to_noise(*both).mean()),
            ]
        out.append(Enlarged(name, *numbers))
    return out


def _projected(given: ProcessInput, large: Image.Image, low: Image.Image) -> Image.Image:
    """``large`` after one round of back-projection onto ``low``."""
    one, other = ((from_pil(picture)[None] + 1) / 2 for picture in (large, low))
    return to_pil(given.consistent(one, other, 1)[0])


def _pairs(table: Path, every: int) -> list[tuple[str, Image.Image]]:
    """Caption and picture of every so-manieth row."""
    rows = [json.loads(line) for line in table.read_text().splitlines() if line.strip()][::every]
    return [
        (
            row["text"] if isinstance(row["text"], str) else row["text"][0],
            Image.open(table.parent / row["file_name"]).convert("RGB"),
        )
        for row in rows
    ]


@torch.inference_mode()
def _as_drawn(first_stage: AutoencoderKL, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """``pictures`` at half the size, through the autoencoder."""
    small = ProcessInput("low_res", 2).shrink(torch.stack([from_pil(picture) for picture in pictures]))
    seen = first_stage.decode(first_stage.encode(small).mode()).clamp(-1, 1)
    return [to_pil((picture + 1) / 2) for picture in seen]


def enlarged_table(results: Sequence[Enlarged]) -> str:
    """The second table as Markdown."""
    lines = [
        "| enlarged by | known: fine detail | features | PSNR | held out: fine detail | features | PSNR |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.fine:.2f} | {r.detail:.2f} | {r.psnr:.1f} dB | "
        f"{r.fine_held_out:.2f} | {r.detail_held_out:.2f} | {r.psnr_held_out:.1f} dB |"
        for r in results
    ]
    return "\n".join(lines)


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| stages | looks | top-1 | top-5 | features | at full size | fine detail | s a picture | base |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:

        def share(value: float | None) -> str:
            return "" if value is None else f"{value:.1%}".replace("%", " %")

        def number(value: float | None) -> str:
            return "" if value is None else f"{value:.2f}"

        lines.append(
            f"| {r.name} | {r.looks} | {share(r.top1)} | {share(r.top5)} | {number(r.distance)} | "
            f"{number(r.detail)} | {number(r.fine)} | {statistics.median(r.seconds):.3f} | "
            f"{statistics.median(r.base_seconds):.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, score, print, write."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the rounds' checkpoints lie")
    reader.add_argument("--per-prompt", type=int, default=4)
    reader.add_argument("--repeats", type=int, default=9, help="timed pictures a row")
    reader.add_argument("--enlarge-only", action="store_true", help="print the second table alone")
    reader.add_argument("--sheets", type=Path, help="folder for a sheet of the first 32 pictures of each row")
    args = reader.parse_args()
    torch.set_num_threads(2)
    trials = {name: load(stage) for name, stage in TRIALS.items()}
    if args.enlarge_only:
        seconds = {name: load(Stage(f"configs/{config}.yaml")) for name, config in SECOND.items()}
        print(enlarged_table(enlarge(seconds | trials)))
        return 0
    prompts = read_prompt_file(PROMPTS)
    drawn, results = [], []
    for row in rows(args.runs):
        try:
            drawn.append(Drawn(row))
            results.append(Result(row.name, looks(row)))
        except ValueError as error:
            print(f"left out: {row.name}: {error}", file=sys.stderr)
    measure(drawn, results, prompts, args.repeats)

    scorer = Scorer(prompts, args.per_prompt)
    for one, result in zip(drawn, results, strict=True):
        if not one.row.scored:
            continue
        print(f"judging {result.name}", file=sys.stderr, flush=True)
        first = scorer(one, result)
        if args.sheets is not None:
            args.sheets.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() else "_" for c in result.name)
            write_png(args.sheets / f"{name}.png", grid(first[:32], columns=8))
    print(table(results))
    seconds = {one.row.name.partition("+ ")[2]: one.relay for one in drawn if one.relay is not None}
    enlarged = enlarge(seconds | trials)
    print("\n" + enlarged_table(enlarged))
    out = results_folder() / "cascade.json"
    settings = {"prompts": len(prompts), "per_prompt": args.per_prompt, "repeats": args.repeats, "threads": 2}
    out.write_text(
        json.dumps(
            {
                **facts(settings),
                "rows": [asdict(r) for r in results],
                "enlarged": [asdict(r) for r in enlarged],
            },
            indent=1,
        )
        + "\n"
    )
    print(f"written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
