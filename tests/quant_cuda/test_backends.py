"""Which backend is chosen."""

import warnings

import numpy as np
import pytest
import torch
from helpers.products import activations, assert_as_good_as_naive, packed

import quant_cuda
from quant_cuda import backends, reference
from quant_cuda.cpu import library


def test_the_best_comes_first_and_torch_last():
    assert quant_cuda.available() == (*library.instruction_sets(), "torch")
    weight, _ = packed(4)
    assert quant_cuda.backend_for(weight, torch.float32) == library.instruction_sets()[0]


@pytest.mark.parametrize("backend", library.instruction_sets())
def test_a_named_backend_that_cannot(backend):
    weight, _ = packed(4)
    with pytest.raises(ValueError, match=rf"^[^\n]*{backend}[^\n]*float64[^\n]*$"):
        quant_cuda.matmul(torch.ones(2, 96, dtype=torch.float64), weight, backend)


def test_falling_back_is_said_once():
    weight, matrix = packed(4)
    x = activations(2, 96, dtype=torch.float64)
    backends.forget()
    with pytest.warns(UserWarning, match=r"^[^\n]*slow[^\n]*torch[^\n]*float64[^\n]*$"):
        y = quant_cuda.matmul(x, weight)
    np.testing.assert_allclose(y.numpy(), x.numpy() @ matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quant_cuda.matmul(x, quant_cuda.prepare(weight))


def test_without_the_compiled_code(monkeypatch):
    weight, matrix = packed(4)
    x = activations(2, 96)
    monkeypatch.setattr(library, "compiled", lambda: ())
    backends.forget()
    try:
        with pytest.warns(UserWarning, match="not built"):
            y = quant_cuda.matmul(x, weight)
        assert quant_cuda.available() == ("torch",)
        assert quant_cuda.prepare(weight) is weight
    finally:
        backends.forget()
    assert_as_good_as_naive(y, x, matrix)


def test_a_prepared_weight_by_another_backend():
    weight, _ = packed(4)
    x = activations(2, 96)
    y = quant_cuda.matmul(x, quant_cuda.prepare(weight), "torch")
    assert torch.equal(y, reference.matmul(x, weight))
