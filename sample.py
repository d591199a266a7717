"""Draw pictures for prompts: ``python sample.py --help``."""

import sys

from sat.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
