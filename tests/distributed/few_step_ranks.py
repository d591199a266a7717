"""Work of the ranks of test_few_steps.py: train students of few steps, and on pairs, in several layouts.

``python -m tests.distributed.few_step_ranks FOLDER`` writes FOLDER/results.pt.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sat.config.build import build_engine
from sat.config.load import load
from sat.config.schema import LoraConfig
from sat.data.batch import Sample
from sat.parallel.launch import Mesh, Runtime
from sat.parallel.sequence import apply_sequence
from sat.train.lora import NAME, add_lora
from sat.train.objectives import Objective
from sat.train.objectives.distillation import Distillation
from sat.train.objectives.matching import Heads
from sat.train.objectives.preference import Preference
from tests.configs import DEBUG
from tests.distributed.layout_ranks import Captioned
from tests.training import CONFIG, changed, ranks, rows, trainer

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {  # what differs from one process; axes of ranks
    "zero0": ({}, {}),
    "zero1": ({"zero": 1}, {}),
    "zero2": ({"zero": 2}, {}),
    "zero3": ({"zero": 3}, {}),
    "tensor": ({}, {"tensor": 2}),
    "sequence": ({}, {"sequence": 2}),
}
EVEN = ["conditioning.text.params.heads=2", "conditioning.text.params.head_dim=12"]  # for two tensor ranks
METHODS: dict[str, tuple[bool, dict[str, Any]]] = {  # factors or weights, settings
    "progressive": (True, {"teacher_steps": 8, "rounds": (4, 2), "round": 1}),
    "consistency": (True, {"prediction": "v", "regression": 1, "gap": 0.05}),
    "dmd2": (True, {"steps": 2, "student_every": 2}),
    "gan": (True, {"method": "dmd2", "student_every": 2, "adversarial": Heads(penalty=1.0)}),
    "preference": (True, {"beta": 200.0}),
    "rcm": (False, {"student_every": 2, "gap": 0.05, "consistency_weight": 1.0}),
}


def objective(method: str, mesh: Mesh) -> Objective:
    """As ``train.py`` makes it, over a network whose every part counts."""
    lora, params = METHODS[method]
    torch.manual_seed(0)
    settings = ["conditioning.tokenizer=null", "model.params.zero_init=false", "checkpoint.random=0", *EVEN]
    engine = build_engine(load([DEBUG], settings), device="cpu", dtype=torch.float32, mesh=mesh)
    for parameter in engine.network.parameters():
        parameter.data *= 3.0  # so that text and depth count
    apply_sequence(engine.network, mesh.sequence)
    made: Objective
    if method == "preference":
        made = Preference(**params, engine=engine)
    else:
        made = Distillation(**{"method": method, "guidance": 2.0, "engine": engine, **params})
    if lora:
        add_lora(made, LoraConfig(rank=3, targets=["attention", "mlp"]), seed=0)
    made.begin(NAME if lora else None)
    return made


class Pairs(Captioned):
    """The same, each with a picture that people liked less."""

    @staticmethod
    def sample(place: int) -> Sample:
        other = Captioned.sample(1000 + place).latent_moments
        return replace(Captioned.sample(place), extras={"loser": other})


def trained(runtime: Runtime, folder: Path, changes: dict[str, Any], layout: dict[str, int]) -> Any:
    """A few steps of SGD by each method: how far all weights moved, and the rows of the log."""
    found = {}
    for method in METHODS:  # in order, on all ranks
        mesh = Mesh(runtime, **layout)
        config = changed(
            CONFIG, steps=4 if method == "gan" else 3, warmup=0, batch_size=2, lr=0.1, ema=None, log_every=1,
            save_every=100, weight_decay=0.0, accumulate=2 // mesh.data_ranks, **changes,
        )  # fmt: skip
        made = objective(method, mesh)
        before = {n: p.detach().clone() for n, p in made.named_parameters() if p.requires_grad}
        run = trainer(folder / method, config, runtime, made, mesh, plain=True)
        run.source = Pairs(config.batch_size, mesh.data_rank, mesh.data_ranks)
        run.fit()
        with run.engine.unsharded():
            moved = {name: p.detach() - before[name] for name, p in run.engine.parameters.items()}
        whole = {name: run.engine.joined(name, value) for name, value in moved.items()}
        found[method] = {"moved": whole, "rows": rows(folder / method) if runtime.is_main else []}
    return found


def main(folder: Path) -> None:
    """All cases."""
    import deepspeed  # noqa: F401 - once, before the forks
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import torch._dynamo  # noqa: F401

    import sat.train.deepspeed

    sat.train.deepspeed.PERSISTENT = 9  # all but the smallest weights are shared out at ZeRO 3
    results: dict[str, Any] = {}
    cases: dict[str, Any] = {"one": ({}, {}), **LAYOUTS}
    for name, (changes, layout) in cases.items():
        work = functools.partial(trained, changes=changes, layout=layout)
        results[name] = ranks(1 if name == "one" else 2, folder / name, work, timeout=300.0)
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
