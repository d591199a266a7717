"""Work of the ranks of test_tensor.py: run, load and train models that are split by their plans.

``python -m tests.distributed.tensor_ranks FOLDER`` writes FOLDER/results.pt.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sat.adapters.lora import attach, extract, merge
from sat.checkpoint import load
from sat.checkpoint.load import shards
from sat.config.schema import LoraConfig, TrainConfig
from sat.data.batch import Batch
from sat.kernels.compile import recompute
from sat.models.glm import GLMEncoder
from sat.models.t5 import T5Encoder
from sat.offload.block_swap import OffloadedPart, swap_groups
from sat.parallel.collectives import barrier
from sat.parallel.launch import Axis, Mesh, Runtime
from sat.parallel.tensor import GatheredLinear, apply_sharding
from sat.sharding import Column, family_sharding
from sat.train.checkpoints import Export, ModelExport
from sat.train.lora import AdapterExport, add_lora
from sat.train.objectives import Objective
from sat.train.resume import Saved
from tests.adapters import noisy, start, unet
from tests.configs import ROOT
from tests.golden import build as golden_build
from tests.golden.check import check_file
from tests.small import cogview4, condition, fill, plus
from tests.training import CONFIG, changed, ranks, rows, trainer
from tests.unit.test_block_swap import BLOCKS, Recorder


def t5() -> T5Encoder:
    """Two layers, four heads of 8."""
    model = T5Encoder(dim=24, heads=4, head_dim=8, mlp_dim=40, depth=2, vocab=50, buckets=8, max_distance=16)
    fill(model, std=0.2)
    return model.eval()


def glm() -> GLMEncoder:
    """Two layers, six heads of 8 over two of keys and values."""
    model = GLMEncoder(dim=24, heads=6, kv_heads=2, head_dim=8, mlp_dim=40, depth=2, vocab=50)
    fill(model, std=0.2)
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plus": plus, "unet": unet, "t5": t5, "cogview4": cogview4, "glm": glm
}  # fmt: skip


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients for fixed inputs."""
    dtype = next(model.parameters()).dtype
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(0)  # what dropout draws from
    if isinstance(model, T5Encoder | GLMEncoder):
        out = model(torch.randint(0, 50, (2, 9), generator=g))
    else:
        x = torch.randn(2, 4, 12, 20, generator=g).to(dtype)
        out = model(x, torch.tensor([5.0, 900.0]), model.prepare(condition(dtype=dtype), (12, 20)))  # type: ignore[operator]
    weight = torch.randn(out.shape, generator=g).to(out.dtype)
    (out * weight).mean().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def worst(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def compared(whole: nn.Module, split: nn.Module) -> dict[str, Any]:
    """How far output and every gradient of ``split`` are from those of ``whole``."""
    out, wanted = run(whole)
    mine, found = run(split)
    own = shards(split)
    assert found.keys() == wanted.keys()
    gradients = {
        name: worst(found[name], own[name].take(value) if name in own else value)
        for name, value in wanted.items()
    }
    return {"output": worst(mine, out), "gradients": gradients, "split": sorted(own), "out": mine}


def models(runtime: Runtime, folder: Path, size: int) -> dict[str, Any]:
    """Every model, filled whole and then split, in float64."""
    tensor = Mesh(runtime, tensor=size).tensor
    found = {}
    for name in MODELS if size == 2 else ["plus"]:
        make = MODELS[name]
        split = apply_sharding(make().double(), family_sharding(type(make())), tensor)
        found[name] = compared(make().double(), split)
    return {**found, "fused": fused(tensor)}


def fused(tensor: Axis) -> float:
    """How far three projections in one, whose outputs are gathered, are from whole: outputs and gradients."""
    whole = nn.Linear(5, 24).double()
    fill(whole)
    split = GatheredLinear(copy.deepcopy(whole), Column(parts=3, gather=True), tensor)
    x, weight = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0)).double()
    ends = []
    for layer in (whole, split):
        given = x[:, :5].clone().requires_grad_()
        out = layer(given)
        (out * weight).sum().backward()
        ends.append((out.detach(), given.grad, layer.weight.grad))
    (out, back, learnt), (mine, mine_back, mine_learnt) = ends
    learnt = shards(split)["weight"].take(learnt)
    return max(worst(mine, out), worst(mine_back, back), worst(mine_learnt, learnt))


def read(runtime: Runtime, folder: Path) -> dict[str, bool]:
    """A model on the meta device that reads its share from a file of the whole, and from diffusers' names."""
    tensor = Mesh(runtime, tensor=runtime.world).tensor
    whole = plus()
    if runtime.is_main:
        save_file(whole.state_dict(), folder / "whole.safetensors")
        torch.save({"module": whole.state_dict()}, folder / "whole.pt")
    barrier(runtime.device)
    found = {}
    wanted = apply_sharding(plus(), family_sharding(type(whole)), tensor).state_dict()
    for file in ("whole.safetensors", "whole.pt"):
        with torch.device("meta"):
            made = plus()
        made = apply_sharding(made, family_sharding(type(made)), tensor)
        load(made, folder / file, "model")
        state = made.state_dict()
        found[file] = state.keys() == wanted.keys() and all(torch.equal(state[n], wanted[n]) for n in wanted)
    return found


def adapters(runtime: Runtime, folder: Path, dora: bool, lokr: int | None = None) -> dict[str, Any]:
    """Factors on a model that is split: its outputs, gradients, the factors read back, and merged."""
    tensor = Mesh(runtime, tensor=runtime.world).tensor

    def made(dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
        pair = plus().double(), apply_sharding(plus().double(), family_sharding(type(plus())), tensor)
        layers = noisy(start(pair[0], dora=dora, lokr=lokr))
        for model in pair:
            attach(model, "style", layers, dropout=dropout)
        return pair

    whole, split = made()
    found = compared(whole, split)
    layers, wanted = extract(split, "style"), extract(whole, "style")
    found["extracted"] = max(
        max(worst(a.down, b.down), worst(a.up, b.up))
        for name in wanted
        for a, b in zip(layers[name].parts, wanted[name].parts, strict=True)
        if a is not None and b is not None
    )
    if dora:
        found["magnitudes"] = max(worst(layers[n].magnitude, wanted[n].magnitude) for n in wanted)  # type: ignore[arg-type]
    merge(split)
    found["merged"] = worst(run(split)[0], found["out"])
    whole, split = made(dropout=0.3)
    whole.train()
    split.train()
    found["dropped"] = compared(whole, split)
    found["calm"] = worst(found["dropped"]["out"], found["out"])
    return found


def halves(runtime: Runtime, folder: Path) -> dict[str, Any]:
    """The types that layers give, and the same bits on all ranks, in half precision and under autocast."""
    tensor = Mesh(runtime, tensor=runtime.world).tensor
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16):
        whole, split = (
            plus().to(dtype),
            apply_sharding(plus().to(dtype), family_sharding(type(plus())), tensor),
        )
        a, b = (run_plain(model) for model in (whole, split))
        everyone = [torch.empty_like(b) for _ in range(tensor.size)]
        torch.distributed.all_gather(everyone, b)
        same = all(torch.equal(other, b) for other in everyone)
        found[str(dtype)] = {"types": a.dtype == b.dtype, "far": worst(b.float(), a.float()), "same": same}
    with torch.autocast("cpu", torch.bfloat16):
        whole, split = plus(), apply_sharding(plus(), family_sharding(type(plus())), tensor)
        a, b = (run_plain(model) for model in (whole, split))
        found["autocast"] = {"types": a.dtype == b.dtype, "far": worst(b.float(), a.float()), "same": True}
    return found


@torch.no_grad()
def run_plain(model: nn.Module) -> Tensor:
    """The output for fixed inputs."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(3))
    cond = condition(dtype=dtype)
    out: Tensor = model(x, 5.0, model.prepare(cond, (12, 20)))  # type: ignore[operator]
    return out


def offloaded(runtime: Runtime, folder: Path) -> bool:
    """Whether a split model whose blocks and modulation layers wait on the host computes the same bits."""
    tensor = Mesh(runtime, tensor=runtime.world).tensor
    there, waits = (apply_sharding(plus(), family_sharding(type(plus())), tensor) for _ in range(2))
    stream = Recorder()
    OffloadedPart(waits, stream, swap_groups(waits, BLOCKS, "model")).onload()
    same = torch.equal(run_plain(waits), run_plain(there))
    return same and len(stream.buffers) == 4  # two for the blocks, two for the modulation layers


GOLDEN = ("dit_plus_square", "unet_base", "e2e_plus", "conditioner")
"""Stored outputs of the official code, of networks and text encoders."""


def official(runtime: Runtime, folder: Path) -> dict[str, list[str]]:
    """The comparisons with the official code that fail when models are split."""
    golden_build.TENSOR = Mesh(runtime, tensor=runtime.world).tensor
    found = {}
    for name in GOLDEN:
        report = check_file(ROOT / "tests" / "golden" / "data" / f"{name}.safetensors", echo=False)
        found[name] = [str(line) for line in report.lines if not line.passed]
    return found


# ---------------------------------------------------------------------- training

TRAINING = changed(CONFIG, steps=10, batch_size=2, save_every=5, clip=0.02, group_norms=True)
"""Ten steps of AdamW with eps 1e-4; the clip is below the gradient norm, so it acts at every step."""


class Painter(Objective):
    """The small network told to predict noise, split over ``tensor``; with ``lora`` only factors learn.

    ``unsplit``: patterns of the plan that are left out.
    """

    def __init__(self, tensor: Axis, lora: LoraConfig | None = None, unsplit: Sequence[str] = ()) -> None:
        super().__init__()
        plan = {name: style for name, style in family_sharding(type(plus())).items() if name not in unsplit}
        self.network = apply_sharding(plus(), plan, tensor)
        if lora is not None:
            add_lora(self, lora, seed=0)

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        assert batch.latent_moments is not None
        noise = torch.randn(len(batch), 4, 12, 20, generator=generator)
        x = noise + batch.latent_moments[:, :4]
        cond = condition(len(batch))
        network = self.network
        out = network(x, torch.full((len(batch),), 5.0), network.prepare(cond, (12, 20)))  # type: ignore[operator]
        return {"loss": (out.float() - noise).square().mean()}

    def parts(self) -> dict[str, nn.Module]:
        return {"model": self.network}


LORA = LoraConfig(rank=3, alpha=6.0, targets=["attention", "mlp", "adaln"], dropout=0.2, dora=True)
LOKR = LoraConfig(rank=2, alpha=4.0, targets=["attention", "mlp", "adaln"], dropout=0.2, lokr=4)


def trained(
    runtime: Runtime, folder: Path, config: TrainConfig, size: int, lora: LoraConfig | None = None,
    resume: Path | None = None, unsplit: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Ten steps over ``size`` tensor ranks; from the middle if there is a checkpoint to ``resume``."""
    mesh = Mesh(runtime, tensor=size)
    objective = Painter(mesh.tensor, lora, unsplit)
    if config.activation_checkpointing:
        recompute(objective)
    run = trainer(folder / "run", config, runtime, objective, mesh=mesh, export=export(objective, lora))
    if resume is not None:
        for parameter in run.engine.parameters.values():
            parameter.data.add_(1.0)  # whatever is not restored shows
        run.resume(Saved(5, resume / "run" / "checkpoints" / "step_00000005"))
    run.fit()
    written = rows(folder / "run") if runtime.is_main else []
    norms = [row["grad_norm"] for row in written]
    own = {name: value.clone() for name, value in run.engine.masters()}
    whole = {name: run.engine.joined(name, value).clone() for name, value in own.items()}
    averages = {name: run.engine.joined(name, value).clone() for name, value in run.ema.gather()}  # type: ignore[union-attr]
    return {
        "weights": whole,
        "averages": averages,
        "replicated": {name: value for name, value in own.items() if name not in run.engine.split},
        "norms": norms,
        "by_group": [{k: v for k, v in row.items() if k.startswith("grad_norm/")} for row in written],
    }


def export(objective: Objective, lora: LoraConfig | None) -> Export:
    """What writes the model or the adapter into a checkpoint."""
    if lora is None:
        return ModelExport(
            objective, {"model": {"target": "sat.models.cogview3_plus.CogView3Plus"}}, None, torch.float32
        )
    return AdapterExport(objective, lora, {}, {}, torch.float32)


def trainings(folder: Path, results: dict[str, Any]) -> None:
    """One process and several layouts; checkpoints of one tensor size resumed on another."""

    def case(name: str, world: int, size: int, **options: Any) -> None:
        extra = {key: options.pop(key) for key in ("lora", "resume", "unsplit") if key in options}
        work = functools.partial(trained, config=changed(TRAINING, **options), size=size, **extra)
        results[name] = ranks(world, folder / name, work)

    for kind, lora in (("sft", None), ("lora", LORA), ("lokr", LOKR)):
        case(f"{kind}/one", 1, 1, accumulate=2, lora=lora)
        if kind == "lokr":
            case("lokr/zero2", 2, 2, accumulate=2, zero=2, lora=lora)
            case("lokr/zero3", 2, 2, accumulate=2, zero=3, lora=lora)
            continue
        case(f"{kind}/2x2", 4, 2, zero=1, lora=lora)
    case("sft/zero0", 2, 2, accumulate=2)
    case("sft/zero2", 2, 2, accumulate=2, zero=2, activation_checkpointing=True)
    case("sft/zero3", 2, 2, accumulate=2, zero=3)
    case("lora/zero2", 2, 2, accumulate=2, zero=2, lora=LORA)
    case("lora/zero3", 2, 2, accumulate=2, zero=3, lora=LORA)
    case("sft/joined", 1, 1, accumulate=2, zero=1, resume=folder / "sft/zero2")
    adaln = ["transformer.mixins.adaln.layers.*.1"]
    case("sft/replanned", 2, 2, accumulate=2, zero=1, resume=folder / "sft/zero2", unsplit=adaln)
    case("sft/split", 2, 2, accumulate=2, zero=2, resume=folder / "sft/one")
    case("lora/joined", 1, 1, accumulate=2, lora=LORA, resume=folder / "lora/zero2")


def main(folder: Path) -> None:
    """All cases."""
    import deepspeed  # noqa: F401 - once, before the forks
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import torch._dynamo  # noqa: F401

    import sat.train.deepspeed

    sat.train.deepspeed.PERSISTENT = 9  # all but the smallest weights are shared out at ZeRO 3
    results: dict[str, Any] = {}
    trainings(folder, results)
    for size in (2, 4):
        results[f"models {size}"] = ranks(
            size, folder / f"models{size}", functools.partial(models, size=size)
        )
    results["read"] = ranks(2, folder / "read", read)
    for dora in (False, True):
        results[f"adapters {dora}"] = ranks(2, folder / f"dora{dora}", functools.partial(adapters, dora=dora))
    results["adapters lokr"] = ranks(2, folder / "lokr", functools.partial(adapters, dora=False, lokr=4))
    results["official"] = ranks(2, folder / "official", official)
    results["halves"] = ranks(2, folder / "halves", halves)
    results["offloaded"] = ranks(2, folder / "offloaded", offloaded)
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
