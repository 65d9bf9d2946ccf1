"""What comes from outside: tensors that do not fit, torch's modes and transforms, copies."""

import copy
import dataclasses
import pickle

import pytest
import torch
from helpers.products import activations, packed
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import quant_cuda
from quant_cuda import backends
from quant_cuda.cpu import layout
from quant_cuda.cuda import operator

WEIGHT, MATRIX = packed(4, 96, 24, 32, g_idx=True)
PREPARED = quant_cuda.prepare(WEIGHT)
X = activations(3, 96)
TANGENT = activations(3, 96).flip(0)
BIAS = torch.linspace(-1, 1, 24)
W = torch.from_numpy(MATRIX).float()
BOTH = pytest.mark.parametrize("weight", [WEIGHT, PREPARED], ids=["packed", "prepared"])


@BOTH
@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize(
    ("bias", "error", "text"),
    [
        (torch.zeros(0), ValueError, r"\(0,\).*24 outputs"),
        (torch.zeros(23), ValueError, r"\(23,\).*24 outputs"),
        (torch.zeros(1, 24), ValueError, r"\(1, 24\).*24 outputs"),
        (torch.tensor(1.0), ValueError, r"\(\).*24 outputs"),
        (torch.zeros(24, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(24, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(24, device="meta"), ValueError, "bias is on meta"),
    ],
)
def test_a_bias_that_does_not_fit(weight, backend, bias, error, text):
    with pytest.raises(error, match=text):
        quant_cuda.matmul(X, weight, backend, bias=bias)


@pytest.mark.parametrize("group", [-1, 3, 2**31 - 1])
def test_a_group_that_is_not_there(group):
    g_idx = WEIGHT.g_idx.clone()
    g_idx[5] = group
    with pytest.raises(ValueError, match=r"g_idx must be in 0..2, not"):
        dataclasses.replace(WEIGHT, g_idx=g_idx)


def test_tensors_of_a_weight_that_do_not_fit():
    with pytest.raises(ValueError, match="group_size must be positive or -1, not 0"):
        dataclasses.replace(WEIGHT, g_idx=None, group_size=0)
    with pytest.raises(ValueError, match="scales must be"):
        dataclasses.replace(WEIGHT, scales=WEIGHT.scales[0])
    with pytest.raises(ValueError, match="scales is on meta, qweight on cpu"):
        dataclasses.replace(WEIGHT, scales=WEIGHT.scales.to("meta"))


@BOTH
@pytest.mark.parametrize("int8", [False, True])
def test_forward_mode(weight, int8):
    with forward_ad.dual_level():
        y = quant_cuda.matmul(forward_ad.make_dual(X, TANGENT), weight, bias=BIAS, int8=int8)
        value, tangent = forward_ad.unpack_dual(y)
        plain = forward_ad.unpack_dual(quant_cuda.matmul(X, weight, bias=BIAS, int8=int8))
    assert plain.tangent is None
    torch.testing.assert_close(value, plain.primal)
    torch.testing.assert_close(value, X @ W + BIAS, atol=0.5 if int8 else 1e-4, rtol=0)
    torch.testing.assert_close(tangent, TANGENT @ W, atol=1e-4, rtol=0)


@BOTH
def test_transforms_of_functions(weight):
    def product(x, bias=BIAS):
        return quant_cuda.matmul(x, weight, bias=bias)

    def close(y, expected):
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=0)

    close(torch.func.jvp(product, (X,), (TANGENT,))[1], TANGENT @ W)
    close(torch.func.vmap(product)(X), X @ W + BIAS)
    biases = torch.stack([BIAS, -BIAS])
    close(torch.func.vmap(lambda bias: product(X, bias))(biases), X @ W + biases[:, None])
    close(torch.func.grad(lambda x: product(x).sum())(X), W.sum(1).expand(3, -1))
    close(torch.func.vmap(lambda i: quant_cuda.rows(weight, i))(torch.arange(4)), W.T[:4])


@BOTH
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_holds_the_product(weight):
    traced = torch.jit.trace(lambda x: quant_cuda.matmul(x, weight, bias=BIAS), X)
    torch.testing.assert_close(traced(TANGENT), TANGENT @ W + BIAS, atol=1e-3, rtol=0)


def test_modes_do_not_reach_the_preparation():
    with torch.device("meta"):
        made = quant_cuda.prepare(WEIGHT)
        restored = quant_cuda.restore(made)
    assert torch.equal(quant_cuda.matmul(X, made), quant_cuda.matmul(X, PREPARED))
    assert torch.equal(restored.qweight, WEIGHT.qweight)
    graph = make_fx(lambda x: quant_cuda.matmul(x, WEIGHT))(X)
    torch.testing.assert_close(graph(TANGENT), TANGENT @ W, atol=1e-3, rtol=0)


def test_tensors_whose_memory_is_not_their_value():
    class Own(torch.Tensor):
        pass

    y = quant_cuda.matmul(X, PREPARED, bias=BIAS)
    own = quant_cuda.matmul(X.as_subclass(Own), PREPARED, bias=BIAS.as_subclass(Own))
    assert isinstance(own, Own)
    assert torch.equal(own.as_subclass(torch.Tensor), y)
    negated = torch._neg_view(-X), torch._neg_view(-BIAS)
    assert torch.equal(quant_cuda.matmul(negated[0], PREPARED, bias=negated[1]), y)
    assert torch.equal(quant_cuda.matmul(X, PREPARED, bias=negated[1]), y)
    zero = torch._efficientzerotensor((3, 96))
    assert torch.equal(quant_cuda.matmul(zero, PREPARED), torch.zeros(3, 24))


def test_a_weight_of_inference_mode_trains():
    """Also others of its shape, which share the plan of the tiles."""
    layout._natural_plan.cache_clear()
    with torch.inference_mode():
        made = quant_cuda.prepare(packed(4, 64, 24, 32)[0])
        quant_cuda.matmul(activations(2, 64), made)
    again = quant_cuda.restore(made)
    with torch.inference_mode():
        restored = quant_cuda.restore(made)
    for weight in (made, quant_cuda.prepare(again), restored):
        x = activations(2, 64).requires_grad_()
        quant_cuda.matmul(x, weight).sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))]
)
def test_copies_of_a_weight_in_use(duplicate):
    y = quant_cuda.matmul(X, PREPARED)
    assert PREPARED.chosen
    again = duplicate(PREPARED)
    assert not again.chosen
    assert torch.equal(quant_cuda.matmul(X, again), y)


def test_a_weight_on_a_cpu_asks_no_gpu(monkeypatch):
    """Asking for its compute capability makes a CUDA context."""

    def asked():
        raise AssertionError("the GPU was asked")

    monkeypatch.setattr(operator, "engines", asked)
    backends.forget()
    try:
        weight = quant_cuda.prepare(WEIGHT)
        for backend in (None, "torch", quant_cuda.backend_for(weight, X.dtype)):
            quant_cuda.matmul(X, weight, backend)
    finally:
        backends.forget()
