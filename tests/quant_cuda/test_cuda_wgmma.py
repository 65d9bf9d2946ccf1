"""The CUDA kernel of compute capability 9.0: its own source under the host's compiler, and on a GPU
that has the instructions."""

import dataclasses

import pytest
import torch
from helpers.products import activations, assert_as_good_as_naive, check, packed, ready

from quant_cuda.cuda import kernels as cuda
from quant_cuda.cuda import layout

CAPABILITY = (9, 0)
BITS = (4, 8)
DTYPES = (torch.float16, torch.bfloat16)
SHAPES = [
    (256, 64, 128),  # whole blocks; most warps have no columns
    (576, 160, 128),  # a short last group, more than one thread block
    (160, 5, 32),  # groups smaller than a block, few outputs
    (416, 40, -1),  # one group, a part of a block
    (288, 33, 96),  # groups of no power of two
    (40, 1, 128),  # a part of a run
]


def multiply(kernels, x, prepared, processors=4, bias=None):
    there = None if bias is None else bias.to(kernels.device)
    y = kernels.matmul(x.to(kernels.device), prepared, processors, there, kernel="wgmma")
    return y.cpu()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out", "group_size"), SHAPES)
def test_against_float64(kernels, bits, dtype, n_in, n_out, group_size):
    weight, matrix = packed(bits, n_in, n_out, group_size)
    prepared = ready(kernels, weight)
    for rows in (1, 70):
        x = activations(rows, n_in, dtype=dtype)
        assert_as_good_as_naive(multiply(kernels, x, prepared), x, matrix)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("column_tile", [128, 256])
def test_several_thread_blocks(kernels, bits, column_tile, monkeypatch):
    """Two along the rows, two or three along the columns; inputs in another order."""
    monkeypatch.setattr(cuda, "_column_tile", lambda *arguments: column_tile)
    weight, matrix = packed(bits, 160, 272, 32, g_idx=True)
    x = activations(130, 160, dtype=torch.float16)
    assert_as_good_as_naive(multiply(kernels, x, ready(kernels, weight)), x, matrix)


@pytest.mark.parametrize("bits", BITS)
def test_inputs_split_over_thread_blocks(kernels, bits):
    """One, two and as many as there are steps for; the same call gives the same bits."""
    weight, matrix = packed(bits, 1600, 20, 64)
    prepared = ready(kernels, weight)
    x = activations(7, 1600, dtype=torch.float16)
    for processors in (1, 2, 100):
        y = multiply(kernels, x, prepared, processors)
        assert_as_good_as_naive(y, x, matrix)
    assert torch.equal(y, multiply(kernels, x, prepared, processors))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_weights_are_those_written_out(kernels, bits, dtype):
    """Unit rows of x give back each weight, rounded as by dequantize.cu: the same bits."""
    n_in = 256
    weight, _ = packed(bits, n_in, 48, 32)
    prepared = ready(kernels, weight)
    written = kernels.dequantize(prepared, dtype).cpu()
    eye = torch.eye(n_in, dtype=dtype)
    assert torch.equal(multiply(kernels, eye, prepared), written)


@pytest.mark.parametrize("bits", BITS)
def test_bias_and_zero_points(kernels, bits):
    weight, matrix = packed(bits, 192, 37, 64, 0)
    x = activations(3, 192, dtype=torch.float16)
    bias = torch.arange(37, dtype=torch.float16)
    y = multiply(kernels, x, ready(kernels, weight), bias=bias)
    assert_as_good_as_naive(y - bias, x, matrix)


@pytest.mark.parametrize("bits", BITS)
def test_order_of_threads_changes_nothing(kernels, bits):
    """Nor whether products and stores happen at once or as late as they may."""
    n_in = 128 * 40 // bits  # more stages than there is room for
    weight, _ = packed(bits, n_in, 128, 64)
    x = activations(9, n_in, dtype=torch.bfloat16)
    prepared = ready(kernels, weight)
    first = multiply(kernels, x, prepared)
    for order in (0, 1, 2, 3, 4):
        for eager in (0, 1):
            kernels.settle(order, eager)
            assert torch.equal(multiply(kernels, x, prepared), first)


def test_it_is_chosen_for_some_hundreds_of_rows(kernels):
    weight, matrix = packed(4, 96, 24, 32)
    check(kernels, activations(65, 96, dtype=torch.float16), weight, matrix)
    tiled = layout.prepare(weight)
    half = torch.float16
    names = [cuda.kernel_for(m, half, tiled, True).name for m in (1, 32, 33, 64, 65, 512, 513)]
    assert names == ["gemv", "gemv", "gemm", "gemm", "wgmma", "wgmma", "dense"]
    names = [cuda.kernel_for(m, half, tiled, False).name for m in (32, 33, 127, 128)]
    assert names == ["gemv", "gemm", "gemm", "dense"]
    assert cuda.kernel_for(200, torch.float32, tiled, True).name == "dense"
    plain = layout.plain(weight)
    assert [cuda.kernel_for(m, half, plain, True).name for m in (127, 128)] == [
        "plain_multiply",
        "dense",
    ]


def test_tiles_fill_the_gpu():
    """Of 132 multiprocessors."""
    assert cuda._column_tile(256, 8192, 132) == 128  # 64 wide thread blocks would leave half idle
    assert cuda._column_tile(512, 8192, 132) == 256
    assert cuda._column_tile(2048, 8192, 132) == 256


def test_errors(kernels):
    prepared = ready(kernels, packed(4)[0])
    x = torch.ones(2, 96, dtype=torch.float16, device=kernels.device)
    short = dataclasses.replace(prepared, shift=4)
    with pytest.raises(RuntimeError, match=r"^wgmma failed: invalid argument$"):
        kernels.matmul(x, short, kernel="wgmma")
    nothing = [None] * 5
    for splits, partial in ((0, None), (2, x)):  # of a single block of inputs
        with pytest.raises(RuntimeError, match=r"^wgmma failed: invalid argument$"):
            cuda.named("wgmma")(
                kernels.launch(), 4, 0, *nothing, partial, 2, 96, 24, 32, 5, splits, 128
            )
