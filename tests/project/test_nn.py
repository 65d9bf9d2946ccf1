"""QuantLinear: the checkpoint's layout in, the same layout out, one forward."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.solving import solve

import quant_cuda
from gptq.config import QuantConfig
from gptq.nn import HalfHead, QuantEmbedding, QuantLinear
from quant_cuda.packing import pack_zeros, unpack_zeros
from quant_cuda.weight import natural_groups

BITS = (2, 3, 4, 8)


def solved(bits, order="natural", n_in=96, n_out=64, group_size=64):
    generator = torch.Generator().manual_seed(bits)
    W = torch.randn(n_out, n_in, generator=generator)
    x = torch.randn(300, n_in, generator=generator) * torch.linspace(0.2, 2, n_in)
    config = QuantConfig(bits=bits, group_size=group_size, order=order, scale_search="minmax")
    return solve(W, x.T @ x / 300, config)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ["natural", "act", "gar"])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_solution_times_x(bits, order, bias):
    solution = solved(bits, order)
    offset = torch.randn(64) if bias else None
    layer = QuantLinear.from_solution(solution, offset)
    x = torch.randn(2, 5, 96)
    expected = torch.nn.functional.linear(x, solution.dequantize(), offset)
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_groups_of_consecutive_inputs_need_no_g_idx_in_the_kernel():
    assert QuantLinear.from_solution(solved(4, "gar"), None).packed().g_idx is None
    assert QuantLinear.from_solution(solved(4, "act"), None).packed().g_idx is not None


def test_natural_groups():
    assert natural_groups(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert natural_groups(3, -1).tolist() == natural_groups(3, 8).tolist() == [0, 0, 0]
    assert natural_groups(3, 1, "cpu").dtype == torch.int64


@pytest.mark.parametrize("bits", BITS)
def test_state_dict_is_the_files_layout(bits):
    layer = QuantLinear.from_solution(solved(bits), torch.ones(64))
    state = layer.state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "qweight": (torch.int32, (3 * bits, 64)),
        "qzeros": (torch.int32, (2, 2 * bits)),
        "scales": (torch.float16, (2, 64)),
        "g_idx": (torch.int32, (96,)),
        "bias": (torch.float32, (64,)),
    }
    layer(torch.randn(1, 96))  # whatever a forward prepares, the layout stays
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_loading_into_a_layer_that_has_run():
    first, second = (
        QuantLinear.from_solution(solved(4, order), None) for order in ("natural", "act")
    )
    x = torch.randn(3, 96)
    first(x)
    first.load_state_dict(second.state_dict())
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)


def test_copies_and_moves():
    layer = QuantLinear.from_solution(solved(4, "act"), None)
    x = torch.randn(3, 96)
    expected = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(layer.to("cpu")(x), expected, rtol=0, atol=0)
    assert layer.half().qweight.dtype == torch.int32


def test_gradients_reach_the_input():
    layer = QuantLinear.from_solution(solved(4), None)
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, solved(4).dequantize().sum(0).expand(3, 96))


def bytes_of(state):
    return {name: (t.dtype, tuple(t.shape), t.numpy().tobytes()) for name, t in state.items()}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ["natural", "act"])
def test_prepared_layers_give_back_every_byte(bits, order, tmp_path):
    layer = QuantLinear.from_solution(solved(bits, order), torch.randn(64))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 96)
    with torch.no_grad():
        expected = layer(x)
        assert not any(name in dict(layer.named_buffers()) for name in ("qweight", "scales"))
        assert list(layer.state_dict()) == list(state)
        assert bytes_of(layer.state_dict()) == bytes_of(state)
        torch.save(layer.state_dict(), tmp_path / "layer.pt")
        assert bytes_of(torch.load(tmp_path / "layer.pt", weights_only=True)) == bytes_of(state)
        copied = copy.deepcopy(layer)
        assert bytes_of(copied.state_dict()) == bytes_of(state)
        assert torch.equal(copied(x), expected)
        assert torch.equal(layer.qweight, state["qweight"])  # asked for, it is there again
        assert torch.equal(layer(x), expected)
        moved = layer.to("meta")
        assert moved.qweight.device.type == moved.scales.device.type == "meta"
        assert moved.qweight.shape == state["qweight"].shape


def test_a_new_weight_replaces_a_prepared_one():
    first, second = (
        QuantLinear.from_solution(solved(4, order), None) for order in ("natural", "act")
    )
    x = torch.randn(3, 96)
    with torch.no_grad():
        first(x)
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            setattr(first, name, getattr(second, name))
        assert torch.equal(first(x), second(x))


def test_a_named_backend_and_int8_activations():
    layer = QuantLinear.from_solution(solved(4), None)
    x = torch.randn(3, 96)
    exact = layer(x)
    for name in quant_cuda.available():
        layer.backend = name
        torch.testing.assert_close(layer(x), exact, rtol=1e-3, atol=1e-3)
    layer.backend, layer.int8_activations = None, True
    rounded = layer(x)
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_threads_share_a_layer_while_it_is_prepared_and_restored():
    solution = solved(4)
    x = torch.randn(1, 96)
    expected = QuantLinear.from_solution(solution)(x)
    failures = []

    def use(action):
        try:
            action()
        except Exception as error:
            failures.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            layer = QuantLinear.from_solution(solution)
            actions = (lambda: layer(x), lambda: layer.qweight.sum(), layer.state_dict, layer.half)  # noqa: B023
            threads = [threading.Thread(target=use, args=(action,)) for action in actions * 2]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert torch.equal(layer(x), expected)
    finally:
        sys.setswitchinterval(before)
    assert not failures


def in_v2(layer):
    """The same weight, its zero points stored as they are."""
    weight = layer.packed()
    zeros = unpack_zeros(weight.qzeros, layer.bits, layer.out_features, 1)
    groups = weight.groups
    twin = QuantLinear(
        layer.in_features,
        layer.out_features,
        layer.bits,
        groups=groups,
        group_size=layer.group_size,
        zero_offset=0,
    )
    twin.load_state_dict({**layer.state_dict(), "qzeros": pack_zeros(zeros, layer.bits, 0)})
    return twin


@pytest.mark.parametrize("prepared", [True, False])
def test_a_state_dict_keeps_the_zero_points_format(prepared, tmp_path):
    v1 = QuantLinear.from_solution(solved(4), None)
    v2 = in_v2(v1)
    x = torch.randn(3, 96)
    expected = v1(x)
    torch.testing.assert_close(v2(x), expected, rtol=0, atol=0)
    for source in (v1, v2):
        torch.save(source.state_dict(), tmp_path / "layer.pt")
        for state in (source.state_dict(), torch.load(tmp_path / "layer.pt", weights_only=True)):
            for offset in (0, 1):
                fresh = QuantLinear(96, 64, 4, 64, zero_offset=offset)
                if prepared:
                    fresh(x)
                fresh.load_state_dict(state)
                assert fresh.zero_offset == source.zero_offset
                assert torch.equal(fresh(x), expected)


def test_loading_rounds_neither_scales_nor_bias():
    layer = QuantLinear.from_solution(solved(4), torch.randn(64))
    layer.scales = layer.scales.float() + 1e-6
    fresh = QuantLinear(96, 64, 4, 64, bias=True)
    fresh.load_state_dict(layer.state_dict())
    assert bytes_of(fresh.state_dict()) == bytes_of(layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("prepared", [True, False])
def test_scales_keep_their_dtype(dtype, prepared):
    layer = QuantLinear.from_solution(solved(4, "act"), torch.randn(64))
    state = layer.state_dict()
    if prepared:
        layer.prepare()
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    layer.float()
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        assert layer.state_dict()[name].dtype == state[name].dtype
        assert torch.equal(layer.state_dict()[name], state[name])


def test_threads_prepare_and_read_one_layer():
    layer = QuantLinear.from_solution(solved(4), None)
    x = torch.randn(1, 96)
    expected, state = layer(x), bytes_of(layer.state_dict())

    def use(turn):
        kind = turn % 4
        if kind == 0:
            return layer.qweight.shape == (12, 64)
        if kind == 1:
            return bytes_of(layer.state_dict()) == state
        if kind == 2:
            return torch.equal(copy.deepcopy(layer)(x), expected)
        return torch.equal(layer(x), expected)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(use, range(200)))
    finally:
        sys.setswitchinterval(interval)
    assert bytes_of(layer.state_dict()) == state


@pytest.mark.filterwarnings("ignore:slow")
def test_pickled_after_matmuls_of_all_dtypes():
    layer = QuantLinear.from_solution(solved(4), None)
    results = [layer(torch.ones(1, 96, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    twin = pickle.loads(pickle.dumps(layer))
    for result in results:
        assert torch.equal(twin(torch.ones(1, 96, dtype=result.dtype)), result)


def test_a_layer_that_ran_in_inference_mode_can_be_trained_through():
    layer = QuantLinear.from_solution(solved(4), None)
    with torch.inference_mode():
        layer(torch.randn(3, 96))
        assert not layer.packed().qweight.is_inference()
    test_input = torch.randn(3, 96, requires_grad=True)
    layer(test_input).sum().backward()
    assert test_input.grad is not None


def test_an_embedding_refuses_tokens_that_it_has_not():
    embedding = QuantEmbedding(96, 64, 4, 64)
    assert embedding(torch.tensor([[0, 95]])).shape == (1, 2, 64)
    assert embedding(torch.empty(0, dtype=torch.long)).shape == (0, 64)
    for token in (-1, -96, 96):
        with pytest.raises(IndexError, match=r"0\.\.95"):
            embedding(torch.tensor([[3, token]]))


@pytest.mark.parametrize("asked", ["module", "parameter"])
def test_a_head_is_trained_in_float32(asked):
    head = HalfHead(64, 96, bias=False, dtype=torch.float16).requires_grad_(False)
    before = head.weight
    optimizer = torch.optim.AdamW([head.weight], lr=1e-3)
    (head if asked == "module" else head.weight).requires_grad_(True)
    for _ in range(3):
        optimizer.zero_grad()
        head(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
    assert head.weight is before
    assert head.weight.dtype == torch.float32
    assert bool(head.weight.isfinite().all())
