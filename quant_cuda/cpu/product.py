"""Matmul with a weight in the CPU kernels' tiles, and its torch operator.

csrc/cpu/product.h has the arithmetic.
"""

import functools

import torch
from torch import Tensor

from quant_cuda import transforms
from quant_cuda.cpu import library
from quant_cuda.cpu.layout import dequantize_outputs
from quant_cuda.weight import Facts, PreparedWeight

MANY_ROWS, MANY_ROWS_OF_BYTES = 64, 192
"""From here on torch's dense matmul may be faster, see `_dense_dtype`."""
DENSE_OUTPUTS = 512
"""Outputs whose dequantized weights are in memory at a time; a multiple of 32."""
_PLAIN_BIASES = (Tensor, torch.nn.Parameter)
_trace = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
# The order of csrc/cpu/product_args.h.
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refuses(product: Facts) -> str | None:
    """Why the compiled code cannot multiply these; None if it can."""
    if product.device != "cpu":
        return f"the weight is on a {product.device} device"
    for what, dtype in (("activations", product.dtype), ("scales", product.scale_dtype)):
        if dtype not in _KINDS:
            return f"{what} are {dtype}, not float32, bfloat16 or float16"
    if product.in_features == 0 or product.out_features == 0:
        return "the weight is empty"
    return None


def matmul(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None = None,
    int8: bool = False,
    instruction_set: int = -1,
) -> Tensor:
    """x float32, bfloat16 or float16 (..., in) times the weight, plus bias float32 (out,).

    int8: round activations to 8 bits with a scale for each group.
    instruction_set: index in `library.compiled()` of one that runs here; -1 for the best.
    Differentiable in x and bias.
    """
    if not is_plain(x, bias):
        if transforms.are_active():
            dense = functools.partial(_dequantize, weight)
            return transforms.matmul(x, weight, bias, int8, dense)
        return traced(x, weight, bias, int8, instruction_set)
    bias = bias if bias is None else bias.detach().float().contiguous()
    data, plan = weight.tensors
    return _product(
        x,
        data,
        plan,
        bias,
        out_features=weight.out_features,
        int8=int8,
        instruction_set=instruction_set,
    )


def traced(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None = None,
    int8: bool = False,
    instruction_set: int = -1,
) -> Tensor:
    """`matmul` through the torch operator."""
    bias = bias if bias is None else bias.float().contiguous()
    operator = torch.ops.quant_cuda.cpu_product
    return operator(x, *weight.tensors, bias, weight.out_features, int8, instruction_set)


def _dequantize(weight: PreparedWeight, dtype: torch.dtype) -> Tensor:
    sizes = weight.in_features, weight.out_features
    return torch.ops.quant_cuda.cpu_dequantize(*weight.tensors, *sizes).to(dtype)


def is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's dispatcher can be left out: no gradient, forward-mode AD, transform of
    torch.func, trace, mode or tensor subclass.

    It would add only its time, which is more than the matmul of a small layer takes.
    """
    return (
        type(x) is Tensor
        and (bias is None or (type(bias) in _PLAIN_BIASES and not bias.is_neg()))
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or (bias is not None and bias.requires_grad))
        )
        and not transforms.are_active()
        and _trace() is None
        and not _dispatch_modes()
        and not _function_modes()
        # The memory of the first holds the numbers with the other sign; the second has none.
        and not x.is_neg()
        and not x._is_zerotensor()
    )


def _product(
    x: Tensor,
    data: Tensor,
    plan: Tensor,
    bias: Tensor | None,
    out_features: int,
    int8: bool,
    instruction_set: int,
) -> Tensor:
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    rows = y.numel() // out_features
    index = library.best() if instruction_set < 0 else instruction_set
    if rows >= MANY_ROWS and not int8:
        dtype = _dense_dtype(rows, x.dtype, int(plan[0]), library.compiled()[index])
        if dtype is not None:
            _dense_product(x.to(dtype), data, plan, bias, y)
            return y
    library.required().quant_cuda_product(
        index,
        x.data_ptr(),
        data.data_ptr(),
        plan.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        rows,
        _KINDS[x.dtype],
        1 if int8 else 2,
        torch.get_num_threads(),
    )
    return y


def _dense_dtype(
    rows: int, dtype: torch.dtype, bits: int, instruction_set: str
) -> torch.dtype | None:
    """The dtype in which torch multiplies so many rows faster than our code; None for none."""
    if dtype == torch.bfloat16 and _has_bfloat16():
        return torch.bfloat16
    # Weights of 8 bits take twice the multiplications without VNNI.
    costly = bits == 8 and instruction_set in ("avx512", "avx2") and rows >= MANY_ROWS_OF_BYTES
    return torch.float32 if costly or instruction_set == "generic" else None


@functools.cache
def _has_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 on hardware units for it here."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _dense_product(x: Tensor, data: Tensor, plan: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Multiply with torch in x's dtype, into y, dequantizing DENSE_OUTPUTS outputs at a time."""
    rows, result = x.flatten(0, -2), y.flatten(0, -2)
    for first in range(0, y.shape[-1], DENSE_OUTPUTS):
        count = min(DENSE_OUTPUTS, y.shape[-1] - first)
        part = rows @ dequantize_outputs(data, plan, x.shape[-1], count, first).to(x.dtype)
        if bias is not None:
            part = part + bias[first : first + count]
        result[:, first : first + count] = part


# The operator ---------------------------------------------------------------------------------

_LIB = torch.library.Library("quant_cuda", "FRAGMENT")
_LIB.define(
    "cpu_product(Tensor x, Tensor data, Tensor plan, Tensor? bias, SymInt out_features, bool int8, "
    "int instruction_set) -> Tensor"
)
_LIB.impl("cpu_product", _product, "CPU")


@torch.library.register_fake("quant_cuda::cpu_product", lib=_LIB)
def _fake_product(x, data, plan, bias, out_features, int8, instruction_set):
    return x.new_empty((*x.shape[:-1], out_features))


def _save_for_gradient(ctx, inputs, output) -> None:
    x, data, plan, bias, *_ = inputs
    ctx.save_for_backward(data, plan)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(ctx, grad: Tensor):
    """The gradient of the matmul with the dequantized weight; rounding to int8 counts as none."""
    data, plan = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        w = torch.ops.quant_cuda.cpu_dequantize(data, plan, ctx.in_features, grad.shape[-1])
        grad_x = grad @ w.to(grad.dtype).T
    if ctx.needs_input_grad[3]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None


torch.library.register_autograd(
    "quant_cuda::cpu_product", _gradient, setup_context=_save_for_gradient, lib=_LIB
)
