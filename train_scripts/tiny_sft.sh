#!/bin/sh
# All weights of the small model fine-tuned on the 22 pictures of data/emoji_sample_3d, a style new to it: caches,
# training (a minute on one CPU core with bf16 instructions) and pictures of objects that are not among the 22.
set -e
python -m sat.cli.prepare cache --base configs/tiny.yaml configs/sft.yaml configs/tiny_sft.yaml
torchrun --standalone train.py --base configs/tiny.yaml configs/sft.yaml configs/tiny_sft.yaml --output-dir runs/tiny_sft "$@"
python sample.py --base configs/tiny.yaml checkpoint.model=runs/tiny_sft/checkpoints/step_00000100/native \
  checkpoint.text=runs/tiny_sft/checkpoints/step_00000100/native --prompt-file configs/tiny_3d_prompts.txt --output-dir outputs/tiny_sft
