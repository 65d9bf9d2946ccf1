"""Damping chosen on held-out inputs, and the correction for earlier layers' errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gptq.adapt import choose_damp, feed_back
from gptq.config import QuantConfig
from gptq.solver import solve


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_feed_back_is_regularised_least_squares(share):
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
    found = feed_back(*map(torch.from_numpy, (W, H, missing)), share, 0.02).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_damping_grows_where_tokens_are_few():
    """A part of few tokens says little of the rest; of many, all there is to say."""
    rng = np.random.default_rng(12)
    mix = np.eye(48) + rng.standard_normal((48, 48)) / 7
    W = torch.from_numpy(rng.standard_normal((300, 48)))
    config = QuantConfig(bits=3, group_size=16, order="natural", scale_search="minmax")

    def moment(tokens):
        x = rng.standard_normal((tokens, 48)) @ mix
        return torch.from_numpy(x.T @ x / tokens)

    held = moment(20000)
    few, many = moment(60), moment(20000)
    damp = choose_damp(few + held, held, config)
    assert damp > 0.05
    assert choose_damp(many + held, held, config) == config.percdamp

    def error(percdamp):
        solved = solve(W, few, replace(config, percdamp=percdamp)).dequantize(torch.float64)
        return float((((W - solved) @ held) * (W - solved)).sum())

    assert error(damp) < 0.95 * error(config.percdamp)
