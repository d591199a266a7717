"""``sample.py`` under the original code's name: ``python sample_dit.py --base cogview3.yaml``."""

import sys

from sat.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
