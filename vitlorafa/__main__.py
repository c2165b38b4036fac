"""Says what there is to run: `python -m vitlorafa`."""

import sys

from vitlorafa.commands import LISTING

if __name__ == "__main__":
    print(LISTING)
    sys.exit(0 if "--help" in sys.argv or "-h" in sys.argv else 2)
