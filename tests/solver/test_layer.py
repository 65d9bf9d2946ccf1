"""The solve against literal Optimal Brain Quantization, and its promises at the edges."""

import dataclasses
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.oracles import Solved, obq, rtn
from helpers.solving import solve as solve_and_refine

from gptq.config import QuantConfig
from gptq.solver import problem
from gptq.solver.compensation import compensate
from gptq.solver.damping import choose_damping
from gptq.solver.hessian import Hessian
from gptq.solver.layer import round_to_nearest, solve_layer
from gptq.solver.problem import STRIP
from gptq.solver.solution import Solution

BITS = (2, 3, 4, 8)
ORDERS = ("natural", "act", "gar")
SEARCHES = ("hessian", "mse", "minmax")


def layer(n_out: int, n_in: int, seed: int, tokens: int | None = None) -> tuple:
    """(W (out, in), H (in, in)): heavy-tailed weights, correlated inputs of uneven size."""
    rng = np.random.default_rng(seed)
    mix = np.eye(n_in) + rng.standard_normal((n_in, n_in)) / np.sqrt(n_in)
    x = rng.standard_normal((tokens or 3 * n_in, n_in)) @ mix * rng.gamma(1.0, 1.0, n_in)
    W = rng.standard_normal((n_out, n_in)) * (1 + rng.standard_normal((n_out, n_in)) ** 2)
    return W, x.T @ x / x.shape[0]


def solve(W: torch.Tensor, H: torch.Tensor, config: QuantConfig) -> Solution:
    """The sweep alone; what is refined afterwards is in test_refine.py."""
    return solve_and_refine(W, H, replace(config, refine=0))


def run(W: np.ndarray, H: np.ndarray, config: QuantConfig) -> Solution:
    return solve(torch.from_numpy(W), torch.from_numpy(H), config)


def oracle(W: np.ndarray, H: np.ndarray, config: QuantConfig, **changes) -> Solved:
    names = ("bits", "group_size", "sym", "order", "static_groups", "scale_search", "percdamp")
    return obq(W, H, **{name: getattr(config, name) for name in names} | changes)


def assert_same(solution: Solution, expected: Solved) -> None:
    """Integers, scales, zeros and groups equal; losses to float64 rounding."""
    assert solution.q.dtype == torch.uint8
    assert solution.scales.dtype == torch.float16
    assert solution.zeros.dtype == torch.int32
    assert solution.g_idx.dtype == torch.int32
    np.testing.assert_array_equal(solution.g_idx.numpy(), expected.g_idx)
    np.testing.assert_array_equal(solution.zeros.numpy(), expected.zeros)
    np.testing.assert_array_equal(solution.scales.numpy().astype(np.float64), expected.scales)
    np.testing.assert_array_equal(solution.q.T.numpy(), expected.q)
    near = {"rtol": 1e-9, "atol": 1e-12 * float(np.abs(expected.rtn_loss).max())}
    np.testing.assert_allclose(solution.loss.double().numpy(), expected.loss, **near)
    np.testing.assert_allclose(solution.rtn_loss.double().numpy(), expected.rtn_loss, **near)
    np.testing.assert_array_equal(solution.dequantize(torch.float64).numpy(), expected.dequantized)


@pytest.mark.parametrize("group_size", [-1, 16, 64])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("scale_search", SEARCHES)
def test_every_setting_equals_obq(group_size, order, static_groups, scale_search):
    for bits, sym in itertools.product(BITS, (False, True)):
        config = QuantConfig(
            bits=bits,
            group_size=group_size,  # of 40 columns: one group, 16 + 16 + 8, one group
            sym=sym,
            order=order,
            static_groups=static_groups,
            scale_search=scale_search,
        )
        W, H = layer(3, 40, seed=bits)
        expected = oracle(W, H, config)
        solution = run(W, H, config)
        assert_same(solution, expected)
        assert solution.damp == config.percdamp
        assert solution.kept_rtn.tolist() == (expected.rtn_loss < expected.swept_loss).tolist()


@pytest.mark.parametrize(
    ("group_size", "order", "static_groups"),
    [
        (-1, "gar", False),  # one group over three blocks
        (150, "natural", False),  # a group longer than a block, starting inside one
        (100, "act", False),  # groups that straddle blocks
        (128, "gar", False),  # groups that end where blocks do, unless the short one leads
        (128, "act", False),
        (32, "gar", False),  # several groups in a block see each other's updates
        (32, "act", True),
        (7, "gar", True),
    ],
)
def test_across_blocks_equals_obq(group_size, order, static_groups):
    config = QuantConfig(bits=3, group_size=group_size, order=order, static_groups=static_groups)
    W, H = layer(3, 264, seed=group_size + 1)  # two blocks of 128 and a rest
    assert_same(run(W, H, config), oracle(W, H, config))


@pytest.mark.parametrize("static_groups", [False, True])
def test_a_short_last_group_visited_first(static_groups):
    W, H = layer(4, 40, seed=11)
    boost = np.ones(40)
    boost[32:] = 20.0
    H = boost[:, None] * H * boost
    config = QuantConfig(group_size=16, order="gar", static_groups=static_groups)
    solution = run(W, H, config)
    assert_same(solution, oracle(W, H, config))
    assert solution.g_idx.tolist() == [0] * 16 + [1] * 16 + [2] * 8


@pytest.mark.parametrize("percdamp", [0.001, 0.1, 1.0])
def test_damping_is_a_share_of_the_mean_diagonal(percdamp):
    W, H = layer(6, 48, seed=5)
    config = QuantConfig(bits=3, group_size=16, percdamp=percdamp)
    solution = run(W, H, config)
    assert_same(solution, oracle(W, H, config))
    # so that the unit of the inputs does not matter
    scaled = run(W, H * 1024, config)
    assert torch.equal(scaled.q, solution.q)
    assert torch.equal(scaled.scales, solution.scales)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("scale_search", SEARCHES)
@pytest.mark.parametrize("sym", [False, True])
def test_identity_hessian_is_plain_rounding(order, static_groups, scale_search, sym):
    W = torch.from_numpy(layer(8, 72, seed=1)[0])
    config = QuantConfig(
        group_size=32,
        sym=sym,
        order=order,
        static_groups=static_groups,
        scale_search=scale_search,
    )
    H = torch.eye(72, dtype=torch.float64)
    solution, rounded = solve(W, H, config), round_to_nearest(W, H, config)
    for field in ("q", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(solution, field), getattr(rounded, field)), field
    torch.testing.assert_close(solution.loss, rounded.loss)
    assert not solution.kept_rtn.any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("scale_search", SEARCHES)
@pytest.mark.parametrize("group_size", [-1, 16, 64])
def test_rounding_to_nearest(bits, sym, scale_search, group_size):
    W, H = layer(5, 40, seed=bits)
    config = QuantConfig(
        bits=bits, sym=sym, scale_search=scale_search, group_size=group_size, method="rtn"
    )
    expected = rtn(W, H, bits=bits, group_size=group_size, sym=sym, scale_search=scale_search)
    assert_same(run(W, H, config), expected)
    assert_same(round_to_nearest(torch.from_numpy(W), torch.from_numpy(H), config), expected)
    assert not run(W, H, config).kept_rtn.any()


@pytest.mark.parametrize("order", ORDERS)
def test_rounding_to_nearest_ignores_the_order(order):
    W, H = layer(5, 40, seed=2)
    expected = rtn(W, H, bits=4, group_size=16, sym=False, scale_search="hessian")
    assert_same(run(W, H, QuantConfig(group_size=16, order=order, method="rtn")), expected)


def test_rounding_without_a_hessian_uses_the_full_range():
    W, H = layer(5, 40, seed=3)
    expected = rtn(W, H, bits=4, group_size=16, sym=False, scale_search="minmax")
    solution = round_to_nearest(torch.from_numpy(W), None, QuantConfig(group_size=16))
    np.testing.assert_array_equal(solution.q.T.numpy(), expected.q)
    np.testing.assert_array_equal(solution.scales.numpy().astype(np.float64), expected.scales)
    np.testing.assert_array_equal(solution.zeros.numpy(), expected.zeros)
    mse = rtn(W, H, bits=4, group_size=16, sym=False, scale_search="mse")
    config = QuantConfig(group_size=16, scale_search="mse")
    solution = round_to_nearest(torch.from_numpy(W), None, config)
    np.testing.assert_array_equal(solution.q.T.numpy(), mse.q)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ORDERS)
def test_never_worse_than_rounding_and_mostly_better(bits, order):
    W, H = layer(64, 96, seed=4)
    config = QuantConfig(bits=bits, group_size=32, order=order)
    solution = run(W, H, config)
    assert (solution.loss <= solution.rtn_loss).all()
    assert solution.loss.sum() < 0.9 * solution.rtn_loss.sum()


def test_rows_that_rounding_serves_better_keep_it():
    # Few columns leave the last ones with errors that nothing can take up.
    W, H = layer(64, 16, seed=6)
    config = QuantConfig(bits=2, group_size=-1, order="natural")
    expected = oracle(W, H, config)
    kept = expected.rtn_loss < expected.swept_loss
    assert 0 < kept.sum() < 64, "the case no longer tests the guard"
    solution = run(W, H, config)
    assert_same(solution, expected)
    assert solution.kept_rtn.tolist() == kept.tolist()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("static_groups", [False, True])
def test_dead_columns(order, static_groups):
    W, H = layer(4, 40, seed=7)
    dead = [0, 5, 17, *range(32, 40)]  # the last group is dead altogether
    H[dead], H[:, dead] = 0.0, 0.0
    W[:, 5] = 1e4  # must not widen its group's range beyond the other weights'
    config = QuantConfig(group_size=16, order=order, static_groups=static_groups)
    solution = run(W, H, config)
    assert_same(solution, oracle(W, H, config))
    assert solution.dead == len(dead)
    bound = np.abs(np.delete(W, dead, axis=1)).max(1)[:, None]
    error = solution.dequantize(torch.float64).numpy() - np.clip(W, -bound, bound)
    step = solution.scales.abs().double().numpy()[solution.g_idx.numpy()].T
    # A search may cut off up to 0.4 of a range.
    assert (np.abs(error) <= step * 0.5 + bound * 0.4)[:, dead].all()
    assert (np.abs(error) <= step * 0.5 + 1e-9)[:, dead].mean() > 0.8
    assert_same(
        run(W, H, dataclasses.replace(config, method="rtn")),
        rtn(W, H, bits=4, group_size=16, sym=False, scale_search="hessian"),
    )


def test_all_columns_dead():
    W, _ = layer(4, 40, seed=8)
    solution = run(W, np.zeros((40, 40)), QuantConfig(group_size=16))
    assert solution.dead == 40
    error = solution.dequantize(torch.float64).numpy() - W
    assert np.abs(error).max() < np.abs(W).max() / 4
    assert (solution.loss == 0).all()
    assert (solution.rtn_loss == 0).all()
    assert not solution.kept_rtn.any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [1, 10])
def test_fewer_tokens_than_columns(order, tokens):
    W, H = layer(4, 48, seed=9, tokens=tokens)
    config = QuantConfig(group_size=16, order=order, scale_search="mse")
    solution = run(W, H, config)
    assert_same(solution, oracle(W, H, config))
    assert solution.damp == config.percdamp
    float32 = solve(torch.from_numpy(W).float(), torch.from_numpy(H).float(), config)
    assert float32.loss.isfinite().all()
    assert solution.loss.sum() < solution.rtn_loss.sum()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_odd_rows(sym, order):
    W, H = layer(8, 48, seed=10)
    W[0] = 0.0
    W[1] = 0.731
    W[2] = -0.731
    W[3] = np.abs(W[3])
    W[4, 9] = 3e3  # an outlier
    W[5] *= 1e-9  # below the smallest scale
    W[6] *= 1e7  # above the largest
    W[7, :16] = 0.0
    config = QuantConfig(sym=sym, order=order, group_size=16)
    solution = run(W, H, config)
    assert_same(solution, oracle(W, H, config))
    assert (solution.dequantize(torch.float64)[0] == 0).all()
    assert solution.scales.isfinite().all()
    assert (solution.scales != 0).all()
    assert (solution.zeros >= 1).all()
    assert (solution.zeros <= 15).all()
    assert solution.loss.isfinite().all()
    # Rows do not know of each other: an odd one harms none beside it.
    alone = run(W[3:5], H, config)
    assert torch.equal(alone.q, solution.q[:, 3:5])
    assert torch.equal(alone.scales, solution.scales[:, 3:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_weights_stay_finite(dtype):
    W, H = layer(6, 48, seed=12)
    W = torch.from_numpy(W).to(dtype)
    W[1, 3], W[2, 40], W[3], W[4] = 1e8, -1e8, W[3] * 1e-30, 1e-38
    H = torch.from_numpy(H).to(dtype)
    for order in ORDERS:
        solution = solve(W, H, QuantConfig(group_size=16, order=order))
        assert solution.scales.isfinite().all()
        assert (solution.scales != 0).all()
        assert solution.dequantize(dtype).isfinite().all()
        assert solution.loss.isfinite().all()
        assert (solution.loss <= solution.rtn_loss).all()


def indefinite(seed: int, lowest: float) -> tuple:
    """A layer whose H has one eigenvalue of `lowest` times its mean diagonal."""
    W, H = layer(4, 40, seed)
    values, vectors = np.linalg.eigh(H)
    H = H - (values[0] - lowest * np.diag(H).mean()) * np.outer(vectors[:, 0], vectors[:, 0])
    return W, H


@pytest.mark.parametrize(
    ("percdamp", "lowest", "used"),
    [(0.01, -0.03, 0.1), (0.02, -0.05, 0.2), (0.01, -0.3, 1.0), (0.05, -0.03, 0.05)],
)
@pytest.mark.parametrize("order", ORDERS)
def test_an_indefinite_hessian_raises_the_damping(percdamp, lowest, used, order):
    W, H = indefinite(13, lowest)
    config = QuantConfig(group_size=16, order=order, percdamp=percdamp, scale_search="minmax")
    solution = run(W, H, config)
    assert solution.damp == pytest.approx(used)
    assert_same(solution, oracle(W, H, config, percdamp=solution.damp))


def test_a_very_small_damping_is_raised_from_one_in_ten_thousand():
    W, H = indefinite(14, -0.005)
    config = QuantConfig(group_size=16, percdamp=3e-9, scale_search="minmax")
    solution = run(W, H, config)
    assert solution.damp == pytest.approx(0.01)
    assert_same(solution, oracle(W, H, config, percdamp=solution.damp))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("transposed", [False, True])
def test_inputs_are_left_alone(method, transposed):
    W, H = layer(4, 40, seed=15)
    H[:, 3], H[3] = 0.0, 0.0  # a dead column, whose weights count as 0
    w, h = torch.from_numpy(W.copy()), torch.from_numpy(H.copy())
    if transposed:  # contiguous the other way round, where a needed copy may not be made
        w, h = w.T.contiguous().T, h.T.contiguous().T
    config = QuantConfig(group_size=16, method=method)
    first = solve(w, h, config)
    assert np.array_equal(w.numpy(), W)
    assert np.array_equal(h.numpy(), H)
    assert torch.equal(first.q, solve(w, h, config).q)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.damp = 1.0


@pytest.mark.parametrize("transposed", [False, True])
def test_a_parameter_is_a_weight_too(transposed):
    W, H = layer(6, 40, seed=16)
    w = torch.from_numpy(W)
    parameter = torch.nn.Parameter(w.T.contiguous().T if transposed else w)
    config = QuantConfig(group_size=16)
    solution = solve(parameter, torch.from_numpy(H), config)
    assert_same(solution, oracle(W, H, config))
    assert not solution.scales.requires_grad
    assert not solution.loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_of_h_is_the_dtype_of_the_solve(dtype):
    W, H = layer(6, 40, seed=17)
    narrow = torch.from_numpy(W).to(dtype)
    config = QuantConfig(group_size=16)
    solution = solve(narrow, torch.from_numpy(H), config)
    assert_same(solution, oracle(narrow.double().numpy(), H, config))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [False, True])
def test_float32_comes_close_to_float64(order, sym):
    W, H = layer(48, 160, seed=18)
    config = QuantConfig(group_size=64, order=order, sym=sym)
    double = run(W, H, config)
    single = solve(torch.from_numpy(W).float(), torch.from_numpy(H).float(), config)
    assert single.loss.sum().item() == pytest.approx(double.loss.sum().item(), rel=0.02)
    assert (single.q != double.q).double().mean() < 0.02
    # The loss reported is that of the stored numbers.
    e = torch.from_numpy(W) - single.dequantize(torch.float64)
    true_loss = ((e @ torch.from_numpy(H)) * e).sum(1)
    torch.testing.assert_close(single.loss.double(), true_loss, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("order", "static_groups"),
    [("natural", False), ("gar", False), ("gar", True), ("act", True), ("act", False)],
)
def test_each_column_uses_the_scale_of_its_own_group(order, static_groups):
    # Groups of very different magnitude and a diagonal H, so that nothing moves between columns:
    # every weight must come back to within half a step of its own group's range.
    rng = np.random.default_rng(19)
    diag = rng.gamma(1.0, 1.0, 40) + 0.01
    config = QuantConfig(
        group_size=16, order=order, static_groups=static_groups, scale_search="minmax"
    )
    if order == "act" and not static_groups:
        ranks = np.argsort(np.argsort(-diag))
        groups = ranks // 16
    else:
        groups = np.arange(40) // 16
    W = rng.standard_normal((5, 40)) * np.array([1.0, 1e-2, 1e2])[groups]
    solution = run(W, np.diag(diag), config)
    assert solution.g_idx.tolist() == groups.tolist()
    assert solution.scales.shape == solution.zeros.shape == (3, 5)
    e = np.abs(W - solution.dequantize(torch.float64).numpy())
    for g in range(3):
        members = W[:, groups == g]
        reach = np.maximum(members.max(1), 0) - np.minimum(members.min(1), 0)
        assert (e[:, groups == g] <= 0.52 * reach[:, None] / 15).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dequantize(dtype):
    W, H = layer(4, 40, seed=20)
    solution = run(W, H, QuantConfig(group_size=16, order="act"))
    g = solution.g_idx.long()
    exact = (solution.scales.double()[g] * (solution.q.double() - solution.zeros.double()[g])).T
    got = solution.dequantize(dtype)
    assert got.shape == (4, 40)
    assert got.dtype == dtype
    assert torch.equal(got, exact.to(dtype))


def test_energy_and_rows():
    W, H = layer(6, 40, seed=21)
    H[:, 3], H[3] = 0.0, 0.0
    solution = run(W, H, QuantConfig(group_size=16, order="act"))
    np.testing.assert_allclose(solution.energy.numpy(), [w @ H @ w for w in W], rtol=1e-12)
    part = solution.outputs(2, 5)
    assert torch.equal(part.dequantize(), solution.dequantize()[2:5])
    for field in ("loss", "rtn_loss", "energy", "kept_rtn"):
        assert torch.equal(getattr(part, field), getattr(solution, field)[2:5])


def test_losses_of_layers_wider_than_a_strip():
    W, H = layer(5, 2 * STRIP + 30, 3)
    solution = run(W, H, QuantConfig(group_size=64))
    error = W - solution.dequantize(torch.float64).numpy()
    np.testing.assert_allclose(solution.loss.numpy(), np.diag(error @ H @ error.T), rtol=1e-9)
    np.testing.assert_allclose(solution.energy.numpy(), np.diag(W @ H @ W.T), rtol=1e-9)


def test_rows_worked_on_a_few_at_a_time(monkeypatch):
    W, H = (torch.from_numpy(it) for it in layer(8, 40, 6))
    config = QuantConfig(bits=3, group_size=16, order="act", sweeps=3)
    whole = solve_and_refine(W, H, config)
    monkeypatch.setattr(problem, "ROWS", {"cpu": 3})
    found = solve_and_refine(W, H, config)
    for field in ("q", "scales", "zeros", "kept_rtn"):
        assert torch.equal(getattr(found, field), getattr(whole, field)), field
    for field in ("loss", "rtn_loss", "energy"):
        torch.testing.assert_close(getattr(found, field), getattr(whole, field))
    assert not torch.equal(whole.q, solve(W, H, replace(config, sweeps=1)).q)


def statistics(W: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Of 60 tokens in a quantized and a full-precision model, the last quarter of them held out."""
    rng = np.random.default_rng(seed)
    full = rng.standard_normal((60, W.shape[1])) @ rng.standard_normal((W.shape[1],) * 2)
    x = full + 0.1 * rng.standard_normal(full.shape)
    means = {"H": x.T @ x, "held_out": x[45:].T @ x[45:], "target": W.numpy() @ full.T @ x}
    return {name: torch.from_numpy(mean / 60) for name, mean in means.items()}


@pytest.mark.parametrize("adaptive_damp", [True, False])
@pytest.mark.parametrize("error_feedback", [0.5, 0.0])
def test_damping_is_chosen_and_the_weight_compensated_before_the_sweep(
    adaptive_damp, error_feedback
):
    config = QuantConfig(
        bits=3, group_size=16, adaptive_damp=adaptive_damp, error_feedback=error_feedback
    )
    weight = torch.from_numpy(layer(6, 40, seed=22)[0])
    parts = statistics(weight, 22)
    hessian = Hessian(**parts)
    solution = solve_layer(weight, hessian, config)
    damp = choose_damping(parts["H"], parts["held_out"], config) if adaptive_damp else 0.01
    assert solution.damp == damp
    assert (damp > 0.01) == adaptive_damp, "the case no longer tests the choice"
    corrected = weight
    if error_feedback:
        error = hessian.target_error(weight)
        corrected = compensate(weight, parts["H"], error, error_feedback, damp)
    expected = solve_layer(corrected, Hessian(parts["H"]), replace(config, percdamp=damp))
    assert torch.equal(solution.q, expected.q)
    assert torch.equal(solution.loss, expected.loss)
    assert torch.equal(corrected, weight) == (error_feedback == 0)
    # The record is as it was, and gives the same again.
    assert hessian.held_out is parts["held_out"]
    assert torch.equal(solve_layer(weight, hessian, config).q, solution.q)


def test_outputs_are_solved_alone_as_together():
    """The damping depends on the inputs alone, so that processes can divide the outputs."""
    config = QuantConfig(bits=3, group_size=16)
    weight = torch.from_numpy(layer(6, 40, seed=23)[0])
    whole = solve_layer(weight, Hessian(**statistics(weight, 23)), config)
    for outputs in (slice(0, 2), slice(2, 6)):
        hessian = Hessian(**statistics(weight, 23)).take_outputs(outputs)
        part = solve_layer(weight[outputs], hessian, config)
        assert part.damp == whole.damp
        assert torch.equal(part.q, whole.q[:, outputs])
        assert torch.equal(part.scales, whole.scales[:, outputs])


@pytest.mark.parametrize("group_size", [16, -1])
def test_a_solution_knows_its_settings(group_size):
    W, H = layer(4, 40, seed=25)
    for config in (QuantConfig(bits=3, group_size=group_size), QuantConfig(group_size=group_size)):
        solution = run(W, H, config)
        assert (solution.bits, solution.group_size) == (config.bits, group_size)
        assert solution.q.shape == (40, 4)
        plain = solve_layer(torch.from_numpy(W), None, config)
        assert (plain.bits, plain.group_size, plain.damp) == (config.bits, group_size, 0.0)


@pytest.mark.parametrize("damaged", ["weight", "inputs", "target"])
def test_what_is_not_finite_is_refused(damaged):
    weight = torch.from_numpy(layer(6, 40, seed=26)[0])
    parts = statistics(weight, 26)
    tensor = {"weight": weight, "inputs": parts["H"], "target": parts["target"]}[damaged]
    tensor[1, 3] = torch.nan
    reason = "the inputs hold NaN" if damaged == "inputs" else "the weight holds NaN"
    with pytest.raises(ValueError, match=reason):
        solve_layer(weight, Hessian(**parts), QuantConfig(group_size=16))
