#!/bin/sh
# The small model's autoencoder, about half an hour on a CPU with bf16 instructions. Needs train_scripts/tiny_data.sh.
torchrun --standalone train.py --base configs/tiny.yaml configs/tiny_vae.yaml --output-dir runs/vae "$@"
