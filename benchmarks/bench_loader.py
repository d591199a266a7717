"""How many images a second the loader hands out: from a folder of JPEG files, and from the cache on disk.

    python benchmarks/bench_loader.py [--images 128] [--size 512] [--batch 16] [--workers 0 2 4]

Pictures are made for the occasion, half as large again as they are trained at. The cache holds moments and
text embeddings of CogView3-Plus's shapes in bf16, without running either model. Each case is repeated over
whole epochs, after as many as it takes until two agree within 2 %; nothing is kept between them but what the
system keeps of the files. Peak memory is the process's when the case was done, in MB.
Writes ``benchmarks/results/<machine>/loader.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import PIL.Image  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.machine import facts, results_folder  # noqa: E402
from sat.data.cache import CachedDataset, Store, Stores, fill_latents, fill_text  # noqa: E402
from sat.data.dataset import Dataset, Items  # noqa: E402
from sat.data.loader import Loader  # noqa: E402
from sat.data.sources import read_sources  # noqa: E402
from sat.data.transforms import Transform  # noqa: E402

AGREE, LONGEST = 0.02, 10
"""Of two epochs of the warm-up, and the most epochs it may take."""


@dataclass
class Result:
    """One line of the table: images a second, over the repeats."""

    source: str
    workers: int
    median: float
    slowest: float  # 10th percentile
    fastest: float  # 90th
    peak: float


def pictures(folder: Path, count: int, side: int) -> None:
    """Smooth JPEG pictures with captions."""
    numbers = np.random.default_rng(0)
    for index in range(count):
        coarse = PIL.Image.fromarray(numbers.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((side * 4 // 3, side), PIL.Image.Resampling.BICUBIC).save(folder / f"{index:05d}.jpg")
        (folder / f"{index:05d}.txt").write_text(f"picture number {index}")


def cached(dataset: Dataset, root: Path) -> CachedDataset:
    """A full cache of tensors of the real shapes."""
    made = CachedDataset(
        dataset, Stores(latents=Store(root, "latents", {}), text=Store(root, "text", {})), views=1
    )

    def encode(images: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(images, 8)[:, :1]
        return small.repeat(1, 32, 1, 1).bfloat16()

    def embed(captions: Sequence[str]) -> Tensor:
        return torch.zeros(len(captions), 224, 4096, dtype=torch.bfloat16)

    for _ in fill_latents(made, made.jobs(), encode):
        pass
    text = made.stores.text
    assert text is not None, "made with one"
    for _ in fill_text(text, made.captions(), embed):
        pass
    return made


def rate(items: Items, workers: int, batch: int, repeats: int) -> list[float]:
    """Images a second of each of ``repeats`` epochs, sorted, once two before them agree."""
    batches = iter(Loader(items, batch, workers=workers))
    steps = max(1, len(items) // batch)

    def epoch() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            next(batches)
        return steps * batch / (time.perf_counter() - began)

    warm = [epoch(), epoch()]
    while abs(warm[-1] / warm[-2] - 1) > AGREE and len(warm) < LONGEST:
        warm.append(epoch())
    return sorted(epoch() for _ in range(repeats))


def main() -> int:
    """Make the data, read it in every way, print, write."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--images", type=int, default=128)
    reader.add_argument("--size", type=int, default=512, help="training height and width in pixels")
    reader.add_argument("--batch", type=int, default=16)
    reader.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4], help="threads that read ahead")
    reader.add_argument("--repeats", type=int, default=5)
    args = reader.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        folder.mkdir()
        pictures(folder, args.images, args.size * 3 // 2)
        dataset = Dataset(read_sources([(folder, 1)]), Transform(args.size, args.size), keep_bytes=0)
        sources: list[tuple[str, Items]] = [("folder of JPEG", dataset)]
        sources.append(("cache on disk", cached(dataset, Path(name) / "cache")))
        print(f"{'source':16}  {'workers':>7}  {'images/s':>9}  {'10 % to 90 %':>16}")
        for source, items in sources:
            for workers in args.workers:
                seen = rate(items, workers, args.batch, args.repeats)
                low, middle, high = np.percentile(seen, [10, 50, 90])
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
                results.append(Result(source, workers, *(round(x, 1) for x in (middle, low, high, peak))))
                print(
                    f"{source:16}  {workers:7d}  {middle:9.1f}  {f'{low:.1f} to {high:.1f}':>16}", flush=True
                )
    settings = {name: value for name, value in vars(args).items()}
    path = results_folder() / "loader.json"
    path.write_text(json.dumps(facts(settings) | {"results": [asdict(r) for r in results]}, indent=1) + "\n")
    print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
