"""Runs of train.py, one after the other in one process so that DeepSpeed is imported once.

``python -m tests.smoke.training_runs FOLDER SPIECE`` writes FOLDER/ends.json; test_training.py reads it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
from pathlib import Path

from sat.cli.train import main
from tests.configs import DEBUG, ROOT

TRAIN = """\
train:
  objective: {{target: sat.train.objectives.diffusion.DiffusionObjective, params: {{train_text: true}}}}
  steps: 6
  batch_size: 4
  accumulate: 2
  lr: 1.0e-3
  warmup: 1
  schedule: cosine
  ema: 0.9
  activation_checkpointing: true
  log_every: 1
  save_every: 3
  validate_every: 3
  sample_every: 6
  sample_prompts: [red apple, a dog]
  wandb: disabled
data:
  sources: [{{path: {root}/data/emoji_sample}}]
  validation: [{{path: {root}/data/emoji_sample}}]
  height: 48
  width: 64
  augment: {{shift: 0.1, scale: [0.8, 1.0]}}
conditioning: {{tokenizer: {spiece}}}
parallel: {{device: cpu}}
"""
VAE = """\
train:
  objective: {target: sat.train.objectives.first_stage.FirstStageObjective}
  validate_every: null
  sample_every: null
  activation_checkpointing: false
  autocast: bf16
"""


def write(folder: Path, spiece: Path) -> list[str]:
    """The config files of a training run of the toy model, as arguments."""
    (folder / "train.yaml").write_text(TRAIN.format(root=ROOT, spiece=spiece))
    (folder / "vae.yaml").write_text(VAE)
    return ["--base", str(DEBUG), str(folder / "train.yaml")]


def everything(folder: Path, spiece: Path) -> None:
    """All runs."""
    base = write(folder, spiece)
    ends = {}

    def run(name: str, *arguments: str, to: str = "") -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*base, "--output-dir", str(folder / (to or name)), *arguments])
            logging.shutdown()
        ends[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}

    run("check", "--check")
    run("config", "--print-config")
    run("whole", "train.tensorboard=true", "train.peak_tflops=0.1")
    run("half", "train.save_every=2", "train.max_minutes=1e-9", "train.sample_every=null")
    shutil.copytree(folder / "half", folder / "early")
    run("again", "train.sample_every=null", to="half")
    run("rest", "--resume", "train.sample_every=null", to="half")
    run("done", "--resume", to="whole")
    shutil.copytree(folder / "half", folder / "longer")
    run("longer", "--resume", "--steps", "8", "train.prolong=constant", "train.sample_every=null")
    torn = folder / "half" / "checkpoints" / "step_00000006"
    (torn / "COMPLETE").unlink()
    run("torn", "--resume", "train.sample_every=null", "train.background_save=true", to="half")
    run(
        "cached", "data.cache_views=2", "train.sample_every=null", "train.ema=null", "--steps", "2",
        "train.wandb=offline", "model.params.table_size=[6, 6]",
    )  # fmt: skip
    run(
        "bf16",
        "--dtype",
        "bf16",
        "train.zero=2",
        "--steps",
        "2",
        "train.validate_every=1",
        "train.sample_every=1",
    )
    run("lonely_bf16", "--dtype", "bf16")
    run("vae", "--base", str(folder / "vae.yaml"), "--steps", "2")
    run(
        "nan", "--lr", "1e38", "--steps", "30", "train.optimizer.target=torch.optim.SGD", "train.clip=null",
        "train.max_bad_steps=2", "train.accumulate=1", "train.validate_every=null", "train.sample_every=null",
    )  # fmt: skip
    run("rope", "--base", str(ROOT / "configs" / "debug_rope.yaml"), "--steps", "2", "train.sample_every=2",
        "train.ema=[0.2, 0.05]")  # fmt: skip
    run("no_data", "data.sources.0.path=/nowhere")
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    everything(Path(sys.argv[1]), Path(sys.argv[2]))
