"""The CUDA kernel that the copy engine feeds: its own source under the host's compiler, and on a
GPU of compute capability 9.0."""

import pytest
import torch
from helpers.products import activations, assert_as_good_as_naive, packed, ready

from quant_cuda.cuda import kernels as cuda
from quant_cuda.cuda.variants import SPLITS, TILES, VARIANTS

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
PAIRS = "bulk_pairs"
INSTANCES = sorted({tile[:3] for tile in TILES if tile[0].startswith("bulk")})


def name(rows: int, columns: int, splits: int = 1, kernel: str = "bulk") -> str:
    """The variant of this tile with the fewest stages."""
    start, end = f"{kernel}-{rows}x{columns}-", f"-splits{splits}"
    return next(name for name in VARIANTS if name.startswith(start) and name.endswith(end))


def multiply(kernels, x, prepared, kernel, bias=None):
    there = None if bias is None else bias.to(kernels.device)
    return kernels.matmul(x.to(kernels.device), prepared, bias=there, kernel=kernel).cpu()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out", "group_size"), SHAPES)
def test_against_float64(kernels, bits, dtype, n_in, n_out, group_size):
    weight, matrix = packed(bits, n_in, n_out, group_size)
    prepared = ready(kernels, weight)
    # Of the pair the second thread block has no columns.
    for rows, variant in ((1, name(8, 128)), (21, name(16, 128)), (40, name(32, 256, 1, PAIRS))):
        x = activations(rows, n_in, dtype=dtype)
        assert_as_good_as_naive(multiply(kernels, x, prepared, variant), x, matrix)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("kernel", "rows", "columns"), INSTANCES)
def test_every_instance(kernels, bits, kernel, rows, columns):
    """More than one thread block along the rows and along the columns, and a part of one; inputs in
    another order."""
    for dtype, x_rows, n_out in (
        (torch.float16, rows + 3, columns + 20),
        (torch.bfloat16, rows - 1, columns - 70),
    ):
        weight, matrix = packed(bits, 160, n_out, 32, g_idx=True)
        x = activations(x_rows, 160, dtype=dtype)
        y = multiply(kernels, x, ready(kernels, weight), name(rows, columns, 2, kernel))
        assert_as_good_as_naive(y, x, matrix)


@pytest.mark.parametrize("bits", BITS)
def test_thread_blocks_that_share_the_inputs(kernels, bits):
    """One to eight of them, of an odd number of blocks; the same call gives the same bits."""
    n_in = 128 * 36 // bits
    weight, matrix = packed(bits, n_in, 20, 64)
    prepared = ready(kernels, weight)
    x = activations(7, n_in, dtype=torch.float16)
    for splits in SPLITS:
        y = multiply(kernels, x, prepared, name(16, 128, splits))
        assert_as_good_as_naive(y, x, matrix)
        assert torch.equal(y, multiply(kernels, x, prepared, name(16, 128, splits)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_weights_are_those_written_out(kernels, bits, dtype):
    """Unit rows of x give back each weight, rounded as by dequantize.cu: the same bits."""
    n_in = 256
    weight, _ = packed(bits, n_in, 48, 32)
    prepared = ready(kernels, weight)
    written = kernels.dequantize(prepared, dtype).cpu()
    eye = torch.eye(n_in, dtype=dtype)
    assert torch.equal(multiply(kernels, eye, prepared, name(64, 128)), written)


@pytest.mark.parametrize("splits", [1, 2])
def test_bias_and_zero_points(kernels, splits):
    weight, matrix = packed(4, 192, 37, 64, 0)
    x = activations(3, 192, dtype=torch.float16)
    bias = torch.arange(37, dtype=torch.float16)
    y = multiply(kernels, x, ready(kernels, weight), name(16, 128, splits), bias)
    assert_as_good_as_naive(y - bias, x, matrix)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("n_out", "tile"),
    [(128, (24, 128, 2)), (128, (64, 256, 2)), (264, (32, 256, 2, PAIRS))],
)
def test_order_of_threads_and_copies_changes_nothing(kernels, bits, n_out, tile):
    """Nor whether products and copies happen at once or as late as they may."""
    n_in = 128 * 48 // bits  # more blocks of inputs than stages
    weight, _ = packed(bits, n_in, n_out, 64)
    x = activations(20, n_in, dtype=torch.bfloat16)
    prepared = ready(kernels, weight)
    first = multiply(kernels, x, prepared, name(*tile))
    for order in (0, 1, 2, 3, 4):
        for eager in (0, 1):
            kernels.settle(order, eager)
            assert torch.equal(multiply(kernels, x, prepared, name(*tile)), first)


def test_errors(kernels):
    tensors = [None] * 6
    for bits, splits, tile, stages in (
        (3, 1, (16, 128), 4),
        (4, 9, (16, 128), 4),
        (4, 2, (16, 128), 4),  # of a single block of inputs
        (4, 1, (40, 128), 4),
        (4, 1, (16, 128), 1),
        (4, 1, (128, 256), 40),
    ):
        sizes = (2, 96, 24, 32, 5, splits, *tile, stages, 0)
        with pytest.raises(RuntimeError, match=r"^bulk failed: invalid argument$"):
            cuda.named(name(16, 128))(kernels.launch(), bits, 0, *tensors, *sizes)
