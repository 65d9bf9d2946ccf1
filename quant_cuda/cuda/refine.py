"""The solver's refinement by a CUDA kernel, one launch for a group."""

import torch
from torch import Tensor

from quant_cuda.cuda import kernels

LONGEST = 128
"""Columns that a group may have."""


def refine(
    w: Tensor,
    H: Tensor,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    runs: list[tuple[int, int]],
    labels: list[int],
    bits: int,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """As native.refine, for float32 tensors of a GPU, on its current stream.

    Returns q uint8 (in, out) and scales float32 (groups, out), both new.
    Raises ValueError for a group longer than LONGEST.
    """
    launch = kernels.current(w)
    with torch.cuda.device(w.device):
        return launch_refine(launch, w, H, q, scales, zeros, runs, labels, bits, rounds)


def launch_refine(
    launch: kernels.Launch,
    w: Tensor,
    H: Tensor,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    runs: list[tuple[int, int]],
    labels: list[int],
    bits: int,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """`refine` on a stream of the current device."""
    longest = max(stop - start for start, stop in runs)
    if longest > LONGEST:
        raise ValueError(f"a group of {longest} columns is too long; the kernel takes {LONGEST}")
    inputs, outputs = w.shape
    H, zeros = H.contiguous(), zeros.contiguous()
    scales = scales.clone(memory_format=torch.contiguous_format)
    q = q.to(torch.uint8, copy=True, memory_format=torch.contiguous_format)
    error = w.clone(memory_format=torch.contiguous_format)
    for (start, stop), label in zip(runs, labels, strict=True):
        error[start:stop] -= (q[start:stop] - zeros[label]) * scales[label]
    gradient = H @ error
    in_order = runs == sorted(runs)
    change = error[:longest]  # not needed any more
    for turn in range(rounds):
        for (start, stop), label in zip(runs, labels, strict=True):
            tensors = (H, gradient, zeros[label], scales[label], q, change)
            launch("refine_group", *tensors, inputs, outputs, start, stop, bits)
            # In the last round what was visited is not visited again.
            first = stop if turn + 1 == rounds and in_order else 0
            gradient[first:].addmm_(H[first:, start:stop], change[: stop - start], alpha=-1)
    return q, scales
