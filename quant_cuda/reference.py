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
    """The weight as numbers: dtype (in, out).

    The product is formed in float32 at least and rounded to `dtype` once.
    """
    work = torch.promote_types(torch.float32, weight.scales.dtype)
    work = torch.promote_types(work, dtype)
    scales = weight.scales.to(work)
    zeros = unpack_zeros(weight.qzeros, weight.bits, weight.out_features, weight.zero_offset)
    zeros = zeros.to(work)
    q = unpack(weight.qweight, weight.bits, weight.in_features).to(work)
    size = weight.group_size
    if weight.g_idx is None and size != -1 and weight.in_features % size == 0:
        q = q.view(weight.groups, size, weight.out_features)
        q.sub_(zeros.unsqueeze(1)).mul_(scales.unsqueeze(1))
        return q.view(weight.in_features, weight.out_features).to(dtype)
    group = group_of_inputs(weight)
    return q.sub_(zeros[group]).mul_(scales[group]).to(dtype)


def matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """x (..., in) times the dequantized weight (in, out), in x's dtype; differentiable in x."""
    return x @ dequantize(weight, x.dtype)
