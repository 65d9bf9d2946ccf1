"""A block run in steps against Hugging Face's own forward of it."""

import pytest
import torch
from conftest import bloom_config, make_model

from gptq.blockwise.activations import embed, run_block
from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import open_model
from gptq.blockwise.steps import advance, advance_past, check_steps, finish
from gptq.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def post_norm_bloom(tmp_path):
    changes = {"apply_residual_connection_post_layernorm": True, "slow_but_exact": True}
    return make_model(tmp_path / "model", bloom_config(pretraining_tp=2, **changes))


def first_block(folder):
    """The first block, activations of one batch before it, and that batch with its arguments."""
    model = BlockwiseModel.from_source(open_model(folder), CPU, torch.float32)
    tokens = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    activations = embed(model, [tokens])
    block = model.load_block(0)
    ((_, (hidden,), arguments),) = activations.batches(block)
    return block, activations, hidden, arguments


def input_of(block, name, hidden, arguments):
    inputs = []
    layer = block.linear(name)
    handle = layer.register_forward_hook(lambda _m, args, _o: inputs.append(args[0]))
    run_block(block.module, hidden, arguments)
    handle.remove()
    return inputs[0]


@pytest.mark.parametrize("fixture", ["llama_dir", "bloom_dir", "post_norm_bloom"])
def test_steps_are_hugging_faces_own_forward(fixture, request):
    block, activations, hidden, arguments = first_block(request.getfixturevalue(fixture))
    check_steps(block, activations)
    for number, group in enumerate(block.spec.groups):
        (found,) = advance(activations, block, number)
        for name in group.layers:  # every layer of a group has the same input
            expected = input_of(block, name, hidden, arguments)
            torch.testing.assert_close(found.x, expected, rtol=0, atol=0)
        assert (found.residual is not None) == group.writes_residual
    finish(activations, block)
    expected = run_block(block.module, hidden, arguments)
    ((output,),) = activations.hidden
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("fixture", ["llama_dir", "bloom_dir", "post_norm_bloom"])
def test_past_output_layers_it_is_the_same_forward(fixture, request):
    block, activations, hidden, arguments = first_block(request.getfixturevalue(fixture))
    for number, group in enumerate(block.spec.groups):
        (found,) = advance_past(activations, block, number)
        name = group.layers[0]
        torch.testing.assert_close(found.x, input_of(block, name, hidden, arguments))
        if group.writes_residual:
            torch.testing.assert_close(found.product, found.x @ block.linear(name).weight.T)
    finish(activations, block)
    expected = run_block(block.module, hidden, arguments)
    ((output,),) = activations.hidden
    torch.testing.assert_close(output, expected)


def test_a_change_between_steps_reaches_the_rest(model_dir):
    block, activations, hidden, arguments = first_block(model_dir)
    for number, group in enumerate(block.spec.groups):
        assert len(list(advance(activations, block, number))) == 1
        for name in group.layers:
            block.linear(name).weight.mul_(0.9)
    finish(activations, block)
    expected = run_block(block.module, hidden, arguments)
    ((output,),) = activations.hidden
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_guard_lets_rounding_pass(model_dir, dtype):
    model = BlockwiseModel.from_source(open_model(model_dir), CPU, dtype)
    tokens = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    activations = embed(model, [tokens])
    check_steps(model.load_block(0), activations)


@pytest.mark.parametrize("part", ["norm", "scale"])
def test_a_block_that_the_spec_does_not_describe_is_refused(model_dir, part):
    """A norm behind the branch, or a scale of it, as other architectures have them."""
    block, activations, _, _ = first_block(model_dir)

    def forward(hidden, *args, **kwargs):
        output = run_block_of_class(hidden, *args, **kwargs)
        states = output[0] if isinstance(output, tuple) else output
        change = states - hidden
        change = (
            torch.nn.functional.layer_norm(change, change.shape[-1:])
            if part == "norm"
            else 0.5 * change
        )
        return hidden + change

    run_block_of_class = block.module.forward
    block.module.forward = forward
    with pytest.raises(UserError, match="does not fit this block"):
        check_steps(block, activations)
