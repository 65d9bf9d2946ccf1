"""Quantize or run a bloom model: `python bloom.py --help`."""

import sys

from gptq.cli.run import main
from gptq.models import BLOOM

if __name__ == "__main__":
    sys.exit(main(BLOOM))
