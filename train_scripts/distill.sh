#!/bin/sh
# Distils CogView3-Base to 25, 16, 8 and 4 steps on every GPU of this machine. Needs weights/base (docs/checkpoints.md)
# and captioned pictures: train_scripts/distill.sh data.sources.0.path=MY_PICTURES
torchrun --standalone --nproc_per_node gpu train.py --base configs/base.yaml configs/distill.yaml --output-dir runs/distill "$@"
