"""Runs of train.py and prepare over caches, buckets and weights, one after the other in one process.

``python -m tests.smoke.cache_runs FOLDER SPIECE`` writes FOLDER/ends.json; test_cache.py reads it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

from sat.cli import prepare
from sat.cli.train import main
from sat.config.build import PartBuilder
from tests.configs import DEBUG

CONFIG = """\
train:
  objective: {{target: sat.train.objectives.diffusion.DiffusionObjective}}
  steps: 4
  batch_size: 3
  lr: 1.0e-3
  log_every: 1
  save_every: 2
  validate_every: 4
  wandb: disabled
data:
  sources: [{{path: {folder}/data}}]
  validation: [{{path: {folder}/data}}]
  height: 48
  width: 48
conditioning: {{tokenizer: {spiece}}}
parallel: {{device: cpu}}
"""
RELAY = """\
diffusion:
  process:
    target: sat.diffusion.process.Process
    params: {mixins: {relay: {target: sat.mixins.relay.RelayNoise, params: {partial: 500, blend: linear}}}}
  schedule: {target: sat.diffusion.schedule.Discrete}
  prediction: {target: sat.diffusion.prediction.Eps}
train:
  objective:
    target: sat.train.objectives.diffusion.DiffusionObjective
    params: {low_from: first_stage}
"""
VAE = """\
train:
  objective: {target: sat.train.objectives.first_stage.FirstStageObjective}
  validate_every: null
"""
SIZES = [(48, 48), (48, 64), (64, 48), (70, 50), (96, 96)]
BUCKETS = ("data.height=null", "data.width=null", "data.buckets={area: 3072, step: 16}")


def pictures(folder: Path) -> None:
    """Fifteen smooth pictures of five shapes, with captions."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for index in range(15):
        height, width = SIZES[index % len(SIZES)]
        coarse = numbers.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(coarse).resize((width, height)).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"picture number {index}")


def everything(folder: Path, spiece: Path) -> None:
    """All runs."""
    pictures(folder / "data")
    for name, text in (
        ("train", CONFIG.format(folder=folder, spiece=spiece)),
        ("relay", RELAY),
        ("vae", VAE),
    ):
        (folder / f"{name}.yaml").write_text(text)
    base = ["--base", str(DEBUG), str(folder / "train.yaml")]
    cache = f"data.cache={folder}/cache"
    ends: dict[str, dict[str, object]] = {}
    loaded: list[str] = []
    fill = PartBuilder.part

    def watched(self: PartBuilder, component: object, part: str) -> object:
        if part not in self.without:
            loaded.append(part)
        return fill(self, component, part)  # type: ignore[arg-type]

    PartBuilder.part = watched  # type: ignore[assignment,method-assign]

    def run(name: str, command: Callable[[list[str]], int], *arguments: str) -> None:
        loaded.clear()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command(list(arguments))
            logging.shutdown()
        ends[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "loaded": list(loaded)}

    def train(name: str, *arguments: str, to: str = "") -> None:
        run(name, main, *base, "--output-dir", str(folder / (to or name)), *arguments)

    def fill_cache(name: str, *arguments: str) -> None:
        run(name, prepare.main, "cache", *base, *arguments)

    relay = ("--base", str(folder / "relay.yaml"))
    train("plain")
    fill_cache("check", cache, "--check")
    fill_cache("fill", cache)
    fill_cache("full", cache, "--check")
    train("cached", cache)
    train("threads", cache, "data.workers=2")
    train("other_weights", cache, "checkpoint.random=7")
    train("moving", cache, "data.augment={shift: 0.1}", "data.cache_views=2")
    sampled = ("train.sample_every=4", "train.sample_prompts=[a dog]", "sampling.negative_prompt=a cat")
    train("sampling", cache, *sampled)
    train("sampling_again", cache, *sampled)
    train("sampling_plain", *sampled)
    train("vae", cache, "--base", str(folder / "vae.yaml"))
    train("relay", *relay)
    train("relay_cached", cache, *relay)
    train("text", cache, "train.objective.params={train_text: true}")
    train("buckets", *BUCKETS)
    train("buckets_cached", cache, *BUCKETS)
    shutil.copytree(folder / "buckets_cached", folder / "buckets_half")
    shutil.rmtree(folder / "buckets_half" / "checkpoints" / "step_00000004")
    train("buckets_rest", cache, *BUCKETS, "--resume", to="buckets_half")
    weights = f"data.sources=[{{path: {folder}/data, weight: 1.0}}, {{path: {folder}/data, weight: 3.0}}]"
    train("weights", cache, weights)
    train("lora", cache, "adapters.lora={rank: 2}")
    adapter = folder / "lora" / "checkpoints" / "step_00000004" / "native" / "adapter.safetensors"
    adapted = (f"adapters.load=[{{path: {adapter}, strength: 0.5}}]", "adapters.merge=true")
    train("adapted", cache, *adapted)
    train("adapted_again", cache, *adapted)
    fill_cache("pruned", cache, "--prune")
    fill_cache("nowhere")
    run("no_train", prepare.main, "cache", "--base", str(DEBUG))
    run("inspected", prepare.main, "inspect", *base, "--area", "3072", "--step", "16", "--batch", "4")
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    everything(Path(sys.argv[1]), Path(sys.argv[2]))
