"""Training of the shipped small models on a pretended accelerator: the real loop, without DeepSpeed."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import sat.cli.commands.train as command
from sat.config.load import load
from sat.data.batch import Batch
from sat.first_stage import model as first_stage
from sat.parallel.launch import Runtime
from sat.train import deepspeed as ds
from sat.train import loop
from sat.train.checkpoints import Checkpoints
from sat.train.optim import trainable
from tests.pretended.device import GPU, ROOT, Watch, pretended

CONFIGS = {
    "tiny_train": "tiny.yaml tiny_train.yaml train.sample_every=null",
    "tiny_lora": "tiny.yaml lora.yaml tiny_lora.yaml train.sample_every=null",
    "tiny_base_train": "tiny_base.yaml tiny_base_train.yaml train.sample_every=null",
    "tiny_relay_train": "tiny_relay.yaml tiny_relay_train.yaml train.sample_every=null",
    "tiny_vae": "tiny.yaml tiny_vae.yaml",
}
LOGGED = ("sat/train/log.py", "sat/train/loop.py", "sat/parallel/launch.py")
"""Files that wait for the device outside of steps: a row of the log, of validation too, reads the numbers."""
SMALLER = [
    "train.steps=2", "train.batch_size=2", "train.accumulate=1", "train.warmup=1", "train.wandb=disabled",
    "train.ema=0.9", "train.validate_every=2", "train.log_every=10", "data.workers=0", "data.cache=null",
]  # fmt: skip


class Engine(ds.TrainEngine):
    """An engine of one rank: torch's optimizer, no ZeRO, the interface of DeepSpeed's."""

    def __init__(
        self, objective: Any, optimizer: Any, config: Any, runtime: Runtime, mesh: Any, imports: Any
    ) -> None:
        self.scheduler = None
        self.config, self.runtime, self.mesh, self.objective = config, runtime, mesh, objective
        self.parameters = trainable(objective)
        self.shapes = {name: list(p.shape) for name, p in self.parameters.items()}
        self.split = {}
        objective.to(runtime.device)
        self.engine = Callee(objective, optimizer)
        self.fragments = {
            name: ds.Fragment(p.detach().float().view(-1), 0, p, 0) for name, p in self.parameters.items()
        }

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self) -> ds.StepResult:
        self.engine.optimizer.step()
        self.engine.optimizer.zero_grad(set_to_none=True)
        return ds.StepResult(True, torch.zeros((), device=GPU))


def pictures(folder: Path) -> None:
    """Four small pictures with captions."""
    folder.mkdir()
    rows = [
        {"file_name": f"{color}.png", "caption": f"a {color} square"}
        for color in ("red", "blue", "lime", "tan")
    ]
    for row in rows:
        Image.new("RGB", (128, 128), row["caption"].split()[1]).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Callee:
    """The objective, and the optimizer as an attribute."""

    def __init__(self, objective: Any, optimizer: Any) -> None:
        self.objective, self.optimizer = objective, optimizer

    def __call__(self, *args: Any) -> Any:
        return self.objective(*args)


def train(watch: Watch, words: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Two steps, the second watched, validation and a row of the log."""
    step, sent = loop.Trainer.train_step, Batch.to

    def watched(self: loop.Trainer, batches: Any) -> None:
        watch.on = self.step >= 1
        if self.step == 1:
            watch.begin()
        watch.step = self.step if self.step >= 1 else -1
        step(self, batches)
        watch.step = -1

    def moved(self: Batch, device: torch.device) -> Batch:
        out = sent(self, device)
        watch.vary(*(x for f in fields(out) if isinstance(x := getattr(out, f.name), Tensor)))
        return out

    patch.setattr(command, "TrainEngine", Engine)
    patch.setattr(loop.Trainer, "save", lambda *a, **k: None)
    patch.setattr(Checkpoints, "settle", lambda self: None)
    patch.setattr(loop.Trainer, "train_step", watched)
    patch.setattr(Batch, "to", moved)
    patch.chdir(ROOT)
    pictures(folder / "data")
    data = [f"data.{name}=[{{path: {folder / 'data'}}}]" for name in ("sources", "validation")]
    given = [*words.split(), *SMALLER, *data, f"output.dir={folder / 'run'}"]
    bases = [str(ROOT / "configs" / word) for word in given if "=" not in word]
    experiment = load(bases, [word for word in given if "=" in word])
    experiment = getattr(experiment, "experiment", experiment)
    sections = command._sections(experiment)
    command._train_rounds(experiment, *sections, Runtime(0, 1, 0, GPU))


@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_wait_for_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended() as watch:
        train(watch, CONFIGS[name], tmp_path, monkeypatch)
    for kind in ("mixing", "race", "sync", "transfer"):
        assert not (found := watch.found(kind)), f"{kind} in a step: {found}"
    assert not (found := watch.found("mixing", in_step=False) + watch.found("race", in_step=False)), found
    assert len(watch.launches) == 1
    waits = [line for line in watch.found("sync", in_step=False) if not line.startswith(LOGGED)]
    assert not waits, f"outside of steps, but not by the log: {waits}"


def test_a_planted_wait_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_stage, "sent", lambda x, device: x.to(device))
    with pretended() as watch:
        train(watch, CONFIGS["tiny_vae"], tmp_path, monkeypatch)
    (found,) = watch.found("sync")
    assert "test_training.py" in found and "blocking copy to cuda" in found
