"""A block run in stages against Hugging Face's own forward of it."""

import pytest
import torch
from conftest import bloom_config, make_model

from gptq.blockwise import empty_model
from gptq.blockwise.source import open_model
from gptq.blockwise.steps import advance, advance_past, finish

CPU = torch.device("cpu")


@pytest.fixture
def post_norm_bloom(tmp_path):
    changes = {"apply_residual_connection_post_layernorm": True, "slow_but_exact": True}
    return make_model(tmp_path / "model", bloom_config(pretraining_tp=2, **changes))


def first_block(folder):
    """The first block filled, its spec, and a stream of one batch with its parts."""
    source = open_model(folder)
    spec = source.spec
    model = empty_model.build(source.config, spec, CPU)
    tokens = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    stream = empty_model.embed(model, spec, source.tensors, [tokens], CPU, torch.float32)
    block = empty_model.fill(model, spec, spec.block(0), source.tensors, CPU, torch.float32)
    return block, spec, stream, stream.hidden.get(0)[0], stream.arguments[3]


def reads(spec):
    return {name for branch in spec.branches for name in branch.inputs}


def seen_by(block, name, hidden, arguments):
    seen = []
    layer = block.get_submodule(name)
    handle = layer.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    empty_model.run_block(block, hidden, arguments)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("fixture", ["llama_dir", "bloom_dir", "post_norm_bloom"])
def test_stages_are_hugging_faces_own_forward(fixture, request):
    block, spec, stream, hidden, arguments = first_block(request.getfixturevalue(fixture))
    for number, group in enumerate(spec.groups):
        (found,) = advance(stream, block, spec, number)
        for name in group:  # every layer of a group sees what its first one does
            expected = seen_by(block, name, hidden, arguments)
            torch.testing.assert_close(found.x, expected, rtol=0, atol=0)
        assert (found.residual is None) == (group[0] in reads(spec))
    finish(stream, block, spec)
    expected = empty_model.run_block(block, hidden, arguments)
    ((output,),) = stream.hidden
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("fixture", ["llama_dir", "bloom_dir", "post_norm_bloom"])
def test_past_output_layers_it_is_the_same_forward(fixture, request):
    block, spec, stream, hidden, arguments = first_block(request.getfixturevalue(fixture))
    for number, group in enumerate(spec.groups):
        (found,) = advance_past(stream, block, spec, number)
        torch.testing.assert_close(found.x, seen_by(block, group[0], hidden, arguments))
        if number % 2:
            weight = empty_model.linear(block, group[0]).weight
            torch.testing.assert_close(found.product, found.x @ weight.T)
    finish(stream, block, spec)
    expected = empty_model.run_block(block, hidden, arguments)
    ((output,),) = stream.hidden
    torch.testing.assert_close(output, expected)


def test_a_change_between_stages_reaches_the_rest(model_dir):
    block, spec, stream, hidden, arguments = first_block(model_dir)
    for number, group in enumerate(spec.groups):
        assert len(list(advance(stream, block, spec, number))) == 1
        for name in group:
            empty_model.linear(block, name).weight.mul_(0.9)
    finish(stream, block, spec)
    expected = empty_model.run_block(block, hidden, arguments)
    ((output,),) = stream.hidden
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
