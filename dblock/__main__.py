"""``python -m dblock`` is the command ``dblock``."""

import sys

from dblock.cli import main

if __name__ == "__main__":
    sys.exit(main())
