"""float32 activations times a float16 or bfloat16 weight on a CPU, read as it is stored.

torch multiplies tensors of one dtype only: a float32 copy of the weight is twice as many bytes to
read, and 16-bit matmul is slow on processors without hardware units for it.
"""

import torch
from torch import Tensor, nn

from quant_cuda.cpu import library, product

# From so many rows on torch's dense matmul is as fast, with the weight widened a part at a time.
MANY_ROWS = 32
PART = 4096  # outputs
_KINDS = {torch.bfloat16: 1, torch.float16: 2}


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `matmul` takes these tensors on this machine."""
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
    backend: index in `library.compiled()`; -1 for the best.
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
    library.required().quant_cuda_halves(
        library.best() if backend < 0 else backend,
        *(tensor.data_ptr() for tensor in (rows, weight, y)),
        *(len(rows), weight.shape[1], len(weight)),
        *(_KINDS[weight.dtype], torch.get_num_threads()),
    )
    return y
