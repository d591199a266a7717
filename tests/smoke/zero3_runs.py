"""Every objective and family at ZeRO 0 and at ZeRO 3, one after the other in one process.

``python -m tests.smoke.zero3_runs FOLDER SPIECE`` writes FOLDER/ends.json; test_zero3.py reads it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from pathlib import Path

import sat.train.deepspeed
from sat.cli.train import main
from tests.configs import DEBUG, ROOT
from tests.smoke.training_runs import write
from tests.smoke.unet_runs import DISTILL, TOY

SAME = [
    "train.steps=3", "train.accumulate=2", "train.batch_size=2", "train.ema=0.9", "train.save_every=100",
    "train.validate_every=3", "train.log_every=1", "train.optimizer.params={eps: 1.0e-4}",
    "train.sample_every=null", "train.wandb=disabled", "data.height=32", "data.width=48", "train.lr=1e-2",
    "train.warmup=0", "train.clip=0.05", "data.augment=null",
]  # fmt: skip
FIRST = (
    "train.objective={target: sat.train.objectives.first_stage.FirstStageObjective, "
    "params: {freeze_encoder: true}}"
)
CASES: dict[str, tuple[list[str], list[str]]] = {
    "plus": ([], ["train.activation_checkpointing=true", "train.sample_every=3"]),
    "relay": (["base", "relay"], ["train.activation_checkpointing=true"]),
    "distilled": (["distill"], ["train.objective.params.rounds=[4]", "train.activation_checkpointing=false"]),
    "first_stage": ([], ["train.activation_checkpointing=false", FIRST]),
    "lora": (["lora"], ["adapters.lora.dora=true", "adapters.lora.targets=[attention, text_encoder]"]),
}


def everything(folder: Path, spiece: Path, chosen: list[str]) -> None:
    """The ``chosen`` runs; none: all of them."""
    sat.train.deepspeed.PERSISTENT = 9  # the weights of the toy are small
    train = write(folder, spiece)[-1]
    (folder / "distill.yaml").write_text(DISTILL.format())
    files = {
        "base": TOY / "base.yaml", "relay": TOY / "relay.yaml", "distill": folder / "distill.yaml",
        "lora": ROOT / "configs" / "lora.yaml",
    }  # fmt: skip
    ends = {}
    for name in chosen or CASES:
        extra, settings = CASES[name]
        late = [str(files[file]) for file in extra]
        for zero in (0, 3):
            out, err = io.StringIO(), io.StringIO()
            words = ["--base", str(DEBUG), *late[:2], train, *(late if extra == ["distill"] else []), *SAME]
            words += [*settings, "train.dtype=fp32", f"train.zero={zero}"]
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([*words, "--output-dir", str(folder / f"{name}_{zero}")])
                logging.shutdown()
            ends[f"{name}_{zero}"] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    everything(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
