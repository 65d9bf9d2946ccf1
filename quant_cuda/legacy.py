"""The functions of GPTQ-for-LLaMa's `quant_cuda` extension, for code that was written for it.

Three generations of it called the same names with different arguments; all of them work, on the
tensors of a CPU too. New code calls `quant_cuda.matmul`.
"""

import torch
from torch import Tensor

import quant_cuda
from quant_cuda.cuda import kernels, layout, operator
from quant_cuda.packing import unpack
from quant_cuda.weight import PackedWeight

__all__ = ["vecquant2matmul", "vecquant3matmul", "vecquant4matmul", "vecquant8matmul"]


def vecquant2matmul(
    vec: Tensor,
    mat: Tensor,
    mul: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: int | Tensor | None = None,
) -> None:
    """Add the product of `vec` and a packed weight to `mul`, in place.

    vec: floating (..., in). mat: int32 (in * bits / 32, out), as docs/format.md packs it.
    mul: floating (..., out).
    groups: differs between the generations. A group size, or -1 for one group: scales are floating
        (groups, out) and zeros int32 (groups, out * bits / 32), each a zero point less one. A
        tensor (in,) of whole numbers: the same, and the group of each input. None: one group,
        scales (out, 1), and zeros floating (out, 1), each a zero point times its scale.
    Raises ValueError or TypeError, in one line, for what does not fit.
    """
    _multiply(2, vec, mat, mul, scales=scales, zeros=zeros, groups=groups)


def vecquant3matmul(
    vec: Tensor,
    mat: Tensor,
    mul: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: int | Tensor | None = None,
) -> None:
    """`vecquant2matmul` for 3 bits."""
    _multiply(3, vec, mat, mul, scales=scales, zeros=zeros, groups=groups)


def vecquant4matmul(
    vec: Tensor,
    mat: Tensor,
    mul: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: int | Tensor | None = None,
) -> None:
    """`vecquant2matmul` for 4 bits."""
    _multiply(4, vec, mat, mul, scales=scales, zeros=zeros, groups=groups)


def vecquant8matmul(
    vec: Tensor,
    mat: Tensor,
    mul: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: int | Tensor | None = None,
) -> None:
    """`vecquant2matmul` for 8 bits."""
    _multiply(8, vec, mat, mul, scales=scales, zeros=zeros, groups=groups)


@torch.no_grad()
def _multiply(
    bits: int,
    vec: Tensor,
    mat: Tensor,
    mul: Tensor,
    *,
    scales: Tensor,
    zeros: Tensor,
    groups: int | Tensor | None,
) -> None:
    if mul.shape != (*vec.shape[:-1], mat.shape[1]):
        raise ValueError(
            f"mul has shape {tuple(mul.shape)}; vec {tuple(vec.shape)} times a weight of "
            f"{mat.shape[1]} outputs makes {(*vec.shape[:-1], mat.shape[1])}"
        )
    if groups is None:
        product = _float_zeros(bits, vec, mat, scales, zeros)
    else:
        weight = _weight(bits, vec, mat, scales, zeros, groups)
        if vec.is_cuda and "cuda" in operator.engines() and vec.dtype != torch.float64:
            # The words are left in order, because reordering them costs more than one matmul.
            product = kernels.matmul(vec, layout.plain(weight))
        else:
            product = quant_cuda.matmul(vec, weight)
    mul.add_(product.to(mul.dtype))


def _float_zeros(bits: int, vec: Tensor, mat: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """vec @ weight of the first generation, whose zeros are scale * zero point."""
    if not zeros.is_floating_point():
        raise TypeError(
            f"zeros are {zeros.dtype}: packed zero points need a group size or g_idx after them"
        )
    outputs = mat.shape[1]
    if scales.numel() != outputs or zeros.numel() != outputs:
        raise ValueError(
            f"scales and zeros have shapes {tuple(scales.shape)} and {tuple(zeros.shape)}; without "
            f"a group size both must be ({outputs}, 1)"
        )
    q = unpack(mat, bits, vec.shape[-1]).to(scales.dtype)
    dequantized = (q * scales.reshape(1, -1)).sub_(zeros.reshape(1, -1))
    return vec @ dequantized.to(vec.dtype)


def _weight(
    bits: int, vec: Tensor, mat: Tensor, scales: Tensor, zeros: Tensor, groups: int | Tensor
) -> PackedWeight:
    by_input = isinstance(groups, Tensor)
    inputs = vec.shape[-1]
    return PackedWeight(
        qweight=mat,
        qzeros=zeros,
        scales=scales,
        g_idx=groups.to(torch.int32) if isinstance(groups, Tensor) else None,
        bits=bits,
        group_size=inputs if by_input or groups == -1 else int(groups),
        in_features=inputs,
    )
