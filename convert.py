"""Convert checkpoints between formats; see ``python convert.py --help`` and docs/checkpoints.md."""

import sys

from sat.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
