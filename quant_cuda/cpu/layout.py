"""The CPU kernels' layout of a weight: tiles, made of a packed weight and turned back into one.

csrc/cpu/tiles.h defines the tiles and the plan, a record of int32 that describes them.
"""

import functools

import torch
from torch import Tensor

from quant_cuda.cpu import library
from quant_cuda.packing import words_for
from quant_cuda.weight import MAX_RUN, PackedWeight, PreparedWeight, natural_groups

__all__ = ["LAYOUT", "dequantize", "dequantize_outputs", "prepare", "restore", "rows"]

LAYOUT = "cpu"
# Inputs of a unit, as in csrc/cpu/tiles.h.
_UNIT = 32


def prepare(weight: PackedWeight) -> PreparedWeight:
    """The weight in tiles. `tensors` are the data, uint8, and the plan that describes it, int32."""
    compiled = library.required()
    # Scales of every other type are stored as float32, which holds them exactly.
    is_half = weight.scales.dtype == torch.float16
    scales = weight.scales if is_half else weight.scales.float()
    g_idx = None if weight.g_idx is None else weight.g_idx.clone()
    sizes = {
        "bits": weight.bits,
        "in_features": weight.in_features,
        "out_features": weight.out_features,
        "groups": weight.scales.shape[0],
        "scale_bytes": 2 if is_half else 4,
        "zero_offset": weight.zero_offset,
    }
    if g_idx is None:
        plan = _natural_plan(group_size=weight.group_size, **sizes)
    else:
        plan = _plan(g_idx=g_idx, **sizes)
    data = torch.empty(compiled.quant_cuda_tiles_bytes(plan.data_ptr()), dtype=torch.uint8)
    sources = [t.contiguous() for t in (weight.qweight, weight.qzeros, scales)]
    pointers = (t.data_ptr() for t in (plan, *sources, data))
    compiled.quant_cuda_tiles_pack(*pointers, torch.get_num_threads())
    return PreparedWeight(
        layout=LAYOUT,
        tensors=(data, plan),
        g_idx=g_idx,
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
        zero_offset=weight.zero_offset,
        scale_dtype=weight.scales.dtype,
    )


def restore(weight: PreparedWeight) -> PackedWeight:
    """What `prepare` was given, bit for bit."""
    data, plan = weight.tensors
    groups = int(plan[3])
    words, zero_words = (
        words_for(count, weight.bits) for count in (weight.in_features, weight.out_features)
    )
    qweight = torch.zeros((words, weight.out_features), dtype=torch.int32)
    qzeros = torch.zeros((groups, zero_words), dtype=torch.int32)
    stored = torch.float16 if weight.scale_dtype == torch.float16 else torch.float32
    scales = torch.empty((groups, weight.out_features), dtype=stored)
    pointers = (t.data_ptr() for t in (plan, data, qweight, qzeros, scales))
    library.required().quant_cuda_tiles_unpack(*pointers, torch.get_num_threads())
    return PackedWeight(
        qweight=qweight,
        qzeros=qzeros,
        scales=scales.to(weight.scale_dtype),
        g_idx=weight.g_idx,
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        zero_offset=weight.zero_offset,
    )


def dequantize(weight: PreparedWeight) -> Tensor:
    """The dequantized weight, float32 (out, in)."""
    data, plan = weight.tensors
    return dequantize_outputs(data, plan, weight.in_features, weight.out_features).T


def dequantize_outputs(
    data: Tensor, plan: Tensor, in_features: int, count: int, first: int = 0
) -> Tensor:
    """The dequantized weights of `count` outputs from `first` on, a multiple of 32, as float32
    (in, count)."""
    w = torch.empty((in_features, count), dtype=torch.float32)
    pointers = (t.data_ptr() for t in (plan, data, w))
    compiled = library.required()
    compiled.quant_cuda_tiles_numbers(*pointers, first, count, torch.get_num_threads())
    return w


def rows(weight: PreparedWeight, index: Tensor) -> Tensor:
    """The weights of some outputs: int64 (...), each in 0..out - 1, to float32 (..., in).

    Raises IndexError for an output that is not there.
    """
    data, plan = weight.tensors
    return torch.ops.quant_cuda.cpu_rows(index, data, plan, weight.in_features)


def _rows(index: Tensor, data: Tensor, plan: Tensor, in_features: int) -> Tensor:
    outputs = int(plan[2])
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < outputs:
        raise IndexError(f"a row lies outside 0..{outputs - 1}")
    index = index.to(torch.int64).contiguous()
    w = torch.empty((*index.shape, in_features), dtype=torch.float32)
    pointers = (t.data_ptr() for t in (plan, data, index, w))
    library.required().quant_cuda_tiles_rows(*pointers, index.numel(), torch.get_num_threads())
    return w


# The plan -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _natural_plan(*, in_features: int, group_size: int, **sizes: int) -> Tensor:
    """The plan of groups that are runs of neighbours. Cached: layers of one shape share it."""
    g_idx = natural_groups(in_features, group_size, torch.device("cpu"))
    return _plan(in_features=in_features, g_idx=g_idx, **sizes)


def _plan(
    *,
    bits: int,
    in_features: int,
    out_features: int,
    groups: int,
    scale_bytes: int,
    zero_offset: int,
    g_idx: Tensor,
) -> Tensor:
    """The record that csrc/cpu/tiles.h describes, int32; g_idx: integer (in,)."""
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
    unit_start = first_unit[g_idx[inputs]] * _UNIT + within // _UNIT * _UNIT
    # `in_features` marks a place of a unit that no input fills.
    order = torch.full((total * _UNIT,), in_features)
    order[unit_start + _places(bits)[within % _UNIT]] = inputs
    header = (bits, in_features, out_features, groups, len(starts), total, scale_bytes, zero_offset)
    record = torch.tensor([*header, *starts, total, *run_groups])
    return torch.cat([record, order]).to(torch.int32)


def _places(bits: int) -> Tensor:
    """The place in a unit of each of its inputs: eight steps of four bytes each."""
    step, b = torch.arange(_UNIT) // 4, torch.arange(_UNIT) % 4
    if bits == 8:
        inputs = 4 * step + b
    elif bits == 4:
        inputs = 8 * (step // 2) + 2 * b + step % 2
    else:
        inputs = 16 * (step // 4) + 4 * b + step % 4
    return torch.argsort(inputs)


# The operators --------------------------------------------------------------------------------

_LIB = torch.library.Library("quant_cuda", "FRAGMENT")
_LIB.define(
    "cpu_dequantize(Tensor data, Tensor plan, SymInt in_features, SymInt out_features) -> Tensor"
)
_LIB.define("cpu_rows(Tensor index, Tensor data, Tensor plan, SymInt in_features) -> Tensor")
_LIB.impl("cpu_dequantize", dequantize_outputs, "CPU")
_LIB.impl("cpu_rows", _rows, "CPU")


@torch.library.register_fake("quant_cuda::cpu_dequantize", lib=_LIB)
def _fake_dequantize(data, plan, in_features, out_features):
    return data.new_empty((in_features, out_features), dtype=torch.float32)


@torch.library.register_fake("quant_cuda::cpu_rows", lib=_LIB)
def _fake_rows(index, data, plan, in_features):
    return data.new_empty((*index.shape, in_features), dtype=torch.float32)
