"""Quantize or run LLaMA and models like it: `python llama.py --help`."""

import sys

from gptq.cli.run import main
from gptq.models import LLAMA

if __name__ == "__main__":
    sys.exit(main(LLAMA))
