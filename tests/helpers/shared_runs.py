"""Command lines of runs that several processes share, and one that ends in the middle."""

import os

import gptq.quantization
from gptq.cli import run as cli
from gptq.models import LLAMA


def words(folder, text, path, *more):
    return [
        *(str(folder), str(text), "--wbits", "4", "--groupsize", "32", "--percdamp", "0.01"),
        *("--nsamples", "3", "--seqlen", "32", "--refine", "0", "--device", "cpu"),
        *("--save", str(path), *more),
    ]


def stopped(argv, number):
    """Run a command line in a process that gets a signal in its second block."""
    whole = gptq.quantization.quantize_blocks

    def blocks(*args, **others):
        for layer in whole(*args, **others):
            if layer.block == 1:
                os.kill(os.getpid(), number)
            yield layer

    gptq.quantization.quantize_blocks = blocks
    return cli.main(LLAMA, argv)
