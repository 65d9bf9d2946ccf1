"""Hessian statistics against a plain float64 sum over tokens."""

import pytest
import torch

from gptq.solver import hessian as module
from gptq.solver.hessian import Hessian, Inputs, accumulate_hessian, add_upper, mirror_upper

GENERATOR = torch.Generator().manual_seed(3)


def batches(sizes, features, outputs=None, product=False):
    """Inputs of (batch, seq) each; outputs: the width of the residual stream, if any."""
    return [
        Inputs(
            torch.randn(*size, features, generator=GENERATOR),
            None if outputs is None else torch.randn(*size, outputs, generator=GENERATOR),
            torch.randn(*size, outputs, generator=GENERATOR) if product else None,
        )
        for size in sizes
    ]


def mean_product(left, right):
    """Mean over tokens of the outer product, in float64."""
    pairs = [
        (a.flatten(0, 1).double(), b.flatten(0, 1).double())
        for a, b in zip(left, right, strict=True)
    ]
    return sum(a.T @ b for a, b in pairs) / sum(len(a) for a, _ in pairs)


@pytest.mark.parametrize("features", [1, 33, 128, 129, 300, 700])
@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_means_of_products(features, held_out):
    sizes = [(2, 50), (2, 50), (1, 33)]
    inputs, full_precision = batches(sizes, features), batches(sizes, features)
    found = accumulate_hessian(iter(inputs), iter(full_precision), held_out)
    x = [batch.x for batch in inputs]
    missing = [full.x - batch.x for full, batch in zip(full_precision, inputs, strict=True)]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.H.double(), mean_product(x, x), **close)
    torch.testing.assert_close(found.cross.double(), mean_product(missing, x), **close)
    assert torch.equal(found.H, found.H.T)
    if not held_out:
        assert found.held_out is None
        return
    ends = [batch.flatten(0, 1)[-int(held_out * batch[..., 0].numel()) :, None] for batch in x]
    tokens = sum(batch[..., 0].numel() for batch in x)
    share = sum(map(len, ends)) / tokens
    torch.testing.assert_close(found.held_out.double(), mean_product(ends, ends) * share, **close)
    assert torch.equal(found.held_out, found.held_out.T)


@pytest.mark.parametrize("residual_feedback", [True, False])
def test_what_a_product_lacks(residual_feedback):
    sizes = [(2, 300), (1, 70)]
    inputs = batches(sizes, 40, 24)
    layer = torch.randn(24, 40, generator=GENERATOR)
    # Close to each other, as two runs of a model are.
    full_precision = []
    for batch in inputs:
        x, residual = (
            t + 0.01 * torch.randn(t.shape, generator=GENERATOR) for t in (batch.x, batch.residual)
        )
        full_precision.append(Inputs(x, residual, x @ layer.T))
    found = accumulate_hessian(iter(inputs), iter(full_precision), 0.25, residual_feedback)
    lacks = []
    for full, batch in zip(full_precision, inputs, strict=True):
        lacks.append((full.x.double() - batch.x.double()) @ layer.double().T)
        if residual_feedback:
            lacks[-1] += full.residual.double() - batch.residual.double()
    expected = mean_product(lacks, [batch.x for batch in inputs])
    torch.testing.assert_close(found.target_error(layer).double(), expected, rtol=0, atol=2e-5)
    assert float(expected.abs().max()) > 1e-3
    assert found.cross is None


def test_what_layers_that_read_hidden_states_lack():
    inputs, full_precision = batches([(1, 50)], 30), batches([(1, 50)], 30)
    layer = torch.randn(7, 30, generator=GENERATOR)
    lacks = (full_precision[0].x - inputs[0].x).double() @ layer.double().T
    found = accumulate_hessian(iter(inputs), iter(full_precision), 0.0).target_error(layer)
    expected = mean_product([lacks], [inputs[0].x])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_one_model_alone_has_no_missing_part():
    found = accumulate_hessian(iter(batches([(1, 8)], 5, 5)), None, 0.0)
    assert (found.cross, found.target, found.held_out) == (None, None, None)
    assert not found.has_target


def test_the_statistics_of_some_outputs():
    """Held-out statistics move, because they are as large as H and needed once."""
    H, held_out, target = torch.eye(4), torch.eye(4) / 4, torch.arange(12.0).view(3, 4)
    whole = Hessian(H, held_out=held_out, target=target)
    part = whole.take_outputs(slice(1, 3))
    assert part.H is whole.H is H
    assert part.held_out is held_out
    assert whole.held_out is None
    assert torch.equal(part.target, target[1:3])
    weight = torch.randn(3, 4, generator=GENERATOR)
    assert torch.equal(part.target_error(weight[1:3]), whole.target_error(weight)[1:3])
    cross = Hessian(H, cross=torch.randn(4, 4, generator=GENERATOR))
    assert cross.take_outputs(slice(1, 3)).cross is cross.cross


def test_nothing_in_nothing_out():
    assert accumulate_hessian(iter([]), None, 0.25) is None


def test_half_precision_is_summed_in_float32():
    x = torch.full((1, 4096, 3), 0.1, dtype=torch.bfloat16)
    found = accumulate_hessian(iter([Inputs(x, None)]), None, 0.0)
    assert found.H.dtype == torch.float32
    exact = x.double()[0].T @ x.double()[0] / 4096
    torch.testing.assert_close(found.H.double(), exact, rtol=1e-4, atol=0)


def test_upper_blocks_alone_are_computed():
    x = torch.randn(40, 700, dtype=torch.float64, generator=GENERATOR)
    total = torch.zeros(700, 700, dtype=torch.float64)
    add_upper(total, x)
    # A strip starts on the diagonal: what is left of it was not touched.
    assert float(total[-1, : 700 - module.WIDEST].abs().max()) == 0
    mirror_upper(total)
    torch.testing.assert_close(total, x.T @ x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.gpu
def test_on_a_gpu(dtype):
    def there(some):
        return [Inputs(batch.x.to("cuda", dtype), None) for batch in some]

    sizes = [(2, 500), (1, 33)]
    inputs, full_precision = there(batches(sizes, 600)), there(batches(sizes, 600))
    found = accumulate_hessian(iter(inputs), iter(full_precision), 0.25)
    x = [batch.x for batch in inputs]
    missing = [full.x - batch.x for full, batch in zip(full_precision, inputs, strict=True)]
    assert found.H.dtype == torch.float32
    torch.testing.assert_close(found.H.double(), mean_product(x, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cross.double(), mean_product(missing, x), rtol=1e-5, atol=1e-5)
