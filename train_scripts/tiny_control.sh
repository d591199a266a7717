#!/bin/sh
# Controls by the pixels of outlines for the small models, 46 minutes of a CPU core for the first. Needs train_scripts/tiny_data.sh.
set -e
python train.py --base configs/tiny.yaml configs/control_blockwise.yaml configs/tiny_control.yaml \
  adapters.control.design.params.hidden=416 --output-dir runs/tiny_control "$@"
python train.py --base configs/tiny_base.yaml configs/control_blockwise.yaml configs/tiny_control.yaml \
  adapters.control.design.params.hidden=256 --output-dir runs/tiny_base_control "$@"
