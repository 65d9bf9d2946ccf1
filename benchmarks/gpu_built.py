"""Whether the kernels were built from these sources and for this GPU: 1 if they have to be built.
A part of benchmarks/gpu.sh.

They may have been built where there is no GPU, and the objects left there.
"""

import sys
import warnings

import torch

from benchmarks.gpu_models import random_weight
from quant_cuda.cuda import kernels as cuda
from quant_cuda.cuda import layout, library


def runs() -> bool:
    """Whether a kernel for every GPU and, on Hopper, one for that alone can be launched."""
    with warnings.catch_warnings():
        # Of a library of other sources, which is about to be replaced.
        warnings.simplefilter("ignore")
        if not library.available():
            return False
    weight = layout.prepare(random_weight(4, 256, 64, "cuda"))
    x = torch.ones(64, 256, device="cuda", dtype=torch.float16)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    # What drivers compile of a library for other GPUs has no wgmma.
    if cuda.current(x).wgmma != hopper:
        return False
    try:
        for name in ("gemm", *(["wgmma"] if hopper else [])):
            cuda.matmul(x, weight, kernel=name)
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(0 if runs() else 1)
