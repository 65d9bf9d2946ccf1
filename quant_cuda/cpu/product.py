"""Products with packed weights by the compiled CPU code: its layout, and the torch operator.

csrc/cpu/tiles.h defines the layout, csrc/cpu/product.h the arithmetic.
"""

import functools

import torch
from torch import Tensor

from quant_cuda.cpu import library as native
from quant_cuda.weight import MAX_RUN, Facts, PackedWeight, PreparedWeight

LAYOUT = "cpu"
NOT_BUILT = "the compiled CPU code was not built: pip install . with a C++ compiler"
_UNIT = 32
MANY_ROWS, MANY_ROWS_OF_BYTES = 64, 192
"""From here on torch's dense products may be faster, see `_dense_dtype`."""
DENSE_OUTPUTS = 512
"""A multiple of 32: their numbers are in memory at a time."""
# The order of csrc/cpu/product_args.h.
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refuses(product: Facts) -> str | None:
    """Why there is no native product of this kind; None if there is."""
    if product.device != "cpu":
        return f"the weight is on a {product.device} device"
    for what, dtype in (("activations", product.dtype), ("scales", product.scale_dtype)):
        if dtype not in _KINDS:
            return f"{what} are {dtype}, not float32, bfloat16 or float16"
    if product.in_features == 0 or product.out_features == 0:
        return "the weight is empty"
    return None


def prepare(weight: PackedWeight) -> PreparedWeight:
    """The weight in tiles. `tensors` are the data, uint8, and the plan that describes it, int32."""
    found = library()
    halves = weight.scales.dtype == torch.float16
    scales = weight.scales if halves else weight.scales.float()
    g_idx = None if weight.g_idx is None else weight.g_idx.clone()
    shape = (weight.bits, weight.in_features, weight.out_features, weight.scales.shape[0])
    rest = (2 if halves else 4, weight.zero_offset)
    plan = (
        _natural_plan(*shape, *rest, weight.group_size)
        if g_idx is None
        else _plan(*shape, *rest, g_idx)
    )
    data = torch.empty(found.quant_cuda_tiles_bytes(plan.data_ptr()), dtype=torch.uint8)
    sources = [t.contiguous() for t in (weight.qweight, weight.qzeros, scales)]
    found.quant_cuda_tiles_pack(
        plan.data_ptr(),
        *(t.data_ptr() for t in sources),
        data.data_ptr(),
        torch.get_num_threads(),
    )
    return PreparedWeight(
        LAYOUT,
        (data, plan),
        g_idx,
        weight.bits,
        weight.group_size,
        weight.in_features,
        weight.out_features,
        weight.zero_offset,
        weight.scales.dtype,
    )


def restore(weight: PreparedWeight) -> PackedWeight:
    """What `prepare` was given."""
    data, plan = weight.tensors
    bits, groups = weight.bits, int(plan[3])
    rows, zero_words = (-(-n * bits // 32) for n in (weight.in_features, weight.out_features))
    qweight = torch.zeros((rows, weight.out_features), dtype=torch.int32)
    qzeros = torch.zeros((groups, zero_words), dtype=torch.int32)
    stored = torch.float16 if weight.scale_dtype == torch.float16 else torch.float32
    scales = torch.empty((groups, weight.out_features), dtype=stored)
    library().quant_cuda_tiles_unpack(
        *(t.data_ptr() for t in (plan, data, qweight, qzeros, scales)), torch.get_num_threads()
    )
    return PackedWeight(
        qweight,
        qzeros,
        scales.to(weight.scale_dtype),
        weight.g_idx,
        bits,
        weight.group_size,
        weight.in_features,
        weight.zero_offset,
    )


def matmul(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None = None,
    int8: bool = False,
    instruction_set: int = -1,
) -> Tensor:
    """x float32, bfloat16 or float16 (..., in) times the weight, plus bias float32 (out,).

    int8: round activations to 8 bits with a scale for each group.
    instruction_set: index in `native.compiled()` of one that runs here; -1 for the best.
    Differentiable in x and bias.
    """
    if not is_plain(x, bias):
        return traced(x, weight, bias, int8, instruction_set)
    data, plan = weight.tensors
    bias = bias if bias is None else bias.detach().float().contiguous()
    return _product(x, data, plan, bias, weight.out_features, int8, instruction_set)


def traced(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None = None,
    int8: bool = False,
    instruction_set: int = -1,
) -> Tensor:
    """`matmul` as an operator that torch knows."""
    data, plan = weight.tensors
    bias = bias if bias is None else bias.float().contiguous()
    return torch.ops.quant_cuda.cpu_product(
        x, data, plan, bias, weight.out_features, int8, instruction_set
    )


def numbers(weight: PreparedWeight) -> Tensor:
    """What the weight stands for, float32 (out, in)."""
    data, plan = weight.tensors
    return _numbers(data, plan, weight.in_features, weight.out_features).T


def rows(weight: PreparedWeight, index: Tensor) -> Tensor:
    """The weights of some outputs: int64 (...), each in 0..out - 1, to float32 (..., in)."""
    data, plan = weight.tensors
    return torch.ops.quant_cuda.cpu_rows(index, data, plan, weight.in_features)


def is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing watches: no gradient, no mode, no tensor of another kind. The dispatcher then
    adds nothing but its time, which is more than that of a small layer's product."""
    return (
        type(x) is Tensor
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or (bias is not None and bias.requires_grad))
        )
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
    )


def _product(
    x: Tensor,
    data: Tensor,
    plan: Tensor,
    bias: Tensor | None,
    out_features: int,
    int8: bool,
    index: int,
) -> Tensor:
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    rows = y.numel() // out_features
    index = best() if index < 0 else index
    if rows >= MANY_ROWS and not int8:
        dtype = _dense_dtype(rows, x.dtype, int(plan[0]), native.compiled()[index])
        if dtype is not None:
            _dense_product(x, data, plan, bias, dtype, y)
            return y
    library().quant_cuda_product(
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
    """The type in which torch multiplies so many rows faster than our code does; None for none."""
    if dtype == torch.bfloat16 and _has_bfloat16():
        return torch.bfloat16
    # Weights of 8 bits cost twice the products without VNNI.
    costly = bits == 8 and instruction_set in ("avx512", "avx2") and rows >= MANY_ROWS_OF_BYTES
    return torch.float32 if costly or instruction_set == "generic" else None


@functools.cache
def _has_bfloat16() -> bool:
    """Whether torch's bfloat16 products run on units for them here."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _dense_product(
    x: Tensor,
    data: Tensor,
    plan: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    y: Tensor,
) -> None:
    """The product by torch, into y, with the weight's numbers made a block of outputs at a time."""
    rows, result = x.flatten(0, -2).to(dtype), y.flatten(0, -2)
    for first in range(0, y.shape[-1], DENSE_OUTPUTS):
        count = min(DENSE_OUTPUTS, y.shape[-1] - first)
        part = rows @ _numbers(data, plan, x.shape[-1], count, first).to(dtype)
        if bias is not None:
            part = part + bias[first : first + count]
        result[:, first : first + count] = part


@functools.cache
def best() -> int:
    return native.compiled().index(native.instruction_sets()[0])


def _numbers(
    data: Tensor, plan: Tensor, in_features: int, out_features: int, first: int = 0
) -> Tensor:
    """The weights of outputs from `first` on, a multiple of 32, as float32 (in, out)."""
    w = torch.empty((in_features, out_features), dtype=torch.float32)
    pointers = (t.data_ptr() for t in (plan, data, w))
    library().quant_cuda_tiles_numbers(*pointers, first, out_features, torch.get_num_threads())
    return w


def _rows(index: Tensor, data: Tensor, plan: Tensor, in_features: int) -> Tensor:
    outputs = int(plan[2])
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < outputs:
        raise IndexError(f"a row lies outside 0..{outputs - 1}")
    index = index.to(torch.int64).contiguous()
    w = torch.empty((*index.shape, in_features), dtype=torch.float32)
    library().quant_cuda_tiles_rows(
        *(t.data_ptr() for t in (plan, data, index, w)), index.numel(), torch.get_num_threads()
    )
    return w


def library():
    found = native.library()
    if found is None:
        raise ValueError(
            "the compiled CPU code is not there: run pip install . with a C++ compiler"
        )
    return found


# The plan -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _natural_plan(
    bits: int,
    in_features: int,
    out_features: int,
    groups: int,
    scale_bytes: int,
    zero_offset: int,
    group_size: int,
) -> Tensor:
    """Layers of one shape share it."""
    size = in_features if group_size == -1 else group_size
    g_idx = torch.arange(in_features) // size
    return _plan(bits, in_features, out_features, groups, scale_bytes, zero_offset, g_idx)


def _plan(
    bits: int,
    in_features: int,
    out_features: int,
    groups: int,
    scale_bytes: int,
    zero_offset: int,
    g_idx: Tensor,
) -> Tensor:
    """The record of csrc/cpu/tiles.h; g_idx: integer (in,)."""
    g_idx = g_idx.long()
    inputs = torch.argsort(g_idx, stable=True)
    counts = torch.bincount(g_idx, minlength=groups)
    units = -(-counts // _UNIT)
    first_unit = units.cumsum(0) - units
    first_input = counts.cumsum(0) - counts
    starts, run_groups = [], []
    for group, (first, count) in enumerate(zip(first_unit.tolist(), units.tolist(), strict=True)):
        for unit in range(0, count, MAX_RUN // _UNIT):
            starts.append(first + unit)
            run_groups.append(group)
    total = int(units.sum())
    within = torch.arange(in_features) - first_input[g_idx[inputs]]
    place = first_unit[g_idx[inputs]] * _UNIT + within // _UNIT * _UNIT
    order = torch.full((total * _UNIT,), in_features)
    order[place + _places(bits)[within % _UNIT]] = inputs
    numbers = (bits, in_features, out_features, groups, len(starts), total, scale_bytes)
    record = [*numbers, zero_offset, *starts, total, *run_groups]
    return torch.cat([torch.tensor(record), order]).to(torch.int32)


def _places(bits: int) -> Tensor:
    """Where in a unit each of its inputs stands: four bytes of a step, eight steps."""
    step, b = torch.arange(_UNIT) // 4, torch.arange(_UNIT) % 4
    if bits == 8:
        inputs = 4 * step + b
    elif bits == 4:
        inputs = 8 * (step // 2) + 2 * b + step % 2
    else:
        inputs = 16 * (step // 4) + 4 * b + step % 4
    return torch.argsort(inputs)


# The operator ---------------------------------------------------------------------------------

_LIB = torch.library.Library("quant_cuda", "FRAGMENT")
_LIB.define(
    "cpu_product(Tensor x, Tensor data, Tensor plan, Tensor? bias, SymInt out_features, bool int8, "
    "int instruction_set) -> Tensor"
)
_LIB.define(
    "cpu_numbers(Tensor data, Tensor plan, SymInt in_features, SymInt out_features) -> Tensor"
)
_LIB.define("cpu_rows(Tensor index, Tensor data, Tensor plan, SymInt in_features) -> Tensor")
_LIB.impl("cpu_rows", _rows, "CPU")
_LIB.impl("cpu_product", _product, "CPU")
_LIB.impl("cpu_numbers", _numbers, "CPU")


@torch.library.register_fake("quant_cuda::cpu_product", lib=_LIB)
def _fake_product(x, data, plan, bias, out_features, int8, instruction_set):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("quant_cuda::cpu_numbers", lib=_LIB)
def _fake_numbers(data, plan, in_features, out_features):
    return data.new_empty((in_features, out_features), dtype=torch.float32)


@torch.library.register_fake("quant_cuda::cpu_rows", lib=_LIB)
def _fake_rows(index, data, plan, in_features):
    return data.new_empty((*index.shape, in_features), dtype=torch.float32)


def _remember(ctx, inputs, output) -> None:
    x, data, plan, bias, *_ = inputs
    ctx.save_for_backward(data, plan)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(ctx, grad: Tensor):
    """Of the product with the numbers the weight stands for; rounding to int8 counts as none."""
    data, plan = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        w = torch.ops.quant_cuda.cpu_numbers(data, plan, ctx.in_features, grad.shape[-1])
        grad_x = grad @ w.to(grad.dtype).T
    if ctx.needs_input_grad[3]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None


torch.library.register_autograd(
    "quant_cuda::cpu_product", _gradient, setup_context=_remember, lib=_LIB
)
