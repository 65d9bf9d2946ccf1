"""Refinement against a literal search over single changes, and its promise never to do harm."""

import itertools

import numpy as np
import pytest
import torch
from helpers.refinement import errors, loss, problem
from helpers.solving import solve

from gptq.config import QuantConfig
from gptq.solver.refine import PIECE, refine_columns, torch_refine
from quant_cuda.columns import GroupedColumns
from quant_cuda.cpu import library
from quant_cuda.cpu import solver as cpu_solver


def literal(w, H, q, scales, zeros, runs, labels, bits) -> tuple[np.ndarray, np.ndarray]:
    """One round by trying every integer and by the least-squares scale, a weight at a time."""
    q, scales = q.clone(), scales.clone()
    for (start, stop), g in zip(runs, labels, strict=True):
        for o in range(w.shape[1]):
            for j in range(start, stop):
                found = []
                for number in range(2**bits):
                    q[j, o] = number
                    error = errors(w, q, scales, zeros, runs, labels)[:, o]
                    found.append(error @ H.numpy() @ error)
                q[j, o] = int(np.argmin(found))
        for o in range(w.shape[1]):
            old = scales[g, o].clone()
            before = loss(H, errors(w, q, scales, zeros, runs, labels))[o]
            scales[g, o] = 0
            rest = errors(w, q, scales, zeros, runs, labels)[:, o]
            v = np.zeros(len(w))
            v[start:stop] = (q[start:stop, o] - zeros[g, o]).numpy()
            best = (v @ H.numpy() @ rest) / (v @ H.numpy() @ v)
            scales[g, o] = float(np.float16(np.float32(best)))
            if loss(H, errors(w, q, scales, zeros, runs, labels))[o] >= before:
                scales[g, o] = old
    return q, scales


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_a_round_takes_the_best_of_every_single_change(bits, sym):
    w, H, q, scales, zeros, runs, _ = problem(20, 3, 8, bits, sym)
    order = [runs[1], runs[2], runs[0]], [1, 2, 0]  # the last group is short
    found_q, found_scales = refine_columns(GroupedColumns(w, H, q, scales, zeros, *order), bits, 1)
    expected_q, expected_scales = literal(w, H, q, scales, zeros, *order, bits)
    assert torch.equal(found_q, expected_q)
    assert torch.equal(found_scales, expected_scales)
    assert (found_q != q).any()
    assert (found_scales != scales).any()


@pytest.mark.parametrize("size", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_round_lowers_the_objective(size, dtype):
    inputs = PIECE + 72  # a group of 200 is done in two pieces
    parts = problem(inputs, 16, size, 3, False, seed=1)
    w, H, q, scales, zeros = (part.to(dtype) for part in parts[:5])
    runs, labels = parts[5:]
    losses = []
    for rounds in (0, 1, 2, 6):
        done = refine_columns(GroupedColumns(w, H, q, scales, zeros, runs, labels), 3, rounds)
        e = errors(w.double(), done[0].double(), done[1].double(), zeros.double(), runs, labels)
        losses.append(loss(H.double(), e))
        assert torch.equal(done[1], done[1].half().to(dtype)), "scales are float16 numbers"
        assert done[0].min() >= 0
        assert done[0].max() <= 7
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + slack)).all()
    assert losses[-1].sum() < 0.9 * losses[0].sum()


@pytest.mark.parametrize("instruction_set", library.instruction_sets())
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (20, 3, 8), (150, 40, 150), (1100, 33, 64)])
def test_compiled_code_takes_the_same_steps(instruction_set, bits, sym, shape):
    """Up to ties, that float32 may decide otherwise than float64."""
    w, H, q, scales, zeros, runs, labels = problem(*shape, bits, sym)
    runs = runs[1:] + runs[:1]  # the short one is not last
    columns = torch.cat([torch.arange(*run) for run in runs])
    stops = list(itertools.accumulate(stop - start for start, stop in runs))
    runs, labels = list(zip([0, *stops[:-1]], stops, strict=True)), labels[1:] + labels[:1]
    w, H, q = w[columns], H[columns][:, columns], q[columns]
    scales[:, ::3] *= -1  # refinement keeps signs
    columns = GroupedColumns(w, H, q, scales, zeros, runs, labels)
    expected_q, expected_scales = torch_refine(columns, bits, 3)
    narrow = [part.float() for part in (w, H, q, scales, zeros)]
    kept = [part.clone() for part in narrow]
    found_q, found_scales = cpu_solver.refine(
        GroupedColumns(*narrow, runs, labels),
        bits=bits,
        rounds=3,
        instruction_set=instruction_set,
    )
    assert all(map(torch.equal, narrow, kept)), "nothing given is changed"
    assert found_q.dtype == torch.uint8
    assert (found_q == expected_q).double().mean() > 0.999
    assert (found_scales == expected_scales).double().mean() > 0.99
    found = errors(w, found_q.double(), found_scales.double(), zeros, runs, labels)
    expected = errors(w, expected_q, expected_scales, zeros, runs, labels)
    np.testing.assert_allclose(loss(H, found), loss(H, expected), rtol=1e-3, atol=1e-9)


@pytest.mark.skipif(not library.instruction_sets(), reason="needs the compiled code")
def test_threads_share_the_work_and_not_the_result():
    w, H, q, scales, zeros, runs, labels = problem(100, 130, 32, 4, False)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            narrow = [part.float() for part in (w, H, q, scales, zeros)]
            results.append(refine_columns(GroupedColumns(*narrow, runs, labels), 4, 2))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("order", ["gar", "natural", "act"])
@pytest.mark.parametrize("static_groups", [False, True])
def test_a_solve_is_refined_in_every_order(sym, order, static_groups):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 100, generator=generator)
    x = x @ (torch.eye(100) + torch.randn(100, 100, generator=generator) / 10)
    x[:, 7] = 0  # an input that never fires
    H = x.T @ x / len(x)
    W = torch.randn(24, 100, generator=generator)
    W[3] = 0
    settings = {"sym": sym, "order": order, "static_groups": static_groups, "group_size": 32}
    swept = solve(W, H, QuantConfig(bits=3, **settings, refine=0))
    refined = solve(W, H, QuantConfig(bits=3, **settings, refine=4))
    assert torch.equal(swept.g_idx, refined.g_idx)
    assert torch.equal(swept.zeros, refined.zeros)
    assert torch.equal(swept.scales < 0, refined.scales < 0)
    assert refined.loss.sum() < 0.99 * swept.loss.sum()
    e = W - refined.dequantize()
    e[:, 7] = 0
    torch.testing.assert_close(refined.loss, ((e @ H) * e).sum(1), rtol=1e-3, atol=1e-6)
    assert (refined.dequantize()[3] == 0).all()
    # A dead input is rounded: to within a step of its weight, or to an end of its grid.
    group = int(refined.g_idx[7])
    far = (W[:, 7] - refined.dequantize()[:, 7]).abs() > refined.scales[group].abs().float()
    assert all(int(q) in (0, 7) for q in refined.q[7][far])


def test_nothing_given_is_changed():
    w, H, q, scales, zeros, runs, labels = problem(20, 3, 8, 4, False)
    kept = [part.clone() for part in (w, H, q, scales, zeros)]
    refine_columns(GroupedColumns(w, H, q, scales, zeros, runs, labels), 4, 2)
    for before, after in zip(kept, (w, H, q, scales, zeros), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("order", ["gar", "act"])
def test_more_sweeps_never_lose(sym, order):
    """Each output keeps its best under the damped H, which is what a solve aims at."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 100, generator=generator)
    x = x @ (torch.eye(100) + torch.randn(100, 100, generator=generator) / 10)
    x[:, 7] = 0
    H = x.T @ x / len(x)
    W = torch.randn(40, 100, generator=generator)
    mean = H.diagonal()[H.diagonal() > 0].mean()
    damped = H.clone()
    damped[7, 7] = mean  # a dead input counts as an ordinary one that no other depends on
    damped.diagonal().add_(0.1 * mean)
    losses = []
    for sweeps in (1, 2, 4, 7):
        settings = {"bits": 3, "group_size": 32, "sym": sym, "order": order, "percdamp": 0.1}
        solution = solve(W, H, QuantConfig(**settings, sweeps=sweeps))
        e = W - solution.dequantize()
        # Rows that plain rounding served better under H itself are not what is looked at here.
        losses.append(torch.where(solution.kept_rtn, torch.nan, ((e @ damped) * e).sum(1)))
    for before, after in itertools.pairwise(losses):
        known = ~(before.isnan() | after.isnan())
        assert known.float().mean() > 0.8
        assert (after[known] <= before[known] * (1 + 1e-5)).all()
    assert losses[-1].nanmean() < 0.99 * losses[0].nanmean()
