#!/bin/sh
# The small model that ships, its 32 fixed prompts, four pictures each. Needs a CPU and about a minute.
torchrun --standalone sample.py --base configs/tiny.yaml --prompt-file configs/tiny_prompts.txt --batch-size 4 --output-dir outputs/tiny "$@"
