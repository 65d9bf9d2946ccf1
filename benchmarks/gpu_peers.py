"""Other packages' products on a GPU, timed beside ours. A part of benchmarks/gpu.py."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_models import GROUP_SIZE

Calls = list[Callable[[], Tensor]]


def torch_int4(x: Tensor, inputs: int, outputs: int, count: int) -> Calls:
    """Calls of torch's own 4-bit product, with `count` random weights; none if it is not there.

    x: (rows, in); the product takes bfloat16.
    """
    x = x.bfloat16()
    try:
        return [_int4(x, inputs, outputs) for _ in range(count)]
    except (AttributeError, RuntimeError) as error:
        print(f"torch's 4-bit product is not timed: {error}")
        return []


def _int4(x: Tensor, inputs: int, outputs: int) -> Callable[[], Tensor]:
    packed = torch.randint(256, (outputs, inputs // 2), device=x.device, dtype=torch.uint8)
    words = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    grids = torch.rand((inputs // GROUP_SIZE, outputs, 2), device=x.device).bfloat16() * 0.01
    call = partial(torch.ops.aten._weight_int4pack_mm, x, words, GROUP_SIZE, grids)
    call()
    return call
