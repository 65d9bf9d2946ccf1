"""H in another order, damped, and the factor of its inverse, against numpy's inverse."""

import numpy as np
import pytest
import torch

from gptq.solver.cholesky import STRIP, damped, inverse_factor, lower_inverse, permuted, repair_dead


def moment(n: int) -> np.ndarray:
    x = np.random.default_rng(n).standard_normal((2 * n, n)) * np.linspace(0.5, 2, n)
    return x.T @ x / len(x)


@pytest.mark.parametrize("n", [1, 191, 193, 500])
def test_triangles_are_inverted_by_halves(n):
    L = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).tril_()
    L.diagonal().abs_().add_(n)
    torch.testing.assert_close(lower_inverse(L) @ L, torch.eye(n, dtype=torch.float64))
    assert not bool(lower_inverse(L).triu(1).any())


@pytest.mark.parametrize("n", [5, STRIP + 20])
def test_another_order(n):
    H = moment(n)
    order = np.random.default_rng(1).permutation(n)
    given, places = torch.from_numpy(H.copy()), torch.from_numpy(order)
    expected = H[np.ix_(order, order)]
    np.testing.assert_array_equal(permuted(given, places).numpy(), expected)
    added = torch.tensor(0.25, dtype=torch.float64)
    np.testing.assert_array_equal(damped(given, added, places).numpy(), expected + 0.25 * np.eye(n))
    np.testing.assert_array_equal(damped(given, added).numpy(), H + 0.25 * np.eye(n))
    np.testing.assert_array_equal(given.numpy(), H)


@pytest.mark.parametrize("n", [5, STRIP + 20])
def test_the_factor_of_the_inverse_in_an_order(n):
    H = moment(n)
    H[2], H[:, 2] = 0, 0
    order = np.random.default_rng(2).permutation(n)
    repaired, dead = repair_dead(torch.from_numpy(H))
    before = repaired.clone()
    U, damp = inverse_factor(repaired, dead, 0.03, torch.from_numpy(order))
    assert damp == 0.03
    mean = np.delete(np.diag(H), 2).mean()
    full = H + 0.03 * mean * np.eye(n)
    full[2, 2] += mean
    np.testing.assert_allclose((U.T @ U).numpy(), np.linalg.inv(full)[np.ix_(order, order)])
    assert not bool(U.tril(-1).any())
    assert torch.equal(repaired, before)
    plain, _ = inverse_factor(repaired, dead, 0.03)
    np.testing.assert_allclose((plain.T @ plain).numpy(), np.linalg.inv(full))
