#!/bin/sh
# Fine-tunes CogView3-Plus-3B on every GPU of this machine. Needs weights/plus (docs/checkpoints.md) and captioned
# pictures: train_scripts/sft.sh data.sources.0.path=MY_PICTURES
torchrun --standalone --nproc_per_node gpu train.py --base configs/plus.yaml configs/sft.yaml --output-dir runs/sft "$@"
