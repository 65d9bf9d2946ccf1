"""A rounded layer to refine, and what its errors cost, in float64."""

import numpy as np
import torch

from gptq.solver.grid import find_grid, quantize


def problem(inputs: int, outputs: int, size: int, bits: int, sym: bool, seed: int = 0):
    """(w, H, q, scales, zeros, runs, labels): a rounded layer in float64, group by group."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = randn(3 * inputs, inputs) @ (torch.eye(inputs) + randn(inputs, inputs) / inputs**0.5)
    w, H = randn(inputs, outputs), x.T @ x / len(x)
    runs = [(start, min(start + size, inputs)) for start in range(0, inputs, size)]
    grids = [find_grid(w[a:b], bits, sym, "hessian", H[a:b, a:b]) for a, b in runs]
    scales = torch.stack([grid.scale for grid in grids])
    zeros = torch.stack([grid.zero for grid in grids])
    q = torch.cat([quantize(w[a:b], g, bits) for (a, b), g in zip(runs, grids, strict=True)])
    return w, H, q, scales, zeros, runs, list(range(len(runs)))


def errors(w, q, scales, zeros, runs, labels) -> np.ndarray:
    """w - dequantized (in, out)."""
    group = np.empty(len(w), dtype=int)
    for (start, stop), label in zip(runs, labels, strict=True):
        group[start:stop] = label
    return (w - (q - zeros[group]) * scales[group]).numpy()


def loss(H, error) -> np.ndarray:
    return np.einsum("io,ij,jo->o", error, H.numpy(), error)
