"""Matmul by the compiled CPU code: every instruction set, threads, forks and torch's own checks of
an operator. test_matmul.py has what holds for every backend."""

import multiprocessing
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.products import FIXED_POINT, activations, assert_as_good_as_naive, packed, same_bits

import quant_cuda
from quant_cuda.cpu import library
from quant_cuda.cpu import product as cpu
from quant_cuda.weight import PackedWeight

BITS = (2, 3, 4, 8)
# Those that were compiled; a test of one that this processor lacks is skipped by its name.
COMPILED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in library.instruction_sets(), reason=f"this processor has no {name}"
        ),
    )
    for name in library.compiled()
]
SHAPES = (
    (96, 32, 32),
    (96, 17, -1),
    (160, 5, 64),
    (64, 1, 128),
    (640, 40, -1),  # a group longer than a run
    (1120, 33, 608),
    (64, 70, 8),  # groups that fill part of a unit
    (96, 3, 20),
)


def rounded_to_int8(x: torch.Tensor, groups: np.ndarray) -> np.ndarray:
    """x (rows, in) in float64 after rounding: a scale per group, 512 inputs at most."""
    x, result = x.double().numpy(), np.zeros(x.shape)
    for group in np.unique(groups):
        (members,) = np.nonzero(groups == group)
        for start in range(0, len(members), 512):
            run = members[start : start + 512]
            scale = np.abs(x[:, run]).max(1, keepdims=True) / 127
            result[:, run] = np.rint(x[:, run] / np.maximum(scale, 1e-300)) * scale
    return result


@pytest.mark.parametrize("instruction_set", COMPILED)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("g_idx", [False, True])
def test_against_float64(instruction_set, bits, g_idx):
    for shape in SHAPES:
        weight, matrix = packed(bits, *shape, g_idx=g_idx)
        prepared = quant_cuda.prepare(weight)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows in (1, 3, 8, 21):
                x = activations(rows, shape[0], dtype=dtype)
                y = quant_cuda.matmul(x, prepared, instruction_set)
                assert_as_good_as_naive(y, x, matrix, instruction_set)


@pytest.mark.parametrize("instruction_set", COMPILED)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows(instruction_set, bits, dtype, monkeypatch):
    """More than are laid out at once; also as torch's dense product, of some outputs at a time."""
    monkeypatch.setattr(cpu, "DENSE_OUTPUTS", 32)
    for g_idx in (False, True):
        weight, matrix = packed(bits, 96, 72, g_idx=g_idx)
        x, bias = activations(4, 50, 96, dtype=dtype), torch.randn(72)
        for has_units in (False, True):
            monkeypatch.setattr(cpu, "_has_bfloat16", lambda has_units=has_units: has_units)
            y = quant_cuda.matmul(x, weight, instruction_set, bias=bias)
            exact = x.double().numpy() @ matrix + bias.double().numpy()
            rounded = exact if dtype == torch.float32 else torch.from_numpy(exact).to(dtype)
            eps = 2**-12 if dtype == torch.float32 else torch.finfo(dtype).eps
            assert y.dtype == dtype
            torch.testing.assert_close(
                y.double(), torch.as_tensor(rounded).double(), rtol=4 * eps, atol=40 * eps
            )


@pytest.mark.parametrize("backend", quant_cuda.available())
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("g_idx", [False, True])
def test_int8_activations(backend, bits, g_idx):
    for shape in SHAPES:
        weight, matrix = packed(bits, *shape, g_idx=g_idx)
        size = shape[0] if shape[2] == -1 else shape[2]
        groups = np.arange(shape[0]) // size if weight.g_idx is None else weight.g_idx.numpy()
        x = activations(5, shape[0]) * torch.linspace(0.01, 3, shape[0])
        expected = rounded_to_int8(x, groups) @ matrix
        y = quant_cuda.matmul(x, weight, backend, int8=True)
        error = np.abs(y.double().numpy() - expected).max()
        # Where x lies in the middle between two integers, either may be taken.
        step = np.abs(x.double().numpy()).max() / 127 * np.abs(matrix).max()
        exact = np.abs(y.double().numpy() - expected) < 1e-5 * np.abs(expected).max()
        assert exact.mean() > 0.95
        assert error <= 2 * step


def test_a_v1_zero_of_two_to_the_bits():
    for bits in BITS:
        weight = PackedWeight(
            qweight=torch.zeros(bits, 32, dtype=torch.int32),
            qzeros=torch.full((1, bits), -1, dtype=torch.int32),
            scales=torch.ones(1, 32),
            g_idx=None,
            bits=bits,
            group_size=32,
            in_features=32,
        )
        for name in quant_cuda.available():
            y = quant_cuda.matmul(torch.eye(32), weight, name)
            torch.testing.assert_close(y, torch.full((32, 32), -float(2**bits)))


@pytest.mark.parametrize("instruction_set", COMPILED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("int8", [False, True])
def test_what_is_not_finite_shows_in_its_row_alone(instruction_set, bad, int8):
    weight, _ = packed(4)
    x = activations(6, 96)
    expected = quant_cuda.matmul(x, weight, instruction_set, int8=int8)
    x[2, 40] = bad
    y = quant_cuda.matmul(x, weight, instruction_set, int8=int8)
    assert not y[2].isfinite().any()
    rest = torch.arange(6) != 2
    assert torch.equal(y[rest], expected[rest])


@pytest.mark.parametrize("instruction_set", COMPILED)
@pytest.mark.parametrize("factor", [0.0, 1e-38, 1e-20, 1e20])
def test_tiny_and_huge_activations(instruction_set, factor):
    weight, matrix = packed(4)
    x = activations(3, 96) * factor
    y = quant_cuda.matmul(x, weight, instruction_set).double().numpy()
    exact = x.double().numpy() @ matrix
    # What is smaller than 1e-30 throughout a group may be rounded to steps of 1e-37.
    step = 1e-4 if instruction_set in FIXED_POINT else 1e-6
    assert np.abs(y - exact).max() <= step * np.abs(exact).max() + 1e-35


@pytest.mark.parametrize("backend", quant_cuda.available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias(backend, dtype):
    weight, matrix = packed(4)
    x, bias = activations(5, 96, dtype=dtype), torch.randn(24)
    y = quant_cuda.matmul(x, weight, backend, bias=bias)
    expected = torch.from_numpy(x.double().numpy() @ matrix) + bias
    eps = 2**-15 if dtype == torch.float32 and backend in FIXED_POINT else torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=4 * eps, atol=40 * eps)


@pytest.mark.parametrize("rows", [1, 6, 100])
def test_any_number_of_threads_gives_the_same(rows):
    weight, _ = packed(4, 576, 200, 128)
    prepared = quant_cuda.prepare(weight)
    x = activations(rows, 576)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(quant_cuda.matmul(x, prepared))
            assert same_bits(quant_cuda.prepare(weight).tensors[0], prepared.tensors[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_many_threads_at_once():
    prepared = [quant_cuda.prepare(packed(bits, 576, 96, 128)[0]) for bits in BITS]
    xs = [activations(rows, 576) for rows in (1, 3, 16)]
    cases = [(x, weight) for x in xs for weight in prepared] * 20
    expected = [quant_cuda.matmul(*case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda case: quant_cuda.matmul(*case), cases))
    assert all(map(torch.equal, found, expected))


def _in_a_child(connection, x, prepared) -> None:
    connection.send(quant_cuda.matmul(x, prepared).numpy())
    connection.close()


def test_fork_after_use():
    prepared = quant_cuda.prepare(packed(4, 576, 400, 128)[0])
    x = activations(64, 576)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = quant_cuda.matmul(x, prepared)
        ours, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = multiprocessing.get_context("fork").Process(
                target=_in_a_child, args=(theirs, x, prepared), daemon=True
            )
            child.start()
        assert ours.poll(60), "the child hangs"
        assert np.array_equal(ours.recv(), expected.numpy())
        child.join()
    finally:
        torch.set_num_threads(before)


# The operator, as torch sees it ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(dtype, with_bias):
    data, plan = quant_cuda.prepare(packed(4, 160, 37, 64, g_idx=True)[0]).tensors
    x = activations(2, 3, 160, dtype=dtype).requires_grad_()
    bias = torch.randn(37, requires_grad=True) if with_bias else None
    torch.library.opcheck(
        torch.ops.quant_cuda.cpu_product.default, (x, data, plan, bias, 37, False, -1)
    )
    torch.library.opcheck(torch.ops.quant_cuda.cpu_dequantize.default, (data, plan, 160, 37))


def test_export():
    prepared = quant_cuda.prepare(packed(4)[0])

    class Product(torch.nn.Module):
        def forward(self, x):
            return quant_cuda.matmul(x, prepared) + 1

    x = activations(3, 96)
    program = torch.export.export(Product(), (x,))
    assert "quant_cuda.cpu_product" in program.graph_module.code
    assert torch.equal(program.module()(x), Product()(x))


@pytest.mark.parametrize("backend", [None, "torch"])
def test_compiled_whole(backend):
    prepared = packed(4)[0] if backend == "torch" else quant_cuda.prepare(packed(4)[0])

    def product(x):
        return quant_cuda.matmul(x * 2, prepared, backend).relu()

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (1, 5, 9):
        x = activations(rows, 96).requires_grad_()
        assert torch.equal(compiled(x), product(x))
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        (expected,) = torch.autograd.grad(product(x).sum(), x)
        torch.testing.assert_close(grad, expected)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    prepared = quant_cuda.prepare(packed(4)[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert quant_cuda.matmul(torch.empty(2, 3, 96), prepared).shape == (2, 3, 24)
