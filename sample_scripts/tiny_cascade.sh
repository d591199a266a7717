#!/bin/sh
# The small cascade that ships: 64, then 128 pixels, the 32 fixed prompts. Needs a CPU and about a minute.
torchrun --standalone sample.py --base configs/tiny_cascade.yaml --prompt-file configs/tiny_prompts.txt --output-dir outputs/tiny_cascade "$@"
