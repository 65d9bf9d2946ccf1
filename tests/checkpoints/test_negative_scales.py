"""Readers of the format multiply by a scale whatever its sign is.

Each function has the arithmetic of one reader's kernels, in the order and the types that it has.
"""

import pytest
import torch

from quant_cuda import PackedWeight
from quant_cuda.packing import pack, pack_zeros
from quant_cuda.reference import dequantize

HALF = torch.float16


def _subtract_first(q, zero, scale):
    """GPTQModel's and AutoGPTQ's torch kernels, and ours: integers less the zero point, times."""
    return scale * (q - zero).to(HALF)


def _marlin(q, zero, scale):
    """vLLM and SGLang: a symmetric integer becomes a signed half, which is multiplied."""
    bits = int(zero.max()).bit_length()
    return (q - 2 ** (bits - 1)).to(HALF) * scale


def _exllama(q, zero, scale):
    """exllamav2: one fused multiply and add, the zero point scaled beforehand."""
    scaled = scale.float() * zero.float()
    return (q.float() * scale.float() - scaled).to(HALF)


READERS = {
    "this package": _subtract_first,
    "GPTQModel": _subtract_first,
    "AutoGPTQ": _subtract_first,
    "vLLM": _marlin,
    "SGLang": _marlin,
    "exllamav2": _exllama,
}


def grid(bits: int):
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 2**bits, (64, 32), generator=generator)
    zero = torch.full((1, 32), 2 ** (bits - 1))
    scale = (torch.rand((1, 32), generator=generator) * 0.01 + 0.001).to(HALF)
    scale[:, ::2] *= -1
    return q, zero, scale


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_named_readers_keep_the_sign(reader, bits):
    q, zero, scale = grid(bits)
    exact = scale.double() * (q - zero).double()
    value = READERS[reader](q, zero, scale).double()
    assert ((value - exact).abs() <= exact.abs() * 2**-11).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_this_package_reads_them(bits):
    q, zero, scale = grid(bits)
    packed = PackedWeight(
        pack(q.to(torch.uint8), bits),
        pack_zeros(zero, bits, zero_offset=1),
        scale,
        None,
        bits,
        -1,
        in_features=64,
        zero_offset=1,
    )
    exact = scale.float() * (q - zero).float()
    assert torch.equal(dequantize(packed, torch.float32), exact)
