"""Unpack and multiply in plain torch: the oracle of every kernel and the last fallback."""

import torch
from torch import Tensor

from quant_cuda.packing import unpack, unpack_zeros
from quant_cuda.weight import PackedWeight


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight as numbers: dtype (in, out), a view of a contiguous (out, in).

    The product is formed in float32 at least and rounded to `dtype` once.
    """
    work = torch.promote_types(torch.float32, weight.scales.dtype)
    work = torch.promote_types(work, dtype)
    zeros = unpack_zeros(weight.qzeros, weight.bits, weight.out_features, weight.zero_offset)
    zeros, scales = zeros.T.to(work), weight.scales.T.to(work)  # (out, groups)
    # Turned over while it is bytes: a product over contiguous inputs is faster and sums better.
    q = unpack(weight.qweight, weight.bits, weight.in_features).T.contiguous().to(work)
    if weight.g_idx is not None:
        group = weight.g_idx.long()
        q.sub_(zeros[:, group]).mul_(scales[:, group])
        return q.to(dtype).T
    size = weight.in_features if weight.group_size == -1 else weight.group_size
    full = weight.in_features // size
    # The groups of full size at once, then the short last one if there is one.
    for inputs, groups in (
        (q[:, : full * size].unflatten(1, (full, size)), slice(0, full)),
        (q[:, full * size :].unsqueeze(1), slice(full, None)),
    ):
        if inputs.numel():
            inputs.sub_(zeros[:, groups, None]).mul_(scales[:, groups, None])
    return q.to(dtype).T


def matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """x (..., in) times the dequantized weight (in, out), in x's dtype; differentiable in x."""
    return x @ dequantize(weight, x.dtype)
