"""Looking up single outputs of a packed weight gives what unpacking all of it gives."""

import pytest
import torch

import quant_cuda
from quant_cuda import reference
from quant_cuda.cuda import layout
from quant_cuda.packing import fields, pack, pack_zeros, unpack_zeros
from quant_cuda.weight import PackedWeight

# (in, out, group size): a short last group, outputs that end within a word of zero points and
# within a tile, one group.
SHAPES = ((96, 64, 64), (160, 83, 32), (64, 50, -1))
BITS = (2, 3, 4, 8)


def weight_of(bits, inputs, outputs, group_size, zero_offset=1, shuffled=False):
    generator = torch.Generator().manual_seed(bits * inputs + outputs)
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    q = torch.randint(2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(1, 2**bits, (groups, outputs), generator=generator)
    scales = (torch.rand((groups, outputs), generator=generator) + 0.1).half()
    g_idx = None
    if shuffled:
        g_idx = (torch.randperm(inputs, generator=generator) // size).to(torch.int32)
    return PackedWeight(
        qweight=pack(q, bits),
        qzeros=pack_zeros(zeros, bits, zero_offset),
        scales=scales,
        g_idx=g_idx,
        bits=bits,
        group_size=group_size,
        in_features=inputs,
        zero_offset=zero_offset,
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_rows_of_every_layout(bits, shape, shuffled, zero_offset):
    weight = weight_of(bits, *shape, zero_offset, shuffled)
    whole = reference.dequantize(weight, torch.float32).T
    index = torch.tensor([[0, shape[1] - 1, 17], [31, 32, 17]])
    assert torch.equal(quant_cuda.rows(weight, index), whole[index])
    assert torch.equal(quant_cuda.rows(quant_cuda.prepare(weight), index), whole[index])
    taken = layout.rows(layout.prepare(weight), index.reshape(-1)).reshape(2, 3, -1)
    assert torch.equal(taken, whole[index])


@pytest.mark.parametrize("bits", BITS)
def test_fields_are_those_of_the_whole(bits):
    weight = weight_of(bits, 64, 83, 32)
    whole = unpack_zeros(weight.qzeros, bits, 83, 0)
    columns = torch.arange(83).flip(0)
    assert torch.equal(fields(weight.qzeros, bits, columns), whole[:, columns])


def test_shapes_of_an_index():
    weight = quant_cuda.prepare(weight_of(4, 64, 50, -1))
    for shape in ((), (0,), (2, 0), (1, 1, 3)):
        index = torch.zeros(shape, dtype=torch.int64)
        assert quant_cuda.rows(weight, index).shape == (*shape, 64)


@pytest.mark.parametrize("outside", [-1, 50])
def test_rows_that_are_not_there(outside):
    weight = quant_cuda.prepare(weight_of(4, 64, 50, -1))
    with pytest.raises(IndexError):
        quant_cuda.rows(weight, torch.tensor([0, outside]))


def test_compiled_lookups():
    weight = quant_cuda.prepare(weight_of(8, 64, 50, 32))
    index = torch.tensor([3, 49])
    compiled = torch.compile(lambda i: quant_cuda.rows(weight, i) * 2, backend="aot_eager")
    assert torch.equal(compiled(index), quant_cuda.rows(weight, index) * 2)
