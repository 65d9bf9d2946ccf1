"""The correction of a weight for the errors of layers before it."""

import numpy as np
import pytest
import torch

from gptq.solver.compensation import compensate


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_compensation_is_regularised_least_squares(share):
    """With a share of 1, min |W x_full + d - V x|^2 + damp |V - W|^2 over V, by stacked lstsq."""
    rng = np.random.default_rng(4)
    full = rng.standard_normal((200, 12)) @ rng.standard_normal((12, 12))
    x = full + 0.3 * rng.standard_normal(full.shape)
    x[:, 7] = 0  # never fires in the quantized model
    W = rng.standard_normal((5, 12))
    d = 0.2 * rng.standard_normal((200, 5))  # what the residual stream lacks already
    H = x.T @ x / 200
    missing = ((full - x) @ W.T + d).T @ x / 200
    damp = 0.02 * np.delete(np.diag(H), 7).mean()
    stacked = np.vstack([x / np.sqrt(200), np.sqrt(damp) * np.eye(12)])
    target = np.vstack([(full @ W.T + d) / np.sqrt(200), np.sqrt(damp) * W.T])
    best = np.linalg.lstsq(stacked, target, rcond=None)[0].T
    expected = (1 - share) * W + share * best
    found = compensate(*map(torch.from_numpy, (W, H, missing)), share, 0.02).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-9)
