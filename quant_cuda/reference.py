"""Unpack and multiply in plain torch: the oracle of every kernel and the last fallback."""

import torch
from torch import Tensor

from quant_cuda.packing import fields, unpack, unpack_zeros
from quant_cuda.weight import MAX_RUN, AnyWeight, PackedWeight, group_length, natural_groups


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The dequantized weight: dtype (in, out), a view of a contiguous (out, in).

    scale * (q - zero) is formed in float32 at least and rounded to `dtype` once.
    """
    work = torch.promote_types(torch.float32, weight.scales.dtype)
    work = torch.promote_types(work, dtype)
    zeros = unpack_zeros(weight.qzeros, weight.bits, weight.out_features, weight.zero_offset)
    zeros, scales = zeros.T.to(work), weight.scales.T.to(work)  # (out, groups)
    # Transposed while it is bytes: a matmul over contiguous inputs is faster and sums better.
    q = unpack(weight.qweight, weight.bits, weight.in_features).T.contiguous().to(work)
    if weight.g_idx is not None:
        group = weight.g_idx.long()
        q.sub_(zeros[:, group]).mul_(scales[:, group])
        return q.to(dtype).T
    size = group_length(weight.in_features, weight.group_size)
    full = weight.in_features // size
    # The groups of full size at once, then the short last one if there is one.
    for inputs, groups in (
        (q[:, : full * size].unflatten(1, (full, size)), slice(0, full)),
        (q[:, full * size :].unsqueeze(1), slice(full, None)),
    ):
        if inputs.numel():
            inputs.sub_(zeros[:, groups, None]).mul_(scales[:, groups, None])
    return q.to(dtype).T


def rows(weight: PackedWeight, index: Tensor) -> Tensor:
    """The weights of some outputs: int64 (...) to floating (..., in), float32 at least."""
    columns = index.reshape(-1)
    q = unpack(weight.qweight[:, columns], weight.bits, weight.in_features)
    zeros = fields(weight.qzeros, weight.bits, columns) + weight.zero_offset
    group = weight.g_idx
    if group is None:
        group = natural_groups(weight.in_features, weight.group_size, columns.device)
    values = dequantized(q, zeros, weight.scales[:, columns], group)
    return values.reshape(*index.shape, weight.in_features)


def dequantized(q: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """scale * (q - zero): q uint8 (in, out), zeros and scales (groups, out), group (in,) to
    floating (out, in), float32 at least."""
    work = torch.promote_types(torch.float32, scales.dtype)
    group = group.long()
    return ((q.to(work) - zeros.to(work)[group]) * scales.to(work)[group]).T


def matmul(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, int8: bool = False
) -> Tensor:
    """x (..., in) times the dequantized weight (in, out), plus bias, in x's dtype.

    int8: round activations first, see `to_int8`. Differentiable in x.
    """
    y = (to_int8(x, weight) if int8 else x) @ dequantize(weight, x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def to_int8(x: Tensor, weight: AnyWeight) -> Tensor:
    """Round x (..., in) to integers in -127..127 times a scale, as x's dtype.

    Inputs of one group of the weight share a scale, by the largest of them; a group of more than
    MAX_RUN inputs is cut, in the order of its inputs, into runs of that many. The gradient is
    passed on as it is.
    """
    groups = weight.g_idx
    if groups is None:
        groups = natural_groups(weight.in_features, weight.group_size, x.device)
    order = torch.argsort(groups.long(), stable=True)
    counts = torch.bincount(groups.long())
    first = (counts.cumsum(0) - counts)[groups.long()[order]]
    within = torch.arange(weight.in_features, device=x.device) - first
    # A run begins where a group does, and MAX_RUN inputs after one has begun.
    label = torch.empty_like(order)
    label[order] = (within % MAX_RUN == 0).cumsum(0) - 1
    work = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    largest = work.new_zeros((*x.shape[:-1], int(label.max()) + 1 if label.numel() else 0))
    largest.scatter_reduce_(-1, label.expand(x.shape), work.abs(), "amax")
    scale = (largest.clamp_min(1e-30) / 127)[..., label]
    rounded = (torch.round(work / scale) * scale).to(x.dtype)
    return x + (rounded - x.detach())
