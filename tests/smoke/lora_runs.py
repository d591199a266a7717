"""LoRA trainings, one after the other in one process so that DeepSpeed is imported once.

``python -m tests.smoke.lora_runs FOLDER SPIECE`` writes FOLDER/ends.json; test_lora.py reads it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from PIL import Image

from sat.cli.train import main
from tests.configs import DEBUG, ROOT

TOY = ROOT / "tests" / "assets" / "toy"
LORA = ROOT / "configs" / "lora.yaml"
TRAIN = """\
adapters:
  lora: {{rank: 4, alpha: 8, dropout: 0.2, targets: [attention, mlp], ranks: {{mlp: 2}}}}
train:
  objective: {{target: sat.train.objectives.diffusion.DiffusionObjective}}
  steps: 4
  batch_size: 4
  accumulate: 2
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


def _pictures(folder: Path) -> None:
    """Four pictures with a new word in their captions."""
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (48, 32), (60 * number, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {('red', 'blue')[number % 2]} <it>")


def everything(folder: Path, spiece: Path) -> None:
    """All runs."""
    (folder / "train.yaml").write_text(TRAIN.format(root=ROOT, spiece=spiece))
    ends = {}

    def run(name: str, files: list[Path], *arguments: object, to: str = "") -> None:
        out, err = io.StringIO(), io.StringIO()
        words = [
            "--verbose",
            "--base",
            *map(str, [DEBUG, *files]),
            "--output-dir",
            str(folder / (to or name)),
        ]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*words, *map(str, arguments)])
            logging.shutdown()
        ends[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}

    train = [LORA, folder / "train.yaml"]
    text = (
        "train.objective.params.train_text=true",
        "adapters.lora.targets=[attention, mlp, adaln, text_encoder]",
    )
    run("whole", train, *text)
    run("half", train, *text, "train.max_minutes=1e-9")
    run("rest", train, *text, "--resume", to="half")
    plain = ("train.activation_checkpointing=false", "train.attention=torch")
    run("plain", train, *text, *plain)
    bare = (*text, *plain, "adapters.lora.dropout=0")  # a compiler draws other masks
    run("bare", train, *bare)
    if shutil.which(os.environ.get("CXX", "g++")):
        run("compiled", train, *bare, "train.compile=true")
    bf16 = ("train.dtype=bf16", "train.zero=2", "--steps", 3, "adapters.lora.dora=true")
    run("bf16", train, *bf16)
    run("bf16_half", train, *bf16, "train.max_minutes=1e-9")
    run("bf16_rest", train, *bf16, "--resume", to="bf16_half")
    _pictures(folder / "words")
    words = (
        f"data.sources.0.path={folder / 'words'}", "train.objective.params.train_text=true",
        "adapters.tokens=[{word: <it>, vectors: 2, start: red apple}]",
    )  # fmt: skip
    run("words", train, *words, "adapters.lora=null")
    run("words_half", train, *words, "adapters.lora=null", "train.max_minutes=1e-9")
    run("words_rest", train, *words, "adapters.lora=null", "--resume", to="words_half")
    run("words_lora", train, *words, "--steps", 2)
    run("no_word", train, *words, "adapters.tokens=[{word: <that>}]")
    run("unet", [TOY / "base.yaml", *train], "adapters.lora.targets=[attention, mlp, adaln]", "--steps", 3)
    run("again", train, *text, f"adapters.lora.start={folder / 'whole'}", "--steps", 1, "--lr", "1e-12",
        "adapters.lora.rank=9")  # fmt: skip
    over = f"adapters.load=[{{path: {folder / 'bf16'}, strength: 0.5}}]"
    run("over", train, over, "--steps", 1)
    run("cached", train, over, f"data.cache={folder / 'cache'}", "--steps", 1)
    run("wrong_start", train, f"adapters.lora.start={folder / 'unet'}", "--steps", 1)
    first = "train.objective.target=sat.train.objectives.first_stage.FirstStageObjective"
    run("first_stage", train, first, "--steps", 1)
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    everything(Path(sys.argv[1]), Path(sys.argv[2]))
