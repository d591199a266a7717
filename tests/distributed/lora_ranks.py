"""What the ranks of test_lora.py do: train factors under ZeRO, and run a model split by its plan.

``python -m tests.distributed.lora_ranks FOLDER`` writes FOLDER/results.pt.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sat.adapters.lora import attach, sharding
from sat.adapters.select import family_plan
from sat.config.schema import LoraConfig, TrainConfig
from sat.parallel.launch import Runtime
from sat.plan import Column, Row
from sat.train.lora import add_lora
from tests.adapters import noisy, start
from tests.small import condition, plus
from tests.training import CONFIG, Toy, changed, ranks, trainer

STAGES: dict[str, dict[str, Any]] = {
    "zero0": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "bf16": {"zero": 2, "dtype": "bf16"},
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
    found = {name: p.detach().clone().float() for name, p in objective.named_parameters()}
    return {"weights": found, "frozen": before, "trained": sorted(run.engine.parameters)}


# ---------------------------------------------------------------------- a model split by its plan


class Enter(torch.autograd.Function):
    """The same on every rank; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


class Leave(torch.autograd.Function):
    """Summed over the ranks; gradients are the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Split(nn.Linear):
    """A linear of which a rank holds its share, as the plan's style says."""

    def __init__(self, whole: nn.Linear, style: Column | Row, rank: int, world: int) -> None:
        rows, bias = isinstance(style, Column), whole.bias
        weight = share(whole.weight.detach(), style, rank, world)
        with torch.device("meta"):
            super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.rows = rows
        self.weight = nn.Parameter(weight.clone())
        if bias is not None:
            own = share(bias.detach()[:, None], style, rank, world)[:, 0] if rows else bias.detach()
            self.bias = nn.Parameter(own.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.rows:
            return F.linear(Enter.apply(x), self.weight, self.bias)
        out: Tensor = Leave.apply(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias


def share(weight: Tensor, style: Column | Row, rank: int, world: int) -> Tensor:
    """A rank's share of a weight (O, I), or of anything like it."""
    if isinstance(style, Row):
        return weight.chunk(world, 1)[rank]
    return weight.unflatten(0, (style.parts, -1)).chunk(world, 1)[rank].flatten(0, 1)


def model() -> nn.Module:
    """The small network with trained-looking factors on its planned layers, float64."""
    made = plus().double()
    attach(made, "style", noisy(start(made, ["attention", "mlp"])))
    return made


def loss(network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients for fixed inputs."""
    cond = condition(dtype=torch.float64)
    x = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(0)).double()
    out = network(x, torch.tensor([5.0, 900.0]), network.prepare(cond, (12, 20)))  # type: ignore[operator]
    out.square().mean().backward()
    return out.detach(), {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def split(runtime: Runtime, folder: Path) -> dict[str, Any]:
    """The model split over the ranks by the plan of its adapters: differences from the whole one."""
    reference, sharded = model(), model()
    plan = sharding(sharded, family_plan(type(sharded)))
    for name, style in plan.items():
        parent, _, leaf = name.rpartition(".")
        owner = sharded.get_submodule(parent)
        setattr(owner, leaf, Split(owner.get_submodule(leaf), style, runtime.rank, runtime.world))
    out, wanted = loss(reference)
    mine, found = loss(sharded)
    worst: dict[str, float] = {}
    for name, gradient in wanted.items():
        module, _, kind = name.rpartition(".")
        style = plan.get(module)
        if style is not None and kind == "weight":
            gradient = share(gradient, style, runtime.rank, runtime.world)
        elif isinstance(style, Column):
            gradient = share(gradient[:, None], style, runtime.rank, runtime.world)[:, 0]
        worst[name] = ((found[name] - gradient).abs().max() / gradient.abs().max()).item()
    return {"output": ((mine - out).abs().max() / out.std()).item(), "gradients": worst}


def main(folder: Path) -> None:
    """All cases."""
    import deepspeed  # noqa: F401 - once, before the forks
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import torch._dynamo  # noqa: F401

    results: dict[str, Any] = {}

    def case(name: str, world: int, work: Any, **options: Any) -> None:
        config = changed(CONFIG, **options)
        results[name] = ranks(world, folder / name, functools.partial(work, config=config))

    case("single", 1, trained, accumulate=2)
    for name, options in STAGES.items():
        case(name, 2, trained, **options)
    results["split"] = ranks(2, folder / "split", split)
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
