"""Training of the shipped small models on a pretended accelerator: the real loop on the plain backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import sat.cli.commands.train as command
from sat.config.load import load
from sat.data.batch import Batch
from sat.parallel.launch import Runtime
from sat.train import loop
from sat.train.checkpoints import Checkpoints
from tests.pretended.device import GPU, LARGE, ROOT, Watch, faults, pretended

CONFIGS = {
    "tiny_train": "tiny.yaml tiny_train.yaml train.sample_every=null",
    "tiny_lora": "tiny.yaml lora.yaml tiny_lora.yaml train.sample_every=null",
    "tiny_sft": "tiny.yaml sft.yaml tiny_sft.yaml train.sample_every=null",
    "tiny_base_train": "tiny_base.yaml tiny_base_train.yaml train.sample_every=null",
    "tiny_relay_train": "tiny_relay.yaml tiny_relay_train.yaml train.sample_every=null",
    "tiny_sr": "tiny_sr.yaml tiny_relay_train.yaml train.sample_every=null",
    "tiny_distill": "tiny_base.yaml tiny_distill.yaml",
    "tiny_distill_relay": "tiny_relay.yaml tiny_distill_relay.yaml",
    "tiny_cogview4_train": "tiny_cogview4.yaml tiny_train.yaml tiny_cogview4_train.yaml "
    "train.sample_every=null",
    "tiny_vae": "tiny.yaml tiny_vae.yaml",
}
MOST = {
    "tiny_train": 1300, "tiny_lora": 1300, "tiny_sft": 1300, "tiny_base_train": 1005, "tiny_relay_train": 725,
    "tiny_sr": 730, "tiny_distill": 1690, "tiny_distill_relay": 1235, "tiny_vae": 560,
    "tiny_cogview4_train": 1325,
}  # fmt: skip
"""Launches of a step of one micro-batch at most: passes, norm, optimizer, average, sums of the log."""
ALLOWED = {
    "sat/embeddings.py": 8,  # frequencies of timestep and sizes
    "sat/mixins/text_encoder.py": 19,  # buckets of T5's offsets, and the bias of a frozen encoder
    "sat/mixins/sincos.py": 1,  # the corner of the position table, in the tokens' type
    "sat/mixins/rope.py": 18,  # angles of the patch grid
    "sat/mixins/joint_attention.py": 1,  # with zeros for the text
}
"""Operators a micro-batch, by file, whose results are those of the last one: small tables, and no wait."""
WAITS = "sync: sat/train/backend.py"
"""The end of a step, where the host learns that the gradient is finite."""
LOGGED = ("sat/train/log.py", "sat/train/loop.py", "sat/parallel/launch.py")
"""Files that wait for the device outside of steps: a row of the log, of validation too, reads the numbers."""
SMALLER = [
    "train.steps=2", "train.batch_size=2", "train.accumulate=1", "train.warmup=1", "train.wandb=disabled",
    "train.backend=plain", "train.zero=0", "train.dtype=fp32",
    "train.ema=0.9", "train.validate_every=2", "train.log_every=10", "data.workers=0", "data.cache=null",
]  # fmt: skip


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


def train(
    watch: Watch,
    words: str,
    folder: Path,
    patch: pytest.MonkeyPatch,
    *,
    plant: Callable[[Tensor], object] | None = None,
) -> None:
    """Two steps, the second watched, validation and a row of the log; ``plant`` is done to each batch."""
    step, sent = loop.Trainer.train_step, Batch.to

    def watched(self: loop.Trainer, batches: Any) -> None:
        watch.on = self.step >= 1
        if self.step == 1:
            learned = [t for p in self.engine.parameters.values() for t in (p, p.grad) if t is not None]
            state = [t for own in self.engine.optimizer.state.values() for t in own.values()]
            averages = [] if self.ema is None else list(self.ema.shards.values())
            watch.begin(*learned, *(t for t in (*state, *averages) if isinstance(t, Tensor)))
        watch.step = self.step if self.step >= 1 else -1
        step(self, batches)
        watch.step = -1

    def moved(self: Batch, device: torch.device) -> Batch:
        out = sent(self, device)
        sent_tensors = [x for x in [*vars(out).values(), *out.draws.values()] if isinstance(x, Tensor)]
        watch.vary(*sent_tensors)
        if plant is not None and watch.step >= 0:
            plant(sent_tensors[0])
        return out

    whole = command._train

    def first(*args: Any) -> bool:
        whole(*args)
        return False  # of several rounds one is enough

    patch.setattr(command, "_train", first)
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
    times = 6 if "distill" in name else 1  # passes of teacher and student
    most = MOST[name] + (MOST[name] // 25 if torch.__version__ < "2.6" else 0)  # its optimizers take more
    found = faults(watch, most, {file: n * times for file, n in ALLOWED.items()})
    assert [line for line in found if line.startswith(WAITS)] == found, found
    assert len(found) == 1 and found[0].endswith("1 times"), found
    assert not (found := watch.found("mixing", in_step=False) + watch.found("race", in_step=False)), found
    assert len(watch.launches) == 1
    waits = [line for line in watch.found("sync", in_step=False) if not line.startswith(LOGGED)]
    assert not waits, f"outside of steps, but not by the log: {waits}"


def test_a_draw_that_is_not_pinned_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = Batch.pinned
    monkeypatch.setattr(Batch, "pinned", lambda self: replace(pinned(self), draws=self.draws))
    with pretended() as watch:
        train(watch, CONFIGS["tiny_vae"], tmp_path, monkeypatch)
    (found,) = (line for line in watch.found("sync") if not f"sync: {line}".startswith(WAITS))
    assert "sat/data/batch.py" in found and "copy to cuda" in found and "not pinned" in found


PLANTED: dict[str, Callable[[Tensor], object]] = {
    "mixing: add of": lambda x: x + torch.zeros(x.shape[-1]),
    "sync: ": lambda x: bool((x > 0).any()),
    "transfer: ": lambda x: torch.zeros(5).to(x.device, non_blocking=True),
    "race: ": lambda x: x.to("cpu", non_blocking=True),
    "hoistable: exp": lambda x: torch.ones(64, device=x.device).exp(),
    "hoistable: empty": lambda x: torch.empty(LARGE, device=x.device),
    "launches: ": lambda x: [x * number for number in range(100)],
}


def test_a_fault_of_each_kind_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended() as watch:
        plant = lambda x: [fault(x) for fault in PLANTED.values()]  # noqa: E731
        train(watch, CONFIGS["tiny_vae"], tmp_path, monkeypatch, plant=plant)
    found = faults(watch, MOST["tiny_vae"], ALLOWED)
    for kind in PLANTED:
        fault, _, what = kind.partition(": ")
        assert any(line.startswith(fault) and what in line for line in found), f"{kind} not among {found}"
    assert all("test_training.py" in line or line.startswith(("launches", WAITS)) for line in found), found
