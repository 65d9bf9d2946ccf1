"""The GPU backends' torch operator: matmul by the CUDA kernels (`kernels`) or Triton's (`triton`).

Both read one layout.
"""

import functools
import importlib.util
from dataclasses import replace

import torch
from torch import Tensor

from quant_cuda import reference, transforms
from quant_cuda.cuda import kernels, layout, library
from quant_cuda.weight import Facts, PackedWeight, PreparedWeight

LAYOUT = "gpu"
NOT_THERE = "neither CUDA kernels (pip install . with nvcc) nor Triton are there for this GPU"
# Rows whose tiles `rows` gathers at a time.
_ROWS = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def engines() -> tuple[str, ...]:
    """Of "cuda" and "triton" those that run here, the better first; both need a GPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return ()
    has_triton = importlib.util.find_spec("triton") is not None
    return (*(("cuda",) if library.available() else ()), *(("triton",) if has_triton else ()))


def refuses(product: Facts) -> str | None:
    """Why the GPU backends cannot multiply these; None if they can."""
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
    """The weight as `layout.prepare` makes it, on its device."""
    made = layout.prepare(weight)
    if isinstance(made, layout.Tiled):
        tensors = (made.words, made.table, *(() if made.order is None else (made.order,)))
    else:
        extra = () if made.g_idx is None else (made.g_idx,)
        tensors = (made.qweight, made.scales, made.zeros, *extra)
    return PreparedWeight(
        layout=LAYOUT,
        tensors=tensors,
        g_idx=weight.g_idx,
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
        zero_offset=weight.zero_offset,
        scale_dtype=weight.scales.dtype,
    )


def restore(weight: PreparedWeight) -> PackedWeight:
    """What `prepare` was given, bit for bit."""
    return replace(layout.restore(view_of(weight)), g_idx=weight.g_idx)


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
    sizes = (weight.bits, weight.group_size, weight.in_features, weight.out_features)
    if not torch.compiler.is_compiling() and transforms.are_active():

        def dense(dtype: torch.dtype) -> Tensor:
            operator = torch.ops.quant_cuda.gpu_dequantize
            return operator(list(weight.tensors), *sizes, dtype, engine)

        return transforms.matmul(x, weight, bias, int8, dense)
    if int8:
        x = reference.to_int8(x, weight)
    return torch.ops.quant_cuda.gpu_product(x, list(weight.tensors), bias, *sizes, engine)


traced = matmul


def rows(weight: PreparedWeight, index: Tensor) -> Tensor:
    """The weights of some outputs: int64 (...) to float32 (..., in)."""
    tiles = view_of(weight)
    parts = [layout.rows(tiles, part) for part in index.reshape(-1).split(_ROWS)]
    return torch.cat(parts).reshape(*index.shape, weight.in_features)


def view_of(weight: PreparedWeight) -> layout.KernelWeight:
    return view(
        list(weight.tensors),
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
        zero_offset=weight.zero_offset,
        scales_dtype=weight.scale_dtype,
    )


def view(
    tensors: list[Tensor],
    *,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    zero_offset: int = 1,
    scales_dtype: torch.dtype = torch.float16,
) -> layout.KernelWeight:
    """The record of a prepared weight's tensors that `kernels` and `triton` take.

    zero_offset, scales_dtype: matter to `layout.restore` alone.
    """
    optional = tensors[2] if len(tensors) > 2 else None
    # Tiles have three dimensions, and the words of a checkpoint two.
    if tensors[0].dim() == 3:
        shift = layout.table_shift(group_size, in_features)
        assert shift is not None
        return layout.Tiled(
            words=tensors[0],
            table=tensors[1],
            order=optional,
            bits=bits,
            shift=shift,
            in_features=in_features,
            out_features=out_features,
            group_size=group_size,
            zero_offset=zero_offset,
            scales_dtype=scales_dtype,
        )
    qweight, scales, zeros, *rest = tensors
    return layout.Plain(
        qweight=qweight,
        scales=scales,
        zeros=zeros,
        g_idx=rest[0] if rest else None,
        bits=bits,
        in_features=in_features,
        out_features=out_features,
        group_size=group_size,
        zero_offset=zero_offset,
        scales_dtype=scales_dtype,
    )


# The operator ---------------------------------------------------------------------------------


def _product(x, tensors, bias, bits, group_size, in_features, out_features, engine) -> Tensor:
    weight = view(
        tensors,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
    )
    if (engine or engines()[0]) == "triton":
        from quant_cuda.cuda import triton

        return triton.matmul(x, weight, bias)
    return kernels.matmul(x, weight, bias)


def _dequantize(tensors, bits, group_size, in_features, out_features, dtype, engine) -> Tensor:
    """The dequantized weight, dtype (in, out)."""
    weight = view(
        tensors,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
    )
    if (engine or engines()[0]) == "triton":
        return reference.dequantize(layout.restore(weight), dtype).contiguous()
    return kernels.dequantize(weight, dtype).contiguous()


_LIB = torch.library.Library("quant_cuda", "FRAGMENT")
_LIB.define(
    "gpu_product(Tensor x, Tensor[] weight, Tensor? bias, int bits, int group_size, "
    "SymInt in_features, SymInt out_features, str engine) -> Tensor"
)
_LIB.define(
    "gpu_dequantize(Tensor[] weight, int bits, int group_size, SymInt in_features, "
    "SymInt out_features, ScalarType dtype, str engine) -> Tensor"
)
_LIB.impl("gpu_product", _product, "CUDA")
_LIB.impl("gpu_dequantize", _dequantize, "CUDA")


@torch.library.register_fake("quant_cuda::gpu_product", lib=_LIB)
def _fake_product(x, weight, bias, bits, group_size, in_features, out_features, engine):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("quant_cuda::gpu_dequantize", lib=_LIB)
def _fake_dequantize(weight, bits, group_size, in_features, out_features, dtype, engine):
    return weight[0].new_empty((in_features, out_features), dtype=dtype)


def _save_for_gradient(ctx, inputs, output) -> None:
    _, weight, bias, *ctx.sizes, ctx.engine = inputs
    ctx.save_for_backward(*weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(ctx, grad: Tensor):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dequantize = torch.ops.quant_cuda.gpu_dequantize
        w = dequantize(list(ctx.saved_tensors), *ctx.sizes, grad.dtype, ctx.engine)
        grad_x = grad @ w.T
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    nothing = [None] * len(ctx.saved_tensors)
    return grad_x, nothing, grad_bias, None, None, None, None, None


torch.library.register_autograd(
    "quant_cuda::gpu_product", _gradient, setup_context=_save_for_gradient, lib=_LIB
)
