"""The CPU kernels' tiles: they can be undone, whatever the groups are."""

import numpy as np
import pytest
import torch
from helpers.products import activations, assert_as_good_as_naive, packed, same_bits

import quant_cuda
from quant_cuda import PreparedWeight
from quant_cuda.packing import pack, pack_zeros
from quant_cuda.weight import PackedWeight

BITS = (2, 3, 4, 8)
SHAPES = (
    (96, 32, 32),
    (96, 17, -1),
    (160, 5, 64),
    (64, 1, 128),
    (640, 40, -1),  # a group longer than a run
    (1120, 33, 608),
    (64, 70, 8),  # groups that fill part of a unit
    (96, 3, 20),
)


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("g_idx", [False, True])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_prepared_and_restored(scales, bits, g_idx, zero_offset):
    for shape in SHAPES:
        weight, _ = packed(bits, *shape, zero_offset, g_idx, scales)
        prepared = quant_cuda.prepare(weight)
        assert isinstance(prepared, PreparedWeight)
        again = quant_cuda.restore(prepared)
        assert same_bits(again.qweight, weight.qweight)
        assert same_bits(again.qzeros, weight.qzeros)
        assert same_bits(again.scales.view(torch.uint8), weight.scales.view(torch.uint8))
        assert (again.g_idx is None) == (weight.g_idx is None)
        assert weight.g_idx is None or torch.equal(again.g_idx, weight.g_idx)
        described = ("bits", "group_size", "in_features", "out_features", "zero_offset")
        for name in described:
            assert getattr(prepared, name) == getattr(again, name) == getattr(weight, name)


def test_groups_of_uneven_sizes_and_empty_ones():
    rng = np.random.default_rng(0)
    g_idx = np.array([0] * 5 + [3] * 50 + [1] * 40 + [3])
    rng.shuffle(g_idx)
    q, zeros = rng.integers(0, 16, (96, 7)), rng.integers(1, 17, (4, 7))
    scales = torch.rand(4, 7).half()
    weight = PackedWeight(
        pack(torch.from_numpy(q), 4),
        pack_zeros(torch.from_numpy(zeros), 4, 1),
        scales,
        torch.from_numpy(g_idx.astype(np.int32)),
        bits=4,
        group_size=32,
        in_features=96,
    )
    matrix = scales.double().numpy()[g_idx] * (q - zeros[g_idx])
    x = activations(9, 96)
    for name in quant_cuda.available():
        assert_as_good_as_naive(quant_cuda.matmul(x, weight, name), x, matrix, name)
    assert same_bits(quant_cuda.restore(quant_cuda.prepare(weight)).qweight, weight.qweight)
