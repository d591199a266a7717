"""Trainings of and with a control, one after the other in one process so that DeepSpeed is imported once.

``python -m tests.smoke.control_runs FOLDER SPIECE`` writes FOLDER/ends.json; test_control.py reads it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from pathlib import Path

from sat.cli.train import main
from tests.configs import DEBUG, ROOT

TOY = ROOT / "tests" / "assets" / "toy"
CONTROL = ROOT / "configs" / "control.yaml"
TRAIN = """\
train:
  steps: 4
  batch_size: 4
  accumulate: 1
  dtype: fp32
  zero: 0
  lr: 1.0e-2
  warmup: 1
  ema: 0.9
  log_every: 1
  save_every: 2
  keep_last: 10
  wandb: disabled
data:
  sources: [{{path: {root}/data/emoji_sample}}]
  height: 32
  width: 48
  workers: 0
conditioning: {{tokenizer: {spiece}}}
parallel: {{device: cpu}}
"""
BLOCKWISE = "adapters.control.design={target: sat.control.light.Blockwise}"
INPAINT = "adapters.control.design={target: sat.control.light.concat, params: {inpaint: true}}"
MASKS = "adapters.control.picture={target: sat.data.preprocess.Masks}"


def everything(folder: Path, spiece: Path) -> None:
    """All runs."""
    (folder / "train.yaml").write_text(TRAIN.format(root=ROOT, spiece=spiece))
    ends = {}

    def run(name: str, files: list[Path], *arguments: object, to: str = "", base: Path = DEBUG) -> None:
        out, err = io.StringIO(), io.StringIO()
        words = ["--base", *map(str, [base, *files]), "--output-dir", str(folder / (to or name))]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*words, *map(str, arguments)])
            logging.shutdown()
        ends[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}

    train = [CONTROL, folder / "train.yaml"]
    dropped = "adapters.control.dropout=0.2"
    run("whole", train, dropped)
    run("half", train, dropped, "train.max_minutes=1e-9")
    run("rest", train, dropped, "--resume", to="half")
    run("blockwise", train, BLOCKWISE, "data.cache_views=1", "--steps", 2)
    run("cached", train, BLOCKWISE, f"data.cache={folder / 'cache'}", "--steps", 2)
    run("again", train, BLOCKWISE, f"data.cache={folder / 'cache'}", "--steps", 2)
    run("inpaint", train, INPAINT, MASKS, f"data.cache={folder / 'cache'}", "--steps", 2)
    run("unet", [TOY / "base.yaml", *train], "adapters.control.design.params.hint=[4,6,8,10]",
        f"data.cache={folder / 'cache'}", "--steps", 2)  # fmt: skip
    kept = f"adapters.control={{start: {folder / 'whole'}, train: false}}"
    run("sft", train, kept, "--steps", 1)
    lora = "adapters.lora={rank: 2, targets: [attention]}"
    run("lora", train, kept, lora, "--steps", 1)
    run("both", train, BLOCKWISE, lora, "--steps", 2)
    run("further", train, f"adapters.control={{start: {folder / 'whole'}}}", "--steps", 1, "--lr", "1e-12")
    distilled = ["model.params.guidance_dim=8", "checkpoint.allow_missing=['guidance.*']"]
    distilled += ["sampling.guider={target: sat.diffusion.guidance.Embedded, params: {scale: 3.0}}"]
    drawn = ["train.sample_every=1", "train.sample_prompts=[a, b]", "sampling.steps=2"]
    pictures = f"adapters.control.samples={ROOT / 'data' / 'emoji_sample' / 'noto'}"
    run("distilled", train, *distilled, *drawn, pictures, "--steps", 1)
    run("unsteered", train, *drawn, "--steps", 1)
    run("plan", train, "--plan")
    run("no_pictures", train, "adapters.control.picture=null")
    run("text", train, "train.objective.params.train_text=true")
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    everything(Path(sys.argv[1]), Path(sys.argv[2]))
