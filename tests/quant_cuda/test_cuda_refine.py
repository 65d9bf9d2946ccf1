"""The CUDA kernel of the refinement against torch's: emulated, and on a GPU."""

import itertools

import numpy as np
import pytest
import torch
from helpers.refinement import errors, loss, problem

from gptq.solver.refine import torch_refine
from quant_cuda.columns import GroupedColumns
from quant_cuda.cuda.solver import refine


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (20, 3, 8), (150, 40, 128), (300, 33, 64)])
def test_the_same_steps(kernels, bits, sym, shape):
    """But for some outputs with a tie, which float32 may decide otherwise than float64."""
    w, H, q, scales, zeros, runs, labels = problem(*shape, bits, sym)
    runs, labels = runs[1:] + runs[:1], labels[1:] + labels[:1]  # the short one is not last
    scales[:, ::3] *= -1  # refinement keeps signs
    columns = GroupedColumns(w, H, q, scales, zeros, runs, labels)
    expected_q, expected_scales = torch_refine(columns, bits, 3)
    narrow = [part.float().to(kernels.device) for part in (w, H, q, scales, zeros)]
    kept = [part.clone() for part in narrow]
    results = []
    for order in (0, 1, 2):
        kernels.settle(order, 0)
        columns = GroupedColumns(*narrow, runs, labels)
        done = refine(columns, bits=bits, rounds=3, launch=kernels.launch())
        results.append([part.cpu() for part in done])
    assert all(map(torch.equal, narrow, kept)), "nothing given is changed"
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))
    found_q, found_scales = results[0]
    assert found_q.dtype == torch.uint8
    same = (found_q == expected_q).all(0) & (found_scales == expected_scales).all(0)
    assert same.double().mean() > 0.9
    found = errors(w, found_q.double(), found_scales.double(), zeros, runs, labels)
    expected = errors(w, expected_q, expected_scales, zeros, runs, labels)
    np.testing.assert_allclose(loss(H, found).sum(), loss(H, expected).sum(), rtol=1e-2, atol=1e-9)


def test_every_round_lowers_the_objective(kernels):
    w, H, q, scales, zeros, runs, labels = problem(200, 16, 64, 3, False, seed=1)
    narrow = [part.float().to(kernels.device) for part in (w, H, q, scales, zeros)]
    losses = [loss(H, errors(w, q, scales, zeros, runs, labels))]
    for rounds in (1, 2, 6):
        columns = GroupedColumns(*narrow, runs, labels)
        done = refine(columns, bits=3, rounds=rounds, launch=kernels.launch())
        new_q, new_scales = (part.cpu().double() for part in done)
        assert torch.equal(new_scales, new_scales.half().double()), "scales are float16 numbers"
        assert 0 <= new_q.min() <= new_q.max() <= 7
        losses.append(loss(H, errors(w, new_q, new_scales, zeros, runs, labels)))
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-5)).all()
    assert losses[-1].sum() < 0.9 * losses[0].sum()


def test_a_group_that_is_too_long():
    w, H, q, scales, zeros, runs, labels = problem(129, 2, 129, 4, False)
    with pytest.raises(ValueError, match="group of 129 columns is too long; the kernel takes 128"):
        refine(GroupedColumns(w, H, q, scales, zeros, runs, labels), bits=4, rounds=1)
