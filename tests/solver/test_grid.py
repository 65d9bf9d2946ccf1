"""Scales, zeros and rounding: numbers worked by hand, and a row-by-row search."""

import numpy as np
import pytest
import torch
from helpers.oracles import search_group

from gptq.config import QuantConfig
from gptq.solver.grid import Grid, dequantize, find_grid, quantize
from gptq.solver.sweep import static_grids

BITS = (2, 3, 4, 8)
TENTH = 0.0999755859375  # 0.1 in float16


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def moment(n: int, rng: np.random.Generator, tokens: int | None = None) -> np.ndarray:
    """(n, n) second moment of correlated inputs."""
    x = rng.standard_normal((tokens or 3 * n, n)) @ (np.eye(n) + 0.4 * rng.standard_normal((n, n)))
    return x.T @ x / x.shape[0]


def weights(n: int, n_out: int, rng: np.random.Generator) -> np.ndarray:
    """(n, n_out): ordinary, heavy-tailed, one-signed, constant, zero and tiny columns in turn."""
    w = rng.standard_normal((n, n_out))
    w[:, 1::7] = w[:, 1::7] ** 3
    w[:, 2::7] = np.abs(w[:, 2::7])
    w[:, 3::7] = -np.abs(w[:, 3::7])
    w[:, 4::7] = 0.37
    w[:, 5::7] = 0.0
    w[:, 6::7] *= 1e-4
    return w


@pytest.mark.parametrize(
    ("values", "bits", "sym", "scale", "zero"),
    [
        # asym: (1.0 + 0.5) / 15 = 0.1; 0.5 / 0.09998 = 5.001
        ((-0.5, 1.0, 0.2), 4, False, TENTH, 5),
        # sym: 2 * 0.75 / 15 = 0.1
        ((-0.5, 0.75), 4, True, TENTH, 8),
        ((-0.75, 0.5), 4, True, TENTH, 8),
        # the range always holds 0, but a zero of 0 is not allowed: 14 steps above 1
        ((0.3, 1.4), 4, False, TENTH, 1),
        # -xmin is a third of a step: zero rounds to 0, so the same rule; xmax / 14
        ((-0.03, 1.4), 4, False, TENTH, 1),
        # -xmin is more than half a step ((1.4 + 0.1) / 15 = 0.1): an honest zero of 1
        ((-0.1, 1.4), 4, False, TENTH, 1),
        # all negative: the top of the range is 0
        ((-1.5, -0.2), 4, False, TENTH, 15),
        # nothing at all: as if the range were -1..1; 2/3 in float16 is 0.66650390625, 1.5004 -> 2
        ((0.0, 0.0), 2, False, 0.66650390625, 2),
        ((0.0, 0.0), 2, True, 0.66650390625, 2),
        ((-4.0, 3.0), 3, False, 1.0, 4),
        ((-1.0, 2.0), 2, False, 1.0, 1),
        ((-128.0, 127.0), 8, False, 1.0, 128),
        # -xmin / scale = 2.5 goes to the even 2: (0.5 * 2.5 + 0.5 * 4.5) / 7 = 0.5
        ((-1.25, 2.25), 3, False, 0.5, 2),
        # ... and 3.5 to the even 4
        ((-1.75, 1.75), 3, False, 0.5, 4),
        # float16 ends: 65504 is the largest scale, 2^-24 the smallest
        ((-1e9, 1e9), 4, True, 65504.0, 8),
        ((-1e9, 1e9), 4, False, 65504.0, 15),
        ((-1e-12, 1e-12), 4, True, 2.0**-24, 8),
        ((-1e-12, 1e-12), 4, False, 2.0**-24, 1),
    ],
)
def test_minmax_by_hand(values, bits, sym, scale, zero):
    grid = find_grid(column(*values), bits, sym, "minmax", None)
    assert grid.scale.tolist() == [scale]
    assert grid.zero.tolist() == [zero]


def test_rounding_is_half_to_even_and_clamps():
    grid = Grid(torch.ones(1, dtype=torch.float64), torch.full((1,), 8.0, dtype=torch.float64))
    w = column(-9.0, -8.4, -1.5, -0.5, 0.5, 1.5, 2.5, 2.6, 7.2, 7.5, 100.0)
    q = quantize(w, grid, 4)
    assert q.dtype == w.dtype
    assert q[:, 0].tolist() == [0, 0, 6, 8, 8, 10, 10, 11, 15, 15, 15]
    assert dequantize(q, grid)[:, 0].tolist() == [-8, -8, -2, 0, 0, 2, 2, 3, 7, 7, 7]


def test_each_output_has_its_own_grid():
    grid = Grid(torch.tensor([1.0, 0.5]), torch.tensor([2.0, 1.0]))
    q = quantize(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), grid, 2)
    assert q.tolist() == [[3, 3], [1, 0]]
    assert dequantize(q, grid).tolist() == [[1.0, 1.0], [-1.0, -0.5]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("size", [1, 9, 32])
def test_against_row_by_row_search(bits, sym, search, size):
    rng = np.random.default_rng(bits * 100 + size)
    w, H = weights(size, 21, rng), moment(size, rng)
    scale, zero = search_group(w, bits, sym, search, H)
    tensors = torch.from_numpy(w), torch.from_numpy(H)
    grid = find_grid(tensors[0], bits, sym, search, tensors[1])
    assert grid.scale.dtype == grid.zero.dtype == torch.float64
    np.testing.assert_array_equal(grid.zero.numpy(), zero)
    np.testing.assert_array_equal(grid.scale.numpy(), scale)
    np.testing.assert_array_equal(tensors[0].numpy(), w)
    np.testing.assert_array_equal(tensors[1].numpy(), H)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_grids_of_a_whole_weight_are_as_good_as_those_of_each_group(bits, sym, search, group_size):
    """In float32, in compiled code if it was built, against each group in float64."""
    size = 146  # 4 groups of 32 and one of 18, and one group that is more than a block
    rng = np.random.default_rng(bits)
    w, H = torch.from_numpy(weights(size, 21, rng)), torch.from_numpy(moment(size, rng))
    config = QuantConfig(bits=bits, group_size=group_size, sym=sym, scale_search=search)
    scales, zeros = static_grids(w.float(), H.float(), config)
    step = size if group_size == -1 else group_size
    assert scales.shape == zeros.shape == (-(-size // step), 21)
    for group, start in enumerate(range(0, size, step)):
        part, moments = w[start : start + step], H[start : start + step, start : start + step]

        def losses(grid: Grid, part=part, moments=moments) -> torch.Tensor:
            e = part - dequantize(quantize(part, grid, bits), grid)
            return (
                (e.T @ moments @ e).diagonal() if search == "hessian" else (e.abs() ** 2.4).sum(0)
            )

        found = losses(Grid(scales[group].double(), zeros[group].double()))
        best = losses(find_grid(part, bits, sym, search, moments))
        torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [False, True])
def test_search_lowers_its_own_error(bits, sym):
    rng = np.random.default_rng(bits)
    w, H = torch.from_numpy(weights(32, 42, rng)), torch.from_numpy(moment(32, rng))

    def errors(search: str) -> tuple[torch.Tensor, torch.Tensor]:
        grid = find_grid(w, bits, sym, search, H)
        e = w - dequantize(quantize(w, grid, bits), grid)
        return (e.T @ H @ e).diagonal(), (e.abs() ** 2.4).sum(0)

    by_hessian, by_norm, plain = errors("hessian"), errors("mse"), errors("minmax")
    assert by_hessian[0].sum() < by_norm[0].sum()
    assert by_norm[1].sum() < by_hessian[1].sum()
    if bits < 8:  # the factors skip 1 itself, and at 8 bits there is next to nothing to gain
        assert by_hessian[0].sum() < plain[0].sum()
        assert by_norm[1].sum() < plain[1].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
def test_stored_types_and_ranges(dtype, bits, sym, search):
    rng = np.random.default_rng(3)
    w = torch.from_numpy(weights(24, 70, rng)).to(dtype)
    w[:, 0] *= 1e7
    w[:, 1] *= 1e-9
    grid = find_grid(w, bits, sym, search, torch.from_numpy(moment(24, rng)).to(dtype))
    maxq = 2**bits - 1
    assert grid.scale.shape == grid.zero.shape == (70,)
    assert grid.scale.dtype == grid.zero.dtype == dtype
    assert torch.equal(grid.scale.half().to(dtype), grid.scale)
    assert grid.scale.isfinite().all()
    assert (grid.scale.abs() if sym else grid.scale).gt(0).all()
    assert torch.equal(grid.zero, grid.zero.round())
    assert (grid.zero >= 1).all()
    assert (grid.zero <= maxq).all()
    q = quantize(w, grid, bits)
    assert q.dtype == dtype
    assert torch.equal(q, q.round())
    assert (q >= 0).all()
    assert (q <= maxq).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [False, True])
def test_minmax_error_is_half_a_step(bits, sym):
    w = torch.from_numpy(weights(64, 140, np.random.default_rng(9)))
    grid = find_grid(w, bits, sym, "minmax", None)
    maxq = 2**bits - 1
    e = (w - dequantize(quantize(w, grid, bits), grid)).abs()
    # Rounding the scale to float16 moves the far end by up to maxq * 2^-11 steps; a subnormal
    # scale (column 6: about 1e-5 at 8 bit) by more.
    slack = maxq * torch.maximum(torch.tensor(2.0**-11), 2.0**-25 / grid.scale)
    assert (e <= grid.scale * (0.5 + slack)).all()


def test_quantizing_grid_points_changes_nothing():
    grid = Grid(torch.tensor([0.125, 3.0]), torch.tensor([5.0, 15.0]))
    q = torch.arange(16.0)[:, None].expand(16, 2)
    assert torch.equal(quantize(dequantize(q, grid), grid, 4), q)


@pytest.mark.parametrize("search", ["mse", "hessian"])
def test_a_symmetric_grid_has_its_extra_level_where_the_weights_are(search):
    """-1 .. 7/8 and its mirror image are both on the grid: of one of them by a negative scale."""
    w = torch.arange(-8, 8, dtype=torch.float64)[:, None] / 8
    H = torch.eye(16, dtype=torch.float64)
    for sign in (1, -1):
        grid = find_grid(sign * w, 4, True, search, H)
        assert grid.scale.item() == pytest.approx(sign * 0.125, rel=0.01)
        error = dequantize(quantize(sign * w, grid, 4), grid) - sign * w
        assert error.abs().max() < 0.01
