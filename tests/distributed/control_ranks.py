"""Ranks of test_control.py: they draw with controls in several layouts, and train one.

``python -m tests.distributed.control_ranks FOLDER`` writes FOLDER/results.pt.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat.config.build import build_engine
from sat.config.check import build
from sat.config.load import load
from sat.config.schema import Component, Experiment, TrainConfig
from sat.control.base import BaseModel
from sat.control.files import ControlInfo, write
from sat.control_input import ControlInput
from sat.data.batch import Sample
from sat.kernels.compile import recompute
from sat.parallel.launch import Mesh, Runtime
from sat.parallel.sequence import apply_sequence
from sat.pipeline import Pipeline
from sat.sampling.generator import ImageRng, SamplingParams
from sat.train.control import add_control
from sat.train.objectives.diffusion import DiffusionObjective
from tests.configs import DEBUG, ROOT
from tests.small import fill
from tests.training import CONFIG, Numbers, changed, ranks, trainer

LAYOUTS: dict[str, dict[str, int]] = {
    "one": {}, "tensor": {"tensor": 2}, "sequence": {"sequence": 2}, "guidance": {"guidance": 2}
}  # fmt: skip
MODELS = {"plus": DEBUG, "unet": ROOT / "configs" / "tiny_base.yaml"}
DTYPES = ("fp32", "bf16")
_CONTROLNET, _LIGHT = "sat.control.controlnet.controlnet", "sat.control.light"
_PROMPT = Component(
    "sat.control.reference.image_prompt", {"encoder": str(ROOT / "checkpoints" / "tiny_classifier")}
)
DESIGNS: dict[str, dict[str, Component]] = {
    "plus": {
        "controlnet": Component(_CONTROLNET, {"blocks": 1}),
        "shared": Component(_CONTROLNET, {"blocks": 2, "share_adaln": True}),
        "blockwise": Component(f"{_LIGHT}.Blockwise", {"hidden": 12}),
        "concat": Component(f"{_LIGHT}.concat"),
        "pixels": Component(f"{_LIGHT}.blockwise", {"hidden": 12, "input": "pixels", "cell": 8}),
        "image_prompt": _PROMPT,
        "reference": Component("sat.control.reference.Reference"),
    },
    "unet": {
        "controlnet": Component(_CONTROLNET, {"hint": [4, 6, 8, 10]}),
        "blockwise": Component(f"{_LIGHT}.blockwise", {"hidden": 12}),
        "concat": Component(f"{_LIGHT}.concat"),
        "image_prompt": _PROMPT,
    },
}
TRAININGS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {  # ranks, layout, changes
    "zero1": (2, {}, {"zero": 1}),
    "zero2": (2, {}, {"zero": 2, "activation_checkpointing": True}),
    "zero3": (2, {}, {"zero": 3}),
    "tensor": (2, {"tensor": 2}, {"accumulate": 2}),
    "sequence": (2, {"sequence": 2}, {"accumulate": 2}),
}
STRONG = {"image_prompt": 0.5, "reference": 2.0}
"""Designs whose random weights are larger, so that attention to a few more keys is seen."""
TRAINED = {name: DESIGNS["plus"][name] for name in ("controlnet", "blockwise", "image_prompt")}
TRAINED_HOW = {name: list(TRAININGS) for name in TRAINED} | {"image_prompt": ["tensor", "sequence"]}


def controls(folder: Path) -> None:
    """Files of every design for each model: untrained, and with random weights."""
    for model, file in MODELS.items():
        experiment = load([file])
        network = build_engine(experiment, device="cpu", dtype=torch.float32).network
        for name, design in DESIGNS[model].items():
            made = build(design, base=BaseModel(network, experiment.model))
            info = ControlInfo(design, experiment.model)
            write(folder / f"{model}_{name}_new.safetensors", made.state_dict(), info)
            fill(made, STRONG.get(name, 0.05))
            write(folder / f"{model}_{name}.safetensors", made.state_dict(), info)


def drawn(runtime: Runtime, folder: Path, layout: dict[str, int]) -> dict[tuple[str, str], Any]:
    """For each model and type what each design does to the latents of a picture."""
    return {(m, t): _drawn(runtime, folder.parent, layout, m, t) for m in MODELS for t in DTYPES}


def _drawn(
    runtime: Runtime, folder: Path, layout: dict[str, int], model: str, dtype: str
) -> dict[str, dict[str, Any]]:
    settings = ["sampling.steps=2", f"sampling.dtype={dtype}", "sampling.pack=false", "sampling.fold=false"]
    settings += ["conditioning.text.params.heads=2"] if model == "plus" else []  # as many ranks
    settings += [f"parallel.{axis}={size}" for axis, size in layout.items()]
    names = [f"{design}{end}" for design in DESIGNS[model] for end in ("", "_new")]
    files = [
        {"path": str(folder / f"{model}_{n}.safetensors"), "image": str(ROOT / "README.md")} for n in names
    ]

    def opened(*more: Any) -> Pipeline:
        experiment = load([MODELS[model]], [*settings, *more])
        return Pipeline.open(experiment, runtime.device, Mesh(runtime, **experiment.parallel.sizes))

    def latents(pipeline: Pipeline, *held: ControlInput) -> Tensor:
        generator, sampling = pipeline.generator, pipeline.experiment.sampling
        params = SamplingParams(sampling.height, sampling.width, sampling.steps, pipeline.guider)
        shape = generator.engine.latent_shape(params.height, params.width)
        encoded = generator.encode(["a red apple"], "a blue car")[0]
        return generator.latents(encoded, ImageRng.of(7, [0], shape), params, controls=held)

    plain, pipeline = latents(opened()), opened(("sampling.controls", files))
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, one in pipeline.controls.loaded.items():
        sampling, engine = pipeline.experiment.sampling, pipeline.generator.engine
        picture = torch.rand(1, 3, sampling.height, sampling.width, generator=generator) * 2 - 1
        value = one.control.encode(engine.first_stage, picture)
        steered = latents(pipeline, ControlInput(name, value, (1.0,)))
        off = latents(pipeline, ControlInput(name, value, (0.0,)))
        found[name.removeprefix(f"{model}_")] = {
            "steered": steered, "off": torch.equal(off, plain), "apart": (steered - plain).abs().max().item()
        }  # fmt: skip
    return found


def _sample(place: int) -> Sample:
    generator = torch.Generator().manual_seed(place)
    moments, text = torch.randn(8, 6, 8, generator=generator), torch.randn(8, 24, generator=generator)
    extras = {"control": torch.randn(4, 6, 8, generator=generator)}
    return Sample("", (48, 64), (0, 0), (48, 64), latent_moments=moments, text=text, extras=extras)


class Steered(Numbers):
    """Batches of latent moments, text and control latents that depend on the position alone."""

    sample = staticmethod(_sample)


def _prompted(place: int) -> Sample:
    features = torch.randn(5, 112, generator=torch.Generator().manual_seed(place))
    return replace(_sample(place), extras={"control": features})


class Prompted(Numbers):
    """The same with features of an image encoder."""

    sample = staticmethod(_prompted)


def trained(
    runtime: Runtime, folder: Path, config: TrainConfig, layout: dict[str, int], design: Component
) -> dict[str, Any]:
    """Some steps of SGD of a control beside the debug model: how far the weights moved."""
    mesh = Mesh(runtime, **layout)
    control = {"design": {"target": design.target, "params": design.params}, "dropout": 0.2}
    experiment: Experiment = load(
        [DEBUG],
        [
            "conditioning.tokenizer=null",
            "conditioning.text.params.heads=2",
            ("adapters.control", control),
        ],
    )
    engine = build_engine(experiment, device="cpu", dtype=torch.float32, mesh=mesh)
    apply_sequence(engine.network, mesh.sequence)
    objective = DiffusionObjective(caption_dropout=0.3, engine=engine)
    add_control(objective, experiment, config, mesh.tensor, mesh.sequence)
    if config.activation_checkpointing:
        recompute(objective)
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    run = trainer(folder / "run", config, runtime, objective, mesh, plain=True)
    source = Prompted if design == _PROMPT else Steered
    run.source = source(config.batch_size, mesh.data_rank, mesh.data_ranks)
    run.fit()
    with run.engine.unsharded():
        named = {n: p.detach() - before[n] for n, p in objective.named_parameters()}
        moved = {n: run.engine.joined(n, named[n]) for n in run.engine.parameters}
        still = all(not named[n].any() for n in named if n not in moved)
    return {"moved": moved, "still": still}


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

    controls(folder)
    for name, layout in LAYOUTS.items():
        case(name, 2 if layout else 1, drawn, layout=layout)
    config = changed(
        CONFIG, steps=3, batch_size=2, accumulate=2, lr=0.5, ema=None, save_every=100, weight_decay=0.0
    )
    for design, component in TRAINED.items():
        case(f"{design}/one", 1, trained, config=config, layout={}, design=component)
        for how in TRAINED_HOW[design]:
            world, layout, other = TRAININGS[how]
            changes = changed(config, **{"accumulate": 1, **other})
            case(f"{design}/{how}", world, trained, config=changes, layout=layout, design=component)
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
