"""Work of the ranks of test_lora.py: train factors under ZeRO.

``python -m tests.distributed.lora_ranks FOLDER`` writes FOLDER/results.pt.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch

from sat.config.schema import LoraConfig, TrainConfig
from sat.parallel.launch import Runtime
from sat.train.lora import add_lora
from tests.training import CONFIG, Toy, changed, ranks, trainer

STAGES: dict[str, dict[str, Any]] = {
    "zero0": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "bf16": {"zero": 2, "dtype": "bf16"},
    "zero3": {"zero": 3},
}


def adapted(runtime: Runtime) -> Toy:
    """The toy with low-rank factors on its two linears."""
    toy = Toy(rank=runtime.rank)
    add_lora(toy, LoraConfig(rank=3, alpha=6.0, targets=["model.*"], dora=True), seed=0)
    return toy


def trained(runtime: Runtime, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """A run of the factors from beginning to end."""
    objective = adapted(runtime)
    before = {name: p.detach().clone() for name, p in objective.named_parameters() if not p.requires_grad}
    run = trainer(folder / "run", config, runtime, objective)
    run.fit()
    with run.engine.unsharded():
        found = {name: p.detach().clone().float() for name, p in objective.named_parameters()}
    return {"weights": found, "frozen": before, "trained": sorted(run.engine.parameters)}


def main(folder: Path) -> None:
    """All cases."""
    import deepspeed  # noqa: F401 - once, before the forks
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import torch._dynamo  # noqa: F401

    import sat.train.deepspeed

    sat.train.deepspeed.PERSISTENT = 9  # all but the smallest weights are shared out at ZeRO 3
    results: dict[str, Any] = {}

    def case(name: str, world: int, work: Any, **options: Any) -> None:
        config = changed(CONFIG, **options)
        results[name] = ranks(world, folder / name, functools.partial(work, config=config))

    case("single", 1, trained, accumulate=2)
    for name, options in STAGES.items():
        case(name, 2, trained, **options)
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
