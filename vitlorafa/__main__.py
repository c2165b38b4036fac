"""`python -m vitlorafa`: lists the commands, or runs one."""

import sys

from vitlorafa.commands import main

if __name__ == "__main__":
    sys.exit(main())
