#!/bin/sh
# The small base and relay models that ship, distilled to 4 steps and to 1. Needs train_scripts/tiny_data.sh.
set -e
torchrun --standalone train.py --base configs/tiny_base.yaml configs/tiny_distill.yaml --output-dir runs/tiny_base_distill "$@"
torchrun --standalone train.py --base configs/tiny_relay.yaml configs/tiny_distill_relay.yaml --output-dir runs/tiny_relay_distill "$@"
