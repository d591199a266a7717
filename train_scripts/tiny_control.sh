#!/bin/sh
# Controls by the pixels of outlines for the small models, 46 minutes of a CPU core, and an hour of a shared one. Needs train_scripts/tiny_data.sh.
# python convert.py runs/tiny_control OUT --to native --dtype int8 writes them as they ship.
set -e
python train.py --base configs/tiny.yaml configs/control_blockwise.yaml configs/tiny_control.yaml \
  adapters.control.design.params.hidden=416 --output-dir runs/tiny_control "$@"
python train.py --base configs/tiny_base.yaml configs/control_blockwise.yaml configs/tiny_control.yaml \
  adapters.control.design.params.hidden=960 --output-dir runs/tiny_base_control "$@"
