#!/bin/sh
# The small base model (UNet) and the small relay model, about 45 and 30 minutes on one CPU core with bf16 instructions each.
# Needs train_scripts/tiny_data.sh; autoencoder and text encoder are those that ship.
set -e
torchrun --standalone train.py --base configs/tiny_base.yaml configs/tiny_base_train.yaml --output-dir runs/tiny_base "$@"
torchrun --standalone train.py --base configs/tiny_relay.yaml configs/tiny_relay_train.yaml --output-dir runs/tiny_relay "$@"
