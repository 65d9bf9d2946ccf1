"""Damping chosen on held-out tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.solving import solve

from gptq.config import QuantConfig
from gptq.solver.damping import DAMP_FACTORS, choose_damping
from gptq.solver.order import column_order


def test_damping_grows_where_tokens_are_few():
    """A part of few tokens says little of the rest; of many, all there is to say."""
    rng = np.random.default_rng(12)
    mix = np.eye(48) + rng.standard_normal((48, 48)) / 7
    W = torch.from_numpy(rng.standard_normal((300, 48)))
    config = QuantConfig(bits=3, group_size=16, order="natural", scale_search="minmax")

    def moment(tokens):
        x = rng.standard_normal((tokens, 48)) @ mix
        return torch.from_numpy(x.T @ x / tokens)

    held_out = moment(20000)
    few, many = moment(60), moment(20000)
    damp = choose_damping(few + held_out, held_out, config)
    assert damp > 0.05
    assert choose_damping(many + held_out, held_out, config) == config.percdamp

    def error(percdamp):
        solved = solve(W, few, replace(config, percdamp=percdamp)).dequantize(torch.float64)
        return float((((W - solved) @ held_out) * (W - solved)).sum())

    assert error(damp) < 0.95 * error(config.percdamp)


@pytest.mark.parametrize("order", ["gar", "act", "natural"])
def test_damping_against_the_formula_written_out(order):
    """sum over j of (U held_out U^T)_jj / U_jj^2, U^T U the inverse of what is fitted, damped."""
    config, chosen = QuantConfig(group_size=8, order=order), set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        size = rng.gamma(0.7, 1.0, 40)
        x = rng.standard_normal((60, 40)) @ (np.eye(40) + rng.standard_normal((40, 40)) / 5) * size
        x[:, 5] = 0
        fitted, held_out = (part.T @ part / 60 for part in (x[:45], x[45:]))
        mean = np.delete(np.diag(fitted), 5).mean()
        diagonal = np.where(np.arange(40) == 5, mean, np.diag(fitted))
        places = column_order(torch.from_numpy(diagonal), config)[0].numpy()
        fitted, held_out = fitted[np.ix_(places, places)], held_out[np.ix_(places, places)]
        np.fill_diagonal(fitted, diagonal[places])

        def loss(percdamp, fitted=fitted, held_out=held_out, mean=mean):
            U = np.linalg.cholesky(np.linalg.inv(fitted + percdamp * mean * np.eye(40))).T
            return (np.diag(U @ held_out @ U.T) / np.diag(U) ** 2).sum()

        expected = min((factor * config.percdamp for factor in DAMP_FACTORS), key=loss)
        moments = (torch.from_numpy(it) for it in (x.T @ x / 60, x[45:].T @ x[45:] / 60))
        assert choose_damping(*moments, config) == expected
        chosen.add(expected)
    assert len(chosen) > 1
