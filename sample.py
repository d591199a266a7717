"""Draw pictures for prompts: ``python sample.py --help``."""

from sat.cli.main_guard import leave
from sat.cli.sample import main

if __name__ == "__main__":
    leave(main())
