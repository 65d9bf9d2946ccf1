"""The CUDA kernels against float64: their own source under the host's compiler, and on a GPU."""

import numpy as np
import pytest
import torch
from helpers.oracles import pack_columns
from helpers.products import activations, assert_as_good_as_naive, check, packed, ready

from quant_cuda import PackedWeight
from quant_cuda.cuda import kernels as cuda
from quant_cuda.cuda import layout
from quant_cuda.reference import dequantize

BITS = (2, 3, 4, 8)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [
    (256, 64, 128),  # whole blocks, whole tiles
    (576, 48, 128),  # a short last group
    (160, 5, 32),  # groups smaller than a block, few outputs
    (416, 40, -1),  # one group, a part of a block
    (288, 33, 96),  # groups of no power of two
    (32, 1, 128),  # one output, a group larger than the layer
    (192, 40, 40),  # groups that only the plain kernels take
    (1184, 70, 64),
]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out", "group_size"), SHAPES)
def test_against_float64(kernels, bits, dtype, n_in, n_out, group_size):
    weight, matrix = packed(bits, n_in, n_out, group_size)
    for rows in (1, 2, 8, 13, 29, 50, 70):
        check(kernels, activations(rows, n_in, dtype=dtype), weight, matrix)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("g_idx", [False, True])
def test_conventions(kernels, bits, zero_offset, g_idx):
    weight, matrix = packed(bits, 192, 37, 64, zero_offset, g_idx)
    for rows in (3, 12):
        check(kernels, activations(rows, 192, dtype=torch.float16), weight, matrix)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_integer_at_every_zero_point(kernels, bits, dtype):
    """Weights are exact in the kernels' arithmetic: unit rows of x give back each of them."""
    levels = 2**bits
    q = np.random.default_rng(bits).permutation(np.arange(512) % levels)
    n_in = len(q)
    # A v1 field of all ones is 2**bits.
    zeros = np.unique(np.linspace(1, levels, 16).astype(int))
    n_out = len(zeros)
    weight = PackedWeight(
        qweight=_pack(np.tile(q[:, None], n_out), bits),
        qzeros=_pack(zeros[None].T - 1, bits).T.contiguous(),
        scales=torch.ones(1, n_out, dtype=torch.float16),
        g_idx=None,
        bits=bits,
        group_size=-1,
        in_features=n_in,
    )
    prepared = ready(kernels, weight)
    expected = torch.from_numpy((q[:, None] - zeros[None]).astype(np.float64))
    eye = torch.eye(n_in, dtype=dtype)
    for start in range(0, n_in, 8):
        rows = slice(start, start + 8)
        y = kernels.matmul(eye[rows].to(kernels.device), prepared)
        assert torch.equal(y.cpu().double(), expected[rows])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("g_idx", [False, True])
def test_dequantize(kernels, bits, g_idx):
    for n_in, n_out, group_size in ((160, 37, 32), (256, 18, 64), (200, 33, 40), (96, 8, -1)):
        if (n_in * bits) % 32:
            continue
        weight, matrix = packed(bits, n_in, n_out, group_size, g_idx=g_idx and group_size > 0)
        for dtype in DTYPES:
            got = kernels.dequantize(ready(kernels, weight), dtype)
            assert torch.equal(got.cpu(), torch.from_numpy(matrix).to(dtype))
            assert torch.equal(got.cpu(), dequantize(weight, dtype))


@pytest.mark.parametrize("bits", BITS)
def test_inputs_split_over_thread_blocks(kernels, bits):
    """From no split to as many as there are steps; the same call gives the same bits."""
    weight, matrix = packed(bits, 2560, 40, 128)
    prepared = ready(kernels, weight)
    for rows in (7, 21):
        x = activations(rows, 2560, dtype=torch.float16)
        for processors in (1, 2, 3, 100):
            y = kernels.matmul(x.to(kernels.device), prepared, processors)
            assert_as_good_as_naive(y.cpu(), x, matrix)
            assert torch.equal(y, kernels.matmul(x.to(kernels.device), prepared, processors))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [3, 20])
def test_order_of_threads_changes_nothing(kernels, bits, rows):
    """A missing barrier would show, as would an asynchronous copy nobody waited for."""
    weight, _ = packed(bits, 640, 40, 64)
    x = activations(rows, 640, dtype=torch.bfloat16).to(kernels.device)
    prepared = ready(kernels, weight)
    first = kernels.matmul(x, prepared)
    for order in (0, 1, 2, 3, 4):
        for eager in (0, 1):
            kernels.settle(order, eager)
            assert torch.equal(kernels.matmul(x, prepared), first)


@pytest.mark.parametrize("bits", BITS)
def test_shapes_and_strides_of_x(kernels, bits):
    weight, matrix = packed(bits, 96, 24, 32)
    for shape in ((96,), (2, 96), (2, 3, 96), (0, 96), (2, 0, 96)):
        x = activations(*shape, dtype=torch.float16)
        check(kernels, x, weight, matrix)
    half = torch.float16
    columns = activations(96, 5, dtype=half).T
    every_other = activations(5, 192, dtype=half)[:, ::2]
    misaligned = activations(5 * 96 + 1, dtype=half)[1:].view(5, 96)
    for x in (columns, every_other, misaligned, activations(1, 96, dtype=half).expand(5, 96)):
        y = kernels.matmul(x.to(kernels.device), ready(kernels, weight))
        assert_as_good_as_naive(y.cpu(), x, matrix)


@pytest.mark.parametrize("bits", BITS)
def test_bias(kernels, bits):
    """It joins the sum before the one rounding, whichever kernel ends it."""
    weight, matrix = packed(bits, 1280, 40, 64)
    bias = 100 * torch.arange(40, dtype=torch.float16)
    with_bias = np.vstack([matrix, bias.double().numpy()])
    for rows in (3, 20, 300):
        x = activations(rows, 1280, dtype=torch.float16)
        for processors in (1, 100):
            prepared = ready(kernels, weight)
            there = (t.to(kernels.device) for t in (x, bias))
            y = kernels.matmul(next(there), prepared, processors, next(there))
            ones = torch.ones(rows, 1, dtype=torch.float16)
            assert_as_good_as_naive(y.cpu(), torch.cat([x, ones], 1), with_bias)


def test_inputs_of_four_more_than_a_multiple_of_eight(kernels):
    weight, matrix = packed(8, 100, 24, 32)
    for rows in (1, 9):
        check(kernels, activations(rows, 100, dtype=torch.float16), weight, matrix)


def test_errors(kernels):
    prepared = ready(kernels, packed(4)[0])
    with pytest.raises(ValueError, match=r"^x of shape \(2, 95\) does not fit .* 96 inputs$"):
        kernels.matmul(torch.ones(2, 95, dtype=torch.float16), prepared)
    with pytest.raises(TypeError, match=r"^x must be float16[^\n]*float64$"):
        kernels.matmul(torch.ones(2, 96, dtype=torch.float64), prepared)
    with pytest.raises(RuntimeError, match=r"^gemv failed: invalid argument$"):
        cuda.named("gemv")(cuda.Launch(kernels.library, 0, 1), 5, 0, *[None] * 6, *[0] * 6)


def test_a_tensor_that_is_not_on_a_gpu():
    prepared = layout.prepare(packed(4)[0])
    with pytest.raises(ValueError, match="both must be a GPU's"):
        cuda.matmul(torch.ones(1, 96), prepared)


def _pack(values: np.ndarray, bits: int) -> torch.Tensor:
    return torch.from_numpy(pack_columns(values, bits))
