#!/bin/sh
# A LoRA of the small model on the 22 pictures of data/emoji_sample_3d, a style new to it: caches, training (a minute on
# one CPU core with bf16 instructions) and pictures of objects that are not among the 22. docs/finetune.md explains the steps.
set -e
python -m sat.cli.prepare cache --base configs/tiny.yaml configs/lora.yaml configs/tiny_lora.yaml
torchrun --standalone train.py --base configs/tiny.yaml configs/lora.yaml configs/tiny_lora.yaml --output-dir runs/tiny_lora "$@"
python sample.py --base configs/tiny.yaml --lora runs/tiny_lora --prompt-file configs/tiny_3d_prompts.txt --output-dir outputs/tiny_lora
