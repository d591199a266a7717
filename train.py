"""Train a model: ``python train.py --help``."""

import sys

from sat.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
