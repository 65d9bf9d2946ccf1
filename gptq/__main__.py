"""`python -m gptq`, installed as `gptq`: quantize or run a model of any supported architecture."""

import sys

from gptq.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
