"""Generate instruction data as BELLE does: `python generate_instruction.py --help`."""

import sys

from belle.generation.command import main

if __name__ == "__main__":
    sys.exit(main())
