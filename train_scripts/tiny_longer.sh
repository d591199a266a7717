#!/bin/sh
# The small model's transformer, trained longer with its text encoder frozen (docs/results.md), about an hour of a CPU core.
# Needs train_scripts/tiny_data.sh. The network that ships is the one in runs/longer/ships, begun from the weights before it:
# git checkout 1544339 -- checkpoints/tiny
set -e
all="{path: data/emoji/metadata.jsonl, weight:" core="{path: data/emoji/core/metadata.jsonl, weight:" part=checkpoints/step_0000
train() {
  name=$1 && shift
  python train.py --base configs/tiny.yaml configs/tiny_train.yaml --output-dir "runs/longer/$name" \
    train.objective.params.train_text=false train.backend=plain train.zero=0 train.dtype=fp32 train.autocast=bf16 \
    train.validate_every=100000 train.sample_every=100000 "data.validation=[]" checkpoint.random=null \
    "diffusion.loss={target: sat.diffusion.loss.DenoisingLoss, params: {stratified: true}}" "$@"
}
mean() {  # OUT NETWORK...: of equal shares, with the other parts of checkpoints/tiny
  python - "$@" <<'PYTHON'
import json, sys
from pathlib import Path
from sat.checkpoint import InMemory, Options, open_part, save_native
import torch

old, networks = Path("checkpoints/tiny"), [open_part(Path(one), "model") for one in sys.argv[2:]]
parts = {part: open_part(old, part) for part in ("model", "first_stage", "text")}
tables = {name for name, info in parts["model"].infos().items() if info.dtype != torch.float16}
made = {name: sum(one[name].double() for one in networks) / len(networks) for name in parts["model"]}
made = {name: parts["model"][name] if name in tables else value.float() for name, value in made.items()}
config = json.loads((old / "manifest.json").read_text())["config"]
tokenizer, options = old / "tokenizer/spiece.model", Options(torch.float16)
save_native(sys.argv[1], {**parts, "model": InMemory(made, exact=tables)}, config, tokenizer=tokenizer, options=options)
PYTHON
}
train a checkpoint.path=checkpoints/tiny train.steps=5000 train.lr=5.0e-4 "data.sources=[$core 0.8}, $all 0.2}]"
train b checkpoint.path=checkpoints/tiny train.steps=1500 train.lr=3.0e-4 train.weight_decay=0.1 \
  train.objective.params.caption_dropout=0.15 train.save_every=714 train.keep_last=3 "data.sources=[$core 0.4}, $all 0.6}]"
mean runs/longer/mean checkpoints/tiny runs/longer/a/${part}5000/native runs/longer/b/${part}0714/native
train c checkpoint.path=runs/longer/mean train.steps=600 train.lr=2.0e-4 train.warmup=20 train.ema=0.99 train.save_every=200
mean runs/longer/ships runs/longer/mean runs/longer/c/${part}0600/native
