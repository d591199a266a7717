#!/bin/sh
# Trains a LoRA of CogView3-Plus-3B on every GPU of this machine. Needs weights/plus (docs/checkpoints.md) and captioned
# pictures: train_scripts/lora.sh data.sources.0.path=MY_PICTURES; the adapter is used by sample.py --lora runs/lora
torchrun --standalone --nproc_per_node gpu train.py --base configs/plus.yaml configs/lora.yaml --output-dir runs/lora "$@"
