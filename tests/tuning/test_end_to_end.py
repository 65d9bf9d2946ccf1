"""Training through a model of which one block is in memory, against autograd through the whole."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gptq.blockwise.model import BlockwiseModel, free
from gptq.blockwise.source import open_model
from gptq.config import QuantConfig
from gptq.nn import QuantLinear
from gptq.solver.layer import round_to_nearest
from gptq.tuning import end_to_end
from gptq.tuning.parameters import Parameters
from gptq.tuning.streams import TuneWindows, open_streams
from quant_cuda.reference import dequantize

CPU, FLOAT = torch.device("cpu"), torch.float32
TRAINING = torch.randint(2, 300, (6, 24), generator=torch.Generator().manual_seed(1))
HELD_OUT = torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr("gptq.tuning.streams.STEP_TOKENS", 48)
    monkeypatch.setattr(end_to_end, "LOGIT_TOKENS", 13)


def opened(folder):
    return BlockwiseModel.from_source(open_model(folder), CPU, FLOAT)


def rounded(model, config):
    """The packed tensors of all layers, rounded to nearest, by their names in the model."""
    tensors = {}
    for index in range(model.block_count):
        block = model.load_block(index)
        for name in model.spec.linears:
            layer = block.linear(name)
            bias = None if layer.bias is None else layer.bias.half()
            packed = QuantLinear.from_solution(round_to_nearest(layer.weight, None, config), bias)
            tensors |= {f"{block.name}.{name}.{k}": it for k, it in packed.state_dict().items()}
        free(block.module)
    return tensors


def streams_of(model):
    return open_streams(model, TuneWindows(TRAINING, HELD_OUT, FLOAT, torch.float16), None)


def whole_models(folder, tensors):
    """Hugging Face's full model, and the same with the dequantized weights."""
    full, quantized = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=FLOAT).eval() for _ in range(2)
    )
    for name, module in quantized.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.qweight" in tensors:
            module.weight.data = weight_of(tensors, name, module)
    return full, quantized


def weight_of(tensors, name, module):
    packed = QuantLinear(
        module.in_features,
        module.out_features,
        len(tensors[f"{name}.qweight"]) * 32 // module.in_features,
        -1,
        groups=len(tensors[f"{name}.scales"]),
    )
    parts = ("qweight", "qzeros", "scales", "g_idx")
    packed.load_state_dict({key: tensors[f"{name}.{key}"] for key in parts})
    return dequantize(packed.packed(), FLOAT).T.contiguous()


def divergence(full, quantized, windows):
    with torch.no_grad():
        wanted = full(windows).logits.log_softmax(-1)
    found = quantized(windows).logits.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


@pytest.mark.parametrize("fixture", ["llama_dir", "bloom_dir"])
def test_the_streams_are_the_full_models_own(fixture, request):
    folder = request.getfixturevalue(fixture)
    streams = streams_of(opened(folder))
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=FLOAT).eval()
    spec = open_model(folder).spec
    before, after = [], []
    full.get_submodule(spec.block(0)).register_forward_pre_hook(
        lambda _, inputs: before.append(inputs[0])
    )
    full.get_submodule(spec.norm).register_forward_pre_hook(
        lambda _, inputs: after.append(inputs[0])
    )
    with torch.no_grad():
        for windows in (TRAINING, HELD_OUT):
            full(windows)
    for expected, found in ((before, streams.start), (after, streams.full.hidden)):
        joined = torch.cat([hidden for (hidden,) in found])
        assert torch.allclose(joined, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert (streams.training, streams.held_out) == (range(3), range(3, 5))


@pytest.mark.parametrize("fixture", ["llama_dir", "bloom_dir"])
def test_gradients_are_those_of_the_whole_model(fixture, request):
    folder = request.getfixturevalue(fixture)
    model = opened(folder)
    tensors = rounded(model, QuantConfig(bits=3, group_size=64))
    full, quantized = whole_models(folder, tensors)
    streams = streams_of(model)
    number = 1
    windows = TRAINING[2:4]
    parameters = Parameters(model, tensors, torch.float16, (0.9, 0.95))
    with end_to_end.output_layers(model):
        passes = end_to_end._Passes(model, tensors, streams, parameters)
        passes.gradients(number)
    divergence(full, quantized, windows).backward()
    expected = {name: it.grad for name, it in quantized.named_parameters()}
    compared = 0
    for name, parameter in parameters._parameters.items():
        found = parameter.change.grad / parameter.size
        layer = name.removesuffix(".factors")
        if layer != name:
            # d loss / d factor is the sum of d loss / d weight * weight over a group's inputs.
            weight = quantized.get_submodule(layer).weight
            products = (expected[f"{layer}.weight"] * weight).T
            groups = tensors[f"{layer}.g_idx"].long()
            sums = torch.zeros(found.shape[0], found.shape[2]).index_add(0, groups, products)
            wanted = sums[:, None]
        else:
            wanted = expected[name]
        assert torch.allclose(
            found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.detach().abs().max())
        ), name
        compared += 1
    assert compared > 10


def test_the_best_step_is_kept_and_training_stops_when_the_loss_rises(llama_dir, monkeypatch):
    monkeypatch.setattr(end_to_end, "CHECK", 1)
    monkeypatch.setattr(end_to_end, "EPOCHS", 20)
    # So large that the model is soon spoilt.
    monkeypatch.setattr(end_to_end, "RATE", 0.3)
    model = opened(llama_dir)
    tensors = rounded(model, QuantConfig(bits=2, group_size=32))
    states = list(end_to_end.tune_model(model, tensors, streams_of(model)))
    assert states[-1].step < states[-1].steps
    assert states[-1].rises == end_to_end.PATIENCE
    assert states[-1].least == min(state.loss for state in states)
    best = next(state for state in states if state.loss == states[-1].least)
    assert all(torch.equal(it, best.best[name]) for name, it in states[-1].best.items())


def test_training_goes_on_while_the_loss_falls_again(llama_dir, monkeypatch):
    """The first steps may raise it, and so may one in between; what is written is the best."""
    monkeypatch.setattr(end_to_end, "CHECK", 1)
    model = opened(llama_dir)
    tensors = rounded(model, QuantConfig(bits=2, group_size=32))
    losses = iter([0.5, 0.8, 0.7, 0.6, 0.65, 0.4, 0.45, 0.46, 0.3, 0.2])
    monkeypatch.setattr(end_to_end._Passes, "held_out_loss", lambda _: next(losses))
    monkeypatch.setattr(end_to_end, "EPOCHS", 20)
    states = list(end_to_end.tune_model(model, tensors, streams_of(model)))
    assert [state.loss for state in states] == [0.5, 0.8, 0.7, 0.6, 0.65, 0.4, 0.45, 0.46]
    assert states[-1].least == 0.4
    assert all(torch.equal(it, states[5].best[name]) for name, it in states[-1].best.items())
    assert any(not torch.equal(it, states[0].best[name]) for name, it in states[5].best.items())


def test_the_loss_is_that_of_the_model_a_file_would_hold(llama_dir, monkeypatch):
    monkeypatch.setattr(end_to_end, "CHECK", 3)
    model = opened(llama_dir)
    tensors = rounded(model, QuantConfig(bits=2, group_size=32))
    first, *_, last = end_to_end.tune_model(model, tensors, streams_of(model))
    full, before = whole_models(llama_dir, tensors)
    _, after = whole_models(llama_dir, {**tensors, **last.best})
    for name, parameter in after.named_parameters():
        if name in last.best:
            parameter.data = last.best[name].float()
    with torch.no_grad():
        assert float(divergence(full, before, HELD_OUT)) == pytest.approx(first.loss, rel=1e-4)
        assert float(divergence(full, after, HELD_OUT)) == pytest.approx(last.least, rel=1e-4)
    assert last.least < first.loss
