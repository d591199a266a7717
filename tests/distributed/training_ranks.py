"""Cases of training on one and two ranks, all run from one process so that DeepSpeed is imported once.

``python -m tests.distributed.training_ranks FOLDER`` writes FOLDER/results.pt; test_training.py reads it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from sat.checkpoint.verify import own_check
from sat.config.schema import Component, GroupConfig, OffloadConfig, TrainConfig
from sat.data.batch import Batch
from sat.parallel.collectives import gather
from sat.parallel.launch import Runtime, lost_rank_message
from sat.train.resume import MARKER
from tests.training import CONFIG, Numbers, Toy, Turns, changed, ranks, rows, trainer, weights

STAGES: dict[str, dict[str, Any]] = {
    "zero0": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "bf16": {"zero": 1, "dtype": "bf16"},
    "bf16_zero2": {"zero": 2, "dtype": "bf16"},
    "autocast": {"zero": 0, "autocast": "bf16"},
    "zero3": {"zero": 3},
    "bf16_zero3": {"zero": 3, "dtype": "bf16"},
    "offload2": {"zero": 2, "offload": OffloadConfig(optimizer=True)},
    "offload3": {"zero": 3, "offload": OffloadConfig(optimizer=True, parameters=True)},
}
TWICE = {"accumulate": 2}  # on one rank, for as many images a step
ANEW: dict[str, tuple[str, int, dict[str, Any]]] = {
    "zero0 to one rank": ("zero0", 1, TWICE),
    "zero1 to one rank of zero2": ("zero1", 1, {"zero": 2, **TWICE}),
    "zero1 to zero2": ("zero1", 2, {"zero": 2}),
    "zero2 to zero3": ("zero2", 2, {"zero": 3}),
    "zero3 to zero0": ("zero3", 2, {"zero": 0}),
    "zero3 to one rank": ("zero3", 1, {"zero": 3, **TWICE}),
    "zero3 to offload": ("zero3", 2, STAGES["offload3"]),
    "one rank to zero3": ("single", 2, {"zero": 3}),
    "one rank to zero1": ("single", 2, {"zero": 1}),
    "single to plain": ("single", 1, {"backend": "plain", **TWICE}),
    "zero3 to plain": ("zero3", 1, {"backend": "plain", **TWICE}),
    "plain to zero2": ("plain", 2, {"zero": 2}),
    "bf16 to one rank of zero3": ("bf16", 1, {"zero": 3, "dtype": "bf16", **TWICE}),
}
"""Runs that go on in another layout: from which, on how many ranks, with which settings."""
SPLITS = {"8": (1, 8, 1), "4 x 2": (1, 4, 2), "2 ranks x 4": (2, 4, 1), "2 ranks x 2 x 2": (2, 2, 2)}
"""Ranks, batch and accumulation of steps of eight pictures."""
OWN = {
    "warmup": 0,
    "group_norms": True,
    "schedule": Component("torch.optim.lr_scheduler.CosineAnnealingLR", {"T_max": 7, "eta_min": 1e-3}),
    "groups": [GroupConfig(["model.0.*"], lr=3e-3), GroupConfig(["*.weight"], weight_decay=0.4)],
}
"""A scheduler of torch, whose rates follow from those before, over groups."""


NEW = {
    "steps": 200, "save_every": 100, "log_every": 200, "schedule": "wsd", "decay_steps": 60,
    "ema": [0.98, 0.5], "groups": [GroupConfig(["model.0.*"], lr=3e-3)],
}  # fmt: skip
"""A schedule, groups and averages, which tests/unit/test_backend.py writes out for torch alone."""


def whole(runtime: Runtime, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """A run from beginning to end, then with the averages swapped in and out."""
    run = trainer(folder / "run", config, runtime)
    run.fit()
    before = weights(run)
    written = rows(folder / "run") if runtime.is_main else []
    norms = [row["grad_norm"] for row in written]
    assert run.ema is not None
    before |= {
        f"{n} {name}": v.clone() for n in range(1, len(config.decays)) for name, v in run.ema.gather(n)
    }
    with run.ema.swapped():
        inside = {name: p.detach().clone() for name, p in run.engine.parameters.items()}
        evaluated = run.engine.objective(next(run.batches()), torch.Generator().manual_seed(1))["loss"]
    return {
        "weights": before,
        "norms": norms,
        "by_group": [{k: v for k, v in row.items() if k.startswith("grad_norm/")} for row in written],
        "saved": [saved.step for saved in run.folder.saved()],
        "inside": inside,
        "evaluated": evaluated.detach(),
        "after": weights(run) | {name: value for name, value in before.items() if name[0].isdigit()},
        "masters": {name: value.clone() for name, value in run.engine.masters()},
        "table": run.engine.objective.get_buffer("table").clone(),
    }


def resumed(runtime: Runtime, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """The second half of a run whose first half is in the folder."""
    run = trainer(folder / "run", config, runtime)
    for fragment in run.engine.fragments.values():
        fragment.master.add_(1.0)  # whatever is not restored shows
    run.engine.publish()
    run.resume(run.folder.saved()[0])
    start = run.step
    run.fit()
    return {"weights": weights(run), "start": start, "position": run.source.state_dict()}


def older(runtime: Runtime, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """A run by the rule of random numbers before draws 2, and its second half from an older checkpoint."""
    run = trainer(folder / "run", config, runtime)
    run.rule = 1
    run.fit()
    marker = folder / "run" / "checkpoints" / "step_00000005" / MARKER
    written = json.loads(marker.read_text())
    rule = written["progress"].pop("draws")  # as it was written then
    written["check"] = own_check(written)
    marker.write_text(json.dumps(written))
    again = trainer(folder / "run", config, runtime)
    again.resume(again.folder.saved()[0])
    again.fit()
    last = json.loads((marker.parents[1] / "step_00000010" / MARKER).read_text())["progress"]["draws"]
    return {"weights": weights(run), "again": weights(again), "rules": (rule, again.rule, last)}


def poisoned(runtime: Runtime, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """A run whose loss is NaN at its second step, on rank 0 only."""
    run = trainer(folder / "run", config, runtime, Toy(poison=(1,), rank=runtime.rank))
    before: list[Any] = []
    for _ in range(3):
        run.train_step(run.batches())
        before.append((weights(run)["net.0.weight"], run.skipped))
    return {"history": before}


def turns(runtime: Runtime, folder: Path, config: TrainConfig) -> list[dict[str, torch.Tensor]]:
    """The weights after each of five steps, and after three more of a run that goes on from the third."""
    run = trainer(folder / "run", config, runtime, Turns(rank=runtime.rank))
    found, batches = [], run.batches()
    for step in range(5):
        if step == 3:
            run.save()
        run.train_step(batches)
        found.append(weights(run))
    again = trainer(folder / "run", config, runtime, Turns(rank=runtime.rank))
    again.resume(again.folder.saved()[-1])
    batches = again.batches()
    for _ in range(2):
        again.train_step(batches)
    return [*found, weights(again)]


def hopeless(runtime: Runtime, folder: Path, config: TrainConfig) -> None:
    """A run whose loss is always NaN."""
    trainer(folder / "run", config, runtime, Toy(poison=tuple(range(2, 100)), rank=runtime.rank)).fit()


def dying(runtime: Runtime, folder: Path, config: TrainConfig) -> str | None:
    """Rank 1 dies at its third step; what rank 0 says."""
    run = trainer(folder / "run", config, runtime)
    batches = run.batches()
    try:
        for step in range(6):
            if step == 2 and runtime.rank == 1:
                os._exit(7)
            run.train_step(batches)
    except RuntimeError as error:
        return lost_rank_message(error)
    return "did not notice"


def stopping(runtime: Runtime, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """Only rank 1 is asked to stop, in its second step."""
    import signal

    run = trainer(folder / "run", config, runtime)
    step = run.train_step

    def watched(batches: Any) -> None:
        step(batches)
        if run.step == 2 and runtime.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    run.train_step = watched  # type: ignore[method-assign]
    run.fit()
    return {"step": run.step, "saved": [saved.step for saved in run.folder.saved()]}


class Scripted(Toy):
    """The toy, whose held-out loss is best after three validations."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank=rank)
        self.losses = iter((5.0, 4.0, 3.0, 3.5, float("nan"), 3.2))

    def evaluate(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(next(self.losses))}


def held_out(runtime: Runtime, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """A run that ends by its held-out loss, and the same again."""
    objective, batch = Scripted(runtime.rank), [next(iter(Numbers(3)))]
    run = trainer(folder / "run", config, runtime, objective, validation=batch)
    run.fit()
    again = trainer(folder / "run", config, runtime, Scripted(runtime.rank), validation=batch)
    again.resume(again.folder.saved()[-1])
    again.fit()
    link = folder / "run" / "checkpoints" / "best"
    return {
        "step": run.step,
        "done": (run.done, again.done),
        "saved": [saved.step for saved in run.folder.saved()],
        "best": link.resolve().name,
        "again": again.step,
    }


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

    case("single", 1, whole, accumulate=2)
    case("plain/run", 1, whole, accumulate=2, backend="plain")
    case("plain/resumed", 1, _copied(folder / "plain/run", resumed), accumulate=2, backend="plain")
    case("plain/poisoned", 1, poisoned, backend="plain")
    case("older", 1, older, accumulate=2)
    for name, (world, size, accumulate) in SPLITS.items():
        case(f"split {name}", world, whole, batch_size=size, accumulate=accumulate)
    for name, options in STAGES.items():
        case(f"{name}/run", 2, whole, **options)
        case(f"{name}/resumed", 2, _copied(folder / f"{name}/run", resumed), **options)
        case(f"{name}/poisoned", 2, poisoned, **options)
    for name, (source, world, options) in ANEW.items():
        origin = folder / (source if source == "single" else f"{source}/run")
        case(name, world, _copied(origin, resumed), **options)
    blocks = Component("tests.training.Blockwise", {"block": 8})
    case("blocks/run", 2, whole, zero=1, optimizer=blocks)
    case("blocks/resumed", 2, _copied(folder / "blocks/run", resumed), zero=1, optimizer=blocks)
    case("blocks/anew", 2, _copied(folder / "blocks/run", resumed), zero=2, optimizer=blocks)
    for stage in (0, 1, 2, 3):
        case(f"own{stage}/run", 2, whole, **{**OWN, "zero": stage})
        case(f"new{stage}/run", 2, whole, **{**NEW, "zero": stage})
    case("new/plain", 1, whole, **{**NEW, "backend": "plain", **TWICE})
    for stage in (0, 3):
        case(f"own{stage}/resumed", 2, _copied(folder / f"own{stage}/run", resumed), **{**OWN, "zero": stage})
    for stage in (0, 1, 2):  # at 3 gradients of a resting role stay in the norm: objectives refuse it
        case(f"turns{stage}", 2, turns, zero=stage)
    case("turns_plain", 1, turns, backend="plain", **TWICE)
    case("batch", 1, _copied(folder / "zero0/run", resumed))
    case("background", 2, whole, background_save=True, save_every=1)
    case("hopeless", 2, hopeless, max_bad_steps=3, save_every=2, background_save=True)
    case("bad_end", 1, hopeless, max_bad_steps=50)
    case("dying", 2, dying)
    case("stopping", 2, stopping)
    kept = {"save_every": 2, "keep_last": 1, "keep_every": 4, "keep_best": True, "patience": 3}
    case("held_out", 2, held_out, validate_every=1, **kept)
    case("held_out_background", 2, held_out, validate_every=1, background_save=True, **kept)
    torch.save(results, folder / "results.pt")


def _copied(source: Path, work: Any) -> Any:
    """``work`` in a folder that holds the first checkpoint of the run in ``source``."""

    def act(runtime: Runtime, folder: Path, config: TrainConfig) -> Any:
        import shutil

        target = folder / "run" / "checkpoints" / "step_00000005"
        if runtime.is_main:
            shutil.copytree(source / "run" / "checkpoints" / "step_00000005", target)
        gather(None)
        return work(runtime, folder, config)

    return act


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
