"""Products with packed weights on NVIDIA GPUs: the layout of both backends, and the torch operator.

The CUDA kernels (`kernels`) and the Triton kernels (`triton`) read one layout.
"""

import functools
import importlib.util
from dataclasses import replace

import torch
from torch import Tensor

from quant_cuda import reference
from quant_cuda.cuda import kernels, layout
from quant_cuda.weight import Facts, PackedWeight, PreparedWeight

LAYOUT = "gpu"
NOT_THERE = "neither CUDA kernels (pip install . with nvcc) nor Triton are there for this GPU"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def engines() -> tuple[str, ...]:
    """Of "cuda" and "triton" what runs here, the better first; both need a GPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return ()
    has_triton = importlib.util.find_spec("triton") is not None
    return (*(("cuda",) if kernels.available() else ()), *(("triton",) if has_triton else ()))


def refuses(product: Facts) -> str | None:
    """Why there is no product of this kind here; None if there is."""
    if product.device != "cuda":
        return f"the weight is on a {product.device} device"
    if product.dtype not in _DTYPES:
        return f"activations are {product.dtype}, not float32, bfloat16 or float16"
    if product.scale_dtype == torch.float64:
        return "scales are float64"
    if product.in_features == 0 or product.out_features == 0:
        return "the weight is empty"
    return None


def prepare(weight: PackedWeight) -> PreparedWeight:
    """The weight as `tiles.prepack` makes it, on its device."""
    made = layout.prepack(weight)
    if isinstance(made, layout.Tiled):
        tensors = (made.words, made.table, *(() if made.order is None else (made.order,)))
    else:
        extra = () if made.g_idx is None else (made.g_idx,)
        tensors = (made.qweight, made.scales, made.zeros, *extra)
    return PreparedWeight(
        LAYOUT,
        tensors,
        weight.g_idx,
        weight.bits,
        weight.group_size,
        weight.in_features,
        weight.out_features,
        weight.zero_offset,
        weight.scales.dtype,
    )


def restore(weight: PreparedWeight) -> PackedWeight:
    """What `prepare` was given."""
    sizes = (weight.bits, weight.group_size, weight.in_features, weight.out_features)
    made = _view(list(weight.tensors), *sizes, weight.zero_offset, weight.scale_dtype)
    return replace(layout.unprepack(made), g_idx=weight.g_idx)


def matmul(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None = None,
    int8: bool = False,
    engine: str = "",
) -> Tensor:
    """x float16, bfloat16 or float32 (..., in) times the weight, plus bias (out,).

    int8: round activations to 8 bits with a scale for each group, as the reference does.
    engine: one of `engines()`; none for the first. Differentiable in x and bias.
    """
    if int8:
        x = reference.to_int8(x, weight)
    sizes = (weight.bits, weight.group_size, weight.in_features, weight.out_features)
    return torch.ops.quant_cuda.gpu_product(x, list(weight.tensors), bias, *sizes, engine)


traced = matmul

# Rows whose tiles are gathered at a time.
_ROWS = 256


def rows(weight: PreparedWeight, index: Tensor) -> Tensor:
    """The weights of some outputs: int64 (...) to float32 (..., in)."""
    sizes = (weight.bits, weight.group_size, weight.in_features, weight.out_features)
    view = _view(list(weight.tensors), *sizes, weight.zero_offset, weight.scale_dtype)
    columns = index.reshape(-1)
    some = [layout.rows(view, part) for part in columns.split(_ROWS)]
    return torch.cat(some).reshape(*index.shape, weight.in_features)


def _view(
    tensors: list[Tensor],
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    zero_offset: int = 1,
    scales_dtype: torch.dtype = torch.float16,
) -> layout.Prepacked:
    """The record that the kernels' modules take; tiles have three dimensions."""
    optional = tensors[2] if len(tensors) > 2 else None
    sizes = (in_features, out_features, group_size, zero_offset, scales_dtype)
    if tensors[0].dim() == 3:
        shift = layout.table_shift(group_size, in_features)
        assert shift is not None
        return layout.Tiled(tensors[0], tensors[1], optional, bits, shift, *sizes)
    qweight, scales, zeros, *rest = tensors
    return layout.Plain(qweight, scales, zeros, rest[0] if rest else None, bits, *sizes)


def _product(x, tensors, bias, bits, group_size, in_features, out_features, engine) -> Tensor:
    if (engine or engines()[0]) == "triton":
        from quant_cuda.cuda import triton

        multiply = triton.matmul
    else:
        multiply = kernels.matmul
    return multiply(x, _view(tensors, bits, group_size, in_features, out_features), bias)


def _numbers(tensors, bits, group_size, in_features, out_features, dtype, engine) -> Tensor:
    """The weight as dtype (in, out)."""
    view = _view(tensors, bits, group_size, in_features, out_features)
    if (engine or engines()[0]) == "triton":
        return reference.dequantize(layout.unprepack(view), dtype).contiguous()
    return kernels.dequantize(view, dtype).contiguous()


_LIB = torch.library.Library("quant_cuda", "FRAGMENT")
_LIB.define(
    "gpu_product(Tensor x, Tensor[] weight, Tensor? bias, int bits, int group_size, "
    "SymInt in_features, SymInt out_features, str engine) -> Tensor"
)
_LIB.define(
    "gpu_numbers(Tensor[] weight, int bits, int group_size, SymInt in_features, "
    "SymInt out_features, ScalarType dtype, str engine) -> Tensor"
)
_LIB.impl("gpu_product", _product, "CUDA")
_LIB.impl("gpu_numbers", _numbers, "CUDA")


@torch.library.register_fake("quant_cuda::gpu_product", lib=_LIB)
def _fake_product(x, weight, bias, bits, group_size, in_features, out_features, engine):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("quant_cuda::gpu_numbers", lib=_LIB)
def _fake_numbers(weight, bits, group_size, in_features, out_features, dtype, engine):
    return weight[0].new_empty((in_features, out_features), dtype=dtype)


def _remember(ctx, inputs, output) -> None:
    _, weight, bias, *ctx.sizes, ctx.engine = inputs
    ctx.save_for_backward(*weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(ctx, grad: Tensor):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        numbers = torch.ops.quant_cuda.gpu_numbers
        w = numbers(list(ctx.saved_tensors), *ctx.sizes, grad.dtype, ctx.engine)
        grad_x = grad @ w.T
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    nothing = [None] * len(ctx.saved_tensors)
    return grad_x, nothing, grad_bias, None, None, None, None, None


torch.library.register_autograd(
    "quant_cuda::gpu_product", _gradient, setup_context=_remember, lib=_LIB
)
