#!/bin/sh
# CogView3-Base and CogView3-Relay, 512 then 1024 pixels, on every GPU of this machine. Needs weights/base and
# weights/relay (docs/checkpoints.md) and 24 GB a GPU.
torchrun --standalone --nproc_per_node gpu sample.py --base configs/cascade.yaml --prompt-file configs/prompts.txt --output-dir outputs/cascade --resume "$@"
