#!/bin/sh
# The small model's data and vocabulary (docs/data.md). Needs npm once, resvg-py (requirements-dev.txt) and 200 MB.
set -e
python -m sat.cli.prepare emoji --out data/emoji
python -m sat.cli.prepare emoji --out data/emoji/core --concepts core
python -m sat.cli.prepare emoji --out data/emoji/core128 --concepts core --size 128 # for the relay
python -m sat.cli.prepare tokenizer --captions data/emoji --words 3d --out checkpoints/tiny/tokenizer/spiece.model
