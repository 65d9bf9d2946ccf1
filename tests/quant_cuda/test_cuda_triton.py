"""The Triton kernel: its arithmetic under Triton's interpreter, and that it compiles for GPUs."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.products import activations, assert_as_good_as_naive, packed

from quant_cuda.cuda import layout

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from quant_cuda.cuda import triton as triton_kernels  # noqa: E402


@pytest.fixture(scope="module")
def interpreted():
    """A second copy of the module, whose kernels run in Python on CPU tensors."""
    name = "triton_kernels_interpreted"
    spec = importlib.util.spec_from_file_location(name, Path(triton_kernels.__file__))
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n_in", "n_out", "group_size"),
    [
        (256, 64, 128),
        (576, 48, 128),  # a short last group
        (160, 5, 32),
        (416, 40, -1),
        (288, 33, 96),
        (32, 1, 128),
        (100, 70, 64),
    ],
)
def test_against_float64(interpreted, bits, dtype, n_in, n_out, group_size):
    if bits == 4 and n_in == 100:
        n_in = 104
    weight, matrix = packed(bits, n_in, n_out, group_size)
    for rows in (1, 17) if dtype == torch.float32 else (1, 17, 70):
        x = activations(rows, n_in, dtype=dtype)
        y = interpreted.matmul(x, layout.prepare(weight))
        assert_as_good_as_naive(y, x, matrix)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("g_idx", [False, True])
def test_conventions(interpreted, bits, zero_offset, g_idx):
    weight, matrix = packed(bits, 192, 37, 64, zero_offset, g_idx)
    x = activations(2, 3, 192, dtype=torch.float16)
    assert_as_good_as_naive(interpreted.matmul(x, layout.prepare(weight)), x, matrix)


def test_split_inputs(interpreted):
    weight, matrix = packed(4, 4096, 8, 128)
    x = activations(2, 4096, dtype=torch.float16)
    y = interpreted.matmul(x, layout.prepare(weight))
    assert_as_good_as_naive(y, x, matrix)
    assert torch.equal(y, interpreted.matmul(x, layout.prepare(weight)))


def test_every_integer_at_the_greatest_zero_point(interpreted):
    """Steps of 0..255 less 256: exact in float16."""
    weight, _ = packed(8, 256, 32, -1)
    ones = torch.ones_like(weight.scales)
    weight = dataclasses.replace(weight, qzeros=torch.full_like(weight.qzeros, -1), scales=ones)
    y = interpreted.matmul(torch.eye(256, dtype=torch.float16), layout.prepare(weight))
    from quant_cuda.packing import unpack

    expected = unpack(weight.qweight, 8, 256).double().numpy() - 256
    assert np.array_equal(y.double().numpy(), expected)


def test_empty_and_unfit_x(interpreted):
    weight = layout.prepare(packed(4)[0])
    for shape in ((0, 96), (2, 0, 96)):
        assert interpreted.matmul(torch.empty(shape), weight).shape == (*shape[:-1], 24)
    with pytest.raises(ValueError, match="does not fit a weight of 96 inputs"):
        interpreted.matmul(torch.ones(2, 95), weight)
    with pytest.raises(TypeError, match="must be float16"):
        interpreted.matmul(torch.ones(2, 96, dtype=torch.float64), weight)


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def compiles(capability: int, bits: int, dtype: str, shift: int, rows: int) -> None:
    variant = triton_kernels.variants(bits, shift, rows, DTYPES[dtype])
    constants = {"STEPS": 9, **variant}
    pointers = {"x": f"*{dtype}", "words": "*i32", "table": "*i32", "y": "*fp32"}
    numbers = ("rows", "inputs", "outputs", "columns", "blocks", "shift")
    source = ASTSource(
        triton_kernels.product,
        {**pointers, **dict.fromkeys(numbers, "i32"), **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert f"sm_{capability}" in compiled.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_compiles(capability, bits):
    compiles(capability, bits, "fp16", 7, 64)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [5, 6, 30])
@pytest.mark.parametrize("rows", [1, 32, 64])
def test_every_variant_compiles(capability, bits, dtype, shift, rows):
    compiles(capability, bits, dtype, shift, rows)


@pytest.mark.gpu
def test_on_a_gpu():
    for bits in (4, 8):
        for dtype in (torch.float16, torch.bfloat16):
            weight, matrix = packed(bits, 576, 48, 128)
            prepared = layout.prepare(weight)
            moved = {n: getattr(prepared, n).cuda() for n in ("words", "table")}
            prepared = dataclasses.replace(prepared, **moved)
            for rows in (1, 17, 70):
                x = activations(rows, 576, dtype=dtype)
                y = triton_kernels.matmul(x.cuda(), prepared)
                assert_as_good_as_naive(y.cpu(), x, matrix)
