"""The old extension's functions, called as each generation of code called them."""

import numpy as np
import pytest
import torch
from helpers.products import activations, packed

import quant_cuda

BITS = (2, 3, 4, 8)


def called(bits: int, *arguments) -> None:
    getattr(quant_cuda, f"vecquant{bits}matmul")(*arguments)


def check(bits, weight, matrix, groups, shape, vec_dtype, mul_dtype):
    vec = activations(*shape, weight.in_features, dtype=vec_dtype)
    mul = activations(*shape, matrix.shape[1], dtype=mul_dtype)
    expected = mul.double().numpy() + vec.double().numpy() @ matrix
    called(bits, vec, weight.qweight, mul, weight.scales.float(), weight.qzeros, groups)
    # Activations are rounded to 16 bits, whatever their type.
    eps = max(torch.finfo(vec_dtype).eps, torch.finfo(mul_dtype).eps, 2**-14)
    assert mul.dtype == mul_dtype
    size = np.abs(vec.double().numpy()) @ np.abs(matrix) + np.abs(expected)
    assert (np.abs(mul.double().numpy() - expected) <= 2 * eps * size).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3), ()])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float16, torch.float32)])
def test_with_a_group_size(bits, shape, dtypes):
    weight, matrix = packed(bits, 256, 32, 64)
    check(bits, weight, matrix, 64, shape, *dtypes)
    weight, matrix = packed(bits, 256, 32, -1)
    check(bits, weight, matrix, -1, shape, *dtypes)
    check(bits, weight, matrix, 256, shape, *dtypes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_with_the_group_of_each_input(bits, kind):
    weight, matrix = packed(bits, 256, 32, 64, g_idx=True)
    check(bits, weight, matrix, weight.g_idx.to(kind), (3,), torch.float32, torch.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_with_floating_zeros(bits, shape):
    """The first generation: y starts as the bias, and zeros are scale * zero point."""
    weight, matrix = packed(bits, 96, 32, -1)
    scales = weight.scales.float().reshape(-1, 1)
    q_times_scale = dequantized_before_zeros(bits, weight, scales)
    zeros = torch.from_numpy(q_times_scale - matrix)[0].reshape(-1, 1).float()
    vec = activations(*shape, 96)
    mul = activations(*shape, 32)
    expected = mul.double().numpy() + vec.double().numpy() @ matrix
    called(bits, vec, weight.qweight, mul, scales, zeros)
    np.testing.assert_allclose(mul.double().numpy(), expected, rtol=0, atol=1e-3)


def dequantized_before_zeros(bits, weight, scales) -> np.ndarray:
    from quant_cuda.packing import unpack

    return unpack(weight.qweight, bits, 96).double().numpy() * scales.double().numpy().T


def test_what_does_not_fit():
    weight, _ = packed(4, 256, 32, 64)
    arguments = (weight.qweight, torch.zeros(1, 32), weight.scales, weight.qzeros)
    with pytest.raises(ValueError, match=r"^mul has shape \(1, 32\); vec \(2, 256\)[^\n]*$"):
        called(4, torch.ones(2, 256), *arguments, 64)
    with pytest.raises(TypeError, match=r"^zeros are torch.int32[^\n]*group size[^\n]*$"):
        called(4, torch.ones(1, 256), *arguments)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        called(8, torch.ones(1, 256), *arguments, 64)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        called(4, torch.ones(1, 256), *arguments, 32)
    with pytest.raises(ValueError, match=r"^scales and zeros have shapes[^\n]+$"):
        called(4, torch.ones(1, 256), *arguments[:2], weight.scales, weight.scales)
