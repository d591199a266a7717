"""Every parallel layout against one rank: time of a step, bytes sent, memory of a rank.

    python benchmarks/bench_parallel.py [--ranks 2] [--rounds 3] [--axis AXIS] [section.key=value …]

One thread a rank, ranks pinned to cores of their own where there are enough. The network is CogView3-Plus at
a size where matrix products dominate, with random weights; pictures are drawn through the sampling path of
``sample.py`` with classifier-free guidance. Layouts take turns, ``--rounds`` times; a step's time is the
median over all rounds, without the first step of each. Bytes are counted where collectives are called, as
what a rank has to send for them (a ring: 2 (n - 1) / n of an all-reduce). Writes
``benchmarks/results/<machine>/parallel.json`` (``parallel_<axis>.json`` with ``--axis``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

AXES = ("guidance", "sequence", "tensor", "data")
CONFIG = ROOT / "configs" / "debug.yaml"


@dataclass(frozen=True)
class Result:
    """One line of the table. Times in milliseconds, memory in MB (1e6 bytes) of the rank that has most."""

    layout: dict[str, int]
    step: float
    tenth: float
    ninetieth: float
    pictures: int  # that are drawn at a time, one a team
    speedup: float
    sent: float  # MB a rank and step
    weights: float
    peak: float

    @property
    def name(self) -> str:
        """As ``guidance 2 x tensor 2``."""
        return (
            " x ".join(f"{axis} {self.layout[axis]}" for axis in AXES if self.layout[axis] > 1) or "one rank"
        )


def layouts(ranks: int) -> list[dict[str, int]]:
    """One rank, and every layout of 2, 4, … ``ranks`` ranks."""
    found = [dict.fromkeys(AXES, 1)]
    for count in (2**i for i in range(1, ranks.bit_length())):
        sizes = product([2**i for i in range(count.bit_length())], repeat=4)
        found += [
            dict(zip(AXES, size, strict=True)) for size in sizes if math.prod(size) == count and size[0] <= 2
        ]
    return found


def start(layout: Mapping[str, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each rank of a layout found, from processes of its own."""
    ranks = math.prod(layout.values())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
        ]
        command += [__file__, "--worker", folder, "--layout", json.dumps(layout)]
        for name in ("width", "heads", "depth", "cells", "text", "steps", "dtype"):
            command += [f"--{name}", str(getattr(args, name))]
        command += args.overrides
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def work(args: argparse.Namespace) -> None:
    """One rank: draw pictures with its layout, and write what it measured."""
    import torch

    from sat.config.load import load
    from sat.parallel.launch import Mesh, launch
    from sat.pipeline import Pipeline
    from sat.sampling.generator import ImageRng, SamplingParams

    layout = json.loads(args.layout)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    runtime = launch("auto")
    os.sched_setaffinity(0, {cores[runtime.local_rank % len(cores)]})
    before = runtime.peak_memory()
    sizes = {axis: layout[axis] for axis in AXES if axis != "data"}
    experiment = load([CONFIG], overrides(args, sizes))
    mesh = Mesh(runtime, **sizes)
    pipeline = Pipeline.open(experiment, runtime.device, mesh)
    generator, guider = pipeline.generator, pipeline.guider
    side = experiment.sampling.height
    params = SamplingParams(side, side, args.steps, guider)
    (encoded,) = generator.encode(["a red apple on a table"])
    shape = generator.engine.latent_shape(side, side)

    def draw(callback: Any = None) -> None:
        generator.latents(encoded, ImageRng.of(mesh.data_rank, [0], shape), params, callback)

    draw()
    runtime.synchronize()
    marks = [time.perf_counter()]

    def mark(done: int, total: int, latents: Any) -> None:
        runtime.synchronize()
        marks.append(time.perf_counter())

    draw(mark)
    with Traffic() as traffic:
        draw()
    steps = [1e3 * (b - a) for a, b in zip(marks[1:], marks[2:], strict=False)]
    found = {
        "steps": steps,
        "sent": traffic.sent / args.steps / 1e6,
        "weights": weights(generator.engine.network) / 1e6,
        "peak": 1e3 * (runtime.peak_memory() - before),
    }
    Path(args.worker, f"{runtime.rank}.json").write_text(json.dumps(found))
    runtime.close()


def weights(network: Any) -> int:
    """Bytes of a network's weights on this rank, packed ones included."""
    from sat.kernels.packed import PackedLinear

    packed = [module.packed for module in network.modules() if isinstance(module, PackedLinear)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *packed))


def overrides(args: argparse.Namespace, sizes: Mapping[str, int]) -> list[str]:
    """The toy config at the size that is measured."""
    side = 8 * args.cells
    patches = args.cells // 2
    return [
        f"model.params.dim={args.width}", f"model.params.heads={args.heads}",
        f"model.params.depth={args.depth}", "model.params.emb_dim=128",
        f"model.params.text_len={args.text}", f"conditioning.max_length={args.text}",
        "conditioning.text.params.heads=4",
        f"model.params.table_size=[{patches}, {patches}]",
        f"sampling.height={side}", f"sampling.width={side}", f"sampling.steps={args.steps}",
        f"sampling.dtype={args.dtype}",
        f"sampling.sizes={{min: 16, max: {side}, multiple: 16, max_area: {side * side}}}",
        *(f"parallel.{axis}={size}" for axis, size in sizes.items()),
        *args.overrides,
    ]  # fmt: skip


class Traffic:
    """Counts the bytes this rank has to send for the collectives called inside."""

    def __init__(self) -> None:
        self.sent = 0.0

    def __enter__(self) -> Traffic:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        traffic = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func.namespace == "c10d":
                    traffic.add(func.__name__.split(".")[0], args)
                return func(*args, **(kwargs or {}))

        self._mode = Mode()
        self._size = lambda group: torch._C._distributed_c10d.ProcessGroup.unbox(group).size()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def add(self, name: str, args: Sequence[Any]) -> None:
        """``name`` as torch's dispatcher knows it, its ``args`` tensors (or lists of them) and a group."""
        import torch
        from torch.utils._pytree import tree_leaves

        groups = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
        ranks = self._size(groups[0])
        tensors = [[t for t in tree_leaves(a) if isinstance(t, torch.Tensor)] for a in args]
        sizes = [sum(t.numel() * t.element_size() for t in some) for some in tensors if some]
        if name.startswith("allreduce"):
            self.sent += sizes[0] * 2 * (ranks - 1) / ranks
        elif name.startswith("alltoall"):  # (outputs, inputs, …)
            self.sent += sizes[1] * (ranks - 1) / ranks
        elif "allgather" in name:
            self.sent += sizes[1] * (ranks - 1)
        elif name.startswith(("broadcast", "send")):
            self.sent += sizes[0]
        elif not name.startswith(("barrier", "recv")):
            raise NotImplementedError(f"what does {name} send?")


def measure(args: argparse.Namespace) -> list[Result]:
    """All layouts in turn, round after round."""
    wanted = [
        one
        for one in layouts(args.ranks)
        if not args.axis or math.prod(one.values()) == one.get(args.axis, 1)
    ]
    found: list[list[list[dict[str, Any]]]] = [[] for _ in wanted]
    for turn in range(args.rounds):
        for index, layout in enumerate(wanted):
            found[index].append(start(layout, args))
            print(f"round {turn + 1}: {layout}", file=sys.stderr)
    results: list[Result] = []
    for layout, rounds in zip(wanted, found, strict=True):
        steps = sorted(step for ranks in rounds for step in ranks[0]["steps"])
        tenths = statistics.quantiles(steps, n=10)
        middle = statistics.median(steps)
        first = results[0].step if results else middle
        most = {
            key: max(rank[key] for ranks in rounds for rank in ranks) for key in ("sent", "weights", "peak")
        }
        speedup = first / middle * layout["data"]
        results.append(Result(dict(layout), middle, tenths[0], tenths[-1], layout["data"], speedup, **most))
    return results


def table(results: Sequence[Result]) -> list[str]:
    """The lines of docs/parallel.md's table."""
    lines = [
        "| layout | ms a step | 10 to 90 % | times one rank | MB sent | weights, MB | peak, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {r.name} | {r.step:.0f} | {r.tenth:.0f} to {r.ninetieth:.0f} | {r.speedup:.2f} | {r.sent:.1f} | "
        f"{r.weights:.0f} | {r.peak:.0f} |"
        for r in results
    ]


def main() -> int:
    """Measure, print, write."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--ranks", type=int, default=2, help="the most ranks, a power of two")
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--steps", type=int, default=6, help="steps of a picture")
    reader.add_argument("--width", type=int, default=640)
    reader.add_argument("--heads", type=int, default=16)
    reader.add_argument("--depth", type=int, default=8)
    reader.add_argument("--cells", type=int, default=64, help="side of the latent")
    reader.add_argument("--text", type=int, default=224, help="text tokens")
    reader.add_argument("--dtype", default="fp32")
    reader.add_argument("--axis", choices=AXES, help="only layouts along this axis")
    reader.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="of the config, for all layouts"
    )
    reader.add_argument("--worker", help=argparse.SUPPRESS)
    reader.add_argument("--layout", help=argparse.SUPPRESS)
    args = reader.parse_args()
    if args.worker:
        work(args)
        return 0
    results = measure(args)
    print("\n".join(table(results)))
    from benchmarks.machine import facts, results_folder

    settings = {name: value for name, value in vars(args).items() if name not in ("worker", "layout")}
    report = {**facts(settings), "results": [asdict(result) for result in results]}
    name = "_".join(["parallel", *([args.axis] if args.axis else [])])
    (results_folder() / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
