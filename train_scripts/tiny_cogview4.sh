#!/bin/sh
# The small CogView4, network and causal text encoder, from scratch: 27 minutes of one CPU core with bf16 instructions. Needs
# train_scripts/tiny_data.sh; uses the autoencoder and the vocabulary that ship.
torchrun --standalone train.py --base configs/tiny_cogview4.yaml configs/tiny_train.yaml configs/tiny_cogview4_train.yaml \
  --output-dir runs/tiny_cogview4 "$@"
