"""How to add a backend, and a CUDA kernel: each by a row of a public table, and nothing else."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import emulated
from helpers.products import activations, assert_as_good_as_naive, check, packed, ready
from torch import Tensor

import quant_cuda
from quant_cuda import PackedWeight, PreparedWeight, backends
from quant_cuda.cuda import kernels as cuda
from quant_cuda.cuda.layout import KernelWeight, Plain
from quant_cuda.packing import pack, pack_zeros, unpack, unpack_zeros
from quant_cuda.weight import Facts

# A backend: its layout keeps one byte for each integer ---


def prepare(weight: PackedWeight) -> PreparedWeight:
    q = unpack(weight.qweight, weight.bits, weight.in_features)
    zeros = unpack_zeros(weight.qzeros, weight.bits, weight.out_features, weight.zero_offset)
    return PreparedWeight(
        layout="bytes",
        tensors=(q, zeros, weight.scales),
        g_idx=weight.g_idx,
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
        zero_offset=weight.zero_offset,
        scale_dtype=weight.scales.dtype,
    )


def restore(weight: PreparedWeight) -> PackedWeight:
    q, zeros, scales = weight.tensors
    return PackedWeight(
        qweight=pack(q, weight.bits),
        qzeros=pack_zeros(zeros, weight.bits, weight.zero_offset),
        scales=scales,
        g_idx=weight.g_idx,
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        zero_offset=weight.zero_offset,
    )


def rows(weight: PreparedWeight, index: Tensor) -> Tensor:
    q, zeros, scales = weight.tensors
    group = torch.arange(weight.in_features) // weight.group_size
    return (((q - zeros[group]) * scales.float()[group]).T)[index]


def matmul(x: Tensor, weight: PreparedWeight, bias: Tensor | None, int8: bool) -> Tensor:
    y = x.float() @ rows(weight, torch.arange(weight.out_features)).T
    return (y if bias is None else y + bias).to(x.dtype)


def refuses(product: Facts) -> str | None:
    return "groups are in no natural order" if product.has_g_idx else None


@pytest.fixture
def toy_backend(monkeypatch):
    layout = backends.Layout(prepare, restore, rows, traced=matmul)
    monkeypatch.setitem(backends.LAYOUTS, "bytes", layout)
    backends.register(backends.Backend("toy", "bytes", refuses, matmul))
    yield
    backends.unregister("toy")


def test_a_backend(toy_backend):
    weight, matrix = packed(4)
    x = activations(3, 96)
    assert quant_cuda.available()[0] == "toy"
    assert quant_cuda.backend_for(weight, torch.float32) == "toy"
    prepared = quant_cuda.prepare(weight)
    assert prepared.layout == "bytes"
    for given in (weight, prepared):
        assert_as_good_as_naive(quant_cuda.matmul(x, given), x, matrix)
    assert_as_good_as_naive(quant_cuda.matmul(x, weight, "toy"), x, matrix)
    assert torch.equal(quant_cuda.restore(prepared).qweight, weight.qweight)
    index = torch.tensor([5, 0])
    np.testing.assert_allclose(quant_cuda.rows(prepared, index), matrix.T[[5, 0]], rtol=1e-6)
    # The others still multiply what it prepared, and what it refuses.
    assert_as_good_as_naive(quant_cuda.matmul(x, prepared, "torch"), x, matrix)
    shuffled, matrix = packed(4, g_idx=True)
    assert quant_cuda.backend_for(shuffled, torch.float32) != "toy"
    with pytest.raises(ValueError, match="'toy' cannot multiply here: groups are in no natural"):
        quant_cuda.matmul(x, shuffled, "toy")


def test_a_backend_is_gone_after_it_is_unregistered(toy_backend):
    taken = backends.Backend("torch", None, refuses, matmul)
    with pytest.raises(ValueError, match="there is a backend 'torch' already"):
        backends.register(taken)
    with pytest.raises(ValueError, match="layout 'rags' is not one of"):
        backends.register(backends.Backend("other", "rags", refuses, matmul))
    backends.unregister("toy")
    try:
        assert "toy" not in quant_cuda.available()
    finally:
        backends.register(backends.Backend("toy", "bytes", refuses, matmul))


# A CUDA kernel: one thread an output, for 8 bits and one group ---

SOURCE = """
#include "common.cuh"

__global__ void toy(const float* x, const uint32_t* qweight, const float* scales,
                    const float* zeros, float* y, int inputs, int outputs) {
  const int column = blockIdx.x * 64 + threadIdx.x;
  if (column >= outputs) return;
  float sum = 0;
  for (int i = 0; i < inputs; ++i) {
    const uint32_t q = qweight[i / 4 * outputs + column] >> (8 * (i % 4)) & 255;
    sum += x[blockIdx.y * inputs + i] * (static_cast<float>(q) - zeros[column]);
  }
  y[blockIdx.y * outputs + column] = sum * scales[column];
}

EXPORT int quant_cuda_toy(const float* x, const uint32_t* qweight, const float* scales,
                          const float* zeros, float* y, int rows, int inputs, int outputs,
                          cudaStream_t stream) {
  LAUNCH(toy, dim3(ceil_div(outputs, 64), rows), 64, 0, stream, x, qweight, scales, zeros, y,
         inputs, outputs);
  return cudaGetLastError();
}
"""


def takes(product: cuda.Product) -> bool:
    weight = product.weight
    return isinstance(weight, Plain) and weight.bits == 8 and len(weight.scales) == 1


def launch(
    kernel: cuda.Kernel, launch: cuda.Launch, x: Tensor, weight: KernelWeight, bias: Tensor | None
) -> Tensor:
    y = x.new_empty((len(x), weight.out_features), dtype=torch.float32)
    tensors = (x.float().contiguous(), weight.qweight, weight.scales, weight.zeros, y)
    kernel(launch, *tensors, *x.shape, weight.out_features)
    return (y if bias is None else y + bias).to(x.dtype)


def test_a_cuda_kernel(host_library, tmp_path, monkeypatch):
    source = tmp_path / "toy.cu"
    source.write_text(SOURCE)
    library = emulated.build(tmp_path, [source], objects=[*host_library.parent.glob("*.o")])
    kernels = emulated.emulated(library)
    row = cuda.Kernel(name="toy", signature="ppppp iii p", takes=takes, launch=launch)
    monkeypatch.setattr(cuda, "KERNELS", [row, *cuda.KERNELS])
    # Scales that float16 does not hold: the weight stays in the checkpoint's order.
    weight, matrix = packed(8, 96, 70, -1, scales=torch.float32)
    weight = dataclasses.replace(weight, scales=weight.scales / 3)
    kernel_weight = ready(kernels, weight)
    half = torch.float16
    assert cuda.kernel_for(5, half, kernel_weight, True).name == "toy"
    x = activations(5, 96, dtype=half)
    assert_as_good_as_naive(kernels.matmul(x, kernel_weight), x, matrix / 3)
    assert_as_good_as_naive(kernels.matmul(x, kernel_weight, kernel="toy"), x, matrix / 3)
    # The others take what it does not.
    weight, matrix = packed(4, 96, 24, 32)
    assert cuda.kernel_for(5, half, ready(kernels, weight), True).name == "gemv"
    check(kernels, x, weight, matrix)
