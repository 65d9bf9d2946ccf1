"""Generate instruction data as BELLE does: `python generate_instruction.py --help`."""

import sys

try:
    from belle.generation.command import main
except ModuleNotFoundError as error:
    print(f"error: needs {error.name}: pip install 'belle-gptq[belle]'", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
