"""float32 activations times a weight of 16-bit floats on a CPU, which reads it as it is stored.

torch takes both in one type: in float32 the weight is twice as many bytes, and in 16 bits slow on
processors without units for them.
"""

import torch
from torch import Tensor, nn

from quant_cuda.cpu import library, product

# From so many rows on torch's dense product is as fast, the weight widened a part at a time.
MANY_ROWS = 32
PART = 4096  # outputs
_KINDS = {torch.bfloat16: 1, torch.float16: 2}


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `matmul` takes these here."""
    return (
        bool(library.compiled())
        and x.dtype == torch.float32
        and weight.dtype in _KINDS
        and x.device.type == weight.device.type == "cpu"
        and weight.is_contiguous()
        and product.is_plain(x, None)
    )


def matmul(x: Tensor, weight: Tensor, backend: int = -1) -> Tensor:
    """x (..., in) times weight^T, summed in float32; no gradients.

    x: float32, any strides; weight: float16 or bfloat16 (out, in), contiguous.
    backend: index in `native.compiled()`; -1 for the best.
    Returns float32 (..., out). Raises ValueError for what does not fit.
    """
    if not fits(x, weight) or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"no product of {x.dtype} {tuple(x.shape)} with {weight.dtype} {tuple(weight.shape)}"
        )
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if len(rows) >= MANY_ROWS:
        parts = [nn.functional.linear(rows, part.float()) for part in weight.split(PART)]
        return torch.cat(parts, 1).view(*x.shape[:-1], len(weight))
    y = x.new_empty((*x.shape[:-1], len(weight)))
    product.library().quant_cuda_halves(
        product.best() if backend < 0 else backend,
        *(tensor.data_ptr() for tensor in (rows, weight, y)),
        *(len(rows), weight.shape[1], len(weight)),
        *(_KINDS[weight.dtype], torch.get_num_threads()),
    )
    return y
