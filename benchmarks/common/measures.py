"""What several benchmarks measure in the same way."""

import multiprocessing
import os
import resource
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

from torch import nn

from gptq import __version__
from gptq.api import Opened
from gptq.blockwise.empty_model import linear
from gptq.cli.printing import prepare_streams
from gptq.nn import PackedModule, QuantLinear

PACKED = ("qweight", "qzeros", "scales", "g_idx")
# What torch's CUDA allocator rounds every block up to.
ALLOCATED = 512

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function in a new process, whose peak memory is then the function's own."""
    context = multiprocessing.get_context("spawn")
    # Its warnings are lines as those of the command line are.
    with ProcessPoolExecutor(
        max_workers=1, mp_context=context, initializer=prepare_streams
    ) as executor:
        return executor.submit(function, *arguments).result()


def version() -> str:
    """Of this package, with the commit if it is a checkout, and a mark if files were changed."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            words, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__}+{done.stdout.strip()}"


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name and how many cores this process may use."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(": ")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, 'unknown processor')}, {len(os.sched_getaffinity(0))} cores"


def children_seconds() -> float:
    """Processor time of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bits_per_weight(opened: Opened) -> float:
    """Bits stored for a weight of the blocks' packed layers, scales, zeros and group indices
    included."""
    spec = opened.source.spec
    bits = weights = 0
    for index in range(opened.source.config.num_hidden_layers):
        for name in (f"{spec.block(index)}.{inner}" for inner in spec.linears):
            layer = linear(opened.model.module, name)
            if isinstance(layer, QuantLinear):
                weights += layer.in_features * layer.out_features
                for part in PACKED:
                    if f"{name}.{part}" in opened.tensors:
                        bits += 8 * opened.tensors[f"{name}.{part}"].nbytes
    return bits / weights


def weight_count(model: nn.Module) -> int:
    """Parameters of a full model of this kind; those of a tied head count once."""
    counted = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, PackedModule):
            counted += module.in_features * module.out_features
            counted += module.out_features if module.bias is not None else 0
    return counted


def gpu_bytes(model: nn.Module, itemsize: int = 2) -> int:
    """Bytes that the GPU's allocator would hold for a model's tensors.

    Floating tensors have `itemsize` bytes an element; packed weights are in the layout of the GPU
    kernels (quant_cuda/cuda/layout.py).
    """
    sizes = [itemsize * parameter.numel() for parameter in model.parameters()]
    for module in model.modules():
        if isinstance(module, PackedModule):
            sizes += _packed_bytes(module)
            sizes += [itemsize * module.out_features] if module.bias is not None else []
    return sum(-(-size // ALLOCATED) * ALLOCATED for size in sizes)


def _packed_bytes(module: PackedModule) -> list[int]:
    """Bytes of each tensor of a packed weight of 4 or 8 bits in groups of a multiple of 32."""
    inputs, outputs, bits = module.in_features, module.out_features, module.bits
    size = inputs if module.group_size == -1 else min(module.group_size, inputs)
    if bits not in (4, 8) or size % 32:
        raise ValueError(f"no such count for {bits} bits in groups of {size}")
    columns = -(-outputs // 32) * 32
    blocks = -(-inputs * bits // 512)
    # A row of the table serves the largest power of two that divides the group size.
    rows = 1 if size == inputs else -(-inputs // (size & -size))
    return [columns // 16 * blocks * 256 * 4, rows * columns * 4]
