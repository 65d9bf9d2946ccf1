"""Matmul with packed weights against float64 numpy, and the errors for what does not fit."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.products import activations, assert_as_good_as_naive, packed

import quant_cuda
from quant_cuda import PackedWeight
from quant_cuda.reference import dequantize

BITS = (2, 3, 4, 8)
# Those of GPUs have tests of their own, in test_cuda_*.py.
BACKENDS = tuple(name for name in quant_cuda.available() if name not in ("cuda", "triton"))


def test_torch_is_always_there():
    assert "torch" in BACKENDS
    assert isinstance(BACKENDS, tuple)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n_in", "n_out", "group_size"),
    [
        (96, 32, 32),
        (96, 24, -1),
        (96, 17, 32),  # zeros that do not fill their last word
        (160, 5, 64),  # short last group
        (32, 1, 128),  # group larger than the layer
        (288, 40, 96),
        (576, 96, 128),
    ],
)
def test_against_float64(backend, bits, dtype, n_in, n_out, group_size):
    weight, matrix = packed(bits, n_in, n_out, group_size)
    for rows in (1, 7, 33):
        x = activations(rows, n_in, dtype=dtype)
        y = quant_cuda.matmul(x, weight, backend=backend)
        assert_as_good_as_naive(y, x, matrix, backend or BACKENDS[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("g_idx", [False, True])
def test_conventions(backend, bits, zero_offset, g_idx):
    weight, matrix = packed(bits, 160, 37, 64, zero_offset, g_idx)
    x = activations(9, 160)
    y = quant_cuda.matmul(x, weight, backend=backend)
    assert_as_good_as_naive(y, x, matrix, backend or BACKENDS[0])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("g_idx", [False, True])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_dequantize(bits, g_idx, zero_offset):
    weight, matrix = packed(bits, 160, 37, 64, zero_offset, g_idx)
    assert np.array_equal(dequantize(weight, torch.float64).numpy(), matrix)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got = dequantize(weight, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, torch.from_numpy(matrix).to(dtype))


def test_a_v1_zero_of_two_to_the_bits():
    # An old file's all-ones field: zero 16, one past what four bits hold.
    weight = PackedWeight(
        qweight=torch.zeros(1, 8, dtype=torch.int32),
        qzeros=torch.full((1, 1), -1, dtype=torch.int32),
        scales=torch.ones(1, 8),
        g_idx=None,
        bits=4,
        group_size=8,
        in_features=8,
    )
    assert (dequantize(weight, torch.float32) == -16).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", BITS)
def test_shapes_of_x(backend, bits):
    weight, matrix = packed(bits)
    for shape in [(96,), (2, 96), (2, 3, 96), (2, 1, 3, 96)]:
        x = activations(*shape)
        y = quant_cuda.matmul(x, weight, backend=backend)
        assert_as_good_as_naive(y, x, matrix, backend or BACKENDS[0])
    for shape in [(0, 96), (2, 0, 96)]:
        y = quant_cuda.matmul(torch.empty(shape), weight, backend=backend)
        assert y.shape == (*shape[:-1], 24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_x(backend):
    weight, matrix = packed(4)
    columns = activations(96, 5).T
    every_other = activations(5, 192)[:, ::2]
    expanded = activations(1, 96).expand(5, 96)
    swapped = activations(5, 2, 96).transpose(0, 1)
    for x in (columns, every_other, expanded, swapped):
        before = x.clone()
        y = quant_cuda.matmul(x, weight, backend=backend)
        assert_as_good_as_naive(y, x, matrix, backend or BACKENDS[0])
        assert torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_explicit_groups_in_natural_order_change_nothing(backend):
    weight, _ = packed(4, 160, 24, 64)
    g_idx = (torch.arange(160) // 64).to(torch.int32)
    explicit = dataclasses.replace(weight, g_idx=g_idx)
    x = activations(3, 160)
    assert torch.equal(
        quant_cuda.matmul(x, explicit, backend=backend),
        quant_cuda.matmul(x, weight, backend=backend),
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("g_idx", [False, True])
def test_gradient_of_x_in_float64(bits, g_idx):
    weight, _ = packed(bits, 32, 7, 16, g_idx=g_idx, scales=torch.float64)
    x = activations(2, 3, 32, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: quant_cuda.matmul(x, weight, "torch"), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("g_idx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(backend, bits, g_idx, dtype):
    weight, matrix = packed(bits, 160, 37, 64, g_idx=g_idx)
    x = activations(2, 3, 160, dtype=dtype).requires_grad_()
    bias = torch.randn(37, requires_grad=True)
    y = quant_cuda.matmul(x, weight, backend, bias=bias)
    grad = activations(2, 3, 37, dtype=dtype)
    y.backward(grad)
    rtol = 1e-5 if dtype == torch.float32 else 0.03
    expected = (grad.double() @ torch.from_numpy(matrix).T).to(dtype)
    torch.testing.assert_close(x.grad, expected, rtol=rtol, atol=rtol * expected.abs().max())
    torch.testing.assert_close(bias.grad, grad.float().sum((0, 1)), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_float_dtype(scales, dtype):
    weight, matrix = packed(4, scales=scales)
    x = activations(3, 96, dtype=dtype)
    assert_as_good_as_naive(quant_cuda.matmul(x, weight), x, matrix, BACKENDS[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool])
def test_integer_x(dtype):
    weight, _ = packed(4)
    with pytest.raises(TypeError, match=r"^[^\n]+$"):
        quant_cuda.matmul(torch.ones(2, 96, dtype=dtype), weight)


@pytest.mark.parametrize("shape", [(95,), (2, 97), (96, 2), (0,), ()])
def test_x_that_does_not_fit(shape):
    weight, _ = packed(4)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        quant_cuda.matmul(torch.ones(shape), weight)


def test_unknown_backend():
    weight, _ = packed(4)
    with pytest.raises(ValueError, match=r"^[^\n]*cobol[^\n]*torch[^\n]*$"):
        quant_cuda.matmul(torch.ones(96), weight, backend="cobol")


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"in_features": 104},
        {"group_size": 16},
        {"qweight": torch.zeros(11, 24, dtype=torch.int32)},
        {"qweight": torch.zeros(12, 25, dtype=torch.int32)},
        {"qzeros": torch.zeros(3, 4, dtype=torch.int32)},
        {"qzeros": torch.zeros(2, 3, dtype=torch.int32)},
        {"scales": torch.zeros(4, 24)},
        {"g_idx": torch.zeros(95, dtype=torch.int32)},
    ],
)
def test_parts_that_do_not_fit(change):
    weight, _ = packed(4)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        dataclasses.replace(weight, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"qweight": torch.zeros(12, 24, dtype=torch.int64)},
        {"qzeros": torch.zeros(3, 3, dtype=torch.uint8)},
        {"scales": torch.ones(3, 24, dtype=torch.int32)},
        {"g_idx": torch.zeros(96, dtype=torch.float32)},
    ],
)
def test_parts_of_the_wrong_dtype(change):
    weight, _ = packed(4)
    with pytest.raises(TypeError, match=r"^[^\n]+$"):
        dataclasses.replace(weight, **change)
