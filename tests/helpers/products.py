"""Random packed weights and activations, and how exact a matmul with them has to be."""

import dataclasses

import numpy as np
import torch

from helpers.emulated import Kernels
from helpers.oracles import pack_columns
from quant_cuda import PackedWeight
from quant_cuda.cuda import layout

# Those that round activations to 16 bits, with a scale for each group.
FIXED_POINT = ("avx512vnni", "avx512", "avx2")


def packed(
    bits: int,
    n_in: int = 96,
    n_out: int = 24,
    group_size: int = 32,
    zero_offset: int = 1,
    g_idx: bool = False,
    scales: torch.dtype = torch.float16,
) -> tuple[PackedWeight, np.ndarray]:
    """A random weight, and what it dequantizes to: float64 (in, out)."""
    rng = np.random.default_rng(bits * 10_000 + n_in + n_out)
    size = n_in if group_size == -1 else group_size
    groups = np.arange(n_in) // size
    n_groups = groups[-1] + 1
    if g_idx:
        groups = rng.permutation(groups)
    q = rng.integers(0, 2**bits, (n_in, n_out))
    zeros = rng.integers(1, 2**bits, (n_groups, n_out))
    s = torch.from_numpy(rng.uniform(0.5, 1.5, (n_groups, n_out)) / 2**bits).half().to(scales)
    weight = PackedWeight(
        qweight=torch.from_numpy(pack_columns(q, bits)),
        qzeros=torch.from_numpy(pack_columns((zeros - zero_offset).T, bits).T.copy()),
        scales=s,
        g_idx=torch.from_numpy(groups.astype(np.int32)) if g_idx else None,
        bits=bits,
        group_size=group_size,
        in_features=n_in,
        zero_offset=zero_offset,
    )
    return weight, s.double().numpy()[groups] * (q - zeros[groups])


def assert_as_good_as_naive(
    y: torch.Tensor, x: torch.Tensor, matrix: np.ndarray, backend: str | None = None
) -> None:
    """y is x @ matrix with at most twice the error of torch on the rounded matrix.

    If x is float32 and the backend rounds it to fixed point: a sixteenth of bfloat16's error.
    """
    exact = x.double().numpy() @ matrix
    rounded = x.dtype == torch.float32 and backend in FIXED_POINT
    kind, share = (torch.bfloat16, 1 / 16) if rounded else (x.dtype, 2)
    matrix_of_kind = torch.from_numpy(matrix).to(kind).T.contiguous()
    naive = torch.nn.functional.linear(x.to(kind), matrix_of_kind)
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    error = np.linalg.norm(y.double().numpy() - exact)
    limit = share * np.linalg.norm(naive.double().numpy() - exact)
    # Torch can be exact by luck: allow one rounding of the result, or of the terms that are summed
    # where there are too few results for luck to even out.
    eps = 2**-13 if rounded and exact.size < 64 else torch.finfo(x.dtype).eps
    terms = np.abs(x.double().numpy()) @ np.abs(matrix) if exact.size < 64 else exact / 2
    assert error <= limit + eps * np.linalg.norm(terms)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rng = np.random.default_rng(len(shape) + shape[0])
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def ready(kernels: Kernels, weight: PackedWeight) -> layout.KernelWeight:
    """The weight in the kernels' layout, on their device."""
    g_idx = None if weight.g_idx is None else weight.g_idx.to(kernels.device)
    moved = {name: getattr(weight, name).to(kernels.device) for name in ("qweight", "qzeros")}
    scales = weight.scales.to(kernels.device)
    return layout.prepare(dataclasses.replace(weight, **moved, scales=scales, g_idx=g_idx))


def check(kernels: Kernels, x: torch.Tensor, weight: PackedWeight, matrix, processors=4) -> None:
    """The kernels multiply as well as torch does."""
    y = kernels.matmul(x.to(kernels.device), ready(kernels, weight), processors)
    assert_as_good_as_naive(y.cpu(), x, matrix)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(a.numpy()) == bytes(b.numpy())
