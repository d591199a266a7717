"""Turn a short prompt into a full English description: ``python prompt_optimize.py --help``."""

import sys

from sat.cli.prompt import main

if __name__ == "__main__":
    sys.exit(main())
