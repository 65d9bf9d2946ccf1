"""Tiles and pipelines that only a tuned table chooses; see also test_cuda_bulk.py."""

import pytest
import torch
from helpers.products import activations, assert_as_good_as_naive, packed, ready

from quant_cuda.cuda.variants import TILES, VARIANTS

NAMES = [name for name in VARIANTS if not name.startswith("bulk") and name.endswith("splits2")]
DEEP = [name for name in VARIANTS if name.startswith("gemm_deep") and name.endswith("splits1")]
# Of a multiprocessor of compute capability 9.0, less what each thread block takes for itself.
SHARED, OWN = 228 * 1024, 1024


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_against_float64(kernels, bits, name):
    """Groups smaller than a block of inputs, a short last block, columns that fill no tile."""
    if "wgmma" in name and not kernels.wgmma:
        pytest.skip("not for this GPU")
    weight, matrix = packed(bits, 288, 150, 32, g_idx=True)
    for rows, dtype in ((3, torch.float16), (70, torch.bfloat16)):
        x = activations(rows, 288, dtype=dtype)
        prepared = ready(kernels, weight)
        y = kernels.matmul(x.to(kernels.device), prepared, kernel=name)
        assert_as_good_as_naive(y.cpu(), x, matrix)
        assert torch.equal(y, kernels.matmul(x.to(kernels.device), prepared, kernel=name))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", DEEP)
def test_order_of_threads_and_copies_changes_nothing(kernels, bits, name):
    n_in = 128 * 48 // bits  # more steps than stages
    weight, _ = packed(bits, n_in, 40, 64)
    x = activations(9, n_in, dtype=torch.float16).to(kernels.device)
    prepared = ready(kernels, weight)
    first = kernels.matmul(x, prepared, kernel=name)
    for order in (0, 1, 2, 3, 4):
        for eager in (0, 1):
            kernels.settle(order, eager)
            assert torch.equal(kernels.matmul(x, prepared, kernel=name), first)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tile", [tile for tile in TILES if tile[0].startswith("bulk")])
def test_a_multiprocessor_holds_so_many_thread_blocks(bits, tile):
    """Their rings fit the shared memory: x, words, and a row of the table for groups of 128."""
    _, rows, columns, stages, blocks = tile
    inputs = 512 // bits
    stage = 2 * rows * inputs + columns * inputs * bits // 8 + -(-4 * columns // 1024) * 1024
    barriers = 8 * (2 * stages + 1)
    # Boxes start at a multiple of 1024 bytes.
    assert blocks * (OWN + 1024 + stages * stage + barriers) <= SHARED
    assert (stages - 1) * blocks * columns * inputs * bits // 8 >= 22 * 1024, "of weights under way"
