"""Unpack and multiply in plain torch: the oracle of every kernel and the last fallback."""

import torch
from torch import Tensor

from quant_cuda.packing import unpack, unpack_zeros
from quant_cuda.weight import PackedWeight


def group_of_inputs(weight: PackedWeight) -> Tensor:
    """Group of each input, int64 (in,)."""
    if weight.g_idx is not None:
        return weight.g_idx.long()
    inputs = torch.arange(weight.in_features, device=weight.qweight.device)
    return inputs // (weight.in_features if weight.group_size == -1 else weight.group_size)


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
    size = weight.group_size
    if weight.g_idx is None and size != -1 and weight.in_features % size == 0:
        grouped = q.view(weight.out_features, weight.groups, size)
        grouped.sub_(zeros.unsqueeze(2)).mul_(scales.unsqueeze(2))
    else:
        group = group_of_inputs(weight)
        q.sub_(zeros[:, group]).mul_(scales[:, group])
    return q.to(dtype).T


def matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """x (..., in) times the dequantized weight (in, out), in x's dtype; differentiable in x."""
    return x @ dequantize(weight, x.dtype)
