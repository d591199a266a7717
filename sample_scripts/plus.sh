#!/bin/sh
# CogView3-Plus-3B on every GPU of this machine; prompts are shared out over them. Needs weights/plus (docs/checkpoints.md)
# and 24 GB a GPU; memory.text_encoder=free frees part of it once the prompts are encoded.
torchrun --standalone --nproc_per_node gpu sample.py --base configs/plus.yaml --prompt-file configs/prompts.txt --output-dir outputs/plus --resume "$@"
