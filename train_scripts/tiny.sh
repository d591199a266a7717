#!/bin/sh
# The small model's transformer and text encoder, about an hour on two CPU cores. Needs train_scripts/tiny_data.sh; uses
# the autoencoder that ships, or add checkpoint.first_stage=runs/vae/checkpoints/step_00002000/native for your own.
torchrun --standalone train.py --base configs/tiny.yaml configs/tiny_train.yaml --output-dir runs/tiny "$@"
