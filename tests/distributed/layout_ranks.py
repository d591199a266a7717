"""Work of the ranks of test_layouts.py: draw, compute gradients and train in several layouts.

``python -m tests.distributed.layout_ranks FOLDER`` writes FOLDER/results.pt.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from sat.config import settle
from sat.config.build import build_engine
from sat.config.load import load
from sat.config.schema import LoraConfig, RegionConfig, RegionsConfig, TrainConfig
from sat.data.batch import Sample
from sat.diffusion.guidance import IntervalLimited
from sat.first_stage import AutoencoderKL
from sat.first_stage.tiling import Tiling, decode_tiled, encode_tiled
from sat.kernels import measured
from sat.kernels.apply import Folded, fold
from sat.kernels.compile import recompute
from sat.mixins.rope import RoPE
from sat.models.cogview3_plus import CogView3Plus
from sat.models.cogview3_unet import CogView3UNet
from sat.parallel.cfg_parallel import CfgParallel
from sat.parallel.collectives import taking_turns
from sat.parallel.launch import Mesh, Runtime, lost_rank_message
from sat.parallel.sequence import apply_sequence
from sat.pipeline import Pipeline
from sat.sampling.edit import Framed, Given, Regions
from sat.sampling.generator import EncodedPrompt, ImageRng, SamplingParams
from sat.sampling.prompts import Prompt
from sat.train.lora import add_lora
from sat.train.objectives import Objective
from sat.train.objectives.diffusion import DiffusionObjective
from sat.train.shards import Share
from tests.checkpoints import tokenizer
from tests.configs import DEBUG, ROOT
from tests.small import cogview4, condition, fill, plus
from tests.training import CONFIG, Numbers, changed, ranks, rows, trainer

MODELS = ("tiny", "tiny_base", "tiny_cogview4")
UNTRAINED = [  # with heads of text that two tensor ranks share, which the weights that ship have not
    "checkpoint.path=null", "checkpoint.random=0", "model.params.zero_init=false",
    "conditioning.text.params.heads=6", "conditioning.text.params.kv_heads=2",
    "conditioning.text.params.head_dim=16", "conditioning.max_length=48",
]  # fmt: skip
LONG = "a red apple and a blue car and a house and a dog and the sun " * 2
"""Longer than the prompt against it: one of the two halves of guidance has a mask."""
LAYOUTS: dict[str, dict[str, int]] = {
    "guidance": {"guidance": 2},
    "sequence": {"sequence": 2},
    "sequence_of_3": {"sequence": 3},
    "guidance_sequence": {"guidance": 2, "sequence": 2},
    "guidance_tensor": {"guidance": 2, "tensor": 2},
    "sequence_tensor": {"sequence": 2, "tensor": 2},
}
TRAININGS: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, and what differs from one process
    "zero0": (2, {}),
    "zero2": (2, {"zero": 2, "activation_checkpointing": True}),
    "zero3": (2, {"zero": 3}),
    "data": (4, {"zero": 1, "accumulate": 1}),
}


# ---------------------------------------------------------------------- pictures


def pictures(runtime: Runtime, folder: Path, layout: dict[str, int]) -> dict[str, dict[str, Tensor]]:
    """Latents and pixels of one picture of each small model, of guidance within an interval, and folded."""
    return {name: _picture(name, runtime, layout) for name in MODELS}


def _picture(name: str, runtime: Runtime, layout: dict[str, int]) -> dict[str, Tensor]:
    experiment = load(
        [ROOT / "configs" / f"{name}.yaml"],
        [
            "sampling.steps=4", *(UNTRAINED if name == "tiny_cogview4" else []),
            *(f"parallel.{axis}={size}" for axis, size in layout.items()),
        ],
    )  # fmt: skip
    mesh = Mesh(runtime, **experiment.parallel.sizes)
    pipeline = Pipeline.open(experiment, runtime.device, mesh)
    generator, guider = pipeline.generator, pipeline.guider
    encoded = generator.encode([LONG if name == "tiny_cogview4" else "a red apple"], "a blue car")[0]

    def drawn(params: SamplingParams, encoded: EncodedPrompt = encoded, given: Given | None = None) -> Tensor:
        shape = generator.engine.latent_shape(params.height, params.width)
        return generator.latents(encoded, ImageRng.of(7, [0], shape), params, given=given)

    found = {"latents": drawn(SamplingParams(64, 64, 4, guider))}
    found["pixels"] = generator.engine.decode(found["latents"])
    mask = np.pad(np.full((30, 20), 255, np.uint8), ((10, 24), (30, 14)))
    framed = Framed(Image.new("RGB", (64, 64), (200, 90, 30)), mask, (0, 0, 64, 64))
    given = Given([framed], 0.9, False, experiment.sampling)
    found["inpainted"] = drawn(SamplingParams(64, 64, 4, guider), given=given)
    parts = [([0.0, 0.0, 0.5, 1.0], "a blue car"), ([0.4, 0.2, 1.0, 0.9], "the sun")]
    areas = RegionsConfig([RegionConfig(text, None, box) for box, text in parts], end=0.9)
    regions = Regions(areas, encoded=generator.encode([text for _, text in parts]))
    found["regions"] = drawn(SamplingParams(64, 64, 4, guider, regions=regions))
    if mesh.guidance.size > 1 or not layout:
        limited = IntervalLimited(3.0, 200.0, 700.0)
        shared = CfgParallel(limited, mesh.guidance) if mesh.guidance.size > 1 else limited
        found["interval"] = drawn(SamplingParams(64, 64, 4, shared))
    if isinstance(network := generator.engine.network, CogView3Plus):
        fold(network, 1)
        seen, prepare = [], network.prepare
        network.prepare = lambda *given: seen.append(prepare(*given)) or seen[-1]  # type: ignore[method-assign]
        found["folded"] = drawn(SamplingParams(64, 64, 4, guider), generator.encode(["a red apple"])[0])
        unguided = mesh.guidance.rank == mesh.guidance.size - 1 > 0
        assert [isinstance(made.context, Folded) for made in seen] == [not unguided], "as one rank does"
    return found


def command(
    runtime: Runtime, folder: Path, layout: dict[str, int], done: Path | None = None
) -> dict[str, Any]:
    """sample.py with three prompts, the first ``done``: the exit code and what this rank wrote."""
    from sat.cli.sample import main
    from sat.sampling.output import OutputFolder

    prompts = folder / f"prompts_{runtime.rank}.txt"  # one each: nobody reads what another is still writing
    prompts.write_text("a red apple\na blue car\nthe sun\n")
    words = ["--base", str(DEBUG), f"conditioning.tokenizer={folder.parent / 'spiece.model'}", "--resume"]
    words += ["parallel.device=cpu", *(f"parallel.{axis}={size}" for axis, size in layout.items())]
    if done is not None and runtime.is_main:
        for name in done.glob("0_*"):
            shutil.copytree(name, folder / "out" / name.name)
    written: list[int] = []
    write = OutputFolder.write_image

    def noted(self: OutputFolder, prompt: Prompt, *given: Any) -> Path:
        written.append(prompt.index)
        return write(self, prompt, *given)

    OutputFolder.write_image = noted  # type: ignore[method-assign]
    arguments = ["--prompt-file", str(prompts), "--output-dir", str(folder / "out")]
    return {"code": main([*words, *arguments]), "written": written}


# ---------------------------------------------------------------------- gradients


def _plus() -> nn.Module:
    return plus()


def _rotary() -> nn.Module:
    return plus({"position": RoPE(8, 4, 6)})


def _unet() -> nn.Module:
    made = CogView3UNet(
        channels=4, width=16, multipliers=(1, 2), blocks=1, attention=(1, 2), depths=(1, 2), head_dim=8,
        text_dim=16, text_len=7, size_dim=48, groups=4, zero_init=False,
    )  # fmt: skip
    fill(made)
    return made.eval()


NETWORKS = {"plus": _plus, "rotary": _rotary, "unet": _unet, "cogview4": cogview4}


def gradients(runtime: Runtime, folder: Path) -> dict[str, tuple[float, float]]:
    """Differences of output and gradients (over ranks averaged) of networks whose tokens are shared.

    Nothing divides by the number of ranks: 7 text tokens, 15 patches (or cells), 4 and 2 heads.
    """
    axis = Mesh(runtime, sequence=runtime.world).sequence
    worst = {}
    for name, make in NETWORKS.items():
        one, shared = make().double(), make().double()
        apply_sequence(shared, axis)
        (out, wanted), (ours, found) = _passed(one), _passed(shared)
        assert wanted.keys() == found.keys()
        apart = 0.0
        for parameter, gradient in wanted.items():
            mean = found[parameter].clone()
            dist.all_reduce(mean)
            apart = max(apart, _apart(mean / runtime.world, gradient))
        worst[name] = (_apart(ours, out), apart)
    return worst


def _passed(network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients for fixed inputs, some of the text masked."""
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    cond = replace(condition(dtype=torch.float64), text_mask=mask)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 2, 4, 6, 10, generator=generator).double()
    out = network(x, torch.tensor([5.0, 900.0]), network.prepare(cond, (6, 10)))  # type: ignore[operator]
    (out * weight).sum().backward()
    return out.detach(), {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def _apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


# ---------------------------------------------------------------------- the first stage


def tiles(runtime: Runtime, folder: Path) -> dict[str, bool]:
    """Whether the tiles that ranks share make the picture and the posterior of one rank, to the last bit."""
    axis = Mesh(runtime, sequence=runtime.world).team
    stage = AutoencoderKL(8, (1, 2, 2), 1, 4, 4)
    fill(stage, 0.1)
    latent = torch.randn(3, 4, 20, 13, generator=torch.Generator().manual_seed(2))
    image = torch.rand(1, 3, 80, 52, generator=torch.Generator().manual_seed(3)) * 2 - 1
    work, tiling = functools.partial(taking_turns, axis), Tiling(8, batch=2)
    with torch.inference_mode():
        decoded = torch.equal(decode_tiled(stage, latent, tiling, work), decode_tiled(stage, latent, tiling))
        ours, wanted = encode_tiled(stage, image, tiling, work), encode_tiled(stage, image, tiling)
    return {"decoded": decoded, "encoded": torch.equal(ours.moments, wanted.moments)}


# ---------------------------------------------------------------------- training


def _sample(place: int) -> Sample:
    generator = torch.Generator().manual_seed(place)
    moments, text = torch.randn(8, 6, 8, generator=generator), torch.randn(8, 24, generator=generator)
    return Sample("", (48, 64), (0, 0), (48, 64), latent_moments=moments, text=text)


class Captioned(Numbers):
    """Batches of latent moments and text that depend on the position in the stream alone."""

    sample = staticmethod(_sample)


def _objective(mesh: Mesh, *, lora: bool, checkpointing: bool) -> Objective:
    experiment = load([DEBUG], ["conditioning.tokenizer=null"])
    engine = build_engine(experiment, device="cpu", dtype=torch.float32)
    apply_sequence(engine.network, mesh.sequence)
    objective = DiffusionObjective(caption_dropout=0.3, engine=engine)
    if lora:
        add_lora(objective, LoraConfig(rank=3, alpha=6.0, targets=["attention", "mlp"]), seed=0)
    if checkpointing:
        recompute(objective)
    return objective


def trained(runtime: Runtime, folder: Path, config: TrainConfig, layout: dict[str, int], lora: bool) -> Any:
    """Ten steps of SGD: how far the weights moved, and the norm and loss of each step."""
    mesh = Mesh(runtime, **layout)
    objective = _objective(mesh, lora=lora, checkpointing=config.activation_checkpointing)
    before = {n: p.detach().clone() for n, p in objective.named_parameters() if p.requires_grad}
    run = trainer(folder / "run", config, runtime, objective, mesh, plain=True)
    run.source = Captioned(config.batch_size, mesh.data_rank, mesh.data_ranks)
    run.fit()
    with run.engine.unsharded():
        moved = {name: p.detach() - before[name] for name, p in run.engine.parameters.items()}
    return {"moved": moved, "rows": rows(folder / "run") if runtime.is_main else []}


def dying(runtime: Runtime, folder: Path) -> dict[str, Any]:
    """The second rank of a team dies while a checkpoint is written: what the first says and finds."""
    mesh = Mesh(runtime, sequence=2)
    config = changed(CONFIG, batch_size=2, ema=None)
    run = trainer(folder / "run", config, runtime, _objective(mesh, lora=True, checkpointing=False), mesh)
    run.source = Captioned(config.batch_size)
    run.train_step(run.batches())
    if mesh.sequence.rank == 1:
        Share.write = lambda share, folder, name: os._exit(7)  # type: ignore[method-assign]
    try:
        run.save()
    except RuntimeError as error:
        folders = [path.name for path in (folder / "run" / "checkpoints").iterdir()]
        return {"said": lost_rank_message(error), "folders": folders, "whole": run.folder.saved()}
    return {"said": "did not notice"}


def choices(runtime: Runtime, folder: Path) -> tuple[object, ...]:
    """Choices of ranks that measure otherwise."""
    measured.fastest = lambda question, usual, other, make: other if runtime.is_main else usual
    measured.slow = lambda dtype: not runtime.is_main
    main, train = runtime.is_main, replace(CONFIG, dtype="auto", zero=1)
    experiment = replace(load([DEBUG], ["sampling.dtype=auto"]), train=train)
    made = settle.settle_dtype(experiment, runtime.device, main=main)
    engine = SimpleNamespace(network=plus(), first_stage=AutoencoderKL(8, (1, 2), groups=4))
    made = settle.settle_sampling(made, engine, (6, 10), runtime.device, main=main)
    trained = settle.settle_training(train, plus(), (6, 10), runtime.device, packs=True, main=main)
    return (
        made.sampling.dtype,
        made.train and made.train.dtype,
        made.sampling.pack,
        made.sampling.convolutions,
        trained.pack,
    )


def main(folder: Path) -> None:
    """All cases."""
    import deepspeed  # noqa: F401 - once, before the forks
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import torch._dynamo  # noqa: F401

    import sat.train.deepspeed

    sat.train.deepspeed.PERSISTENT = 9  # all but the smallest weights are shared out at ZeRO 3
    results: dict[str, Any] = {}

    def case(name: str, world: int, work: Any, **given: Any) -> None:
        results[name] = ranks(world, folder / name, functools.partial(work, **given), timeout=300.0)

    case("one", 1, pictures, layout={})
    for name, layout in LAYOUTS.items():
        case(name, math.prod(layout.values()), pictures, layout=layout)
    tokenizer(folder / "spiece.model")
    case("command", 1, command, layout={})
    case("command_teams", 4, command, layout={"sequence": 2}, done=folder / "command" / "out")
    case("choices", 2, choices)
    case("gradients", 3, gradients)
    case("tiles", 3, tiles)
    case("dying", 2, dying)
    for lora in (False, True):
        config = changed(
            CONFIG,
            steps=10,
            batch_size=2,
            accumulate=2,
            lr=30.0 if lora else 0.3,
            ema=None,
            log_every=1,
            save_every=100,
            weight_decay=0.0,
        )
        name = "lora" if lora else "sft"
        case(f"{name}/one", 1, trained, config=config, layout={}, lora=lora)
        for how, (world, other) in TRAININGS.items():
            changes = changed(config, **other)
            case(f"{name}/{how}", world, trained, config=changes, layout={"sequence": 2}, lora=lora)
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
