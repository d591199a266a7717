#!/bin/sh
# Controls by outlines for the small models, about 40 minutes each on a busy CPU core. Needs train_scripts/tiny_data.sh.
set -e
python train.py --base configs/tiny.yaml configs/control_blockwise.yaml configs/tiny_control.yaml \
  adapters.control.design.params.hidden=192 --output-dir runs/tiny_control "$@"
python train.py --base configs/tiny_base.yaml configs/control.yaml configs/tiny_control.yaml \
  "adapters.control.design.params.hint=[8,16,24,32]" --output-dir runs/tiny_base_control "$@"
