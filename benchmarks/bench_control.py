"""Cost of a step with a control beside the plain step, in pairs, and by count of products (docs/control.md).

    python benchmarks/bench_control.py [--rounds 15] [--depth 10] [--dim 512] [--cells 32]

A network of the architecture of CogView3-Plus with random weights. Each pair is a plain step and one with the
control, in turn first and second; the ratio is of processor seconds, which other programs change little, and
the table has the median of the pairs. Writes ``benchmarks/results/<machine>/control.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks.machine import facts, results_folder  # noqa: E402
from sat.conditioning.conditioner import Condition  # noqa: E402
from sat.config.schema import Component  # noqa: E402
from sat.control.base import BaseModel, Control, attach, detach  # noqa: E402
from sat.control.controlnet import controlnet  # noqa: E402
from sat.control.light import Blockwise, concat  # noqa: E402
from sat.control_input import ControlInput  # noqa: E402
from sat.models.cogview3_plus import CogView3Plus  # noqa: E402

TEXT = 64
"""Tokens of text."""


def designs(base: BaseModel, depth: int) -> dict[str, Callable[[], Control]]:
    """The controls to time."""
    counts = sorted({1, depth // 5, depth // 2, depth})
    found: dict[str, Callable[[], Control]] = {
        f"ControlNet, {n} of {depth} blocks": lambda n=n: controlnet(n, base=base) for n in counts
    }
    return found | {"block-wise": lambda: Blockwise(base=base), "concat": lambda: concat(base=base)}


def main() -> int:
    """Time, print, write."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--rounds", type=int, default=15)
    reader.add_argument("--depth", type=int, default=10)
    reader.add_argument("--dim", type=int, default=512)
    reader.add_argument("--cells", type=int, default=32, help="side of the latent")
    args = reader.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {
        "dim": args.dim, "heads": args.dim // 64, "depth": args.depth, "text_dim": 256, "text_len": TEXT,
        "emb_dim": 128, "size_dim": 192, "table_size": [64, 64],
    }  # fmt: skip
    network = CogView3Plus(**sizes, zero_init=False).eval().requires_grad_(False)
    base = BaseModel(network, Component("sat.models.cogview3_plus.CogView3Plus", sizes))
    x, picture = torch.randn(2, 1, network.channels, args.cells, args.cells)
    cond = Condition(torch.randn(1, TEXT, 256), torch.randn(1, 192))
    steered = Condition(cond.text, cond.vector, controls=(ControlInput("own", picture, (1.0,)),))
    size = (args.cells, args.cells)

    def step(prepared: object) -> float:
        began = time.process_time()
        with torch.inference_mode():
            network(x, 500.0, prepared)
        return time.process_time() - began

    def count(prepared: object) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, 500.0, prepared)
        return counter.get_total_flops()

    rows = []
    for name, make in designs(base, args.depth).items():
        control = make()
        for parameter in control.parameters():
            parameter.requires_grad_(False).normal_(0, 0.02)
        attach(network, "own", control)
        with torch.no_grad():
            pair = [network.prepare(one, size) for one in (cond, steered)]
        plain, more = (count(one) for one in pair)
        for prepared in pair * 2:  # a warm-up
            step(prepared)
        ratios, seconds = [], []
        for turn in range(args.rounds):
            took = {place: step(pair[place]) for place in ((0, 1) if turn % 2 else (1, 0))}
            ratios.append(took[1] / took[0])
            seconds.append(took[0])
        measured, counted = statistics.median(ratios), more / plain
        row = {"control": name, "measured": measured, "counted": counted, "over": measured / counted}
        rows.append({**row, "plain_seconds": statistics.median(seconds)})
        print(
            f"{name:<28} measured {measured:.3f}   by count {counted:.3f}   {measured / counted:.3f}",
            flush=True,
        )
        detach(network, control)
    file = results_folder() / "control.json"
    file.write_text(json.dumps({**facts(vars(args)), "rows": rows}, indent=1) + "\n")
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
