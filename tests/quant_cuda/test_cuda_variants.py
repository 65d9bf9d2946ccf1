"""Tiles and pipelines that only a tuned table chooses; see also test_cuda_bulk.py."""

import pytest
import torch
from helpers.products import activations, assert_as_good_as_naive, packed, ready

from quant_cuda.cuda.kernels import kernel_for
from quant_cuda.cuda.launches import Product
from quant_cuda.cuda.layout import Tiled, prepare
from quant_cuda.cuda.tuned import Entry, Table
from quant_cuda.cuda.variants import TILES, VARIANTS, variants

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
    # One thread block with the table of groups of 32.
    of_32 = stage + -(-4 * columns * (inputs // 32) // 1024) * 1024 - -(-4 * columns // 1024) * 1024
    assert OWN + 1024 + stages * of_32 + barriers <= SHARED


def candidates(rows, n_out=8192, kernel="bulk", columns=256):
    """(tile, splits) of those that may be the best, of a weight of 64 blocks of inputs."""
    words = torch.empty((n_out // 16, 64, 256), dtype=torch.int32, device="meta")
    table = torch.empty((64, n_out), dtype=torch.int32, device="meta")
    weight = Tiled(words, table, None, 4, 7, 8192, n_out, 128, 1, torch.float16)
    product = Product(rows, torch.float16, weight, wgmma=True)
    assert all(variant.runs(product) for variant in variants() if variant.takes(product))
    return {
        (variant.rows, variant.splits)
        for variant in variants()
        if (variant.kernel, variant.columns) == (kernel, columns) and variant.takes(product)
    }


@pytest.mark.parametrize("rows", range(1, 177))
def test_rows_are_padded_little(rows):
    """The smallest tile that holds them is among those that are timed; which are few."""
    tiles = {tile for columns in (128, 256) for tile, _ in candidates(rows, columns=columns)}
    smallest = min(tile for tile in tiles if tile >= rows)
    assert smallest - rows < (8 if rows <= 32 else 16)
    assert len({tile for tile, _ in candidates(rows)}) <= 4


def test_candidates():
    every = set(range(1, 9))
    assert candidates(8) == {(8, splits) for splits in every}
    assert candidates(100) == {(tile, splits) for tile in (112, 128) for splits in every} | {
        (64, splits) for splits in range(1, 7)
    }
    # 2 tiles of 96, for whose rows the weight is unpacked twice; 3 of 64.
    assert {tile for tile, _ in candidates(180)} == {96, 64}
    # 128 thread blocks without splits.
    assert {splits for tile, splits in candidates(512) if tile == 128} == {1, 2, 3}
    assert candidates(1024) == {(128, 1), (160, 1)}
    assert candidates(1281) == set()
    assert candidates(512, kernel="bulk_pairs") >= {(128, 1), (128, 3)}


def test_a_tuned_variant_serves_fewer_rows_than_it_is_meant_for():
    name = "bulk-128x256-stages4-splits2"
    weight, _ = packed(4, 256, 64, 64)
    for rows, chosen in ((256, name), (177, name), (257, "wgmma")):
        table = Table((Entry(4, 256, 64, 256, name),))
        assert kernel_for(rows, torch.float16, prepare(weight), True, table).name == chosen
    assert kernel_for(177, torch.float16, prepare(weight), False, table).name == "dense"
