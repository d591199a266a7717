"""A toy objective and data for the training loop, and ranks that are forked to run it."""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sat.config.check import build
from sat.config.schema import Component, TrainConfig
from sat.data.batch import Batch, Sample, collate
from sat.diffusion.draws import Draws, GeneratorDraws
from sat.parallel.launch import Mesh, Runtime, launch
from sat.train import optim
from sat.train.backend import build_backend
from sat.train.log import Record
from sat.train.loop import Extras, Trainer
from sat.train.objectives import Objective
from sat.train.resume import RunFolder

CONFIG = TrainConfig(
    objective=Component("tests.training.Toy"), steps=10, batch_size=3, lr=1e-2, ema=0.9, clip=0.05,
    weight_decay=0.1, schedule="cosine", warmup=2, log_every=2, save_every=5, keep_last=10, wandb="disabled",
    optimizer=Component("torch.optim.AdamW", {"eps": 1e-4, "fused": True}),
)  # fmt: skip
"""Ten steps; the clip is below the gradient norm, so it acts at every step."""


class Toy(Objective):
    """A denoiser of vectors with a frozen layer and a table; ``poison`` makes the loss of those steps NaN."""

    def __init__(self, poison: tuple[int, ...] = (), rank: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 33), nn.GELU(), nn.Linear(33, 8))
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("table", torch.tensor([1 / 3]))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        self.poison, self.rank, self.calls = poison, rank, 0

    def draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        return {"noise": draws.normal("noise", (8,))}

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> Mapping[str, Tensor]:
        assert batch.latent_moments is not None
        x = batch.latent_moments.flatten(1)
        drawn = batch.draws or self.draws(batch, GeneratorDraws(len(batch), generator))
        seen = self.frozen((x + drawn["noise"]).to(self.frozen.weight.dtype))
        error = self.norm(self.net(seen)).float() - x
        loss = error.square().mean() * self.table.float().sum()
        if self.calls in self.poison and self.rank == 0 and self.training:
            loss = loss * float("nan")
        self.calls += self.training
        return {"loss": loss, "twice": 2 * loss}

    def parts(self) -> dict[str, nn.Module]:
        return {"model": self.net}


class Turns(Toy):
    """The toy, whose net learns in every third step and whose norm in the others."""

    def role(self, name: str) -> str:
        return name.partition(".")[0]

    def resting(self) -> frozenset[str]:
        return frozenset(("norm",)) if self.step % 3 == 0 else frozenset(("net",))

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> Mapping[str, Tensor]:
        assert batch.latent_moments is not None and batch.draws is not None
        x = batch.latent_moments.flatten(1)
        seen = self.frozen(x + batch.draws["noise"])
        if "norm" in self.resting():
            return {"loss": (self.net(seen) - x).square().mean()}
        with torch.no_grad():
            made = self.net(seen)
        return {"loss": (self.norm(made) - x).square().mean()}


class Blockwise(torch.optim.Optimizer):
    """Momentum in 8 bits, with a scale for each block: a stand-in for the optimizers of other packages."""

    def __init__(self, params: Any, lr: float = 1e-3, *, block: int = 16) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "block": block})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, flat = self.state[p], p.grad.reshape(-1)
                padded = nn.functional.pad(flat, (0, -len(flat) % group["block"])).view(-1, group["block"])
                if state:
                    padded = padded + 0.9 * state["codes"] * state["scales"]
                scales = padded.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
                codes = (padded / scales).round().to(torch.int8)
                state |= {"codes": codes, "scales": scales, "steps": state.get("steps", 0) + 1}
                p.sub_(group["lr"] * padded.view(-1)[: len(flat)].view_as(p))


def _sample(place: int) -> Sample:
    moments = torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(place))
    return Sample(f"{place}", (8, 8), (0, 0), (8, 8), latent_moments=moments)


class Numbers:
    """Endless batches of ``sample``, by default vectors, that depend on the position in the stream alone."""

    sample = staticmethod(_sample)

    def __init__(self, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.position = 0

    @property
    def epoch(self) -> float:
        return self.position / 10

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(lambda number, batch: batch)

    def batches(self, prepare: Callable[[int, Batch], Batch]) -> Iterator[Batch]:
        for number in itertools.count():
            start = self.position + self.rank * self.batch_size
            self.position += self.world * self.batch_size
            yield prepare(
                number, collate([self.sample(place) for place in range(start, start + self.batch_size)])
            )


def trainer(
    folder: Path,
    config: TrainConfig,
    runtime: Runtime,
    objective: Objective | None = None,
    mesh: Mesh | None = None,
    plain: bool = False,
    **extras: Any,
) -> Trainer:
    """A trainer of the toy (or of ``objective``) in ``folder``; ``plain``: by SGD."""
    mesh = mesh or Mesh(runtime)
    objective = objective or Toy(rank=mesh.data_rank)
    groups = optim.by_role(objective, optim.groups(objective, config.weight_decay, config.groups, config.lr))
    optimizer = (
        torch.optim.SGD(groups, lr=config.lr)
        if plain
        else build(config.optimizer, imports=["tests.training"], params=groups, lr=config.lr)
    )
    engine = build_backend(objective, optim.with_rests(optimizer), config, runtime, mesh)
    source = Numbers(config.batch_size, mesh.data_rank, mesh.data_ranks)
    record = Record(folder) if runtime.is_main else None
    return Trainer(engine, source, RunFolder(folder), Extras(record=record, **extras))


def weights(run: Trainer) -> dict[str, Tensor]:
    """Every parameter whole, and every average under ``ema.``."""
    with run.engine.unsharded():
        found = {name: p.detach().clone() for name, p in run.engine.objective.named_parameters()}
    if run.ema is not None:
        averages = dict(run.ema.gather())
        found |= {f"ema.{name}": value.clone() for name, value in averages.items()}
    return found


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    """``config`` with other values."""
    return replace(config, **values)


# ---------------------------------------------------------------------- ranks

Work = Callable[[Runtime, Path], Any]


def ranks(world: int, folder: Path, work: Work, timeout: float = 120.0) -> list[dict[str, Any]]:
    """What ``work(runtime, folder)`` returns or raises on each of ``world`` forked ranks.

    A fork of a process that has imported everything starts in a tenth of a second. Call it from a process
    that has not computed with several threads.
    """
    import torch.multiprocessing as mp

    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("fork")
    processes = [context.Process(target=_rank, args=(rank, world, folder, work)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
    ends = []
    for rank, process in enumerate(processes):
        file = folder / f"end_{rank}.pt"
        end = torch.load(file, weights_only=False) if file.exists() else {}
        ends.append({"code": process.exitcode, **end})
    return ends


def _rank(rank: int, world: int, folder: Path, work: Work) -> None:
    """The life of one rank; what it returns or raises goes to a file."""
    import os
    import signal
    from datetime import timedelta

    import torch.distributed as dist

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    if world > 1:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
    runtime = launch("cpu", 60, group=True)
    try:
        end = {"value": work(runtime, folder)}
    except Exception as error:
        traceback.print_exc()
        end = {"error": f"{type(error).__name__}: {error}"}
    torch.save(end, folder / f"end_{rank}.pt")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if "value" in end else 1)


def state(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of one rank: weights, averages, optimizer state, and what is exported."""
    files = [checkpoint / "state" / "shard_000_00000.safetensors", *checkpoint.glob("native/*.safetensors")]
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def averages(checkpoint: Path) -> dict[str, Tensor]:
    """The flat averages in a checkpoint of one rank, by parameter."""
    held = load_file(checkpoint / "state" / "shard_000_00000.safetensors")
    return {name.removeprefix("average/"): v for name, v in held.items() if name.startswith("average/")}


def rows(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl."""
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
