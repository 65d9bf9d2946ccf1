"""`python -m belle.generation` is the command line of generate_instruction.py."""

import sys

from belle.generation.command import main

if __name__ == "__main__":
    sys.exit(main())
