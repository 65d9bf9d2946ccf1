"""The operator of the GPU backends: by the emulated kernels, and on a GPU."""

import dataclasses

import pytest
import torch
from helpers.emulated import emulated
from helpers.products import activations, assert_as_good_as_naive, packed
from torch import Tensor

import quant_cuda
from quant_cuda.cuda import layout, operator
from quant_cuda.weight import PreparedWeight, facts

BITS = (2, 3, 4, 8)


def view(tensors, bits, group_size, inputs, outputs) -> layout.KernelWeight:
    sizes = {"in_features": inputs, "out_features": outputs}
    return operator.view(tensors, bits=bits, group_size=group_size, **sizes)


@pytest.fixture(scope="module")
def on_host(request):
    """The operator of CPU tensors, by the emulated kernels."""
    kernels = emulated(request.getfixturevalue("host_library"))

    def product(x, tensors, bias, bits, group_size, inputs, outputs, engine) -> Tensor:
        return kernels.matmul(x, view(tensors, bits, group_size, inputs, outputs), 4, bias)

    def dequantize(tensors, bits, group_size, inputs, outputs, dtype, engine) -> Tensor:
        weight = view(tensors, bits, group_size, inputs, outputs)
        return kernels.dequantize(weight, dtype).contiguous()

    library = torch.library.Library("quant_cuda", "IMPL")
    library.impl("gpu_product", product, "CPU")
    library.impl("gpu_dequantize", dequantize, "CPU")
    yield operator.matmul
    library._destroy()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("g_idx", [False, True])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_preparing_can_be_undone(bits, g_idx, zero_offset, scales):
    weight, _ = packed(bits, 192, 37, 64, zero_offset, g_idx, scales)
    prepared = operator.prepare(weight)
    assert isinstance(prepared, PreparedWeight)
    back = operator.restore(prepared)
    for field in dataclasses.fields(weight):
        before, after = getattr(weight, field.name), getattr(back, field.name)
        same = torch.equal(before, after) if isinstance(before, Tensor) else before == after
        assert same, field.name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("g_idx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_product_and_gradients(on_host, bits, g_idx, dtype):
    weight, matrix = packed(bits, 160, 37, 64, g_idx=g_idx)
    x = activations(2, 3, 160, dtype=dtype).requires_grad_()
    bias = torch.randn(37, requires_grad=True)
    prepared = operator.prepare(weight)
    assert_as_good_as_naive(on_host(x.detach(), prepared), x.detach(), matrix)
    grad = activations(2, 3, 37, dtype=dtype)
    on_host(x, prepared, bias).backward(grad)
    rtol = 1e-5 if dtype == torch.float32 else 0.03
    expected = (grad.double() @ torch.from_numpy(matrix).T).to(dtype)
    torch.testing.assert_close(x.grad, expected, rtol=rtol, atol=rtol * expected.abs().max())
    torch.testing.assert_close(bias.grad, grad.float().sum((0, 1)), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("bits", [2, 4])
def test_int8_activations_are_those_of_the_reference(on_host, bits):
    weight, _ = packed(bits, 160, 37, 64)
    x = activations(3, 160)
    expected = quant_cuda.matmul(x, weight, "torch", int8=True)
    torch.testing.assert_close(on_host(x, operator.prepare(weight), int8=True), expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_operator_can_be_traced(on_host, bits):
    prepared = operator.prepare(packed(bits, 160, 37, 64, g_idx=True)[0])
    sizes = (bits, 64, 160, 37, "cuda")
    x = activations(2, 160, dtype=torch.float16).requires_grad_()
    arguments = (x, list(prepared.tensors), None, *sizes)
    torch.library.opcheck(torch.ops.quant_cuda.gpu_product.default, arguments)


def test_what_is_refused():
    here = facts(packed(4)[0], torch.float16)
    there = here._replace(device="cuda")
    assert operator.refuses(here) == "the weight is on a cpu device"
    assert operator.refuses(there) is None
    assert "float64" in operator.refuses(there._replace(dtype=torch.float64))
    assert "float64" in operator.refuses(there._replace(scale_dtype=torch.float64))
    assert operator.refuses(there._replace(out_features=0)) == "the weight is empty"


@pytest.mark.gpu
def test_on_a_gpu():
    for engine in operator.engines():
        for bits in BITS:
            weight, matrix = packed(bits, 576, 48, 128)
            names = ("qweight", "qzeros", "scales")
            moved = {name: getattr(weight, name).cuda() for name in names}
            prepared = quant_cuda.prepare(dataclasses.replace(weight, **moved))
            for rows in (1, 17, 70, 300):
                x = activations(rows, 576, dtype=torch.float16)
                y = quant_cuda.matmul(x.cuda(), prepared, engine)
                assert_as_good_as_naive(y.cpu(), x, matrix)


@pytest.mark.gpu
def test_streams_and_graphs_on_a_gpu():
    """The current stream is the one used; a captured product follows its input."""
    weight, matrix = packed(4, 4096, 1024, 128)
    names = ("qweight", "qzeros", "scales")
    moved = {name: getattr(weight, name).cuda() for name in names}
    prepared = quant_cuda.prepare(dataclasses.replace(weight, **moved))
    for engine in operator.engines():
        for rows in (1, 16, 300):
            x = activations(rows, 4096, dtype=torch.float16)
            there, first = x.cuda(), None
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(5):
                    y = quant_cuda.matmul(there, prepared, engine)
                    first = y if first is None else first
                    assert torch.equal(y, first)
                torch.cuda.current_stream().synchronize()
                assert_as_good_as_naive(y.cpu(), x, matrix)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = quant_cuda.matmul(there, prepared, engine)
            for factor in (2, -1):
                there.copy_(factor * x)
                graph.replay()
                assert_as_good_as_naive(captured.cpu(), factor * x, matrix)
